"""Which of several completions is best, by a reward model: rejection sampling (arXiv:2307.09288,
section 3.2.3, where Llama 2 draws K answers to a prompt and keeps the one of the highest reward).

A reward model is a Llama with a sequence classification head of one label; its logit at the last
token is the reward of all the text before. It reads the very ids that the other model wrote, so
both must have one vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llama.batch import MAX_CHUNK, Batches
from llama.completion import Job, Result
from llama.config import Head
from llama.errors import LlamaError
from llama.tokenizer import Tokenizer, vocabularies_differ


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

    def judge(self, job: Job) -> float:
        """The reward of a finished completion: of its prompt and text, end token included."""
        reward = score(self._batches, job.kept())
        if not math.isfinite(reward):
            raise LlamaError(f"the reward of completion {job.completion} is {reward}")
        return reward


def score(batches: Batches, ids: Sequence[int]) -> float:
    """The logit at the last of IDS, of a sequence classification model with one label. What it
    has read before of their beginning is not computed again."""
    slot = batches.slots.take(ids)
    logits = None
    try:
        while (start := len(slot.tokens)) < len(ids):
            part = list(ids[start : start + MAX_CHUNK])
            n = len(part)
            want = [start + i + 1 == len(ids) for i in range(n)]
            with batches.turns:
                batches.check_open()
                logits = batches.engine.forward(
                    part, [slot.number] * n, range(start, start + n), want,
                    rope_lengths=[len(ids)] * n,
                )  # fmt: skip
                slot.tokens += part
                batches.counters.computed_tokens += n
    finally:
        if not batches.closed:
            batches.slots.give(slot)
    assert logits is not None  # the last id is always computed
    return float(logits[0, 0])


def best_first(results: Sequence[Result]) -> list[Result]:
    """By reward, else by the sum of their logprobs; the first drawn of equals first."""

    def worth(result: Result) -> float:
        total = result.cumulative_logprob if result.reward is None else result.reward
        return total or 0.0

    return sorted(results, key=worth, reverse=True)
