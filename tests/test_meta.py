"""Meta's checkpoints: merging shards, what params.json says, and what must be inferred."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch

from llama.checkpoints import Options, load
from llama.checkpoints.convert import convert
from llama.checkpoints.meta import _hidden_dim, _max_seq_len, _rope
from llama.checkpoints.settings import Settings
from llama.errors import LlamaError
from llama.format import Bin, Rope, TokenizerKind, read
from llama.quant import Kind, widen


def export(source: Path, out: Path, options: Options | None = None) -> Bin:
    checkpoint = load(source, options or Options())
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    return read(out)


STYLES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama 1": ({}, "columns", {}),
    "llama 2": ({"n_kv_heads": 8}, "columns", {}),
    "llama 3": (
        {"n_kv_heads": 8, "rope_theta": 5e5, "rope_scaling": Rope.LLAMA3,
         "rope_numbers": (8.0, 1.0, 4.0, 8192.0)}, "rows", {"use_scaled_rope": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("style", STYLES)
def test_shards_and_hugging_face_make_the_same_bytes(
    tmp_path: Path, style: str, dtype: str
) -> None:
    """1, 2, 4 and 8 shards and one safetensors file: one config, and every byte of every tensor."""
    changes, embeddings, said = STYLES[style]
    shape = small_models.config(
        dim=64, head_dim=4, n_heads=16, **{"n_kv_heads": 16, **changes}, vocab_size=48,
        hidden_dim=88,
    )  # fmt: skip
    weights = small_models.weights(shape, dtype)
    rope = dict(zip(small_models.ROPE_NAMES[shape.rope_scaling], shape.rope_numbers, strict=True))
    if rope:
        rope = {**rope, "rope_type": "llama3", small_models.ORIGINAL: 8192}
    folder = small_models.write_hf(tmp_path / "hf", shape, weights, rope_scaling=rope or None)
    hf = export(folder, tmp_path / "hf.bin")
    assert hf.config == replace(shape, norm_eps=hf.config.norm_eps)  # an f32 in the file
    assert hf.records["output.weight"].kind == Kind[dtype.upper()]
    for name, tensor in weights.items():
        assert torch.equal(torch.from_numpy(hf.tensors[name]), tensor.float()), name
    options = Options(max_seq_len=32, rope_scaling="llama3:8" if rope else None)
    for n in (1, 2, 4, 8):
        folder = tmp_path / f"meta{n}"
        small_models.write_meta(folder, shape, weights, n, embeddings, **said)
        meta = export(folder, tmp_path / "meta.bin", options)
        assert meta.config == hf.config
        assert meta.records == {
            name: replace(record, offset=meta.records[name].offset)
            for name, record in hf.records.items()
        }, n


def test_real_checkpoint(data: Path, tmp_path: Path) -> None:
    source = data / "weights/meta_tiny"
    found = export(source, tmp_path / "a.bin")
    expected = torch.load(source / "consolidated.00.pth", weights_only=True)
    assert any(name.endswith("mask") for name in expected)
    assert {n for n in expected if not n.endswith("mask")} == set(found.tensors)
    for name, array in found.tensors.items():
        assert torch.equal(torch.from_numpy(array), expected[name])
    assert found.config.hidden_dim == 172 and found.tokenizer == (TokenizerKind.NONE, b"")


def test_tokenizers_are_told_apart_by_content(data: Path, tmp_path: Path) -> None:
    shape = small_models.config(vocab_size=32000)
    small_models.write_meta(tmp_path / "up/two-chat", shape, small_models.weights(shape))
    model = (data / "tokenizers/llama2_tokenizer.model").read_bytes()
    (tmp_path / "up/tokenizer.model").write_bytes(model)  # above it
    two = load(tmp_path / "up/two-chat")
    assert two.tokenizer.kind == TokenizerKind.SENTENCEPIECE and two.tokenizer.data == model
    assert (two.config.bos_id, two.config.eos_ids) == (1, (2,))
    assert two.meta["template.family"] == "llama2"
    assert any("inferred from the directory's name" in note for note in two.notes)
    (tmp_path / "up/two-chat").rename(tmp_path / "up/CodeLlama-70b-Instruct")
    code = load(tmp_path / "up/CodeLlama-70b-Instruct")
    assert code.meta["template.family"] == "codellama70b"

    shape = small_models.config(vocab_size=128256)
    folder = small_models.write_meta(
        tmp_path / "x/three-Instruct", shape, small_models.weights(shape), 1, "rows"
    )
    (folder / "tokenizer.model").write_bytes(
        (data / "tokenizers/llama3_tokenizer.model").read_bytes()
    )
    three = load(folder)
    assert three.tokenizer.kind == TokenizerKind.TIKTOKEN
    assert (three.config.bos_id, three.config.eos_ids) == (128000, (128001, 128008, 128009))
    special = json.loads(str(three.meta["tokenizer.special"]))
    published = json.loads((data / "tokenizers/hf_llama3_1_tokenizer_config.json").read_text())
    assert len(special) == 256 and special["<|start_header_id|>"] == 128006
    names = {int(i): t["content"] for i, t in published["added_tokens_decoder"].items()}
    assert sorted(special.values()) == sorted(names)
    assert three.meta["template.family"] == "llama3"
    none = load(folder, Options(template="none"))
    assert "template.family" not in none.meta
    assert load(folder, Options(template="zephyr")).meta["template.family"] == "zephyr"
    with pytest.raises(LlamaError, match="--template: expected chatml, .* or none, found nonsense"):
        load(folder, Options(template="nonsense"))


def params(folder: Path, **values: Any) -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    return Settings(folder / "params.json", values)


# (hidden, multiple_of, ffn_dim_multiplier) of the published models, by dim
@pytest.mark.parametrize(
    "dim, hidden, multiple, factor",
    [
        (4096, 11008, 256, None), (5120, 13824, 256, None), (6656, 17920, 256, None),
        (8192, 22016, 256, None), (8192, 28672, 4096, 1.3), (4096, 14336, 1024, 1.3),
        (2048, 8192, 256, 1.5), (3072, 8192, 256, 1.0), (16384, 53248, 4096, 1.2),
    ],
)  # fmt: skip
def test_hidden_dim_rule(
    tmp_path: Path, dim: int, hidden: int, multiple: int, factor: float | None
) -> None:
    class Shape:
        shape = (hidden, dim)

    found: Any = {"layers.0.feed_forward.w1.weight": Shape}
    values = {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    assert _hidden_dim(params(tmp_path, **values), found, dim) == hidden
    Shape.shape = (hidden + multiple, dim)
    with pytest.raises(LlamaError, match=f"make hidden_dim {hidden}, .* {hidden + multiple} rows"):
        _hidden_dim(params(tmp_path, **values), found, dim)


@pytest.mark.parametrize(
    "folder, theta, eps, scaling, length",
    [
        ("7B", 1e4, 1e-6, Rope.PLAIN, 2048),
        ("65B", 1e4, 1e-5, Rope.PLAIN, 2048),
        ("something", 1e4, 1e-6, Rope.PLAIN, 2048),
        ("llama-2-7b", 1e4, 1e-6, Rope.PLAIN, 4096),
        ("llama-2-70b-chat", 1e4, 1e-5, Rope.PLAIN, 4096),
        ("CodeLlama-7b", 1e6, 1e-5, Rope.PLAIN, 16384),
        ("CodeLlama-70b-Instruct", 1e4, 1e-5, Rope.PLAIN, 4096),
        ("Meta-Llama-3-8B", 5e5, 1e-5, Rope.PLAIN, 8192),
        ("Llama-3.1-8B", 5e5, 1e-5, Rope.LLAMA3, 131072),
    ],
)
def test_context_is_inferred_and_said(
    tmp_path: Path, folder: str, theta: float, eps: float, scaling: Rope, length: int
) -> None:
    notes: list[str] = []
    given = params(tmp_path / folder, norm_eps=eps)
    assert _max_seq_len(given, theta, scaling, Options(), notes) == length
    assert notes and "inferred" in notes[0]
    assert _max_seq_len(given, theta, scaling, Options(max_seq_len=77), notes) == length
    assert notes[1] == f"context {length}: inferred"


def test_rope_scaling(tmp_path: Path) -> None:
    assert _rope(params(tmp_path), Options(), []) == (Rope.PLAIN, ())
    assert _rope(params(tmp_path, use_scaled_rope=False), Options(), []) == (Rope.PLAIN, ())
    notes: list[str] = []
    for dim, n_layers in ((4096, 32), (8192, 80), (16384, 126)):
        big = params(tmp_path, use_scaled_rope=True, dim=dim, n_layers=n_layers)
        assert _rope(big, Options(), notes) == (Rope.LLAMA3, (8.0, 1.0, 4.0, 8192.0))
    for dim, n_layers in ((2048, 16), (3072, 28)):
        small = params(tmp_path, use_scaled_rope=True, dim=dim, n_layers=n_layers)
        assert _rope(small, Options(), notes)[1][0] == 32
    assert len(notes) == 5 and all("--rope-scaling sets another" in note for note in notes)
    said = params(tmp_path, use_scaled_rope=True, rope_scaling_factor=16)
    assert _rope(said, Options(), [])[1][0] == 16
    other = params(tmp_path, use_scaled_rope=True, dim=4096, n_layers=31)
    with pytest.raises(LlamaError, match="dim 4096 and 31 layers .* say --rope-scaling llama3:8"):
        _rope(other, Options(), [])
    assert _rope(other, Options(rope_scaling="llama3:8"), notes)[0] == Rope.LLAMA3
    assert len(notes) == 5
    shape = small_models.config()
    small_models.write_meta(tmp_path, shape, small_models.weights(shape), use_scaled_rope=True)
    found = load(tmp_path, Options(rope_scaling="llama3:32"))
    assert found.config.rope_numbers == (32.0, 1.0, 4.0, 8192.0)
    assert any("says llama3 of unknown factor" in note for note in found.notes)


def test_wrong_tensors_are_one_line(tmp_path: Path) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape)

    def refused(n: int = 1, **params: Any) -> str:
        for old in tmp_path.glob("m/*"):
            old.unlink()
        small_models.write_meta(tmp_path / "m", shape, weights, n, **params)
        with pytest.raises(LlamaError) as caught:
            load(tmp_path / "m")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wk = weights.pop("layers.1.attention.wk.weight")
    assert "layers.1.attention.wk.weight is missing, expected 24 x 24" in refused()
    weights["layers.1.attention.wk.weight"] = wk[:12]
    assert "wk.weight: expected 24 x 24, found 12 x 24" in refused()
    weights["layers.1.attention.wk.weight"] = wk.double()
    assert "wk.weight: expected f32, f16 or bf16, found DoubleStorage" in refused()
    weights["layers.1.attention.wk.weight"] = wk
    weights["layers.0.attention.wq.bias"] = torch.zeros(24)
    assert "layers.0.attention.wq.bias: a tensor that" in refused()
    del weights["layers.0.attention.wq.bias"]
    output = weights.pop("output.weight")
    assert "output.weight is missing" in refused()
    weights["output.weight"] = output
    assert "vocab_size is 45, tok_embeddings.weight has 44 rows" in refused(vocab_size=45)
    assert "moe is not supported" in refused(moe={"num_experts": 8})
    assert "dim: expected a whole number, found 'x'" in refused(dim="x")
    assert "n_kv_heads must divide" in refused(n_kv_heads=3)
    small_models.write_meta(tmp_path / "m", shape, weights, 2)
    (tmp_path / "m/consolidated.01.pth").unlink()
    (tmp_path / "m/consolidated.00.pth").rename(tmp_path / "m/consolidated.01.pth")
    with pytest.raises(LlamaError, match="1, 2, 4, 8 or 16 shards .* found consolidated.01"):
        load(tmp_path / "m")


def test_shards_that_differ_are_refused(tmp_path: Path) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape)
    folder = small_models.write_meta(tmp_path / "m", shape, weights, 2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    w1 = shard.pop("layers.0.feed_forward.w1.weight")
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(LlamaError, match="w1.weight is not in every shard"):
        load(folder)
    torch.save(shard | {"layers.0.feed_forward.w1.weight": w1[1:]}, folder / "consolidated.01.pth")
    with pytest.raises(LlamaError, match="shard 0 is f32 38 x 24, shard 1 f32 37 x 24"):
        load(folder)
    half = {name: tensor.half() for name, tensor in shard.items()}
    torch.save(half | {"layers.0.feed_forward.w1.weight": w1}, folder / "consolidated.01.pth")
    with pytest.raises(LlamaError, match="shard 0 is f32 .*, shard 1 f16"):
        load(folder)


@pytest.mark.parametrize("value, kind, message", [
    (7e4, Kind.F16, r"weight \(3, 5\) is too large for f16: 70000"),
    (float("nan"), Kind.F32, r"weight \(3, 5\) is not finite: nan"),
    (float("-inf"), Kind.BF16, r"weight \(3, 5\) is not finite: -inf"),
    (3.4e38, Kind.BF16, r"weight \(3, 5\) is too large for bf16: 3.4e\+38"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, value: float, kind: Kind, message: str
) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape)
    weights["layers.1.attention.wv.weight"][3, 5] = value
    checkpoint = load(small_models.write_meta(tmp_path / "m", shape, weights))
    with pytest.raises(LlamaError, match="layers.1.attention.wv.weight: " + message):
        convert(checkpoint, tmp_path / "a.bin", kind)
    assert not list(tmp_path.glob("a.bin*"))


def test_rows_come_in_any_cut(tmp_path: Path) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape)
    checkpoint = load(small_models.write_meta(tmp_path / "m", shape, weights, 4))
    for name, tensor in checkpoint.tensors.items():
        n = tensor.shape[0]
        for first, last in [(0, 1), (n // 2 - 1, n // 2 + 2), (n - 1, n), (0, n)]:
            rows = torch.from_numpy(widen(tensor.rows(first, last)).copy())
            assert torch.equal(rows, weights[name][first:last]), (name, first, last)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape)

    def refused(dtype: torch.dtype | None = None, **params: Any) -> str:
        tensors = dict(weights)
        if dtype is not None:
            tensors |= {n: t.to(dtype) for n, t in weights.items() if ".w1." in n}
        small_models.write_meta(tmp_path / "m", shape, tensors, **params)
        with pytest.raises(LlamaError) as caught:
            load(tmp_path / "m")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    strange = {"use_qk_norm": True, "vision_chunk_size": 448, "ffn_exp": 4.0,
               "quantization_args": {"group_size": 256}, "activation": "gelu"}  # fmt: skip
    for key, value in strange.items():
        assert f"params.json: {key} is not supported" in refused(**{key: value})
    assert load(small_models.write_meta(tmp_path / "m", shape, weights, vision_chunk_size=-1,
                                        lora_args=None, max_batch_size=4))  # fmt: skip
    assert "w1.weight: expected f32, f16 or bf16, found float8_e4m3fn" in refused(
        torch.float8_e4m3fn
    )
    (tmp_path / "m/fp8_scales_0.pt").write_bytes(b"")
    assert "found float8_e4m3fn with scales of their own (fp8_scales_0.pt)" in refused()
    (tmp_path / "m/fp8_scales_0.pt").unlink()
    big = small_models.config(vocab_size=128256, dim=8, hidden_dim=8, n_heads=1, n_kv_heads=1,
                              head_dim=8, n_layers=1)  # fmt: skip
    small_models.write_meta(tmp_path / "three", big, small_models.weights(big), rope_theta=None)
    with pytest.raises(LlamaError, match="rope_theta: expected a number, found nothing"):
        load(tmp_path / "three")


def test_chat_or_base_is_said_to_be_inferred(tmp_path: Path) -> None:
    shape = small_models.config()
    for name, note in (("llama-2-7b-chat", "chat template llama2: inferred"),
                       ("llama-2-7b", "no chat template: inferred")):  # fmt: skip
        folder = small_models.write_meta(tmp_path / name, shape, small_models.weights(shape))
        notes = load(folder).notes
        assert any(note in line and "--template" in line for line in notes), notes
        notes = load(folder, Options(template="none")).notes
        assert not any("chat template" in line for line in notes)
