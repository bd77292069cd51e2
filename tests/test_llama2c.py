"""llama2.c's legacy files: the layout, tied and untied, and their exact length."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch

from llama.checkpoints import Options, llama2c, load, recognise
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.format import Bin, Config, TokenizerKind, read
from llama.quant import Kind


def write_llama2c(path: Path, shape: Config, weights: dict[str, torch.Tensor]) -> None:
    """As llama2.c's export.py writes version 0."""
    sign = 1 if shape.tied else -1
    head = (shape.dim, shape.hidden_dim, shape.n_layers, shape.n_heads, shape.n_kv_heads)
    parts = [struct.pack("<7i", *head, sign * shape.vocab_size, shape.max_seq_len)]

    def put(name: str) -> None:
        parts.append(weights[name].float().numpy().tobytes())

    put("tok_embeddings.weight")
    for stem in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
                 "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):  # fmt: skip
        for n in range(shape.n_layers):
            put(f"layers.{n}.{stem}.weight")
    put("norm.weight")
    freqs = np.full(shape.max_seq_len * shape.head_dim // 2, 7, np.float32)
    parts += [freqs.tobytes(), freqs.tobytes()]
    if not shape.tied:
        put("output.weight")
    path.write_bytes(b"".join(parts))


def export(path: Path, out: Path, options: Options | None = None) -> Bin:
    checkpoint = load(path, options or Options())
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    return read(out)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight(tmp_path: Path, tied: bool) -> None:
    shape = small_models.config(n_kv_heads=2, tied=tied)
    weights = small_models.weights(shape)
    write_llama2c(tmp_path / "m.bin", shape, weights)
    found = export(tmp_path / "m.bin", tmp_path / "a.bin")
    assert found.config == Config(**{**shape.__dict__, "norm_eps": found.config.norm_eps})
    assert found.config.norm_eps == np.float32(1e-5) and found.config.rope_theta == 1e4
    assert set(found.tensors) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(torch.from_numpy(found.tensors[name]), tensor), name


def test_real_stories(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "weights/stories260K.bin", tmp_path / "stories260K.bin")
    shutil.copy(data / "tokenizers/tok512.bin", tmp_path / "tokenizer.bin")
    found = export(tmp_path / "stories260K.bin", tmp_path / "a.bin")
    c = found.config
    shape = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len)
    assert shape == (64, 172, 5, 8, 4, 512, 512) and c.tied
    assert found.tokenizer[0] == TokenizerKind.SENTENCEPIECE and c.bos_id == 1
    assert found.meta == {"general.origin": "llama2.c stories260K.bin"}
    assert found.records["layers.0.attention.wq.weight"].kind == Kind.F32
    # It tells the known story: greedy, each token from a fresh forward.
    tokens = [1]
    known = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338]
    for _ in known:
        tokens.append(int(small_models.forward(found, tokens)[-1].argmax()))
    assert tokens[1:] == known


def test_tokenizer_option_and_absence(data: Path, tmp_path: Path) -> None:
    source = data / "weights/stories15M.bin"
    alone = tmp_path / "alone" / "m.bin"
    alone.parent.mkdir()
    alone.symlink_to(source)
    checkpoint = load(alone)
    assert (
        checkpoint.tokenizer.kind == TokenizerKind.NONE and "token ids only" in checkpoint.notes[0]
    )
    chosen = Options(tokenizer=data / "tokenizers/llama2_tokenizer.model", max_seq_len=128)
    checkpoint = load(alone, chosen)
    assert checkpoint.tokenizer.vocab_size == 32000 and checkpoint.config.max_seq_len == 128
    with pytest.raises(LlamaError, match="the tokenizer has 128256 tokens, the model only 32000"):
        load(alone, Options(tokenizer=data / "tokenizers/llama3_tokenizer.model"))
    with pytest.raises(LlamaError, match="max_seq_len must be 1 to"):
        load(alone, Options(max_seq_len=0))


def test_length_is_exact(tmp_path: Path) -> None:
    shape = small_models.config(tied=True)
    path = tmp_path / "m.bin"
    write_llama2c(path, shape, small_models.weights(shape))
    whole = path.read_bytes()
    assert recognise(path) == "llama2.c"
    for data in (whole[:-4], whole + bytes(4), whole[:-1], whole[:28], whole[:27], b"\0" * 4000):
        path.write_bytes(data)
        with pytest.raises(LlamaError, match="expected"):
            load(path)
        with pytest.raises(LlamaError, match="expected|truncated"):
            llama2c.load(path, Options())
    for i in range(7):
        for value in (0, -1, 2**31 - 1, -(2**31)):
            changed = bytearray(whole)
            struct.pack_into("<i", changed, 4 * i, value)
            path.write_bytes(changed)
            with pytest.raises(LlamaError):
                load(path)
