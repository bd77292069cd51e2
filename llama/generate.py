"""Llama: text in, text out.

A Llama is an open model file with its tokenizer, chat template and kept sequences. It turns
prompts into jobs, and batch.py runs them; everything about words is here and above, everything
about numbers below, in engine.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from llama import likelihood
from llama.batch import MAX_CHUNK, Batches, Counters
from llama.completion import Job, Result
from llama.errors import LlamaError
from llama.likelihood import Likelihood
from llama.reward import Judge, best_first
from llama.sampling import SamplingParams, whole_number
from llama.templates import ChatTemplate
from llama.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from llama.engine import Config, Engine, SessionInfo

MAX_COMPLETIONS = 1024  # of one prompt
Prompt = str | Sequence[int]  # text, or token ids taken as they are
Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "Hi"}, ...]


class Stream(Iterator[str]):
    """The text of one completion as it comes: whole characters only, nothing of a stop string.
    The pieces joined are what generate() would have returned as text."""

    def __init__(self, batches: Batches, job: Job) -> None:
        self._job = job
        self._steps = batches.run([job])

    def __next__(self) -> str:
        for _, text in self._steps:
            if text:
                return text
        raise StopIteration

    @property
    def text(self) -> str:
        """All text so far."""
        return self._job.text

    @property
    def result(self) -> Result | None:
        """The completion, once the stream has ended."""
        return self._job.result

    def cancel(self) -> None:
        """Ends the stream at its next step; may be called from a signal handler or a thread."""
        self._job.cancelled = True

    def close(self) -> None:
        """Gives the sequence back at once; a stream that is dropped does so too."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()


class Llama:
    """A model, open. Threads may share it: their forward passes take turns. A context manager."""

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "cpu",
        max_seq_len: int | None = None, kv: str | None = None, activations: int | None = None,
        isa: str | None = None,
        template: str | None = None, date: str | None = None,
    ) -> None:  # fmt: skip
        """Opens PATH, a .bin file that export.py wrote. THREADS: None, one a core. MAX_SEQ_LEN:
        None, the model's own. KV: kind of the KV cache, "f32" or "f16". ISA: a kernel set, None
        the best. TEMPLATE: a chat template's family instead of the file's own. DATE: what Llama
        3.1 and later are told the day is ("26 Jul 2024"); None, as their template has it."""
        from llama.engine import Engine

        self._setup(
            Engine(
                path, threads=threads, device=device, max_seq_len=max_seq_len, kv=kv,
                activations=activations, isa=isa,
            ),
            template, date,
        )  # fmt: skip

    @classmethod
    def on(
        cls, engine: Engine, template: str | None = None, date: str | None = None
    ) -> Llama:
        """A Llama on an engine that is open already, and which it will close."""
        llm = cls.__new__(cls)
        llm._setup(engine, template, date)
        return llm

    def _setup(self, engine: Engine, template: str | None, date: str | None) -> None:
        self._engine = engine
        self._family, self._date = template, date
        self._template: ChatTemplate | None = None
        try:
            self.config: Config = engine.config
            config = engine.config
            self.tokenizer: Tokenizer = open_tokenizer(
                *engine.tokenizer, config.vocab_size, config.bos_id, config.eos_ids, engine.meta
            )
            self._batches = Batches(engine)
        except BaseException:
            engine.close()
            raise

    # --- what it is

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

    def info(self) -> SessionInfo:
        self._batches.check_open()
        return self._engine.info()

    # --- text in, text out

    @overload
    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *,
        n: None = None, best_of: int | None = None, reward: Llama | None = None, echo: bool = False,
    ) -> Result: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *,
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
        """Completes PROMPT (text or token ids), or a list of prompts together in one batch, each
        as if alone; for a list PARAMS may be a list too. A text gets the model's begin token.

        N: so many completions of each prompt, a list in place of a Result, numbered from 0; the
        prompt is computed once. BEST_OF: so many are made, and the N (else the one) with the
        largest sum of logprobs returned, the best first; or, with REWARD, an open reward model of
        the same vocabulary, those that it gives the most. ECHO: texts begin with their prompt."""
        request = self._request(n, best_of, reward)
        if isinstance(prompt, str) or _is_ids(prompt):
            job = self._job(prompt, params, echo, request.judge)
            return self._finish([request.jobs(job)], request)[0]
        jobs = self._jobs(prompt, params, echo, request.judge)
        return self._finish([request.jobs(job) for job in jobs], request)

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
        request = self._request(n, best_of, reward)
        jobs = self._jobs(prompts, params, judge=request.judge)
        groups = [request.jobs(job) for job in jobs]
        return self._each(groups, request)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, echo: bool = False
    ) -> Stream:
        """The completion's text as it comes; with ECHO the prompt's comes first."""
        return Stream(self._batches, self._job(prompt, params, echo))

    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: None = None,
        best_of: int | None = None, reward: Llama | None = None,
    ) -> Result: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: int,
        best_of: int | None = None, reward: Llama | None = None,
    ) -> list[Result]: ...  # fmt: skip

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, n: int | None = None,
        best_of: int | None = None, reward: Llama | None = None,
    ) -> Any:  # fmt: skip
        """The assistant's answer to MESSAGES, written in the model's own chat template; N,
        BEST_OF and REWARD as for generate()."""
        request = self._request(n, best_of, reward)
        job = self._answer(messages, params, request.judge)
        return self._finish([request.jobs(job)], request)[0]

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Stream:
        """The answer's text as it comes."""
        return Stream(self._batches, self._answer(messages, params))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt becomes: a text's, behind the begin token; ids as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if not _is_ids(prompt):
            found = "an empty list" if prompt == [] else type(prompt).__name__
            raise LlamaError(f"a prompt must be a str or a list of token ids, found {found}")
        return [self.tokenizer.check(token) for token in prompt]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of IDS: (len(ids), vocab_size), computed afresh."""
        self._batches.check_open()
        if isinstance(ids, (str, bytes)):
            raise LlamaError(f"logits takes token ids, found {type(ids).__name__}")
        ids = [self.tokenizer.check(token) for token in ids]
        if not 0 < len(ids) <= self.max_seq_len:
            raise LlamaError(
                f"logits takes 1 to {self.max_seq_len} token ids (the context), found {len(ids)}"
            )
        out = np.empty((len(ids), self.config.vocab_size), np.float32)
        slot = self._batches.slots.take(ids, reuse=False)
        try:
            for start in range(0, len(ids), MAX_CHUNK):
                part = ids[start : start + MAX_CHUNK]
                positions = range(start, start + len(part))
                with self._batches.turns:
                    self._batches.check_open()
                    out[start : start + len(part)] = self._engine.forward(
                        part, [slot.number] * len(part), positions, [True] * len(part),
                        rope_lengths=[len(ids)] * len(part),
                    )
                    slot.tokens += part
                    self.counters.computed_tokens += len(part)
        finally:
            if not self._batches.closed:
                self._batches.slots.give(slot)
        return out

    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Likelihood]]:
        """How likely each continuation is behind its context: (index, (logprob, greedy)) of each
        (context ids, continuation ids) of PAIRS, as they are known. What pairs share is computed
        once; greedy tells whether each token is the likeliest."""
        self._batches.check_open()
        return likelihood.each(self._batches, pairs)

    # --- the end

    def close(self) -> None:
        """Frees the model; a second close does nothing, any other use is a LlamaError."""
        with self._batches.turns:
            if not self._batches.closed:
                self._batches.closed = True
                self._engine.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    # --- prompts to jobs

    def _request(self, n: int | None, best_of: int | None, reward: Llama | None) -> Request:
        if reward is None:
            return Request(n, best_of)
        if not isinstance(reward, Llama):
            raise LlamaError(f"reward must be a Llama, found {type(reward).__name__}")
        return Request(n, best_of, Judge(reward._batches, reward.tokenizer, self.tokenizer))

    def _room(self, ids: Sequence[int], judge: Judge | None) -> int:
        """The context of a prompt and its completion, which a JUDGE must be able to read."""
        if judge is None:
            return self.max_seq_len
        judge.check(ids)
        return min(self.max_seq_len, judge.max_seq_len)

    def _job(
        self, prompt: Prompt, params: SamplingParams | None, echo: bool = False,
        judge: Judge | None = None,
    ) -> Job:  # fmt: skip
        self._batches.check_open()
        ids = self.prompt_ids(prompt)
        fresh = not ids or self.tokenizer.is_control(ids[-1])
        text = ""
        if echo:
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        return Job(
            ids, _checked(params), self.tokenizer, frozenset(self.config.eos_ids),
            self._room(ids, judge), fresh, text,
        )  # fmt: skip

    def _answer(
        self, messages: Messages, params: SamplingParams | None, judge: Judge | None = None
    ) -> Job:
        self._batches.check_open()
        template = self.template
        ids = template.encode(messages)
        return Job(
            ids, _checked(params), self.tokenizer, template.stop_ids, self._room(ids, judge),
            fresh=True,
        )  # fmt: skip

    def _jobs(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None, echo: bool = False,
        judge: Judge | None = None,
    ) -> list[Job]:  # fmt: skip
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise LlamaError(
                f"a prompt must be a str, a list of token ids or a list of these, found "
                f"{type(prompts).__name__}"
            )
        if params is None or isinstance(params, SamplingParams):
            # one seed for the whole call
            each: Sequence[SamplingParams] = [_checked(params).seeded()] * len(prompts)
        else:
            each = [_checked(one) for one in params]
        if len(each) != len(prompts):
            raise LlamaError(f"{len(prompts)} prompts need as many params, found {len(each)}")
        jobs = []
        for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                jobs.append(self._job(prompt, one, echo, judge))
            except LlamaError as error:
                raise LlamaError(f"prompt {number}: {error}") from None
        return jobs

    def _finish(self, groups: list[list[Job]], request: Request) -> list[Any]:
        found = dict(self._each(groups, request))
        return [found[index] for index in range(len(groups))]

    def _each(self, groups: list[list[Job]], request: Request) -> Iterator[tuple[int, Any]]:
        """(index, what the request asked for) as each group finishes."""
        index = {id(job): number for number, group in enumerate(groups) for job in group}
        left = [len(group) for group in groups]
        for job, _ in self._batches.run([job for group in groups for job in group]):
            if job.result is not None:
                number = index[id(job)]
                left[number] -= 1
                if not left[number]:
                    yield number, request.answer(groups[number])


class Request:
    """How many completions of each prompt are made, and which of them returned."""

    def __init__(self, n: int | None, best_of: int | None, judge: Judge | None = None) -> None:
        self._several = n is not None
        self._n = 1 if n is None else whole_number("n", n, 1, MAX_COMPLETIONS)
        self._ranked = best_of is not None
        self._made = self._n
        self.judge = judge
        if best_of is not None:
            self._made = whole_number("best_of", best_of, self._n, MAX_COMPLETIONS)
        elif judge is not None:
            raise LlamaError("a reward model chooses among completions: best_of says how many")

    def jobs(self, first: Job) -> list[Job]:
        """All completions of a prompt, FIRST among them; they share a seed."""
        if self._ranked and self.judge is None and first.params.logprobs is None:
            first.params = replace(first.params, logprobs=0)
        return [first, *(first.twin(number) for number in range(1, self._made))]

    def answer(self, jobs: list[Job]) -> Result | list[Result]:
        results = []
        for job in jobs:
            assert job.result is not None
            reward = None if self.judge is None else self.judge.judge(job)
            results.append(replace(job.result, reward=reward))
        if self._ranked:
            results = best_first(results)
        return results[: self._n] if self._several else results[0]


def _checked(params: SamplingParams | None) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise LlamaError(f"params must be SamplingParams, found {type(params).__name__}")
    return params


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.dtype.kind in "iu"
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)) and len(prompt) > 0
        and not isinstance(prompt[0], (str, Sequence, np.ndarray))
    )  # fmt: skip
