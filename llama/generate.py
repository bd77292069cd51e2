"""Llama: text in, text out. What it says about texts besides is in heads.py.

A Llama is an open model file with its tokenizer, chat template and kept sequences. It turns
prompts into jobs, and batch.py runs them; everything about words is here and above, everything
about numbers below, in engine.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from llama import likelihood, session
from llama.batch import Batches, Counters
from llama.completion import Job, Result
from llama.config import Head
from llama.errors import LlamaError
from llama.heads import Heads, Messages, is_ids
from llama.infill import Gap, Infiller, Order
from llama.overflow import Overflow, Window
from llama.request import Prompt, Request
from llama.reward import Judge
from llama.sampling import SamplingParams
from llama.speculate import proposer
from llama.stream import Stream
from llama.templates import ChatTemplate
from llama.tokenizer import NoTokenizer, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from llama.engine import Engine
from llama.facts import Config, SessionInfo


class Llama(Heads):
    """A model, open. Threads may share it: their forward passes take turns. A context manager."""

    _own_draft: Llama | None = None  # opened here, and closed with this one

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "cpu",
        max_seq_len: int | None = None, kv: str | None = None, activations: int | None = None,
        isa: str | None = None, template: str | None = None, date: str | None = None,
        overflow: str = "stop", keep: int | None = None, lookup: int = 0,
        draft: Llama | str | os.PathLike[str] | None = None, gpu_layers: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:  # fmt: skip
        """Opens PATH, a .bin file that export.py wrote. THREADS: None, one a core. DEVICE: "cpu",
        "cuda" or "auto", of which `chosen` then says what it took and why. GPU_LAYERS: with cuda
        only the last so many layers there, None all; a DRAFT given as a path is there whole.
        PROGRESS(done, total): told of bytes brought there. MAX_SEQ_LEN: None, the model's own;
        warns if it was not made for so many. KV: kind of the cache, "f32", "f16" or "q8". ISA: a
        kernel set, None the best. TEMPLATE: a chat template's family, not the file's own. DATE:
        what Llama 3.1 and later are told the day is ("26 Jul 2024"); None, as their template has
        it, which Meta's own files lack: no date.

        OVERFLOW: what happens when the context is full. "stop": the completion ends, "length".
        "error": a LlamaError. "slide": the first KEEP tokens stay, of the others the oldest half
        goes, and the text runs on, without an end if neither max_tokens nor the model sets one; a
        prompt that is too long loses as much before it is read. KEEP None: 4 tokens, in a chat all
        that stands before the first question; half of the context at most. What a gap or a reward
        model needs whole ends, as with "stop", instead of sliding."""
        from llama.engine import Engine

        same: dict[str, Any] = dict(
            threads=threads, device=device, kv=kv, activations=activations, isa=isa,
            progress=progress,
        )  # fmt: skip
        engine = Engine(path, max_seq_len=max_seq_len, gpu_layers=gpu_layers, **same)
        self._setup(engine, template, date, overflow, keep)
        self._speculate(lookup, draft, same)
        untrained = self.config.untrained(self.max_seq_len)
        if untrained is not None:
            warnings.warn(untrained, stacklevel=2)

    @classmethod
    def on(
        cls, engine: Engine, template: str | None = None, date: str | None = None,
        overflow: str = "stop", keep: int | None = None, lookup: int = 0,
        draft: Llama | None = None,
    ) -> Llama:  # fmt: skip
        """A Llama on an engine that is open already, and which it will close."""
        llm = cls.__new__(cls)
        llm._setup(engine, template, date, overflow, keep)
        llm._speculate(lookup, draft, {})
        return llm

    def _setup(
        self, engine: Engine, template: str | None, date: str | None, overflow: str,
        keep: int | None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._family, self._date = template, date
        self._template: ChatTemplate | None = None
        self._other: tuple[str, ChatTemplate] | None = None  # of the date last asked for
        self._judged: tuple[Llama, Judge] | None = None  # the reward model last asked
        try:
            self.config: Config = engine.config
            config = engine.config
            self.tokenizer: Tokenizer = open_tokenizer(
                *engine.tokenizer, config.vocab_size, config.bos_id, config.eos_ids, engine.meta
            )
            self.overflow = Overflow.checked(overflow, keep, config, engine.max_seq_len)
            self._batches = Batches(engine)
        except BaseException:
            engine.close()
            raise

    def _speculate(self, lookup: int, draft: Any, options: dict[str, Any]) -> None:
        """OPTIONS: how a draft model is opened that is given as a path."""
        try:
            if isinstance(draft, (str, os.PathLike)):
                draft = self._own_draft = Llama(draft, **options)
            if draft is not None and not isinstance(draft, Llama):
                raise LlamaError(f"draft must be a Llama or a path, found {type(draft).__name__}")
            small = None if draft is None else (draft._batches, draft.tokenizer)
            self._batches.proposer = proposer(self._batches, self.tokenizer, lookup, small)
        except BaseException:
            self.close()
            raise

    # --- what it is

    @property
    def chosen(self) -> str | None:
        """How device "auto" came to its device, for a draft opened here, too; None for others."""
        draft = self._own_draft.chosen if self._own_draft else None
        return "; for the draft ".join(filter(None, (self._engine.chosen, draft))) or None

    @property
    def drafts_by(self) -> str | None:
        """What speculates, "lookup" or "draft", if anything does."""
        return self._batches.proposer.name if self._batches.proposer else None

    @property
    def counters(self) -> Counters:
        """What was computed since opening."""
        return self._batches.counters

    @property
    def computed_tokens(self) -> int:
        """How many tokens went through the network since opening."""
        return self._batches.counters.computed_tokens

    @property
    def meta(self) -> dict[str, int | float | str | bytes]:
        return self._engine.meta

    @property
    def max_seq_len(self) -> int:
        """Positions that a prompt and its completion may take together."""
        return self._engine.max_seq_len

    @property
    def template(self) -> ChatTemplate:
        """How this model writes a dialog; LlamaError for a base model."""
        if self._template is None:
            self._template = ChatTemplate(
                self.tokenizer, self._engine.meta, self._family, self._date
            )
        return self._template

    @property
    def infiller(self) -> Infiller:
        """How this model is asked to fill a gap; LlamaError if it was not trained to."""
        return Infiller(self.tokenizer, self._engine.meta)

    def _dated(self, date: str) -> ChatTemplate:
        if self._other is None or self._other[0] != date:
            template = ChatTemplate(self.tokenizer, self._engine.meta, self._family, date)
            self._other = date, template
        return self._other[1]

    def info(self) -> SessionInfo:
        self._batches.check_open()
        return self._engine.info()

    # --- text in, text out

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *,
        n: None = None, best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> Result: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *,
        n: int, best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> list[Result]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        n: None = None, best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> list[Result]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        n: int, best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> list[list[Result]]: ...  # fmt: skip

    def generate(
        self, prompt: Any, params: Any = None, *, n: int | None = None,
        best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> Any:  # fmt: skip
        """Completes PROMPT (text, token ids or a Gap), or a list of prompts together in one
        batch, each as if alone; for a list PARAMS may be a list too. A text gets the model's
        begin token.

        N: so many completions of each prompt, a list in place of a Result, numbered from 0; the
        prompt is computed once. BEST_OF: so many are made, and the N (else the one) with the
        largest sum of logprobs returned, the best first; or, with REWARD, an open reward model of
        the same vocabulary, those that it gives the most. ECHO: texts begin with their prompt,
        and where PARAMS ask for logprobs its tokens have theirs in Result.prompt_logprobs."""
        if isinstance(prompt, (str, Gap)) or is_ids(prompt):
            one = Request(prompt, params, n, best_of, echo, reward)
            return _several(n, self._finish(one, self._job(one)))
        requests = self._requests(prompt, params, Request("", None, n, best_of, echo, reward))
        found = dict(self.each_of(requests))
        return [_several(n, found[index]) for index in range(len(requests))]

    @overload
    def each(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        n: None = None, best_of: int | None = None, reward: Llama | None = None,
    ) -> Iterator[tuple[int, Result]]: ...  # fmt: skip
    @overload
    def each(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        n: int, best_of: int | None = None, reward: Llama | None = None,
    ) -> Iterator[tuple[int, list[Result]]]: ...  # fmt: skip

    def each(
        self, prompts: Sequence[Prompt], params: Any = None, *, n: int | None = None,
        best_of: int | None = None, reward: Llama | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """As generate() of a list; yields (index, result) as each prompt finishes."""
        base = Request("", None, n, best_of, reward=reward)
        requests = self._requests(prompts, params, base)
        return ((index, _several(n, found)) for index, found in self.each_of(requests))

    def each_of(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Result]]]:
        """Completes REQUESTS together in one batch, each as if alone; yields (index, results) as
        each finishes."""
        groups = []
        for number, request in enumerate(requests):
            try:
                groups.append(request.jobs(self._job(request)))
            except LlamaError as error:
                raise LlamaError(f"{request.name or f'prompt {number}'}: {error}") from None
        return self._each(requests, groups)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, echo: bool = False
    ) -> Stream:
        """The completion's text as it comes; with ECHO the prompt's comes first."""
        return Stream(self._batches, self._job(Request(prompt, params, echo=echo)))

    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: None = None,
        best_of: int | None = None, reward: Llama | None = None, date: str | None = None,
    ) -> Result: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: int,
        best_of: int | None = None, reward: Llama | None = None, date: str | None = None,
    ) -> list[Result]: ...  # fmt: skip

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: int | None = None,
        best_of: int | None = None, reward: Llama | None = None, date: str | None = None,
    ) -> Any:  # fmt: skip
        """The assistant's answer to MESSAGES, written in the model's own chat template; N,
        BEST_OF and REWARD as for generate(). DATE: another than the one given on opening."""
        request = Request("", params, n, best_of, reward=reward)
        return _several(n, self._finish(request, self._answer(messages, request, date)))

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, *, date: str | None = None
    ) -> Stream:
        """The answer's text as it comes."""
        return Stream(self._batches, self._answer(messages, Request("", params), date))

    @overload
    def infill(
        self, prefix: str, suffix: str, params: SamplingParams | None = None, *,
        order: Order = "psm", n: None = None, best_of: int | None = None,
        reward: Llama | None = None,
    ) -> Result: ...  # fmt: skip
    @overload
    def infill(
        self, prefix: str, suffix: str, params: SamplingParams | None = None, *,
        order: Order = "psm", n: int, best_of: int | None = None, reward: Llama | None = None,
    ) -> list[Result]: ...  # fmt: skip

    def infill(
        self, prefix: str, suffix: str, params: SamplingParams | None = None, *,
        order: Order = "psm", n: int | None = None, best_of: int | None = None,
        reward: Llama | None = None,
    ) -> Any:  # fmt: skip
        """What belongs between PREFIX and SUFFIX: the whole is prefix + result.text + suffix.
        ORDER: "psm" or "spm", see Gap; N, BEST_OF and REWARD as for generate(), which takes a
        Gap too.
        LlamaError for a model that was not trained for it."""
        request = Request(Gap(prefix, suffix, order), params, n, best_of, reward=reward)
        return _several(n, self._finish(request, self._job(request)))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt becomes: a text's, behind the begin token; ids as they are; a
        gap's with the tokens that mark it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if isinstance(prompt, Gap):
            return self.infiller.encode(prompt)
        if not is_ids(prompt):
            found = "an empty list" if prompt == [] else type(prompt).__name__
            raise LlamaError(f"a prompt must be a str or a list of token ids, found {found}")
        return [self.tokenizer.check(token) for token in prompt]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of IDS: (len(ids), vocab_size), computed afresh."""
        self.require(Head.LM, "logits()")
        self._batches.check_open()
        if isinstance(ids, (str, bytes)):
            raise LlamaError(f"logits takes token ids, found {type(ids).__name__}")
        ids = [self.tokenizer.check(token) for token in ids]
        if not 0 < len(ids) <= self.max_seq_len:
            raise LlamaError(
                f"logits takes 1 to {self.max_seq_len} token ids (the context), found {len(ids)}"
            )
        out = np.empty((len(ids), self.config.vocab_size), np.float32)
        done = 0
        for _, rows in self._batches.outputs([ids], [range(len(ids))]):
            out[done : done + len(rows)] = rows
            done += len(rows)
        return out

    # --- sessions

    def save_session(
        self, path: str | os.PathLike[str], messages: Messages, *, words_only: bool = False
    ) -> int:
        """Writes MESSAGES and, unless WORDS_ONLY, the keys and values that are kept of them to
        PATH, replacing a file there at once or not at all; returns how many tokens have theirs.
        MESSAGES may be empty. docs/session.md draws the file."""
        self._batches.check_open()
        dialog = session.check(messages)
        asked = not words_only and any(message["role"] != "system" for message in dialog)
        if not asked:
            session.save(Path(path), self._engine, dialog)
            return 0
        ids = self.template.encode(dialog, reply=False)
        slot = self._batches.slots.take(ids, whole=True)
        try:
            session.save(
                Path(path), self._engine, dialog, slot.tokens, slot.number, slot.rope_length
            )
            return len(slot.tokens)
        finally:
            if not self._batches.closed:
                self._batches.slots.give(slot)

    def load_session(self, path: str | os.PathLike[str]) -> tuple[list[dict[str, str]], int]:
        """The messages of the session at PATH, and how many of their tokens came back computed: a
        chat that goes on from these messages need not read them again. LlamaError for a damaged
        file, or one of another model, KV kind or width of activations."""
        self._batches.check_open()
        with session.Saved(Path(path), self._engine) as saved:
            slot = self._batches.slots.take((), reuse=False)
            try:
                tokens = saved.restore(slot.number)
                slot.tokens, slot.rope_length = tokens, saved.rope_length
            finally:
                if not self._batches.closed:
                    self._batches.slots.give(slot)
        return saved.messages, len(tokens)

    def likelihoods(self, pairs: Sequence[likelihood.Pair]) -> Iterator[likelihood.Numbered]:
        """(index, (logprob, greedy)) of each (context ids, continuation ids) of PAIRS as it is
        known: how likely the continuation is, and whether each of its tokens is the likeliest."""
        self.require(Head.LM, "likelihoods()")
        return likelihood.each(self._batches, pairs)

    # --- the end

    def close(self) -> None:
        """Frees the model; a second close does nothing, any other use is a LlamaError."""
        with self._batches.turns:
            if not self._batches.closed:
                self._batches.closed = "is closed"
                self._engine.close()
        if self._own_draft is not None:
            self._own_draft.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    # --- prompts to jobs

    def _job(self, request: Request) -> Job:
        self._batches.check_open()
        prompt = request.prompt
        self.require(Head.LM, "infill()" if isinstance(prompt, Gap) else "generate()")
        ids = self.prompt_ids(prompt)
        fresh = not ids or self.tokenizer.is_control(ids[-1])
        stop_ids = frozenset(self.config.eos_ids)
        if isinstance(prompt, Gap):
            fresh, stop_ids = False, self.infiller.stop_ids
        params = request.params or SamplingParams()
        return Job(
            ids, params, self.tokenizer, stop_ids, self._window(request, ids), fresh,
            self._text(prompt, ids) if request.echo else "",
            scored=request.echo and params.logprobs is not None,
        )  # fmt: skip

    def _text(self, prompt: Prompt, ids: list[int]) -> str:
        """What stands before a completion of PROMPT, which has these IDS."""
        if isinstance(prompt, Gap):
            return prompt.prefix
        if isinstance(prompt, str):
            return prompt
        return "" if isinstance(self.tokenizer, NoTokenizer) else self.tokenizer.decode(ids)

    def _answer(self, messages: Messages, request: Request, date: str | None) -> Job:
        self._batches.check_open()
        self.require(Head.LM, "chat()")
        template = self.template if date is None else self._dated(date)
        ids = template.encode(messages)
        window = self._window(request, ids, lambda: template.question_starts(messages, ids))
        return Job(
            ids, request.params or SamplingParams(), self.tokenizer, template.stop_ids, window,
            fresh=True,
        )  # fmt: skip

    def _window(
        self, request: Request, ids: Sequence[int],
        starts: Callable[[], Sequence[int]] | None = None,
    ) -> Window:  # fmt: skip
        """The context of a prompt and its completion. Nothing slides where a judge must be able to
        read all of them, nor where the tokens that mark a gap would go."""
        judge, overflow = self._judge(request.reward), self.overflow
        if judge is not None:
            judge.check(ids)
            overflow = overflow.for_whole(judge.max_seq_len)
        elif isinstance(request.prompt, Gap):
            overflow = overflow.for_whole()
        return Window(overflow, starts)

    def _judge(self, reward: Llama | None) -> Judge | None:
        """REWARD as the judge of this model's completions; found to be one once."""
        if reward is None:
            return None
        if not isinstance(reward, Llama):
            raise LlamaError(f"reward must be a Llama, found {type(reward).__name__}")
        reward._batches.check_open()
        if self._judged is None or self._judged[0] is not reward:
            self._judged = reward, Judge(reward._batches, reward.tokenizer, self.tokenizer)
        return self._judged[1]

    def _requests(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None, base: Request,
    ) -> list[Request]:  # fmt: skip
        """BASE for each of PROMPTS."""
        self._batches.check_open()
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise LlamaError(
                f"a prompt must be a str, a list of token ids or a list of these, found "
                f"{type(prompts).__name__}"
            )
        if params is None or isinstance(params, SamplingParams):
            # one seed for the whole call
            each: Sequence[SamplingParams] = [(params or SamplingParams()).seeded()] * len(prompts)
        else:
            each = params
        if len(each) != len(prompts):
            raise LlamaError(f"{len(prompts)} prompts need as many params, found {len(each)}")
        return [
            replace(base, prompt=prompt, params=one)
            for prompt, one in zip(prompts, each, strict=True)
        ]

    def _finish(self, request: Request, first: Job) -> list[Result]:
        return dict(self._each([request], [request.jobs(first)]))[0]

    def _each(
        self, requests: Sequence[Request], groups: list[list[Job]]
    ) -> Iterator[tuple[int, list[Result]]]:
        """(index, what the request asked for) as each group finishes."""
        index = {id(job): number for number, group in enumerate(groups) for job in group}
        left = [len(group) for group in groups]
        for job, _ in self._batches.run([job for group in groups for job in group]):
            if job.result is not None:
                number = index[id(job)]
                left[number] -= 1
                if not left[number]:
                    judge = self._judge(requests[number].reward)
                    yield number, requests[number].answer(groups[number], judge)


def _several(n: int | None, results: list[Result]) -> Any:
    """A list for those who named a number, even 1."""
    return results[0] if n is None else results
