"""Completions of a real model with a known answer: batches, kept prefixes, seeds, threads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama import engine
from llama.errors import LlamaError
from llama.generate import Llama
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def known(data: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        (data / "reference" / "stories260K_greedy.json").read_text()
    )
    return answer


@pytest.fixture(scope="module")
def real(stories: Path) -> Iterator[Llama]:
    with Llama(stories) as llm:
        yield llm


PROMPTS = [
    "", "One day", "Lily and her mom went to the park. " * 3, "The dog", "x", "One day",
    "Tim was sad because", "\n", "She said, \"", "Once upon a time, there was a little girl",
    "A very long time ago, far away, there lived a cat. " * 5, "He",
]  # fmt: skip


def test_the_known_story_word_for_word(real: Llama, known: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=known["steps"])
    result = real.generate(known["prompt"], params)
    ids = known["first_64_ids"]
    assert result.token_ids[: len(ids)] == ids
    assert result.text == known["text"] and result.finish_reason == "length"
    assert "".join(real.stream(known["prompt"], params)) == known["text"]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_real_batch_is_as_alone(real: Llama, stories: Path, temperature: float) -> None:
    params = [
        SamplingParams(temperature=temperature, seed=n % 3, max_tokens=20 + 9 * n, min_p=0.01,
                       repetition_penalty=1.0 + n % 2 * 0.3)
        for n in range(len(PROMPTS))
    ]  # fmt: skip
    together = real.generate(PROMPTS, params)
    with Llama(stories) as other:
        for prompt, one, result in zip(PROMPTS, params, together, strict=True):
            assert other.generate(prompt, one).token_ids == result.token_ids
    with Llama(stories, threads=1) as fresh:
        assert [r.text for r in fresh.generate(PROMPTS, params)] == [r.text for r in together]


def test_kept_prefixes_change_no_bit(real: Llama, stories: Path) -> None:
    ids = real.tokenizer.encode("Once upon a time there was a big red ball", bos=True)
    whole = real.logits(ids)
    for n in (1, 5, len(ids)):
        assert np.array_equal(real.logits(ids[:n]), whole[:n])
    params = SamplingParams(temperature=0.0, max_tokens=30)
    first = real.generate(ids, params)
    longer = [*ids, *first.token_ids[:10]]
    with Llama(stories) as fresh:
        expect = fresh.generate(longer, params)
    found = real.generate(longer, params)
    assert found.cached_tokens == len(longer) - 1
    assert found.token_ids == expect.token_ids


def test_each_token_is_drawn_for_its_position(real: Llama) -> None:
    """The whole of generate(), said in five lines with the sampler alone."""
    params = SamplingParams(temperature=1.1, top_k=30, seed=6, max_tokens=12)
    params = dataclasses.replace(params, repetition_penalty=1.2)
    ids = real.tokenizer.encode("One day", bos=True)
    found = real.generate(ids, params).token_ids
    for n, token in enumerate(found):
        seen = ids + found[:n]
        logits = real.logits(seen)[-1]
        assert engine.sample_logits(logits, params, seen, 0, len(seen)) == token


def test_seeds_give_other_stories(real: Llama) -> None:
    texts = {
        real.generate("One day", SamplingParams(temperature=1.0, seed=n, max_tokens=30)).text
        for n in range(8)
    }
    assert len(texts) == 8


def test_streams_of_a_real_model_join_to_its_text(real: Llama) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=120, stop=("Lily", "\n\n"))
    for prompt in PROMPTS[1:4]:
        assert "".join(real.stream(prompt, params)) == real.generate(prompt, params).text


def test_a_text_continues_its_prompt(real: Llama) -> None:
    """The completion's first word keeps the space that parts it from the prompt."""
    result = real.generate("Once upon a", SamplingParams(temperature=0.0, max_tokens=3))
    assert result.text.startswith(" time")


def test_real_threads(real: Llama) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    expect = [real.generate(prompt, params).text for prompt in PROMPTS]
    found: dict[int, str] = {}

    def work(n: int) -> None:
        found[n] = real.generate(PROMPTS[n], params).text

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(PROMPTS))] == expect


def test_two_models_are_open_at_once(stories: Path, tiny: Path, known: dict[str, Any]) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    with Llama(stories) as one, Llama(tiny) as two:
        pairs = list(
            itertools.zip_longest(one.stream("", greedy), two.stream("abc", greedy), fillvalue="")
        )
        texts = ["".join(pieces) for pieces in zip(*pairs, strict=True)]
        assert known["text"].startswith(texts[0])
        assert texts[1] == two.generate("abc", greedy).text


def test_the_full_context(stories: Path) -> None:
    with Llama(stories, max_seq_len=64) as llm:
        result = llm.generate("One day", SamplingParams(temperature=0.0))
        assert result.finish_reason == "length"
        assert result.prompt_tokens + len(result.token_ids) == 64
        with pytest.raises(LlamaError, match="tokens and the context holds 64"):
            llm.generate("word " * 100)
