"""Messages to token ids, in the form that each model family was trained on.

A prompt is built from parts: an int is a control token, a str is text, and text is encoded as
plain text, so nothing that a message says can become a control token. Texts that touch are
joined first, so that they are cut into tokens exactly as in the whole published string. A model
of a family not known here uses its own Jinja template; never another family's in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

from llama import sandbox
from llama.errors import LlamaError
from llama.tokenizer import Tokenizer, split_at

ROLES = ("system", "user", "assistant")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAMA31_DATE = "26 Jul 2024"  # what the published templates say where no date is given

Part = int | str  # a control token's id, or text


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Style:
    """What a family leaves open and a model settles."""

    default_system: str | None = None  # said where the dialog has no system message
    dated: bool = False  # Llama 3.1 and later: a block with the date opens the system message
    date: str = LLAMA31_DATE
    as_meta: bool = False  # Code Llama 70B: in Meta's pieces, not as the published Jinja text


Build = Callable[[Tokenizer, list[Message], bool, Style], list[Part]]


def llama2(tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style) -> list[Part]:
    """<s>[INST] <<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\nUSER [/INST] ASSISTANT </s><s>[INST] ... (Meta's
    llama/generation.py). [INST] is plain text here, so, as Meta does, a message that holds such a
    mark is refused."""
    bos, eos = _begin(tokenizer), _end(tokenizer)
    for message in messages:
        if message.role != "assistant":
            _refuse_marks(message, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"))
    head = ""
    if messages[0].role == "system":
        head = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n"
        messages = messages[1:]
    parts: list[Part] = []
    _take_turns(messages)
    for message in messages:
        if message.role == "user":
            parts += [bos, f"[INST] {(head + message.content).strip()} [/INST]"]
            head = ""
        else:
            parts += [f" {message.content.strip()} ", eos]
    return parts


def llama3(tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style) -> list[Part]:
    """<|begin_of_text|>, then for each message a header with its role, two newlines, the text
    and <|eot_id|> (Meta's llama3/tokenizer.py, ChatFormat)."""
    start, end = map(tokenizer.control_id, ("<|start_header_id|>", "<|end_header_id|>"))
    turn_end = tokenizer.control_id("<|eot_id|>")
    parts: list[Part] = [tokenizer.control_id("<|begin_of_text|>")]
    if style.dated:
        block = f"Cutting Knowledge Date: December 2023\nToday Date: {style.date}\n\n"
        if messages[0].role != "system":
            messages = [Message("system", ""), *messages]
        parts += [start, "system", end, f"\n\n{block}{messages[0].content.strip()}", turn_end]
        messages = messages[1:]
    for message in messages:
        parts += [start, message.role, end, f"\n\n{message.content.strip()}", turn_end]
    if reply:
        parts += [start, "assistant", end, "\n\n"]
    return parts


def chatml(tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style) -> list[Part]:
    """<|im_start|>ROLE\\nTEXT<|im_end|>\\n for each message."""
    start, end = map(tokenizer.control_id, ("<|im_start|>", "<|im_end|>"))
    if style.default_system is not None and messages[0].role != "system":
        messages = [Message("system", style.default_system), *messages]
    parts: list[Part] = []
    for message in messages:
        parts += [start, f"{message.role}\n{message.content}", end, "\n"]
    if reply:
        parts += [start, "assistant\n"]
    return parts


def zephyr(tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style) -> list[Part]:
    """<|ROLE|>\\nTEXT</s>\\n for each message. The marks are plain text in most vocabularies, so
    a message that holds one is refused."""
    end = _end(tokenizer)
    marks = {role: f"<|{role}|>" for role in ROLES}
    parts: list[Part] = []
    for message in messages:
        if message.role != "assistant":
            _refuse_marks(message, [m for m in marks.values() if m not in tokenizer.control])
        mark = marks[message.role]
        parts += [tokenizer.control.get(mark, mark), f"\n{message.content}", end, "\n"]
    if reply:
        parts += [tokenizer.control.get(marks["assistant"], marks["assistant"]), "\n"]
    return parts


def vicuna(tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style) -> list[Part]:
    """<s>SYSTEM USER: TEXT ASSISTANT: TEXT</s>USER: TEXT ASSISTANT: (Vicuna 1.1 and later:
    FastChat's conversation.py). The marks are plain text, so a message that holds one is
    refused."""
    end = _end(tokenizer)
    for message in messages:
        if message.role != "assistant":
            _refuse_marks(message, ("USER:", "ASSISTANT:"))
    if style.default_system is not None and messages[0].role != "system":
        messages = [Message("system", style.default_system), *messages]
    parts: list[Part] = [_begin(tokenizer)]
    if messages[0].role == "system":
        parts += [f"{messages[0].content} "]
        messages = messages[1:]
    _take_turns(messages)
    for message in messages:
        if message.role == "user":
            parts += [f"USER: {message.content} "]
        else:
            parts += [f"ASSISTANT: {message.content}", end]
    return [*parts, "ASSISTANT:"] if reply else parts


def codellama70b(
    tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style
) -> list[Part]:
    """<s>Source: ROLE\n\n TEXT <step> Source: ROLE\n\n TEXT <step> Source: assistant\n
    Destination: user\n\n (the published Jinja text), where <step> is a control token. Meta's
    codellama/llama/generation.py encodes header and body one by one, with a space before every
    header and none before <step>; its checkpoints get that."""
    step = tokenizer.control_id("<step>")
    parts: list[Part] = [_begin(tokenizer)]
    _take_turns(messages[1:] if messages[0].role == "system" else messages)
    for number, message in enumerate(messages):
        text = message.content.strip()
        if style.as_meta:
            parts += tokenizer.encode(f" Source: {message.role}")
            parts += tokenizer.encode(f"\n\n {text}") if message.content else []
        else:
            parts += [f"{' ' if number else ''}Source: {message.role}\n\n {text} "]
        parts += [step]
    header, space = " Source: assistant\nDestination: user", "\n\n "
    if reply and style.as_meta:
        parts += [*tokenizer.encode(header), *tokenizer.encode(space)]
    elif reply:
        parts += [header + space]
    return parts


FAMILIES: dict[str, tuple[Build, tuple[str, ...]]] = {  # and what ends a turn, beside the eos ids
    "llama2": (llama2, ()),
    "llama3": (llama3, ("<|eot_id|>", "<|eom_id|>")),
    "chatml": (chatml, ("<|im_end|>",)),
    "zephyr": (zephyr, ()),
    "vicuna": (vicuna, ()),
    "codellama70b": (codellama70b, ("<step>",)),
}


# Dialogs that show whether a file's own template is its family's: roles, turns, outer spaces.
PROBES = [
    [Message("user", " a b ")],
    [Message("system", " s "), Message("user", "a")],
    [Message("user", "a"), Message("assistant", " b "), Message("user", "c")],
]


class ChatTemplate:
    """One model's way to write a dialog. FAMILY overrides what the file says; else a file's own
    template is used wherever it writes otherwise than the family it is said to be of. DATE is
    what Llama 3.1 and later are told the day is: "26 Jul 2024"; None is as their template has
    it, some a fixed day and some today."""

    def __init__(
        self, tokenizer: Tokenizer, meta: Mapping[str, Any], family: str | None = None,
        date: str | None = None,
    ) -> None:  # fmt: skip
        source = str(meta.get("template.jinja", ""))
        named = family or meta.get("template.family")
        if named is None and not source:
            raise LlamaError(
                "this is a base model: its file names no chat template; complete text with "
                f"run.py, or choose one with --template ({', '.join(FAMILIES)})"
            )
        if named not in FAMILIES and (family is not None or not source):
            raise LlamaError(f"chat template must be {', '.join(FAMILIES)}, found {named!r}")
        self.family = str(named) if named in FAMILIES else "jinja"
        _check_date(date, self.family, source)
        self._tokenizer = tokenizer
        self.style = _style(self.family, source, str(meta.get("general.name", "")), date)
        if self.family != "jinja" and family is None and source and not self._agrees(source, date):
            self.family = "jinja"
        ends: Sequence[str]
        if self.family == "jinja":
            self._build: Build = JinjaTemplate(source, date)
            ends = [piece for piece in tokenizer.control
                    if piece in source and re.search("end|eot|eos|eom", piece)
                    and not re.search("header|begin|start", piece)]  # fmt: skip
        else:
            self._build, ends = FAMILIES[self.family]
        self.stop_ids = frozenset(
            [*tokenizer.eos_ids, *(tokenizer.control[p] for p in ends if p in tokenizer.control)]
        )

    def _agrees(self, source: str, date: str | None) -> bool:
        """Whether the file's own template writes every probe as the family's function does."""
        if find_spec("jinja2") is None:
            return True  # the family's name must do
        own, (build, _) = JinjaTemplate(source, date), FAMILIES[self.family]

        def written(how: Build, messages: list[Message]) -> list[Part]:
            return joined(how(self._tokenizer, messages, True, self.style))

        try:
            return all(written(own, probe) == written(build, probe) for probe in PROBES)
        except LlamaError:
            return False

    def encode(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> list[int]:
        """The dialog's token ids; with REPLY they end where the assistant's answer begins."""
        dialog = check_messages(messages)
        if reply and dialog[-1].role != "user":
            raise LlamaError(
                f"messages: the last one must be the user's, found {dialog[-1].role}'s"
            )
        ids: list[int] = []
        for part in joined(self._build(self._tokenizer, dialog, reply, self.style)):
            if isinstance(part, str):
                continues = bool(ids) and self._tokenizer.spaces_first
                ids += self._tokenizer.encode(part, continues=continues)
            else:
                ids.append(part)
        return ids

    def text(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
        """The dialog as one string, its control tokens by name, for those who encode it
        themselves: what a message says may then become a control token."""
        parts = self._build(self._tokenizer, check_messages(messages), reply, self.style)
        return "".join(p if isinstance(p, str) else self._tokenizer.piece(p) for p in parts)

    def question_starts(
        self, messages: Sequence[Mapping[str, str]], ids: Sequence[int]
    ) -> list[int]:
        """Where each of the user's texts begins in IDS, the MESSAGES' tokens: the place up to which
        any two texts there have the same tokens."""
        starts = []
        for number, message in enumerate(messages):
            if message["role"] == "user":
                a, b = (self.encode([*messages[:number], {"role": "user", "content": text}])
                        for text in "ab")  # fmt: skip
                same = takewhile(lambda x: x[0] == x[1] == x[2], zip(ids, a, b, strict=False))
                starts.append(len(list(same)))
        return starts


class JinjaTemplate:
    """A model's own template, rendered in jinja2's sandbox as transformers does, by sandbox.py.

    Where a message holds a control token's text, one character of it is swapped for a private
    one while the template runs, and back when the result has been cut at its control tokens.
    Marks around each message then show that no token was put together from two messages.
    """

    def __init__(self, source: str, date: str | None = None) -> None:
        if find_spec("jinja2") is None:
            raise LlamaError("this model brings its own chat template: pip install jinja2")
        self._source, self._date = source, date
        self._given = {"date_string": date} if date is not None else {}
        try:
            sandbox.check(source)
        except sandbox.Refused as error:
            raise LlamaError(f"the model's chat template cannot be read: {error}") from None

    def __call__(
        self, tokenizer: Tokenizer, messages: list[Message], reply: bool, style: Style
    ) -> list[Part]:
        controls = tokenizer.control
        said = "".join(message.content for message in messages)
        private = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
        swapped: dict[str, str] = {}  # private character -> the one it stands for
        plain: list[Message] = []
        for message in messages:
            content = message.content
            while found := next((p for p in controls if p in content), None):
                swap = next((c for c, first in swapped.items() if first == found[0]), None)
                if swap is None:
                    swap = next(private)
                    swapped[swap] = found[0]
                content = content.replace(found, swap + found[1:])
            plain.append(Message(message.role, content))
        guard = next(private)
        parts = split_at(controls, self._render(tokenizer, plain, reply))
        guarded = [Message(m.role, _guard(m.content, guard)) for m in plain]
        again = split_at(controls, self._render(tokenizer, guarded, reply))
        if [p for p in parts if p in controls] != [p for p in again if p in controls]:
            raise LlamaError("messages: the model's own template would turn text into a control "
                             "token here")  # fmt: skip
        restore = str.maketrans(swapped)
        return [controls[part] if part in controls else part.translate(restore) for part in parts]

    def _render(self, tokenizer: Tokenizer, messages: list[Message], reply: bool) -> str:
        def name(token: int | None) -> str:
            return tokenizer.piece(token) if token is not None else ""

        given = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "add_generation_prompt": reply, "bos_token": name(tokenizer.bos_id),
            "eos_token": name(next(iter(tokenizer.eos_ids), None)), **self._given,
        }  # fmt: skip
        try:
            return sandbox.render(self._source, given, self._date)
        except sandbox.Refused as error:
            raise LlamaError(
                f"the model's chat template refuses these messages: {error}"
            ) from None


def joined(parts: Sequence[Part]) -> list[Part]:
    """PARTS with texts that touch made one: a tokenizer's words may reach across the seam."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part != "":
            out.append(part)
    return out


def check_messages(messages: Sequence[Mapping[str, str]]) -> list[Message]:
    """MESSAGES, each {"role": ..., "content": ...}; LlamaError for what no dialog may hold."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise LlamaError(
            'messages must be a list of {"role": ..., "content": ...}, found '
            f"{type(messages).__name__}"
        )
    if not messages:
        raise LlamaError("messages must hold at least one message")
    dialog: list[Message] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise LlamaError(f"{where} must have role and content and nothing else")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise LlamaError(f"{where}: role must be {', '.join(ROLES)}, found {role!r}")
        if not isinstance(content, str):
            raise LlamaError(f"{where}: content must be a str, found {type(content).__name__}")
        if role == "system" and number:
            raise LlamaError(f"{where}: only the first message may be the system's")
        dialog.append(Message(role, content))
    if len(dialog) == 1 and dialog[0].role == "system":
        raise LlamaError("messages: a system message alone asks nothing")
    return dialog


def _style(family: str, source: str, name: str, date: str | None) -> Style:
    if family == "chatml" and (
        SMOLLM2_SYSTEM in source or (not source and "smollm2" in name.lower())
    ):
        return Style(default_system=SMOLLM2_SYSTEM)
    if family == "vicuna" and (not source or VICUNA_SYSTEM.split("'")[0] in source):
        return Style(default_system=VICUNA_SYSTEM)
    if family == "codellama70b":
        return Style(as_meta=not source)
    if family == "llama3" and ("Cutting Knowledge Date" in source or (date and not source)):
        # 3.1's template has a fixed date, 3.2's and 3.3's ask the clock; Meta's own files come
        # without one, and its code writes no date by itself (llama-models, chat_format.py)
        if date is None and "strftime_now" in source:
            date = datetime.now().strftime("%d %b %Y")
        return Style(dated=True, date=date or LLAMA31_DATE)
    return Style()


def _check_date(date: str | None, family: str, source: str) -> None:
    if date is None:
        return
    # nothing that could be part of a control token
    if not isinstance(date, str) or not re.fullmatch(r"[\w ,./:-]+", date):
        raise LlamaError(f"date must be like '26 Jul 2024', found {date!r}")
    dated = "date_string" in source or "strftime_now" in source
    if not dated and not (family == "llama3" and not source):
        raise LlamaError(f"date is {date!r} and this model's chat template says no date")


def _take_turns(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        if message.role != ("user", "assistant")[number % 2]:
            raise LlamaError("messages: user and assistant must take turns, the user first")


def _begin(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_id is None:
        raise LlamaError("this chat template needs a begin token and the model has none")
    return tokenizer.bos_id


def _end(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise LlamaError("this chat template needs an end token and the model has none")
    return tokenizer.eos_ids[0]


def _refuse_marks(message: Message, marks: Sequence[str]) -> None:
    for mark in marks:
        if mark in message.content:
            raise LlamaError(
                f"messages: the {message.role}'s text holds {mark!r}, which this model's chat "
                "template uses as a mark"
            )


def _guard(text: str, mark: str) -> str:
    # inside the outer white space, which templates trim
    core = text.strip()
    if not core:
        return text
    at = text.index(core)
    return f"{text[:at]}{mark}{core}{mark}{text[at + len(core) :]}"
