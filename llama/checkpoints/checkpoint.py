"""What every source comes down to: a config, tensors under Meta's names, a tokenizer, notes.

A source's reader fills a Checkpoint; `check` then holds it against docs/format.md in one place,
so that a wrong, missing or misshapen tensor is the same sentence whatever the format was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama.checkpoints.tensors import Tensor, Unreadable
from llama.errors import LlamaError
from llama.format import Config, Head, Rope, TokenizerKind, Value, expected_tensors
from llama.quant import Kind

# Embeddings are padded to round sizes and with room for tokens to come. The most that is known of
# a published Llama is DeepSeek LLM's: 100,015 tokens, 102,400 rows.
MOST_PADDING, PADDING_SHARE = 256, 32
HEADS = {Head.NONE: "no head", Head.SEQUENCE: "sequence classification",
         Head.ANSWER: "question answering", Head.TOKEN: "token classification"}  # fmt: skip
FLOATS = {kind.label: kind for kind in (Kind.F32, Kind.F16, Kind.BF16)}


@dataclass(frozen=True)
class Options:
    """What a person may say about a checkpoint that it does not say itself."""

    tokenizer: Path | None = None
    template: str | None = None  # a family's name, or "none"
    max_seq_len: int | None = None
    rope_scaling: str | None = None  # positions.parse reads it
    infill: bool | None = None  # None: by the vocabulary, the name and the shape
    lora: tuple[Path, ...] = ()  # adapters' directories, merged in this order


@dataclass
class Tokenizer:
    """A tokenizer's file and the ids that begin and end a text."""

    kind: TokenizerKind = TokenizerKind.NONE
    data: bytes = b""
    vocab_size: int = 0  # ids it can produce; 0: not known
    bos_id: int | None = None  # None: no token is put before a text
    eos_ids: tuple[int, ...] = ()
    special: dict[str, int] = field(default_factory=dict)  # of tiktoken ranks
    infill: dict[str, int] = field(default_factory=dict)  # the ids that the source itself names


@dataclass
class Checkpoint:
    """One recognised model, nothing of its weights read yet."""

    path: Path
    source: str  # "GGUF", "Meta", ...
    config: Config
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    meta: dict[str, Value]
    notes: list[str]  # what was inferred or left out, a line each
    own_names: Mapping[str, str] = field(default_factory=dict)  # ours -> the source's
    tied_as_published: bool = False  # the model is known to be tied, whatever the files hold

    def check(self) -> None:
        """Raises LlamaError for an impossible config, or a tensor wrong, missing or left over."""
        self._check_pairing()
        try:
            self.config.check()
        except LlamaError as error:
            raise LlamaError(f"{self.path}: {error}") from None
        expected = expected_tensors(self.config)
        for name, shape in expected.items():
            where = f"{self.path}: {self.own_names.get(name, name)}"
            if name not in self.tensors:
                raise LlamaError(f"{where} is missing, expected {show(shape)}{_why(name)}")
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise LlamaError(f"{where}: expected {show(shape)}, found {show(tensor.shape)}")
            if isinstance(tensor, Unreadable):
                raise LlamaError(f"{where}: expected f32, f16 or bf16, found {tensor.dtype}")
        for name in self.tensors.keys() - expected.keys():
            raise LlamaError(
                f"{self.path}: {self.own_names.get(name, name)}: a tensor that a Llama of this "
                "shape does not have"
            )

    def _check_pairing(self) -> None:
        """Raises LlamaError where the tokenizer cannot be the one the model was trained with."""
        size, rows = self.tokenizer.vocab_size, self.config.vocab_size
        if size > rows:
            raise LlamaError(
                f"{self.path}: the tokenizer has {size} tokens, the model only {rows}: they do not "
                "belong together"
            )
        if not size or size == rows:
            return
        if rows - size > max(MOST_PADDING, size // PADDING_SHARE):
            raise LlamaError(
                f"{self.path}: the tokenizer has {size} tokens, the model {rows}, more than "
                "padding explains: they do not belong together"
            )
        self.notes.append(f"{rows - size} ids beyond the tokenizer's {size} tokens: padding")

    def main_dtype(self) -> str:
        """The dtype that most of the matrices' weights have."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if len(tensor.shape) == 2:
                weights[tensor.dtype] += tensor.shape[0] * tensor.shape[1]
        return weights.most_common(1)[0][0]

    def default_kind(self) -> Kind:
        """The source's own dtype; f16 for a quantised one."""
        return FLOATS.get(self.main_dtype(), Kind.F16)

    def describe(self) -> str:
        """One line for a person."""
        c = self.config
        parts = [
            f"{self.source} {self.main_dtype()}",
            f"{c.n_layers} layer" + "s" * (c.n_layers > 1),
            f"dim {c.dim}",
            f"{c.n_heads} heads" + (f" ({c.n_kv_heads} kv)" if c.n_kv_heads != c.n_heads else ""),
            f"vocab {c.vocab_size}",
            f"context {c.max_seq_len}",
        ]
        if c.rope_scaling != Rope.PLAIN:
            parts.append(f"{c.rope_scaling.name.lower()} rope x{c.rope_numbers[0]:g}")
        if c.tied:
            parts.append("tied")
        if c.head != Head.LM:
            parts.append(HEADS[c.head])
        if c.head in (Head.SEQUENCE, Head.TOKEN):
            parts[-1] += f" of {c.n_labels} label" + "s" * (c.n_labels > 1)
        if "template.family" in self.meta:
            parts.append(f"{self.meta['template.family']!s} template")
        return f"{self.path.resolve().name}: {', '.join(parts)}"


def _why(name: str) -> str:
    """What a missing bias has to do with the others."""
    if not name.endswith(".bias"):
        return ""
    group = "q, k, v and output" if ".attention." in name else "w1, w2 and w3"
    return f": there are biases, and then all of {group} have one"


def show(shape: tuple[int, ...]) -> str:
    """(4096, 512) -> "4096 x 512"."""
    return " x ".join(str(n) for n in shape) or "a single number"
