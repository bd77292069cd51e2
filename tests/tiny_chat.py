"""A chat model small enough to write in a blink: random weights, one token a byte, ChatML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fake_engine import byte_tokenizer

from llama.config import Config, expected_tensors
from llama.format import Record, TokenizerKind, Writer
from llama.quant import Kind

CONFIG = Config(
    vocab_size=259, dim=32, hidden_dim=48, head_dim=8, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=4096, norm_eps=1e-5, rope_theta=1e4, tied=True, eos_ids=(0,),
)  # fmt: skip
# a run with it that is still there when it is interrupted
WITHOUT_END = ("--overflow=slide", "--max_tokens=2000000000")


def write(path: Path, family: str | None = "chatml", tokenizer: bool = True) -> Path:
    """A .bin at PATH whose random babble never ends by itself: the control tokens' rows are
    zero, and the logits of some bytes are not."""
    rng = np.random.default_rng(3)
    records = [Record(name, Kind.F32, shape) for name, shape in expected_tensors(CONFIG).items()]
    meta = {"general.name": "tiny"} | ({"template.family": family} if family else {})
    kind = (TokenizerKind.JSON, byte_tokenizer()) if tokenizer else (TokenizerKind.NONE, b"")
    with Writer(path, CONFIG, records, tokenizer=kind, meta=meta) as writer:
        for record in records:
            values = rng.normal(size=record.shape).astype(np.float32)
            if "norm" in record.name:
                values = np.ones(record.shape, np.float32)
            if record.name == "tok_embeddings.weight":
                values[:3] = 0
            writer.write(record.name, values)
    return path
