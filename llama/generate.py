"""Llama: text in, text out.

A Llama is an open model file with its tokenizer, chat template and kept sequences. It turns
prompts into jobs, and batch.py runs them; everything about words is here and above, everything
about numbers below, in engine.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from llama.batch import MAX_CHUNK, Batches, Counters
from llama.completion import Job, Result
from llama.errors import LlamaError
from llama.sampling import SamplingParams
from llama.templates import ChatTemplate
from llama.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from llama.engine import Config, Engine, SessionInfo

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
        template: str | None = None,
    ) -> None:  # fmt: skip
        """Opens PATH, a .bin file that export.py wrote. THREADS: None, one a core. MAX_SEQ_LEN:
        None, the model's own. KV: kind of the KV cache, "f32" or "f16". ISA: a kernel set, None
        the best. TEMPLATE: a chat template's family instead of the file's own."""
        from llama.engine import Engine

        self._setup(
            Engine(
                path, threads=threads, device=device, max_seq_len=max_seq_len, kv=kv,
                activations=activations, isa=isa,
            ),
            template,
        )

    @classmethod
    def on(cls, engine: Engine, template: str | None = None) -> Llama:
        """A Llama on an engine that is open already, and which it will close."""
        llm = cls.__new__(cls)
        llm._setup(engine, template)
        return llm

    def _setup(self, engine: Engine, template: str | None) -> None:
        self._engine = engine
        self._family = template
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
            self._template = ChatTemplate(self.tokenizer, self._engine.meta, self._family)
        return self._template

    def info(self) -> SessionInfo:
        self._batches.check_open()
        return self._engine.info()

    # --- text in, text out

    @overload
    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Result: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]: ...  # fmt: skip

    def generate(self, prompt: Any, params: Any = None) -> Any:
        """Completes PROMPT (text or token ids), or a list of prompts together in one batch, each
        as if alone; for a list PARAMS may be a list too. A text gets the model's begin token."""
        if isinstance(prompt, str) or _is_ids(prompt):
            return self._finish([self._job(prompt, params)])[0]
        return self._finish(self._jobs(prompt, params))

    def each(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Result]]:  # fmt: skip
        """As generate() of a list; yields (index, result) as each prompt finishes."""
        jobs = self._jobs(prompts, params)
        return (
            (jobs.index(job), job.result)
            for job, _ in self._batches.run(jobs) if job.result is not None
        )  # fmt: skip

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """The completion's text as it comes."""
        return Stream(self._batches, self._job(prompt, params))

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Result:
        """The assistant's answer to MESSAGES, written in the model's own chat template."""
        return self._finish([self._answer(messages, params)])[0]

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Stream:
        """The answer's text as it comes."""
        return Stream(self._batches, self._answer(messages, params))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt becomes: a text's, behind the begin token; ids as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if not _is_ids(prompt):
            raise LlamaError(
                f"a prompt must be a str or a list of token ids, found {type(prompt).__name__}"
            )
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

    def _job(self, prompt: Prompt, params: SamplingParams | None) -> Job:
        self._batches.check_open()
        ids = self.prompt_ids(prompt)
        fresh = not ids or self.tokenizer.is_control(ids[-1])
        return Job(
            ids, _checked(params), self.tokenizer, frozenset(self.config.eos_ids),
            self.max_seq_len, fresh,
        )  # fmt: skip

    def _answer(self, messages: Messages, params: SamplingParams | None) -> Job:
        self._batches.check_open()
        template = self.template
        return Job(
            template.encode(messages), _checked(params), self.tokenizer, template.stop_ids,
            self.max_seq_len, fresh=True,
        )  # fmt: skip

    def _jobs(
        self, prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
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
                jobs.append(self._job(prompt, one))
            except LlamaError as error:
                raise LlamaError(f"prompt {number}: {error}") from None
        return jobs

    def _finish(self, jobs: list[Job]) -> list[Result]:
        for _ in self._batches.run(jobs):
            pass
        return [job.result for job in jobs if job.result is not None]


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
