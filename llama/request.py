"""What a person may ask of a model in one go: a prompt, how to sample, how many completions.

A Request becomes jobs, all completions of its prompt, which share a seed and the prompt's
computation; and when they are done it picks the ones to return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama.completion import Job, Result
from llama.errors import LlamaError
from llama.infill import Gap
from llama.sampling import SamplingParams, whole_number

MAX_COMPLETIONS = 1024  # of one prompt
Prompt = str | Sequence[int] | Gap  # text, or token ids taken as they are, or a gap to fill


@dataclass(frozen=True)
class Request:
    """PROMPT completed N times (None: once), with PARAMS (None: the defaults). BEST_OF: so many
    are made, and the N with the largest sum of logprobs returned, the best first. ECHO: texts
    begin with their prompt, and its tokens have logprobs where PARAMS ask for them."""

    prompt: Prompt
    params: SamplingParams | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", whole_number("n", self.n, 1, MAX_COMPLETIONS))
        if self.best_of is not None:
            made = whole_number("best_of", self.best_of, self.n or 1, MAX_COMPLETIONS)
            object.__setattr__(self, "best_of", made)
        if not isinstance(self.echo, bool):
            raise LlamaError(f"echo must be true or false, found {self.echo!r}")
        if self.params is not None and not isinstance(self.params, SamplingParams):
            found = type(self.params).__name__
            raise LlamaError(f"params must be SamplingParams, found {found}")

    def jobs(self, first: Job) -> list[Job]:
        """All completions of the prompt, FIRST among them."""
        if self.best_of is not None and first.params.logprobs is None:
            first.params = replace(first.params, logprobs=0)
        return [first, *(first.twin(k) for k in range(1, self.best_of or self.n or 1))]

    def answer(self, jobs: list[Job]) -> list[Result]:
        """Of the finished JOBS what was asked for."""
        results = [job.result for job in jobs if job.result is not None]
        if self.best_of is not None:
            results.sort(key=lambda result: -(result.cumulative_logprob or 0.0))
        return results[: self.n or 1]
