"""The default model, SmolLM2-135M-Instruct, against transformers: the same tokens, and a right
answer.

transformers gets the GGUF's weights as the gguf package dequantises them, so nothing of ours
stands between. Its tokens are known without letting it write: if at each place of our greedy
text its largest logit is the token we wrote, then by induction it would have written the same.
One prompt it writes itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from numpy.typing import NDArray

from llama import Llama, SamplingParams
from llama.engine import Engine
from llama.quant import Kind

COUNT = 48
NEAR_TIE = 0.05
PROMPTS = [
    "Richard Feynman was a ",
    "Once upon a time",
    "The three laws of thermodynamics are:\n1.",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first",
    "Water boils at",
    "Q: What is 12 times 12?\nA:",
    "Die Hauptstadt von Deutschland ist",
    "The best way to learn a new language is to",
    "To be, or not to be",
]
QUESTIONS = ["What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain."]


@pytest.fixture(scope="module")
def prompts(bins: dict[str, Path]) -> list[list[int]]:
    """Token ids: plain beginnings, and questions in the chat template."""
    with Llama(bins["f16"]) as llm:
        plain = [llm.prompt_ids(text) for text in PROMPTS]
        asked = [llm.template.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    return plain + asked


def greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The COUNT tokens after each prompt, ends of text included; all prompts in one batch."""
    with Engine(path) as engine:
        batch = [(t, s, p) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        new: list[list[int]] = [[] for _ in prompts]
        for _ in range(COUNT):
            want = [p >= len(prompts[s]) - 1 for _, s, p in batch]
            logits = engine.forward(*zip(*batch, strict=True), want)
            assert logits is not None
            for s, row in enumerate(logits):
                new[s].append(int(row.argmax()))
            batch = [
                (tokens[-1], s, len(prompts[s]) + len(tokens) - 1) for s, tokens in enumerate(new)
            ]
    return new


@pytest.fixture(scope="module")
def texts(bins: dict[str, Path], prompts: list[list[int]]) -> list[list[int]]:
    """Our greedy text at f32 after each prompt."""
    return greedy(bins["f32"], prompts)


@pytest.fixture(scope="module")
def judged(
    theirs: Any, prompts: list[list[int]], texts: list[list[int]]
) -> list[NDArray[np.float32]]:
    """transformers' logits at each place of our texts: (COUNT, vocab_size) each."""
    found = []
    with torch.inference_mode():
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt + text[:-1]])
            found.append(theirs(ids).logits[0, len(prompt) - 1 :].numpy())
    return found


def test_f32_writes_transformers_tokens(
    theirs: Any, prompts: list[list[int]], texts: list[list[int]], judged: list[Any]
) -> None:
    assert len(prompts) >= 10
    closest = np.inf
    for prompt, text, logits in zip(prompts, texts, judged, strict=True):
        assert logits.argmax(axis=1).tolist() == text, prompt
        top = np.sort(logits, axis=1)
        closest = min(closest, float((top[:, -1] - top[:, -2]).min()))
    print(f"{len(prompts)} prompts, {COUNT} tokens each; the closest two logits: {closest:.4f}")
    with torch.inference_mode():
        ids = torch.tensor([prompts[0]])
        whole = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT,
            min_new_tokens=COUNT, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert whole[0, len(prompts[0]) :].tolist() == texts[0]


def forced(path: Path, prompt: list[int], text: list[int], **options: Any) -> NDArray[np.float32]:
    """Our logits at each place of TEXT: (COUNT, vocab_size)."""
    ids = prompt + text[:-1]
    with Engine(path, **options) as engine:
        want = [p >= len(prompt) - 1 for p in range(len(ids))]
        logits = engine.forward(ids, [0] * len(ids), range(len(ids)), want)
    assert logits is not None
    return logits


def test_f32_logits_are_transformers(
    bins: dict[str, Path], prompts: list[list[int]], texts: list[list[int]], judged: list[Any]
) -> None:
    worst = 0.0
    for prompt, text, right in list(zip(prompts, texts, judged, strict=True))[::4]:
        ours = forced(bins["f32"], prompt, text)
        worst = max(worst, float(np.abs(ours - right).max() / np.abs(right).max()))
    print(f"largest difference: {worst:.1e} of the largest logit")
    assert worst <= 1e-4


def test_f16_chooses_transformers_tokens_but_for_near_ties(
    bins: dict[str, Path], prompts: list[list[int]], texts: list[list[int]], judged: list[Any]
) -> None:
    near = []
    for prompt, text, right in zip(prompts, texts, judged, strict=True):
        ours = forced(bins["f16"], prompt, text)
        for i, (mine, logits) in enumerate(zip(ours.argmax(axis=1), right, strict=True)):
            if mine != text[i]:
                gap = float(logits[text[i]] - logits[mine])
                near.append(f"{prompt[:4]}... token {i}: {mine} for {text[i]}, {gap:.4f} apart")
                assert gap < NEAR_TIE, near[-1]
    print(
        f"{len(near)} near-ties under {NEAR_TIE} of {len(prompts) * COUNT} tokens:", *near, sep="\n"
    )


@pytest.mark.parametrize("kind, least", [(Kind.Q8, 0.95), (Kind.Q4, 0.65)])
def test_quantised_stays_close(
    bins: dict[str, Path], prompts: list[list[int]], texts: list[list[int]], judged: list[Any],
    kind: Kind, least: float, tmp_path: Path,
) -> None:  # fmt: skip
    """How often its largest logit is f32's, along f32's texts: 98 % and 75 % were seen."""
    path = small_models.quantized(bins["f32"], tmp_path / "small.bin", kind)
    same = [
        forced(path, prompt, text).argmax(axis=1) == text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    share = float(np.mean(same))
    print(f"{kind.label}: {share:.1%} of {len(prompts) * COUNT} tokens")
    assert share >= least


def test_rotation_serves_8_bit_activations(
    bins: dict[str, Path], prompts: list[list[int]], texts: list[list[int]], tmp_path: Path
) -> None:
    """How much the logits move from 16 bits to 8: by 0.41 of the plain kind's was seen."""
    moved = []
    for kind in (Kind.Q8, Kind.Q8R):
        path = small_models.quantized(bins["f32"], tmp_path / kind.label, kind)
        coarse, fine = (
            [forced(path, *pair, activations=bits) for pair in zip(prompts, texts, strict=True)]
            for bits in (8, 16)
        )
        moved.append(np.square(np.array(coarse) - np.array(fine)).mean() ** 0.5)
    print(f"rms of the change: plain {moved[0]:.4f}, rotated {moved[1]:.4f}")
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_capital_of_france(bins: dict[str, Path], dtype: str) -> None:
    with Llama(bins[dtype]) as llm:
        question = [{"role": "user", "content": QUESTIONS[0]}]
        answer = llm.chat(question, SamplingParams(temperature=0.0))
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop" or answer.finish_reason == "eos"
