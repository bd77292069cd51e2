"""A .bin as GGUF, for other engines: the same weights under llama.cpp's names, each matrix in the
kind nearest to its own.

Rows of wq and wk stay in their order: GGUF's is Meta's, neighbours are a rotary pair. Quantised
matrices are decoded and encoded again by the peer's own quantiser. There are only token ids here,
so the vocabulary is one of made-up words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tqdm import tqdm

from llama.config import Config, Head, Rope
from llama.engine import Model
from llama.errors import LlamaError
from llama.facts import Tensor
from llama.quant import STORED, Array, Kind
from llama.shapes import gguf_rows, room
from llama.temporary import hold, name_of, remove_leftovers

NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
    "attention.wv": "attn_v", "attention.wo": "attn_output", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}  # fmt: skip
TYPES = {
    Kind.F32: GGMLQuantizationType.F32, Kind.F16: GGMLQuantizationType.F16,
    Kind.BF16: GGMLQuantizationType.BF16, Kind.Q8: GGMLQuantizationType.Q8_0,
    Kind.Q4: GGMLQuantizationType.Q4_0, Kind.Q8R: GGMLQuantizationType.Q8_0,
    Kind.Q4R: GGMLQuantizationType.Q4_0,
    Kind.Q4E: GGMLQuantizationType.Q4_0,
}  # fmt: skip
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32, Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16, Kind.Q8: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4: gguf.LlamaFileType.MOSTLY_Q4_0, Kind.Q8R: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4R: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4E: gguf.LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip
PIECE = 1 << 24  # weights that are converted at a time
# encodes float32 rows (n, columns) in a block type: the peer's quantiser
Quantise = Callable[[Array, GGMLQuantizationType], Array]


def to_gguf(
    model: Model, path: Path, quantise: Quantise, random: bool = False, only_f16: bool = False
) -> None:
    """Writes MODEL as PATH. A quantised matrix whose rows are no whole number of blocks becomes
    f16. RANDOM: quantised matrices are drawn anew, not converted. ONLY_F16: so do f32 and bf16
    ones. LlamaError for what GGUF's plain Llama cannot hold, or a full disk."""
    config = model.config
    if config.head != Head.LM:
        raise LlamaError(f"{model.path}: has no language model's head; peers cannot run it")
    temporary = name_of(path)
    remove_leftovers(path)
    plan = [(i, t, _type(t, only_f16)) for i, t in enumerate(model.tensors)]
    sizes = [_bytes(t.shape, type_) for _, t, type_ in plan]
    room(path.parent, sum(sizes) + (1 << 22), str(path))
    writer = gguf.GGUFWriter(temporary, "llama")
    held = None
    try:
        held = open(temporary, "wb")  # noqa: SIM115 (the writer opens it too)
        hold(held.fileno())
        _metadata(writer, model, only_f16)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype,
                                   factors.nbytes)  # fmt: skip
        for (_, tensor, type_), size in zip(plan, sizes, strict=True):
            writer.add_tensor_info(_name(tensor.name), _stored_shape(tensor.shape, type_),
                                   np.dtype(np.uint8), size, raw_dtype=type_)  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=path.name, leave=False,
                  disable=None) as bar:
            for index, tensor, type_ in plan:
                parts = _parts(model, index, tensor, type_, quantise, random)
                whole = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
                writer.write_tensor_data(whole)
                bar.update(whole.nbytes)
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise LlamaError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
        if held is not None:
            held.close()


def _metadata(writer: Any, model: Model, only_f16: bool) -> None:
    c, source = model.config, model.path
    writer.add_name(source.stem)
    kind = Kind[c.dtype.upper()]
    writer.add_file_type(FILE_TYPES[Kind.F16 if only_f16 and kind in STORED else kind])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    if c.head_dim * c.n_heads != c.dim:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.rope_scaling == Rope.LINEAR:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_numbers[0])
    elif c.rope_scaling not in (Rope.PLAIN, Rope.LLAMA3):
        raise LlamaError(
            f"{source}: {c.rope_scaling.name.lower()} rope scaling is not written to GGUF"
        )
    _vocabulary(writer, c.vocab_size)


def _vocabulary(writer: Any, size: int) -> None:
    """Byte-level BPE of SIZE made-up words: nothing is tokenised, but peers ask for one."""
    words = [f"w{i}" for i in range(size)]
    letters = [chr(c) for c in range(33, 127)][:size]
    words[: len(letters)] = letters
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    # OpenVINO cannot run a model whose vocabulary has no control token
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["w 0"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(size - 1)
    writer.add_add_bos_token(False)


def _rope_factors(c: Config) -> Array | None:
    """What llama3 scaling divides each frequency by (head_dim / 2): GGUF's rope_freqs.weight."""
    if c.rope_scaling != Rope.LLAMA3:
        return None
    factor, low, high, original = c.rope_numbers
    turns = original / (2 * np.pi) * c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: Array = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return divisors


def _name(ours: str) -> str:
    *stem, last = ours.split(".")
    if stem[0] == "layers":
        return f"blk.{stem[1]}.{NAMES['.'.join(stem[2:])]}.{last}"
    return f"{NAMES['.'.join(stem)]}.{last}"


def _type(tensor: Tensor, only_f16: bool) -> GGMLQuantizationType:
    type_ = TYPES[tensor.kind]
    block = GGML_QUANT_SIZES[type_][0]
    if len(tensor.shape) == 2 and (tensor.shape[1] % block or (only_f16 and block == 1)):
        return GGMLQuantizationType.F16
    return type_


def _stored_shape(shape: tuple[int, ...], type_: GGMLQuantizationType) -> tuple[int, ...]:
    """What add_tensor_info takes for raw bytes: the last dimension in bytes."""
    block, size = GGML_QUANT_SIZES[type_]
    return (*shape[:-1], shape[-1] // block * size)


def _bytes(shape: tuple[int, ...], type_: GGMLQuantizationType) -> int:
    return int(np.prod(_stored_shape(shape, type_), dtype=np.int64))


def _parts(
    model: Model, index: int, tensor: Tensor, type_: GGMLQuantizationType,
    quantise: Quantise, random: bool,
) -> Iterator[Array]:  # fmt: skip
    """The tensor's data, some rows at a time."""
    rows, columns = (*tensor.shape, 1)[:2]
    quantised = GGML_QUANT_SIZES[type_][0] > 1
    if quantised and random:
        bits = 8 if type_ == GGMLQuantizationType.Q8_0 else 4
        yield from gguf_rows(np.random.default_rng(index), bits, rows, columns)
        return
    step = max(1, PIECE // columns)
    for first in range(0, rows, step):
        values = model.rows(index, first, min(step, rows - first))
        if quantised:
            yield quantise(values, type_)
        elif type_ == GGMLQuantizationType.BF16:  # exact: they came out of a bf16 file
            yield (values.view("<u4") >> 16).astype("<u2")
        else:
            yield values.astype("<f4" if type_ == GGMLQuantizationType.F32 else "<f2")
