"""What a person may ask of a model in one go: a prompt, how to sample, how many completions.

A Request becomes jobs, all completions of its prompt, which share a seed and the prompt's
computation; and when they are done it picks the ones to return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llama.completion import Job, Result
from llama.errors import LlamaError
from llama.infill import Gap
from llama.reward import Judge, best_first
from llama.sampling import SamplingParams, whole_number

if TYPE_CHECKING:
    from llama.generate import Llama

MAX_COMPLETIONS = 1024  # of one prompt
Prompt = str | Sequence[int] | Gap  # text, or token ids taken as they are, or a gap to fill


@dataclass(frozen=True)
class Request:
    """PROMPT completed N times (None: once), with PARAMS (None: the defaults). BEST_OF: so many
    are made, and the N with the largest sum of logprobs returned, the best first, or, with REWARD,
    an open reward model of the same vocabulary, those that it gives the most. ECHO: texts begin
    with their prompt, and its tokens have logprobs where PARAMS ask for them. NAME: what an error
    calls it; else by its number."""

    prompt: Prompt
    params: SamplingParams | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool = False
    reward: Llama | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", whole_number("n", self.n, 1, MAX_COMPLETIONS))
        if self.best_of is not None:
            made = whole_number("best_of", self.best_of, self.n or 1, MAX_COMPLETIONS)
            object.__setattr__(self, "best_of", made)
        elif self.reward is not None:
            raise LlamaError("a reward model chooses among completions: best_of says how many")
        if not isinstance(self.echo, bool):
            raise LlamaError(f"echo must be true or false, found {self.echo!r}")
        if self.params is not None and not isinstance(self.params, SamplingParams):
            found = type(self.params).__name__
            raise LlamaError(f"params must be SamplingParams, found {found}")

    def jobs(self, first: Job) -> list[Job]:
        """All completions of the prompt, FIRST among them."""
        ranked = self.best_of is not None and self.reward is None
        if ranked and first.params.logprobs is None:
            first.params = replace(first.params, logprobs=0)
        return [first, *(first.twin(k) for k in range(1, self.best_of or self.n or 1))]

    def answer(self, jobs: list[Job], judge: Judge | None = None) -> list[Result]:
        """Of the finished JOBS what was asked for; JUDGE is the reward model's."""
        results = [job.result for job in jobs if job.result is not None]
        if judge is not None:
            rewards = judge.rewards(jobs)
            results = [replace(r, reward=x) for r, x in zip(results, rewards, strict=True)]
        if self.best_of is not None:
            results = best_first(results)
        return results[: self.n or 1]
