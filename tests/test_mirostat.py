"""Mirostat 2 against the paper's loop written plainly, and its promise: the mean surprise."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from llama import engine
from llama.errors import LlamaError
from llama.sampling import SamplingParams

ON = SamplingParams(temperature=1.0, mirostat_tau=3.0, seed=4)


def surprises(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Of each token, in bits."""
    scores = logits.astype(np.float64) / temperature
    p = np.exp(scores - scores.max())
    return np.asarray(-np.log2(p / p.sum()))


def allowed(surprise: NDArray[np.float64], mu: float) -> NDArray[np.bool_]:
    kept = surprise <= mu
    return kept if kept.any() else surprise == surprise.min()


def zipf(size: int) -> NDArray[np.float32]:
    """The distribution the paper's analysis is about."""
    return (-1.2 * np.log(np.arange(1, size + 1))).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("eta", [0.05, 0.1, 1.0])
def test_each_step_is_the_papers(temperature: float, eta: float) -> None:
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=temperature, mirostat_tau=3.0, mirostat_eta=eta, seed=9,
                            top_k=2, top_p=0.1, min_p=0.9, typical_p=0.2)  # fmt: skip
    mu, ours = 6.0, array("d", [6.0])
    for position in range(300):
        logits = rng.permutation(zipf(400)) * np.float32(rng.uniform(0.5, 2))
        surprise = surprises(logits, temperature)
        token = engine.sample_logits(logits, params, (), 0, position, 0, ours)
        assert allowed(surprise, mu + 1e-5)[token]
        mu -= eta * (surprise[token] - 3.0)
        assert math.isclose(ours[0], mu, abs_tol=1e-4)
        mu = ours[0]


@pytest.mark.parametrize("mu", [-4.0, 0.5, 2.0, 4.5, 6.0, 40.0])
def test_draws_follow_the_distribution(mu: float) -> None:
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=60) * 2).astype(np.float32)
    surprise = surprises(logits, 1.0)
    p = np.where(allowed(surprise, mu), 2.0**-surprise, 0)
    p /= p.sum()
    n = 4000
    counts = Counter(
        engine.sample_logits(logits, ON, (), 0, at, 0, array("d", [mu])) for at in range(n)
    )
    assert all(p[token] > 0 for token in counts)
    likely = np.flatnonzero(p * n >= 10)
    chi2 = sum((counts[int(t)] - p[t] * n) ** 2 / (p[t] * n) for t in likely)
    freedom = max(len(likely) - 1, 1)
    assert chi2 <= freedom + 4.5 * np.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("tau", [3.0, 4.0, 5.0])
def test_the_mean_surprise_comes_to_tau(tau: float) -> None:
    """What the paper promises for text of any temperament."""
    logits = zipf(5000)
    surprise = surprises(logits, 1.0)
    params = SamplingParams(temperature=1.0, mirostat_tau=tau, seed=2)
    mu = array("d", [2 * tau])
    tokens = [engine.sample_logits(logits, params, (), 0, at, 0, mu) for at in range(1500)]
    assert abs(surprise[tokens[200:]].mean() - tau) < 0.1


def test_greedy_leaves_mu_alone() -> None:
    params, mu = SamplingParams(temperature=0.0, mirostat_tau=3.0), array("d", [6.0])
    assert engine.sample_logits([1.0, 3.0, 2.0], params, mu=mu) == 1 and mu[0] == 6.0


def test_a_missing_or_broken_mu_is_refused() -> None:
    for mu in (None, array("d", [math.nan]), array("d", [math.inf])):
        with pytest.raises(LlamaError, match="mirostat_tau is 3 and there is no finite mirosta"):
            engine.sample_logits([1.0, 2.0], ON, mu=mu)
