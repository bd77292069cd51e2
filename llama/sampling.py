"""SamplingParams: how logits become tokens and when a completion ends.

The knobs are applied in the order of transformers' logits processors: repetition penalty,
temperature, top_k, top_p, min_p; what remains is drawn from. The arithmetic is lib/sampler.c's.
Each position's random number depends only on (seed, completion, position), so a seed gives the
same text alone, in a batch, and on another device.
"""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Iterable
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
    repetition_penalty  > 0; divides the positive logits of tokens already in prompt or
                        completion and multiplies the negative ones; 1 is off. Default 1.
    seed                0 to 2^64 - 1; None draws one for each call. Default None.
    max_tokens          >= 1, the end token counted; None runs on until the model ends or its
                        context is full. Default None.
    stop                strings that end the text, which holds none of them; one str or several.
                        Default none.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __new__(cls, *_: Any, **knobs: Any) -> SamplingParams:
        _refuse_unknown(knobs)  # as clear a line as for a bad value, in place of a TypeError
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", _number("temperature", self.temperature, "0 or more", 0.0))
        put("top_p", _number("top_p", self.top_p, "above 0 and at most 1", 0.0, 1.0, open_=True))
        put("min_p", _number("min_p", self.min_p, "0 to 1", 0.0, 1.0))
        penalty = self.repetition_penalty
        put("repetition_penalty",
            _number("repetition_penalty", penalty, "above 0", 0.0, open_=True))  # fmt: skip
        put("top_k", _integer("top_k", self.top_k, 0, 2**31 - 1))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1, 2**31 - 1))
        put("stop", _strings("stop", self.stop))

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


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LlamaError(f"{name} must be a whole number, found {value!r}")
    if not low <= number <= high:
        raise LlamaError(f"{name} must be {low} to {high}, found {value!r}")
    return number


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable) or isinstance(strings, bytes):
        raise LlamaError(f"{name} must be a string or several, found {value!r}")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise LlamaError(f"{name} must hold strings that are not empty, found {string!r}")
    return strings
