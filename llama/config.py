"""The model's shape under Meta's names, and the tensors that a shape requires.

The limits are those of docs/format.md, checked alike when a file is written and when it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from llama.errors import LlamaError

MAX_EOS = 8
MAX_LABELS = 65_536


class Rope(IntEnum):
    """How rotary frequencies are scaled; Config.rope_numbers holds the numbers."""

    PLAIN = 0
    LINEAR = 1
    LLAMA3 = 2
    YARN = 3
    DYNAMIC = 4


class Head(IntEnum):
    """What the last matrix makes of a token's final hidden state."""

    LM = 0  # a logit for each token of the vocabulary
    NONE = 1  # there is none: the hidden state itself
    SEQUENCE = 2  # a logit for each label of the text; one: its reward
    ANSWER = 3  # two logits: an answer starts here, ends here
    TOKEN = 4  # a logit for each label of the token


ROPE_COUNTS = {Rope.PLAIN: 0, Rope.LINEAR: 1, Rope.LLAMA3: 4, Rope.YARN: 6, Rope.DYNAMIC: 2}


@dataclass(frozen=True)
class Config:
    """The header's fields; docs/format.md says what each means."""

    vocab_size: int
    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Rope = Rope.PLAIN
    rope_numbers: tuple[float, ...] = ()  # docs/format.md says which, by kind
    tied: bool = False
    attention_bias: bool = False  # of wq, wk, wv and wo, all four
    mlp_bias: bool = False  # of w1, w2 and w3
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    head: Head = Head.LM
    n_labels: int = 0  # of the heads that have labels
    output_bias: bool = False  # of those heads

    @property
    def n_outputs(self) -> int:
        """Numbers that the network gives for a token."""
        sizes = {Head.LM: self.vocab_size, Head.NONE: self.dim}
        return sizes.get(self.head, self.n_labels)

    def check(self) -> None:
        """Raises LlamaError for a shape that no file may hold."""
        limits = {
            "vocab_size": 2**24, "dim": 2**24, "hidden_dim": 2**24, "max_seq_len": 2**24,
            "head_dim": 2**16, "n_layers": 4096, "n_heads": 2**16, "n_kv_heads": 2**16,
        }  # fmt: skip
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise LlamaError(f"config: {name} must be 1 to {limit}, found {value}")
        if self.head_dim % 2:
            raise LlamaError(f"config: head_dim must be even, found {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise LlamaError(
                f"config: n_kv_heads must divide n_heads, found {self.n_kv_heads} "
                f"and {self.n_heads}"
            )
        for name in ("norm_eps", "rope_theta"):
            with np.errstate(over="ignore"):
                value = float(np.float32(getattr(self, name)))
            if not (math.isfinite(value) and value > 0):
                raise LlamaError(f"config: {name} must be finite and above zero, found {value}")
        self._check_rope()
        self._check_ids()
        self._check_head()

    def rope_length(self, prompt: int) -> int:
        """What the keys of a prompt of PROMPT tokens depend on besides its tokens: under dynamic
        scaling its length, once that is beyond the original; else nothing, 0."""
        dynamic = self.rope_scaling == Rope.DYNAMIC
        return prompt if dynamic and prompt > self.rope_numbers[1] else 0

    def untrained(self, length: int) -> str | None:
        """What to tell who asks for a context of LENGTH positions, if training, and the rope
        scaling with it, do not reach so far; None where they do. Dynamic scaling always does."""
        kind, numbers, trained = self.rope_scaling, self.rope_numbers, self.max_seq_len
        if kind in (Rope.LLAMA3, Rope.YARN):
            trained = max(trained, int(numbers[0] * numbers[3 if kind == Rope.LLAMA3 else 1]))
        if length <= trained or kind == Rope.DYNAMIC:
            return None
        if kind == Rope.LINEAR and length <= numbers[0] * trained:  # some name it unstretched
            return (
                f"a context of {length} positions goes beyond the {trained} that this model names; "
                f"its linear rope scaling (factor {numbers[0]:g}) applies there too"
            )
        scaling = f"the {kind.name.lower()} rope scaling of this model reaches no further"
        return (
            f"positions beyond {trained} were never trained (the context is {length}), and "
            f"{'this model has no rope scaling' if kind == Rope.PLAIN else scaling}: expect its "
            "text to fall apart there"
        )

    def _check_rope(self) -> None:
        count = ROPE_COUNTS[self.rope_scaling]
        numbers = self.rope_numbers
        with np.errstate(over="ignore"):  # as the file holds them
            positive = [float(np.float32(n)) for n in numbers]
        if self.rope_scaling == Rope.YARN:
            positive = positive[:5]
        if len(numbers) != count or not all(math.isfinite(n) and n > 0 for n in positive):
            raise LlamaError(
                f"config: rope scaling {self.rope_scaling.name.lower()} takes {count} numbers "
                f"above zero, found {list(numbers)}"
            )
        if self.rope_scaling == Rope.YARN and numbers[5] not in (0, 1):
            raise LlamaError(f"config: yarn's truncate must be 0 or 1, found {numbers[5]}")
        if self.rope_scaling == Rope.DYNAMIC and self.head_dim == 2:
            raise LlamaError("config: dynamic rope scaling needs a head_dim above 2")
        if self.rope_scaling == Rope.LLAMA3 and positive[2] <= positive[1]:
            raise LlamaError(
                f"config: llama3 rope scaling needs low_freq_factor below high_freq_factor, "
                f"found {numbers[1]} and {numbers[2]}"
            )

    def _check_head(self) -> None:
        name, labelled = self.head.name.lower(), self.head >= Head.SEQUENCE
        low, high = (2, 2) if self.head == Head.ANSWER else (1, MAX_LABELS) if labelled else (0, 0)
        if not low <= self.n_labels <= high:
            raise LlamaError(
                f"config: the {name} head takes {low} to {high} labels, found {self.n_labels}"
            )
        if (self.tied and self.head != Head.LM) or (self.output_bias and not labelled):
            raise LlamaError(f"config: the {name} head can be neither tied nor biased")

    def _check_ids(self) -> None:
        if len(self.eos_ids) > MAX_EOS:
            raise LlamaError(f"config: at most {MAX_EOS} eos ids, found {len(self.eos_ids)}")
        if self.bos_id is not None and not 0 <= self.bos_id < self.vocab_size:
            raise LlamaError(
                f"config: bos id must be below vocab_size {self.vocab_size}, found {self.bos_id}"
            )
        for token in self.eos_ids:
            if not 0 <= token < self.vocab_size:
                raise LlamaError(
                    f"config: eos id must be below vocab_size {self.vocab_size}, found {token}"
                )


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that CONFIG requires, in file order: name -> (length,) or (rows, columns)."""
    dim, hidden = config.dim, config.hidden_dim
    biased = ("attention",) * config.attention_bias + ("feed_forward",) * config.mlp_bias
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for n in range(config.n_layers):
        layer = f"layers.{n}."
        stems: dict[str, tuple[int, ...]] = {
            "attention_norm": (dim,),
            "attention.wq": (q, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, q),
            "ffn_norm": (dim,),
            "feed_forward.w1": (hidden, dim),
            "feed_forward.w3": (hidden, dim),
            "feed_forward.w2": (dim, hidden),
        }
        for stem, shape in stems.items():
            shapes[f"{layer}{stem}.weight"] = shape
            if stem.split(".")[0] in biased:
                shapes[f"{layer}{stem}.bias"] = shape[:1]
    shapes["norm.weight"] = (dim,)
    if not config.tied and config.head != Head.NONE:
        shapes["output.weight"] = (config.n_outputs, dim)
    if config.output_bias:
        shapes["output.bias"] = (config.n_outputs,)
    return shapes
