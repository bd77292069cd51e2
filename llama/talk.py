"""chat.py's work: a dialog in the terminal, or line by line from a pipe.

The answers go to stdout, everything else to stderr. The history is a list of messages; each turn
encodes all of it, and the engine computes only what is new. When the context is full the oldest
question goes, together with its answer, unless overflow says otherwise. With a session the words
are written after each turn, which is cheap; keys and values, which could be computed again, at the
end.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.cli import open_model, params_of, say, show_prompt, speed_line, text_of
from llama.completion import Result
from llama.config import Head
from llama.errors import LlamaError
from llama.generate import Llama
from llama.machine import cache_folder
from llama.overflow import slides
from llama.sampling import SamplingParams
from llama.stream import Stream

HELP = """\
/reset          forget the conversation
/system TEXT    tell the model TEXT first, and forget the conversation; alone: show it
/stats          tokens and speed
/help           this list
/quit           leave (Ctrl-D too); Ctrl-C stops an answer"""


class Talk:
    """A conversation: its messages so far and the commands on it."""

    def __init__(
        self, llm: Llama, params: SamplingParams, system: str | None = None, show: bool = False,
        session: Path | None = None,
    ) -> None:  # fmt: skip
        """SESSION: the file that the conversation goes on from, if it is there, and is kept in."""
        self.llm = llm
        self.params = params
        self.system = system
        self.show = show
        self.turns: list[dict[str, str]] = []  # user and assistant, by turns
        self.forgets = llm.overflow.policy == "slide"  # the oldest turns, when there is no room
        self.failed = False
        self._last: Result | None = None
        self._session = session
        self._saved: list[dict[str, str]] | None = None  # the words that the session's file holds
        self._whole = False  # and their keys and values
        if session is not None and session.exists():
            self._restore(session)
        elif session is not None:
            self._save(words_only=True)  # a place that cannot be written to shows at once

    def messages(self) -> list[dict[str, str]]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.turns

    def line(self, text: str) -> bool:
        """Takes a line from the person; False when it says to leave."""
        word, _, rest = text.strip().partition(" ")
        if word == "/quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: self.reset(), "/system": self.set_system,
            "/stats": lambda _: self.stats(), "/help": lambda _: say(HELP),
        }  # fmt: skip
        if word in commands:
            try:
                commands[word](rest.strip())
            except LlamaError as error:
                self._complain(error)
        elif word.startswith("/"):
            say(f"there is no {word}; /help lists the commands")
        elif word:
            self.ask(text)
        if self._saved is not None and self.messages() != self._saved:
            try:
                self._save(words_only=True)
            except LlamaError as error:
                self._complain(error)
        return True

    def close(self) -> None:
        """Keeps the session, keys and values included."""
        if self._saved is not None and not self._whole:
            try:
                self._save(words_only=False)
            except LlamaError as error:
                self._complain(error)

    def ask(self, text: str) -> None:
        """Answers TEXT on stdout, as the answer comes."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        answered = False
        try:
            dropped = self._fit()
            if self.show:
                show_prompt(self.llm, self.llm.template.encode(self.messages()))
                if self.llm.template.family == "jinja":
                    say("warning: a chat template of no known family; it is the file's own")
                if not self.llm.template.stop_ids:
                    say("warning: no token ends an answer; only --max_tokens and --stop do")
            stream = self.llm.stream_chat(self.messages(), self.params)
            if dropped:
                say(f"(the context is full: the oldest {_turns(dropped)} forgotten)")
            with cancelling(stream):
                self._print(stream)
            self._last = stream.result
            if stream.result is not None:
                self._note(stream.result)
            self.turns.append({"role": "assistant", "content": stream.text})
            # an end token alone is an answer; no token, as the context is full, is none
            ended = stream.result is not None and stream.result.finish_reason == "eos"
            answered = bool(stream.text) or ended
        except LlamaError as error:
            self._complain(error)
        finally:
            if not answered:  # as if the line had not been said
                self.turns = before

    def reset(self) -> None:
        self.turns = []
        say("the conversation is forgotten")

    def set_system(self, text: str) -> None:
        if text:
            self.system, self.turns = text, []
            say("told; the conversation starts again")
            return
        shown = self.system if self.system is not None else self.llm.template.style.default_system
        say(f"system: {shown}" if shown is not None else "there is no system message")

    def stats(self) -> None:
        used = len(self.llm.template.encode(self.messages(), reply=False)) if self.turns else 0
        turns = _turns(len(self.turns) // 2)
        say(f"{turns}, {used} of {self.llm.max_seq_len} tokens of context")
        if self._last is not None:
            last = self._last
            seed = "" if last.seed is None else f", seed {last.seed}"
            say(
                f"last answer: {last.prompt_tokens} prompt tokens, {last.cached_tokens} of them "
                f"kept from before, {len(last.token_ids)} answered{seed}"
            )
        say(speed_line(self.llm))

    def _restore(self, session: Path) -> None:
        messages, tokens = self.llm.load_session(session)
        system = None
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise LlamaError(f"{session}: expected questions and their answers, by turns")
        if messages and self.system not in (None, system):
            raise LlamaError(
                f"{session}: it was begun with another system message, or none; leave --system out"
            )
        self.system, self.turns = system if messages else self.system or system, messages
        self._saved, self._whole = self.messages(), True
        if messages:
            computed = f"{tokens} tokens of it computed" if tokens else "to be read again"
            say(f"({session}: {_turns(len(messages) // 2)} restored, {computed})")

    def _save(self, words_only: bool) -> None:
        assert self._session is not None
        self.llm.save_session(self._session, self.messages(), words_only=words_only)
        self._saved, self._whole = self.messages(), not words_only

    def _complain(self, error: LlamaError) -> None:
        self.failed = True
        say(f"chat.py: {error}")

    def _fit(self) -> int:
        """Drops the oldest turns, if it may, until a quarter of the context, or max_tokens, is
        free; how many. What a question says itself is never dropped unread."""
        if not self.forgets:
            return 0
        size = self.llm.max_seq_len
        room = size - min(self.params.max_tokens or size, size // 4)
        dropped = 0
        while (n := len(self.llm.template.encode(self.messages()))) > room and len(self.turns) > 1:
            del self.turns[:2]
            dropped += 1
        if n > size:
            raise LlamaError(f"the question alone has {n} tokens and the context holds {size}")
        return dropped

    def _print(self, stream: Stream) -> None:
        out = sys.stdout
        try:
            for piece in stream:
                out.write(piece)
                out.flush()
        finally:
            out.write("\n")
            out.flush()

    def _note(self, result: Result) -> None:
        if result.finish_reason == "cancelled":
            say("(stopped)")
        elif result.finish_reason == "length":
            used = result.prompt_tokens + len(result.token_ids)
            full = self.llm.overflow.policy != "slide" and used >= self.llm.max_seq_len
            hint = "" if self.forgets else ": /reset, or --overflow slide"
            say(f"(the context is full{hint})" if full else "(cut at --max_tokens)")
        if result.dropped_tokens:
            say(f"(the context was full: {result.dropped_tokens} tokens forgotten on the way)")


def _turns(n: int) -> str:
    return f"{n} turn" if n == 1 else f"{n} turns"


@contextmanager
def cancelling(stream: Stream) -> Iterator[None]:
    """Inside, Ctrl-C ends the stream at its next step instead of the program."""
    try:
        before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    except ValueError:  # not the main thread, which alone hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def talk(args: Namespace) -> int:
    """Does what the flags say; the exit status."""
    params = params_of(args)
    with open_model(args, template=args.template, date=args.date) as llm:
        llm.require(Head.LM, "a chat")
        family = llm.template.family  # a base model is refused before the first line
        if args.overflow is None and slides(llm.config, llm.max_seq_len):
            llm.overflow = replace(llm.overflow, policy="slide")
        system = None if args.system is None else text_of(args.system)
        dialog = Talk(llm, params, system, args.show_prompt, args.session)
        dialog.forgets |= args.overflow is None  # whole turns go, even if the window cannot slide
        try:
            reader = _editor() if sys.stdin.isatty() else None
            if reader is not None:
                name = llm.meta.get("general.name") or args.bin or "the default model"
                kind = f"{llm.config.dtype}, {family}, context {llm.max_seq_len}"
                say(f"{name} ({kind}); /help, /quit")
            _lines(dialog, reader)
        finally:
            dialog.close()
        return 1 if dialog.failed and reader is None else 0


def _lines(dialog: Talk, reader: Callable[[], str] | None) -> None:
    """Hands DIALOG each line that READER, else standard input, gives."""
    if reader is None:
        for line in iter(sys.stdin.readline, ""):
            if not dialog.line(line.rstrip("\r\n")):
                return
        return
    while True:
        try:
            if not dialog.line(reader()):
                return
        except KeyboardInterrupt:
            continue  # the line is cleared
        except EOFError:
            return


def _editor() -> Callable[[], str] | None:
    """Reads an edited line from the terminal, with history; None where that cannot be."""
    screen = next((s for s in (sys.stderr, sys.stdout) if s.isatty()), None)
    if screen is None:
        return None
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import create_output
    except ImportError:
        return lambda: input("> ")
    history: History = InMemoryHistory()
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat-history"
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # what was said is nobody else's
        history = FileHistory(str(file))
    except OSError:
        pass
    session: Any = PromptSession(
        history=history, output=create_output(stdout=screen), enable_suspend=True
    )
    return lambda: _edited(session)


def _edited(session: Any) -> str:
    """A line. Signals end the editor as an answer would: an exception that a handler raised inside
    its event loop would be reported there."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def end(error: SystemExit) -> None:
        if session.app.future is not None and not session.app.future.done():
            session.app.exit(exception=error)

    def leave(number: int, frame: object) -> None:
        error = SystemExit(128 + number)
        if session.app.loop is None:
            raise error
        session.app.loop.call_soon_threadsafe(end, error)

    before = {number: signal.getsignal(number) for number in numbers}
    changed = [number for number in numbers if callable(before[number])]
    try:
        for number in changed:
            signal.signal(number, leave)
        return str(session.prompt("> "))
    finally:
        for number in changed:
            signal.signal(number, before[number])
