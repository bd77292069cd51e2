"""Which of several completions is best, by a reward model: rejection sampling (arXiv:2307.09288,
section 3.2.3, where Llama 2 draws K answers to a prompt and keeps the one of the highest reward).

A reward model is a Llama with a sequence classification head of one label; its logit at the last
token is the reward of all the text before. It reads the very ids that the other model wrote, so
both must have one vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llama.batch import Batches
from llama.completion import Job, Result
from llama.config import Head
from llama.errors import LlamaError
from llama.tokenizer import Tokenizer


class Judge:
    """A reward model beside the model whose completions it judges."""

    def __init__(self, batches: Batches, tokenizer: Tokenizer, theirs: Tokenizer) -> None:
        """BATCHES and TOKENIZER are the reward model's, THEIRS the other model's. LlamaError where
        it is no reward model, or the two do not belong together."""
        batches.check_open()
        config = batches.engine.config
        if config.head != Head.SEQUENCE or config.n_labels != 1:
            found = f"the head {config.head.name.lower()}"
            found += f" with {config.n_labels} labels" if config.n_labels else ""
            raise LlamaError(
                "the reward model must have a sequence classification head with one label, found "
                f"{found}"
            )
        problem = vocabularies_differ(theirs, tokenizer)
        if problem is not None:
            raise LlamaError(f"the reward model has another vocabulary: {problem}")
        self._batches = batches
        self.max_seq_len = batches.engine.max_seq_len

    def check(self, prompt: Sequence[int]) -> None:
        """LlamaError for a prompt that leaves no room in the reward model's context."""
        if len(prompt) > self.max_seq_len:
            raise LlamaError(
                f"the prompt has {len(prompt)} tokens and the reward model's context holds "
                f"{self.max_seq_len}"
            )

    def rewards(self, jobs: Sequence[Job]) -> list[float]:
        """The rewards of finished completions: of their prompts and texts, end tokens included."""
        found = scores(self._batches, [job.kept() for job in jobs])
        for job, reward in zip(jobs, found, strict=True):
            if not math.isfinite(reward):
                raise LlamaError(f"the reward of completion {job.completion} is {reward}")
        return found


def scores(batches: Batches, texts: Sequence[Sequence[int]]) -> list[float]:
    """The logit at the last id of each of TEXTS, of a sequence classification model with one
    label. Beginnings that they share are computed once."""
    found = [math.nan] * len(texts)
    last = [range(len(ids) - 1, len(ids)) for ids in texts]
    for number, rows in batches.outputs(texts, last):
        found[number] = float(rows[-1, 0])
    return found


def vocabularies_differ(ours: Tokenizer, other: Tokenizer) -> str | None:
    """How OTHER's ids mean other texts than OURS, or None. Without tokenizers all that is known
    is how many ids there are."""
    if ours.kind != other.kind:
        return f"expected a tokenizer of kind {ours.kind}, found {other.kind}"
    sizes = ours.size or ours.vocab_size, other.size or other.vocab_size
    if sizes[0] != sizes[1]:
        return f"expected {sizes[0]} tokens, found {sizes[1]}"
    for token in range(ours.size):
        expected, found = ours.written(token), other.written(token)
        if expected != found:
            texts = [x.decode("utf-8", "backslashreplace") for x in (expected, found)]
            return f"token {token}: expected {texts[0]!r}, found {texts[1]!r}"
    if ours.control != other.control:
        names = sorted(ours.control.items() ^ other.control.items(), key=lambda item: item[1])
        return f"{names[0][0]!r} is a control token of one and not of the other"
    return None


def best_first(results: Sequence[Result]) -> list[Result]:
    """By reward, else by the sum of their logprobs; the first drawn of equals first."""

    def worth(result: Result) -> float:
        total = result.cumulative_logprob if result.reward is None else result.reward
        return total or 0.0

    return sorted(results, key=worth, reverse=True)
