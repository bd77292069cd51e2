"""SamplingParams refuses what cannot be; the C sampler against numpy and transformers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llama import engine
from llama.errors import LlamaError
from llama.sampling import NAMES, SamplingParams, params_from


def draw(
    logits: NDArray[np.float32], params: SamplingParams, seen: Any = (), completion: int = 0,
    position: int = 0, said: int = 0,
) -> int:  # fmt: skip
    return int(engine.sample_logits(logits, params, seen, completion, position, said))


# --- the knobs


def test_defaults_are_documented() -> None:
    text = str(SamplingParams.__doc__)
    params = SamplingParams()
    assert (params.temperature, params.top_p) == (0.6, 0.9)
    for name in NAMES:
        assert f"\n    {name}" in text
    assert text.count("Default") == len(NAMES)


@pytest.mark.parametrize(
    ("knob", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True, 1e39, [1]]),
        ("top_k", [-1, 1.5, 2.0, "3", None, True, 1 << 31]),
        ("top_p", [0, 0.0, -1, 1.0001, float("nan"), "0.5", None, True, 1e-300]),
        ("min_p", [-0.1, 1.1, float("nan"), None, False]),
        ("repetition_penalty", [0, -1, float("nan"), float("inf"), None, True, "x"]),
        ("typical_p", [0, -1, 1.0001, float("nan"), "0.5", None, True]),
        ("mirostat_tau", [-1, float("nan"), float("inf"), None, True, "5"]),
        ("mirostat_eta", [-0.1, float("nan"), None, False]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), None, True, "1"]),
        ("frequency_penalty", [-2.1, 2.1, float("nan"), None, True, "1"]),
        ("logit_bias", [None, 5, "abc", [1]]),
        ("logit_bias token id", [{-1: 1}, {1.5: 1}, {"a": 1}, {1 << 31: 1}, {True: 1}]),
        ("logit_bias of token 4", [{4: None}, {4: "1"}, {4: float("inf")}, {4: float("nan")},
                                   {4: True}]),
        ("logprobs", [-1, 1.0, "1", True, 1 << 31]),
        ("seed", [-1, 1 << 64, 1.0, "1", True]),
        ("max_tokens", [0, -1, 1.0, "1", True, 1 << 31]),
        ("stop", ["", [""], [1], 5, b"x", ["a", ""], [None], None]),
    ],
)
def test_impossible_values_are_refused_by_name(knob: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(LlamaError, match=f"^{knob} must") as caught:
            SamplingParams(**{knob.split()[0]: value})
        assert "found" in str(caught.value) and "\n" not in str(caught.value)


def test_values_are_kept_as_plain_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(1), top_k=np.int64(5), top_p=1, min_p=0, seed=np.uint64(2**64 - 1),
        stop=["a", "b"], max_tokens=3, presence_penalty=1, logprobs=np.int32(2),
        logit_bias={np.int64(7): 1, "3": -np.inf, 5: np.float32(0.5)}, typical_p=1, mirostat_tau=5,
    )  # fmt: skip
    kinds = [type(getattr(params, name)) for name in NAMES]
    assert kinds == [float, int, *[float] * 8, tuple, int, int, tuple, int]
    assert params.logit_bias == params.biases == ((3, -np.inf), (5, 0.5), (7, 1.0))
    assert SamplingParams(stop="end").stop == ("end",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 4  # type: ignore[misc]
    with pytest.raises(LlamaError, match="unknown sampling parameter 'top_q'; there are temp"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


def test_params_from() -> None:
    base = SamplingParams(seed=4)
    assert params_from({"top_k": 3}, base) == SamplingParams(seed=4, top_k=3)
    with pytest.raises(LlamaError, match="unknown sampling parameter 'top_q'; there are temp"):
        params_from({"top_q": 3})


def test_a_seed_is_drawn_once() -> None:
    params = SamplingParams()
    assert params.seeded().seed != params.seeded().seed
    assert SamplingParams(seed=0).seeded().seed == 0


# --- the C sampler


def numpy_probabilities(
    logits: NDArray[np.float32], params: SamplingParams, seen: list[int], said: int = 0
) -> NDArray[np.float64]:
    """The distribution to draw from, straight from the definitions, in float64."""
    scores = logits.astype(np.float64)
    for token, bias in params.biases:
        scores[token] += bias
    for token in set(seen):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in Counter(seen[len(seen) - said :]).items():
        scores[token] -= params.presence_penalty + times * params.frequency_penalty
    scores /= params.temperature
    if params.top_k:
        scores[scores < np.sort(scores)[::-1][min(params.top_k, len(scores)) - 1]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        n = int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1
        p[order[n:]] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    if params.typical_p < 1:
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        far = np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum())
        order = np.argsort(far, kind="stable")
        last = min(int((np.cumsum(p[order]) < params.typical_p).sum()), len(p) - 1)
        p[far > far[order[last]]] = 0
    return np.asarray(p / p.sum())


def openai_penalties(
    scores: NDArray[np.float32], params: SamplingParams, said: list[int]
) -> NDArray[np.float32]:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, as OpenAI's manual has
    it; transformers has no such knobs."""
    count = np.bincount(said, minlength=len(scores))
    taken = count * params.frequency_penalty + (count > 0) * params.presence_penalty
    return (scores - taken).astype(np.float32)


def transformers_probabilities(
    logits: NDArray[np.float32], params: SamplingParams, seen: list[int], said: int = 0
) -> NDArray[np.float64]:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    scores = torch.tensor(logits)[None]
    ids = torch.tensor([seen], dtype=torch.long)
    steps: list[Any] = []
    if params.biases:
        steps.append(lp.SequenceBiasLogitsProcessor({(t,): bias for t, bias in params.biases}))
    if seen and params.repetition_penalty != 1:
        steps.append(lp.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        steps.append(lambda ids, scores: torch.from_numpy(
            openai_penalties(scores.numpy()[0], params, seen[len(seen) - said :]))[None]
        )  # fmt: skip
    steps.append(lp.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(lp.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        steps.append(lp.TypicalLogitsWarper(params.typical_p))
    for step in steps:
        scores = step(ids, scores)
    return np.asarray(scores.double().softmax(-1)[0].numpy())


CASES = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.3, "top_p": 1.0},
    {"temperature": 2.5, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.3, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.7},
    {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 0.6},
    {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 1.5},
    {"temperature": 1.0, "top_p": 1.0, "frequency_penalty": -0.7},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": -0.5, "frequency_penalty": 0.8,
     "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 1.0, "logit_bias": {3: 2.5, 17: -1.5, 40: 4.0}},
    {"temperature": 0.8, "logit_bias": {3: 2.5, 11: 3.0}, "repetition_penalty": 1.5, "top_k": 30},
    {"temperature": 1.0, "top_p": 1.0, "typical_p": 0.5},
    {"temperature": 1.4, "top_p": 1.0, "typical_p": 0.95},
    {"temperature": 1.0, "top_p": 1.0, "typical_p": 0.001},
    {"temperature": 1.2, "top_k": 25, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.6},
]  # fmt: skip
DRAWS = 6000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_distribution(case: dict[str, Any]) -> None:
    """Never a token outside the kept set, and each token as often as it should be."""
    rng = np.random.default_rng(7)
    params = SamplingParams(seed=11, **case)
    logits = (rng.normal(size=60) * 2).astype(np.float32)
    # the prompt's, then four that the completion said
    seen = [3, 3, 17, int(np.argmax(logits)), int(np.argmin(logits)), 5, 3, 5, 9]
    p = numpy_probabilities(logits, params, seen, 4)
    theirs = transformers_probabilities(logits, params, seen, 4)
    assert ((p > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(p, theirs, rtol=1e-4)
    counts = Counter(draw(logits, params, seen, position=n, said=4) for n in range(DRAWS))
    assert all(p[token] > 0 for token in counts)
    # chi-square; tokens expected less than ten times are counted together
    rare = p * DRAWS < 10
    expect = np.append(p[~rare], p[rare].sum()) * DRAWS
    found = np.array([counts[int(t)] for t in np.flatnonzero(~rare)], float)
    found = np.append(found, DRAWS - found.sum())
    if expect[-1] < 10:  # too few to be a class of their own
        expect, found = expect[:-1], found[:-1]
    chi2 = float(((found - expect) ** 2 / expect).sum())
    freedom = max(len(expect) - 1, 1)
    assert chi2 <= freedom + 4.5 * np.sqrt(2 * freedom) + 6


@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 300),
    st.floats(0.05, 5), st.integers(0, 40), st.floats(0.01, 1), st.floats(0, 1),
    st.floats(0.5, 2), st.floats(-2, 2), st.integers(0, 5),
)  # fmt: skip
def test_drawn_tokens_are_kept_tokens(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float,
    penalty: float, frequency: float, said: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=size).astype(np.float32) * 4
    seen = rng.integers(0, size, 5).tolist()
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        repetition_penalty=penalty, presence_penalty=-frequency / 2, frequency_penalty=frequency,
    )  # fmt: skip
    p = numpy_probabilities(logits, params, seen, said)
    # a token on the very edge of the kept set may fall either way in float32
    wider = dataclasses.replace(
        params, top_k=top_k and top_k + 1, top_p=min(1.0, top_p * 1.0001), min_p=min_p * 0.9999
    )
    loose = numpy_probabilities(logits, wider, seen, said)
    for position in range(20):
        token = draw(logits, params, seen, position=position, said=said)
        assert p[token] > 0 or loose[token] > 0


def test_greedy_takes_the_first_of_equals() -> None:
    params = SamplingParams(temperature=0.0)
    logits = np.array([1, 5, 2, 5, 5, -1], np.float32)
    assert {draw(logits, params, position=n) for n in range(50)} == {1}
    # the other knobs have no say, the penalty has
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0, seed=3)
    assert draw(logits, params) == 1
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert draw(logits, params, [1]) == 3 and draw(logits, params, [1, 3, 4]) == 1
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.5)
    assert draw(logits, params, [1, 3, 4]) == 1 and draw(logits, params, [1, 3, 4], said=2) == 1
    assert draw(logits, params, [1, 3, 4], said=3) == 2  # 1.5 each
    assert draw(logits, params, [3, 1, 4, 4, 1], said=4) == 3
    params = SamplingParams(temperature=0.0, logit_bias={1: float("-inf"), 3: -4, 4: -2.5, 0: 1})
    assert draw(logits, params) == 4
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert draw(-logits, params, [5]) == 5 and draw(-logits - 4, params, [5]) == 0


def test_greedy_is_argmax_at_any_size() -> None:
    rng = np.random.default_rng(8)
    for size in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1000, 32000, 49152):
        logits = rng.normal(size=size).astype(np.float32)
        for _ in range(20):
            logits[rng.integers(size)] = 7
            assert draw(logits, SamplingParams(temperature=0.0)) == int(np.argmax(logits))


def test_ties_with_the_kth_stay() -> None:
    logits = np.array([3, 1, 2, 2, 2, 0], np.float32)
    params = SamplingParams(temperature=3.0, top_k=2, top_p=1.0, seed=1)
    assert {draw(logits, params, position=n) for n in range(400)} == {0, 2, 3, 4}


def test_a_token_depends_on_seed_completion_and_position_alone() -> None:
    logits = np.random.default_rng(9).normal(size=500).astype(np.float32)
    base = SamplingParams(temperature=1.0, top_p=1.0, seed=5)
    other = SamplingParams(temperature=1.0, top_p=1.0, seed=6)
    keys = [(p, c, n) for p in (base, other) for c in (0, 1) for n in range(30)]
    first = [draw(logits, p, (), c, n) for p, c, n in keys]
    again = [draw(logits, p, (), c, n) for p, c, n in reversed(keys)]
    assert first == again[::-1]
    series = [tuple(first[k : k + 30]) for k in range(0, 120, 30)]
    assert len(set(series)) == 4
    assert min(len(set(s)) for s in series) > 20


def test_neighbouring_keys_are_independent() -> None:
    """Seeds 0, 1, 2, ... at one position, and one seed at positions 0, 1, 2, ..., both draw
    evenly: the key is mixed, not added up."""
    flat = np.zeros(16, np.float32)
    for keys in (
        [(seed, 0, 40) for seed in range(4000)],
        [(1, completion, 40) for completion in range(4000)],
        [(1, 0, position) for position in range(4000)],
        [(n, n, n) for n in range(4000)],
    ):
        counts = np.zeros(16)
        for seed, completion, position in keys:
            params = SamplingParams(temperature=1.0, top_p=1.0, seed=seed)
            counts[draw(flat, params, (), completion, position)] += 1
        assert ((counts - 250) ** 2 / 250).sum() < 50  # 15 degrees of freedom


def test_masked_and_huge_logits() -> None:
    logits = np.full(40, -np.inf, np.float32)
    logits[[4, 9]] = 3e38, 3e38
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=1)
    assert {draw(logits, params, position=n) for n in range(60)} == {4, 9}
    tiny = SamplingParams(temperature=1e-6, top_p=1.0, seed=1)
    assert draw(np.array([1, 2, 3], np.float32), tiny) == 2
    for bad in (np.nan, np.inf):
        broken = np.zeros(5, np.float32)
        broken[2] = bad
        for each in (params, SamplingParams(temperature=0.0)):
            with pytest.raises(LlamaError):
                draw(broken, each)
    with pytest.raises(LlamaError):
        draw(np.full(5, -np.inf, np.float32), params)
    with pytest.raises(LlamaError):
        draw(np.zeros(5, np.float32), SamplingParams(repetition_penalty=2.0), [5])
