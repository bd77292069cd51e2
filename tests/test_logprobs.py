"""Logprobs against torch, and generate() with every knob against the sampler alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_models
from fake_engine import FakeEngine

from llama import engine
from llama.completion import Result
from llama.config import expected_tensors
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import Record, Writer
from llama.generate import Llama
from llama.quant import Kind
from llama.sampling import SamplingParams

KNOBS = [
    SamplingParams(temperature=1.1, presence_penalty=1.5, frequency_penalty=0.5, seed=1),
    SamplingParams(temperature=0.9, repetition_penalty=1.3, frequency_penalty=-0.4, seed=2),
    SamplingParams(temperature=1.0, logit_bias={5: 3.0, 13: float("-inf"), 400: 2.5}, seed=3),
    SamplingParams(temperature=1.2, top_p=1.0, typical_p=0.6, seed=4),
    SamplingParams(temperature=1.0, mirostat_tau=3.0, mirostat_eta=0.3, seed=5),
    SamplingParams(temperature=0.0, frequency_penalty=1.0, logit_bias={42: 1.5}),
]
ALL = [SamplingParams(**{**vars(knobs), "max_tokens": 24, "logprobs": 3}) for knobs in KNOBS]


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[Llama]:
    with Llama(stories) as llm:
        yield llm


def logprobs_of(llm: Llama, prompt: list[int], result: Result) -> np.ndarray:
    torch = pytest.importorskip("torch")
    logits = llm.logits([*prompt, *result.token_ids])[len(prompt) - 1 : -1]
    return np.asarray(torch.tensor(logits).double().log_softmax(-1).numpy())


@pytest.mark.parametrize("params", ALL, ids=range(len(ALL)))
def test_logprobs_are_the_models_own(llm: Llama, params: SamplingParams) -> None:
    """Whatever the knobs do to the choice, they are those of the raw logits."""
    prompt = llm.prompt_ids("One day")
    result = llm.generate(prompt, params)
    right = logprobs_of(llm, prompt, result)
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    for token, said, row in zip(result.logprobs, result.token_ids, right, strict=True):
        assert token.token_id == said and abs(token.logprob - row[said]) < 1e-9
        assert list(token.top) == list(np.argsort(-row, kind="stable")[:3])
        assert np.allclose(list(token.top.values()), row[list(token.top)], rtol=0, atol=1e-9)
    assert result.cumulative_logprob == sum(token.logprob for token in result.logprobs)


def test_how_many(llm: Llama) -> None:
    none = llm.generate("x", SamplingParams(max_tokens=3))
    assert none.logprobs is None and none.cumulative_logprob is None
    bare = llm.generate("x", SamplingParams(max_tokens=3, logprobs=0))
    assert bare.logprobs is not None and [token.top for token in bare.logprobs] == [{}] * 3
    whole = llm.generate("x", SamplingParams(max_tokens=1, logprobs=512)).logprobs
    assert whole is not None and sorted(whole[0].top) == list(range(512))
    assert abs(np.exp(list(whole[0].top.values())).sum() - 1) < 1e-9
    with pytest.raises(LlamaError, match="logprobs must be 0 to 512 .the vocabulary., found 513"):
        llm.generate("x", SamplingParams(logprobs=513))
    with pytest.raises(LlamaError, match="logit_bias token id must be 0 to 511, found 512"):
        llm.generate("x", SamplingParams(logit_bias={512: 1.0}))


def test_the_whole_of_generate_in_a_few_lines(llm: Llama) -> None:
    for params in ALL:
        prompt = llm.prompt_ids("One day")
        found, mu = llm.generate(prompt, params).token_ids, array("d", [2 * params.mirostat_tau])
        for n, token in enumerate(found):
            ids = prompt + found[:n]
            logits = llm.logits(ids)[-1]
            assert engine.sample_logits(logits, params, ids, 0, len(ids), n, mu) == token


def test_together_is_as_alone(llm: Llama, stories: Path) -> None:
    prompts = ["One day", "Lily", "One day", "The dog", "One day", "x"]
    together = llm.generate(prompts, ALL)
    with Llama(stories, threads=1) as other:
        for prompt, params, result in zip(prompts, ALL, together, strict=True):
            alone = other.generate(prompt, params)
            assert (alone.text, alone.logprobs) == (result.text, result.logprobs)


def test_a_banned_token_never_comes_and_a_pushed_one_always(llm: Llama) -> None:
    said = llm.generate("One day", SamplingParams(temperature=0.0, max_tokens=30)).token_ids
    ban = SamplingParams(temperature=0.0, max_tokens=30, logit_bias={said[0]: float("-inf")})
    assert said[0] not in llm.generate("One day", ban).token_ids
    push = SamplingParams(temperature=1.0, max_tokens=5, logit_bias={300: 100})
    assert llm.generate("One day", push).token_ids == [300] * 5
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(512), float("-inf")))
    with pytest.raises(LlamaError, match="every logit is -infinity"):
        llm.generate("One day", nothing)


def test_rows_that_are_not_there(stories: Path) -> None:
    with engine.Engine(stories) as numbers:
        numbers.forward([1, 5], [0, 0], [0, 1], [False, True], keep=True)
        assert len(numbers.logprobs(0, 5, 512)[1]) == 512
        for row, token, n in ((1, 5, 2), (0, 512, 2), (0, -1, 2), (0, 5, 513), (0, 5, -1)):
            with pytest.raises(LlamaError):
                numbers.logprobs(row, token, n)


def test_the_end_tokens_logprob_counts() -> None:
    fake = FakeEngine(64, script=b"abcdef\xff\xff")
    llm = Llama.on(fake)  # type: ignore[arg-type]
    result = llm.generate("abc", SamplingParams(temperature=0.0, logprobs=1))
    assert result.finish_reason == "eos" and result.logprobs is not None
    assert [token.token_id for token in result.logprobs] == result.token_ids
    assert result.token_ids[-1] == 0


def test_huge_logits_keep_their_digits(tmp_path: Path) -> None:
    """Equal logits of about 1e25 are equally likely, however many there are."""
    shape = small_models.config()
    records = [Record(name, Kind.F32, size) for name, size in expected_tensors(shape).items()]
    with Writer(tmp_path / "a.bin", shape, records) as writer:
        for record in records:
            huge = record.name == "output.weight"
            writer.write(record.name, np.full(record.shape, 1e25 if huge else 1.0, np.float32))
    with Engine(tmp_path / "a.bin", threads=1) as engine:
        engine.forward([1], [0], [0], [True], keep=True)
        logprob, top = engine.logprobs(0, 3, shape.vocab_size)
    assert list(top) == list(range(shape.vocab_size))
    assert np.allclose([logprob, *top.values()], -np.log(shape.vocab_size), rtol=1e-12)
