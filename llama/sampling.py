"""SamplingParams: how logits become tokens and when a completion ends.

The knobs are applied in the order of transformers' logits processors: logit_bias, repetition
penalty, and beside it presence and frequency penalty, temperature, top_k, top_p, min_p,
typical_p (or mirostat in place of these four); what remains is drawn from. The arithmetic is
lib/sampler.c's. Each position's random number depends only on (seed, completion, position), so a
seed gives the same text alone, in a batch, and on another device.
"""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llama.errors import LlamaError


@dataclass(frozen=True)
class SamplingParams:
    """The knobs of one completion. The defaults are those of Meta's chat example (temperature
    0.6, top_p 0.9), everything else off. A value that cannot be is refused by its name.

    temperature         >= 0; divides the logits; 0 is greedy: the largest logit, the first of
                        equals, and top_k, top_p, min_p and seed have no effect. Default 0.6.
    top_k               >= 0; keeps the K largest logits and ties with the K-th; 0 keeps all.
                        Default 0.
    top_p               above 0 to 1; keeps the fewest tokens whose probabilities reach P; 1 keeps
                        all. Default 0.9.
    min_p               0 to 1; keeps tokens of at least P times the largest probability; 0 keeps
                        all. Default 0.
    typical_p           above 0 to 1; keeps the tokens whose surprise is nearest to the expected
                        one, until their probabilities reach P; 1 keeps all. Default 1.
    mirostat_tau        >= 0; above 0: Mirostat's second version in place of top_k, top_p, min_p
                        and typical_p, which then have no effect: tokens are cut off so that
                        their surprise is TAU bits on average; 5 is usual. 0 is off. Default 0.
    mirostat_eta        >= 0; how fast it adapts. Default 0.1.
    repetition_penalty  > 0; divides the positive logits of tokens already in prompt or
                        completion and multiplies the negative ones; 1 is off. Default 1.
    presence_penalty    -2 to 2; taken from the logit of each token that the completion holds,
                        and not the prompt; 0 is off. Default 0.
    frequency_penalty   -2 to 2; taken from that logit for each time the completion holds the
                        token; 0 is off. Default 0.
    logit_bias          {token id: bias}; added to the model's logits before anything else;
                        -infinity bans a token. Kept as pairs in rising id. Default none.
    seed                0 to 2^64 - 1; None draws one for each call. Default None.
    max_tokens          >= 1, the end token counted; None runs on until the model ends or its
                        context is full. Default None.
    stop                strings that end the text, which holds none of them; one str or several.
                        Default none.
    logprobs            >= 0; with each token its log-probability and those of the N likeliest
                        tokens, as the model gives them, before all the knobs above; None is off.
                        Default None.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __new__(cls, *_: Any, **knobs: Any) -> SamplingParams:
        _refuse_unknown(knobs)  # as clear a line as for a bad value, in place of a TypeError
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", _number("temperature", self.temperature, "0 or more", 0.0))
        put("top_p", _number("top_p", self.top_p, "above 0 and at most 1", 0.0, 1.0, open_=True))
        put("min_p", _number("min_p", self.min_p, "0 to 1", 0.0, 1.0))
        put("typical_p",
            _number("typical_p", self.typical_p, "above 0 and at most 1", 0.0, 1.0,
                    open_=True))  # fmt: skip
        put("mirostat_tau", _number("mirostat_tau", self.mirostat_tau, "0 or more", 0.0))
        put("mirostat_eta", _number("mirostat_eta", self.mirostat_eta, "0 or more", 0.0))
        penalty = self.repetition_penalty
        put("repetition_penalty",
            _number("repetition_penalty", penalty, "above 0", 0.0, open_=True))  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _number(name, getattr(self, name), "-2 to 2", -2.0, 2.0))
        put("logit_bias", _biases("logit_bias", self.logit_bias))
        put("top_k", whole_number("top_k", self.top_k, 0, 2**31 - 1))
        if self.seed is not None:
            put("seed", whole_number("seed", self.seed, 0, 2**64 - 1))
        if self.max_tokens is not None:
            put("max_tokens", whole_number("max_tokens", self.max_tokens, 1, 2**31 - 1))
        put("stop", _strings("stop", self.stop))
        if self.logprobs is not None:
            put("logprobs", whole_number("logprobs", self.logprobs, 0, 2**31 - 1))

    @property
    def looks_back(self) -> bool:
        """Whether earlier tokens matter: any of the three penalties is on."""
        talks = self.presence_penalty != 0 or self.frequency_penalty != 0
        return talks or self.repetition_penalty != 1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias as it is kept."""
        return tuple(dict(self.logit_bias).items())

    def seeded(self) -> SamplingParams:
        """Itself with a seed: its own, or one drawn now."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


FLOAT32_MIN, FLOAT32_MAX = 1.2e-38, 3.4e38  # what the sampler can tell from 0 and infinity
NAMES = tuple(field.name for field in fields(SamplingParams))


def params_from(knobs: dict[str, Any], base: SamplingParams | None = None) -> SamplingParams:
    """BASE (default: the defaults) with KNOBS in place; an unknown name is refused."""
    _refuse_unknown(knobs)
    return replace(base or SamplingParams(), **knobs)


def _refuse_unknown(knobs: Iterable[str]) -> None:
    for name in knobs:
        if name not in NAMES:
            raise LlamaError(f"unknown sampling parameter {name!r}; there are {', '.join(NAMES)}")


def _number(
    name: str, value: Any, range_: str, low: float, high: float = FLOAT32_MAX, open_: bool = False
) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise LlamaError(f"{name} must be a number, found {value!r}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (open_ and number < FLOAT32_MIN):
        raise LlamaError(f"{name} must be {range_}, found {value!r}")
    return number


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """VALUE as an int; LlamaError with its NAME if it is none from LOW to HIGH."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LlamaError(f"{name} must be a whole number, found {value!r}")
    if not low <= number <= high:
        raise LlamaError(f"{name} must be {low} to {high}, found {value!r}")
    return number


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs in rising id; a str of digits, as JSON's objects have, is an id too."""
    try:
        pairs = dict(value)
    except (TypeError, ValueError):
        raise LlamaError(f"{name} must be {{token id: bias}}, found {value!r}") from None
    biases: dict[int, float] = {}
    for key, bias in pairs.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        banned = isinstance(bias, numbers.Real) and float(bias) == -math.inf
        biases[whole_number(f"{name} token id", token, 0, 2**31 - 1)] = (
            -math.inf if banned
            else _number(f"{name} of token {token}", bias, "a number or -infinity", -FLOAT32_MAX)
        )  # fmt: skip
    return tuple(sorted(biases.items()))


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable) or isinstance(strings, bytes):
        raise LlamaError(f"{name} must be a string or several, found {value!r}")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise LlamaError(f"{name} must hold strings that are not empty, found {string!r}")
    return strings
