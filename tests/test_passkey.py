"""A passkey hidden in a long text: the default model's greedy answer is transformers' at every
length and depth, whatever it is.

transformers reads prompt and answer in one pass; if its largest logit at each place is the token
that we wrote, it would have written the same. Beyond the trained length the answer is nonsense,
and must be the same nonsense; that takes minutes and runs where LLAMA_TEST_LONG is set.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, SamplingParams

KEY = "58317"
FILLER = (
    "The river turns east behind the old mill.", "Nobody had painted the fence for years.",
    "On Mondays the market opens a little later.", "A grey cat sleeps on the warm stone wall.",
    "The bus to the harbour leaves every half hour.", "Rain is expected before the evening.",
    "Two children count the boats from the bridge.", "The baker keeps his door open in summer.",
)  # fmt: skip
ANSWER = SamplingParams(temperature=0.0, max_tokens=10)


def hidden(llm: Llama, length: int, depth: float) -> list[int]:
    """A question of about LENGTH tokens, the passkey at DEPTH of the text in it."""
    rng = random.Random(length)
    text: list[str] = []
    n = 60
    while n < length:
        text.append(rng.choice(FILLER))
        n += len(llm.tokenizer.encode(" " + text[-1]))
    text.insert(
        round(depth * len(text)), f"The passkey is {KEY}. Remember it: {KEY} is the passkey."
    )
    question = "A passkey is hidden in this text. Find it.\n\n{}\n\nWhat is the passkey?"
    return llm.template.encode([{"role": "user", "content": question.format(" ".join(text))}])


def compare(bins: dict[str, Path], theirs: Any, length: int, depth: float, **options: Any) -> None:
    with Llama(bins["f32"], **options) as llm:
        prompt = hidden(llm, length, depth)
        assert abs(len(prompt) - length) < 50
        answer = llm.generate(prompt, ANSWER)
        print(f"{len(prompt)} tokens, key {depth:.0%} deep: {answer.text!r}")
        assert length > 256 or KEY in answer.text  # what it finds shows that the test can
    with torch.inference_mode():
        count = len(answer.token_ids)
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        logits = theirs(ids, logits_to_keep=count).logits[0]
    assert logits.argmax(-1).tolist() == answer.token_ids


@pytest.mark.parametrize("length, depth", [(256, 0.1), (256, 0.9), (1000, 0.7), (2000, 0.4)])
def test_the_answer_is_transformers(
    bins: dict[str, Path], theirs: Any, length: int, depth: float
) -> None:
    compare(bins, theirs, length, depth)


@pytest.mark.filterwarnings("ignore:positions beyond")
@pytest.mark.skipif("LLAMA_TEST_LONG" not in os.environ, reason="minutes: make test-long")
@pytest.mark.parametrize("length, depth", [(8000, 0.3), (9000, 0.3), (9000, 0.95)])
def test_to_the_trained_length_and_beyond(
    bins: dict[str, Path], theirs: Any, length: int, depth: float
) -> None:
    assert theirs.config.max_position_embeddings == 8192
    compare(bins, theirs, length, depth, max_seq_len=9216)
