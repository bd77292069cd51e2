"""llama2.c's legacy .bin: seven numbers, then float32 weights, one kind of tensor after another.

  i32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: untied), seq_len
  tok_embeddings | all layers' attention_norm | wq | wk | wv | wo | ffn_norm | w1 | w2 | w3 |
  norm | freq_cis real, imaginary (seq_len, head_dim / 2 each) | output, if untied

There is no magic number: the file is recognised by its length, which must fit exactly.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from llama.checkpoints import tokenizer_file
from llama.checkpoints.checkpoint import Checkpoint, Options
from llama.checkpoints.tensors import Plain, Tensor
from llama.errors import LlamaError
from llama.format import Config, Value, expected_tensors
from llama.quant import Kind
from llama.reading import File

HEADER = struct.Struct("<7i")
TOKENIZERS = ("tokenizer.model", "tokenizer.bin")
LAYERED = [
    "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
]  # fmt: skip


def config_of(head: bytes) -> Config | None:
    """What the first 28 bytes say, or None where they cannot be such a header."""
    if len(head) < HEADER.size:
        return None
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = HEADER.unpack(head[: HEADER.size])
    if n_heads < 1 or dim % n_heads:
        return None
    config = Config(
        vocab_size=abs(vocab), dim=dim, hidden_dim=hidden, head_dim=dim // n_heads,
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=max(n_kv_heads, 0), max_seq_len=seq_len,
        norm_eps=1e-5, rope_theta=10000.0, tied=vocab > 0,
    )  # fmt: skip
    try:
        config.check()
    except (LlamaError, ZeroDivisionError):
        return None
    return config


def _layout(config: Config) -> tuple[list[str], int]:
    """Tensor names in the file's order ("" for freq_cis) and the file's length in bytes."""
    shapes = expected_tensors(config)
    order = ["tok_embeddings.weight"]
    for name in LAYERED:
        order += [f"layers.{n}.{name}.weight" for n in range(config.n_layers)]
    order += ["norm.weight", ""]
    if not config.tied:
        order.append("output.weight")
    weights = config.max_seq_len * config.head_dim  # freq_cis: two halves
    for shape in shapes.values():
        weights += shape[0] * (shape[1] if len(shape) == 2 else 1)
    return order, HEADER.size + 4 * weights


def recognise(head: bytes, size: int) -> bool:
    """True if a file of SIZE bytes that starts with HEAD is one."""
    config = config_of(head)
    return config is not None and _layout(config)[1] == size


def load(path: Path, options: Options) -> Checkpoint:
    """Reads the header and finds the tokenizer; weights stay where they are."""
    file = File(path)
    config = config_of(file.read(0, HEADER.size, "the header"))
    if config is None:
        raise LlamaError(f"{path}: expected llama2.c's header, found impossible numbers")
    order, size = _layout(config)
    if size != file.size:
        raise LlamaError(f"{path}: expected {size} bytes by its header, found {file.size}")
    shapes = expected_tensors(config)
    tensors: dict[str, Tensor] = {}
    offset = HEADER.size
    for name in order:
        if name:
            shape = shapes[name]
            tensors[name] = Plain(file, offset, Kind.F32, shape, name)
            offset += 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        else:
            offset += 4 * config.max_seq_len * config.head_dim
    notes: list[str] = []
    tokenizer = tokenizer_file.beside(path.parent, TOKENIZERS, options, notes)
    config = replace(config, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    meta: dict[str, Value] = {"general.origin": f"llama2.c {path.name}"}
    return Checkpoint(path, "llama2.c", config, tensors, tokenizer, meta, notes)
