"""How far positions reach: --rope-scaling and --max-seq-len on top of what a checkpoint says.

A scaling changes every number the model makes, so that a person's replaces the checkpoint's as a
whole and is printed; a context beyond what the model was trained for is said to be so.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llama.checkpoints.checkpoint import Checkpoint
from llama.config import Config, Rope
from llama.errors import LlamaError

FORMS = (
    "none, linear:FACTOR, dynamic:FACTOR[,ORIGINAL], yarn:FACTOR[,ORIGINAL] or "
    "llama3:FACTOR[,LOW,HIGH[,ORIGINAL]]"
)
KINDS = {
    "none": Rope.PLAIN, "linear": Rope.LINEAR, "dynamic": Rope.DYNAMIC, "yarn": Rope.YARN,
    "llama3": Rope.LLAMA3,
}  # fmt: skip
COUNTS = {  # how many numbers each may be given
    Rope.PLAIN: (0,), Rope.LINEAR: (1,), Rope.DYNAMIC: (1, 2), Rope.YARN: (1, 2),
    Rope.LLAMA3: (1, 3, 4),
}  # fmt: skip

Scaling = tuple[Rope, tuple[float, ...]]


def parse(text: str) -> Scaling:
    """What --rope-scaling's TEXT says: the kind and the numbers that stand there."""
    name, colon, rest = text.strip().partition(":")
    try:
        kind = KINDS[name]
        numbers = tuple(float(word) for word in rest.split(",")) if colon else ()
    except (KeyError, ValueError):
        raise LlamaError(f"--rope-scaling: expected {FORMS}; found {text[:60]!r}") from None
    if len(numbers) not in COUNTS[kind]:
        raise LlamaError(f"--rope-scaling: expected {FORMS}; found {text[:60]!r}")
    if not all(math.isfinite(n) and 0 < n <= 1 << 24 for n in numbers):
        raise LlamaError(
            f"--rope-scaling: numbers must be above 0 and at most {1 << 24}, found {text[:60]!r}"
        )
    if numbers and numbers[0] < 1:
        raise LlamaError(f"--rope-scaling: the factor must be at least 1, found {numbers[0]:g}")
    if kind == Rope.LLAMA3 and len(numbers) > 1 and numbers[1] >= numbers[2]:
        raise LlamaError(
            f"--rope-scaling: llama3's LOW must be below its HIGH, found {numbers[1]:g} "
            f"and {numbers[2]:g}"
        )
    return kind, numbers


def complete(config: Config, scaling: Scaling) -> Config:
    """CONFIG with the SCALING that `parse` read; what was not said is as published, or the
    model's own length before any scaling."""
    kind, given = scaling
    numbers = given
    if kind in (Rope.DYNAMIC, Rope.YARN):
        numbers = (*given, original_length(config))[:2]
    if kind == Rope.YARN:
        numbers += (32.0, 1.0, yarn_attention(given[0]), 1.0)
    if kind == Rope.LLAMA3:
        numbers = given + (1.0, 4.0, 8192.0)[len(given) - 1 :]
    return replace(config, rope_scaling=kind, rope_numbers=numbers)


def original_length(config: Config) -> float:
    """The length a model was made for before its scaling, as far as its numbers tell."""
    at = {Rope.LLAMA3: 3, Rope.YARN: 1, Rope.DYNAMIC: 1}.get(config.rope_scaling)
    return float(config.max_seq_len) if at is None else config.rope_numbers[at]


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What yarn multiplies cos and sin by where nothing is said (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def apply(checkpoint: Checkpoint, scaling: Scaling | None, length: int | None) -> None:
    """Puts --rope-scaling's SCALING and --max-seq-len's LENGTH in place and notes what follows."""
    trained = checkpoint.config.max_seq_len
    if scaling is not None:
        before = describe(checkpoint.config)
        checkpoint.config = complete(checkpoint.config, scaling)
        note = f"rope scaling {describe(checkpoint.config)}: set by --rope-scaling"
        note += f"; the checkpoint says {before}" * (before != describe(checkpoint.config))
        note += f"; the context stays {trained} (--max-seq-len sets another)" * (length is None)
        checkpoint.notes.append(note)
    if length is None:
        return
    checkpoint.config = replace(checkpoint.config, max_seq_len=length)
    if length > trained:
        note = f"context {length}: beyond the {trained} positions it was trained for; "
        if checkpoint.config.rope_scaling == Rope.PLAIN:
            note += "it has no rope scaling to reach them (--rope-scaling sets one)"
        else:
            note += f"rope scaling {describe(checkpoint.config)} applies"
        checkpoint.notes.append(note)


def describe(config: Config) -> str:
    """The scaling for a person: "yarn x4 from 4096", "linear x2", "none"."""
    if config.rope_scaling == Rope.PLAIN:
        return "none"
    factor = f"x{config.rope_numbers[0]:g}" if config.rope_numbers[0] else "of unknown factor"
    text = f"{config.rope_scaling.name.lower()} {factor}"
    if config.rope_scaling != Rope.LINEAR:
        text += f" from {original_length(config):g}"
    return text
