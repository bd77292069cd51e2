"""GGUF files against the gguf package's own writer, reader and dequantiser."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.checkpoints import Options, load
from llama.checkpoints.convert import convert
from llama.checkpoints.gguf import LAYER_NAMES, NAMES
from llama.checkpoints.gguf_container import Container
from llama.errors import LlamaError
from llama.format import Bin, Config, Rope, TokenizerKind, read
from llama.quant import Kind

Q = gguf.GGMLQuantizationType
OURS_TO_GGUF = {ours: theirs for theirs, ours in NAMES.items()}


def gguf_name(name: str) -> str:
    if name in OURS_TO_GGUF:
        return str(OURS_TO_GGUF[name])
    _, n, *rest, last = name.split(".")
    inverse = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    return f"blk.{n}.{inverse['.'.join(rest)]}.{last}"


def write_gguf(
    path: Path,
    shape: Config,
    type_: Any = Q.F32,
    extra: dict[str, np.ndarray] | None = None,
    more: Any = lambda writer: None,
    architecture: str = "llama",
) -> dict[str, np.ndarray]:
    """A random model; returns its weights under Meta's names as they were before quantising."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.hidden_dim)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    more(writer)
    arrays = {name: t.numpy() for name, t in small_models.weights(shape).items()}
    for name, array in arrays.items():
        if array.ndim == 1 or type_ == Q.F32:
            writer.add_tensor(gguf_name(name), array)
        elif type_ == Q.F16:
            writer.add_tensor(gguf_name(name), array.astype(np.float16))
        else:
            data = gguf.quants.quantize(array, type_)
            writer.add_tensor(gguf_name(name), data, raw_dtype=type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def export(path: Path, out: Path) -> Bin:
    checkpoint = load(path)
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    return read(out)


# ---- weights ----

SHAPE = small_models.config(dim=64, head_dim=16, hidden_dim=96)


@pytest.mark.parametrize("type_", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0])
def test_every_weight_is_the_packages(tmp_path: Path, type_: Any) -> None:
    write_gguf(tmp_path / "a.gguf", SHAPE, type_)
    checkpoint = load(tmp_path / "a.gguf")
    kind = {Q.F32: Kind.F32, Q.BF16: Kind.BF16}.get(type_, Kind.F16)
    assert checkpoint.default_kind() == kind
    convert(checkpoint, tmp_path / "a.bin", Kind.F32)
    found = read(tmp_path / "a.bin")
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = {gguf_name(n): n for n in found.tensors}[tensor.name]
        assert np.array_equal(found.tensors[ours], values.reshape(found.tensors[ours].shape))


def test_k_quants(data: Path) -> None:
    """Another converter's file: four block types against its own dequantised values."""
    known = json.loads((data / "tiny_hf/tiny_kquant_ref.json").read_text())
    tensors = Container(data / "tiny_hf/tiny_kquant.gguf").tensors
    assert np.array_equal(
        tensors["ref.f32.weight"].rows(0, 4).ravel(), np.float32(known["ref_f32"])
    )
    for name, values in known["dequant"].items():
        tensor = tensors[f"kq.{name}.weight"]
        assert tensor.dtype == name and tensor.shape == (1024,)
        assert np.abs(tensor.rows(0, 1024) - np.float32(values)).max() < 1e-5


def test_rows_of_k_quants_in_any_cut(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for type_ in (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS, Q.IQ2_XXS, Q.TQ1_0):
        block, size = gguf.GGML_QUANT_SIZES[type_]
        raw = random.integers(0, 255, (33, 512 // block * size), np.uint8)
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tensor("w", raw, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tensor = Container(tmp_path / "a.gguf").tensors["w"]
        assert tensor.shape == (33, 512) and tensor.dtype == type_.name
        with np.errstate(all="ignore"):
            whole = gguf.quants.dequantize(raw, type_)
            for first, last in ((0, 33), (5, 6), (16, 33)):
                rows = tensor.rows(first, last)
                assert np.array_equal(rows, whole[first:last], equal_nan=True), type_


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_q8"])
def test_gguf_is_the_hugging_face_model(data: Path, tmp_path: Path, name: str) -> None:
    """llama.cpp keeps wq and wk in Meta's order: so a GGUF is taken as it is."""
    folder = tmp_path / "hf"
    folder.mkdir()
    source = data / "tiny_hf"
    (folder / "config.json").write_bytes((source / f"{name}_config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((source / f"{name}.safetensors").read_bytes())
    hf = export(folder, tmp_path / "hf.bin")
    file = "tiny_llama_f32.gguf" if name == "tiny_llama" else f"{name}.gguf"
    checkpoint = load(source / file)
    convert(checkpoint, tmp_path / "g.bin", Kind.F32)
    found = read(tmp_path / "g.bin")
    for tensor, array in hf.tensors.items():
        if name == "tiny_llama":
            assert found.records[tensor].crc32 == hf.records[tensor].crc32
        else:
            assert np.abs(found.tensors[tensor] - array).max() <= np.abs(array).max() / 127
    assert found.config == hf.config


# ---- metadata ----


def test_config(tmp_path: Path) -> None:
    shape = small_models.config(dim=64, head_dim=20, n_kv_heads=2, rope_theta=5e5, tied=True)

    def more(writer: Any) -> None:
        writer.add_key_length(20)
        writer.add_value_length(20)
        writer.add_rope_dimension_count(20)
        writer.add_name("A name")
        writer.add_license("mit")
        writer.add_chat_template("{{ '<|im_start|>' + '<|im_end|>' }}")

    write_gguf(tmp_path / "a.gguf", shape, more=more)
    found = export(tmp_path / "a.gguf", tmp_path / "a.bin")
    assert found.config == shape.__class__(**{**shape.__dict__, "norm_eps": found.config.norm_eps})
    assert found.config.norm_eps == np.float32(shape.norm_eps)
    assert found.meta["general.name"] == "A name" and found.meta["general.license"] == "mit"
    assert found.meta["template.family"] == "chatml"
    assert found.meta["general.origin"] == "GGUF a.gguf"


def published_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes rope_freqs.weight for Llama 3.1 and later."""
    inverse = 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    out = []
    for freq in inverse:
        wavelength = 2 * np.pi / freq
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor, known", [(8.0, True), (32.0, True), (13.0, False)])
def test_llama3_rope_is_recovered_from_its_tensor(
    tmp_path: Path, factor: float, known: bool
) -> None:
    shape = small_models.config(dim=256, head_dim=64, rope_theta=5e5)
    freqs = {"rope_freqs.weight": published_factors(5e5, 64, factor)}
    write_gguf(tmp_path / "a.gguf", shape, extra=freqs)
    if known:
        config = load(tmp_path / "a.gguf").config
        assert config.rope_scaling == Rope.LLAMA3
        assert config.rope_numbers == (factor, 1.0, 4.0, 8192.0)
    else:
        with pytest.raises(LlamaError, match="rope_freqs.weight fits none .* --rope-scaling"):
            load(tmp_path / "a.gguf")
        found = load(tmp_path / "a.gguf", Options(rope_scaling=f"llama3:{factor}"))
        assert found.config.rope_numbers == (factor, 1.0, 4.0, 8192.0)
    found = load(tmp_path / "a.gguf", Options(rope_scaling="yarn:4"))
    assert found.config.rope_numbers[:2] == (4.0, 8192.0)  # from before its own scaling
    assert "the checkpoint says llama3" in found.notes[-1]


def test_yarn_rope(tmp_path: Path) -> None:
    """The keys of llama.cpp, whose rope_yarn multiplies attn_factor by 1 + ln(factor) / 10."""

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    def more(writer: Any) -> None:
        yarn(writer)
        writer.add_rope_scaling_orig_ctx_len(8)
        writer.add_rope_scaling_attn_factors(0.5)
        writer.add_rope_scaling_yarn_beta_fast(16.0)
        writer.add_rope_scaling_yarn_beta_slow(2.0)

    write_gguf(tmp_path / "a.gguf", SHAPE, more=yarn)
    config = load(tmp_path / "a.gguf").config
    implied = 1 + np.log(4) / 10
    assert config.rope_scaling == Rope.YARN
    assert config.rope_numbers == pytest.approx((4.0, 32.0, 32.0, 1.0, implied, 1.0))
    write_gguf(tmp_path / "a.gguf", SHAPE, more=more)
    numbers = load(tmp_path / "a.gguf").config.rope_numbers
    assert numbers == pytest.approx((4.0, 8.0, 16.0, 2.0, implied / 2, 1.0))

    def half(writer: Any) -> None:
        yarn(writer)
        writer.add_rope_scaling_yarn_ext_factor(0.5)

    write_gguf(tmp_path / "a.gguf", SHAPE, more=half)
    with pytest.raises(LlamaError, match="yarn_ext_factor other than 1"):
        load(tmp_path / "a.gguf")


def test_linear_rope(tmp_path: Path) -> None:
    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tmp_path / "a.gguf", SHAPE, more=linear)
    assert load(tmp_path / "a.gguf").config.rope_numbers == (4.0,)


@pytest.mark.parametrize(
    "more, message",
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8 is not supported"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "type 'longrope' is"),
        (lambda w: w.add_rope_scaling_attn_factors(1.2), "attn_factor other than 1"),
        (lambda w: w.add_rope_scaling_yarn_log_mul(0.1), "yarn_log_multiplier = 0.1"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count: expected the head's 16"),
        (lambda w: w.add_logit_scale(2.0), "llama.logit_scale = 2.0"),
        (lambda w: w.add_tokenizer_model("bert"), "tokenizer.ggml.tokens: expected a list"),
    ],
)
def test_metadata_that_changes_numbers_is_refused(tmp_path: Path, more: Any, message: str) -> None:
    write_gguf(tmp_path / "a.gguf", SHAPE, more=more)
    with pytest.raises(LlamaError, match=message):
        load(tmp_path / "a.gguf")


def test_other_models_are_refused(tmp_path: Path, data: Path) -> None:
    write_gguf(tmp_path / "a.gguf", SHAPE, architecture="qwen2")
    with pytest.raises(LlamaError, match="architecture llama, found 'qwen2'"):
        load(tmp_path / "a.gguf")
    with pytest.raises(LlamaError, match="found 'kquanttest'"):
        load(data / "tiny_hf/tiny_kquant.gguf")
    with pytest.raises(LlamaError, match="token_embd.weight is missing"):
        load(data / "vocab/ggml-vocab-llama-spm.gguf")
    for name in ("blk.0.attn_q.scale", "blk.0.ffn_gate_inp.weight", "something"):
        write_gguf(tmp_path / "a.gguf", SHAPE, extra={name: np.zeros(64, np.float32)})
        with pytest.raises(LlamaError, match=f"{name}: a tensor that a plain Llama"):
            load(tmp_path / "a.gguf")
    write_gguf(tmp_path / "a.gguf", SHAPE, extra={"blk.7.attn_q.weight": np.zeros((4, 4), "f4")})
    with pytest.raises(LlamaError, match="blk.7.attn_q.weight: a tensor that"):
        load(tmp_path / "a.gguf")


def test_biases_come_whole_or_not_at_all(tmp_path: Path) -> None:
    shape = small_models.config(attention_bias=True, mlp_bias=True)
    arrays = write_gguf(tmp_path / "a.gguf", shape)
    found = export(tmp_path / "a.gguf", tmp_path / "a.bin")
    assert found.config.attention_bias and found.config.mlp_bias
    for name, array in arrays.items():
        assert np.array_equal(found.tensors[name], array), name
    for theirs, missing in (("attn_q", "attention.wk"), ("ffn_up", "feed_forward.w1")):
        one = {f"blk.0.{theirs}.bias": np.zeros(24 if theirs == "attn_q" else 76, np.float32)}
        write_gguf(tmp_path / "a.gguf", small_models.config(), extra=one)
        with pytest.raises(LlamaError, match=f"layers.0.{missing}.bias is missing"):
            load(tmp_path / "a.gguf")
    for name in ("blk.0.attn_norm.bias", "blk.7.attn_q.bias"):
        write_gguf(tmp_path / "a.gguf", shape, extra={name: np.zeros(24, np.float32)})
        with pytest.raises(LlamaError, match=f"{name}: a tensor that a Llama of this shape"):
            load(tmp_path / "a.gguf")


def test_real_file(data: Path, tmp_path: Path) -> None:
    found = export(data / "weights/llama-2-tiny-random.gguf", tmp_path / "a.bin")
    assert found.config.vocab_size == 32000 and found.tokenizer[0] == TokenizerKind.SENTENCEPIECE
    assert (found.config.bos_id, found.config.eos_ids) == (1, (2,))
    assert found.records["tok_embeddings.weight"].kind == Kind.F16
    for tensor in gguf.GGUFReader(data / "weights/llama-2-tiny-random.gguf").tensors:
        ours = {gguf_name(n): n for n in found.tensors}[tensor.name]
        assert np.array_equal(found.tensors[ours], tensor.data.astype(np.float32))


def test_a_classifiers_head_is_refused(tmp_path: Path) -> None:
    for name in ("cls.output.weight", "cls.weight", "cls.output.bias"):
        write_gguf(tmp_path / "a.gguf", SHAPE, extra={name: np.ones((2, 64), np.float32)})
        with pytest.raises(LlamaError, match=f"{name}: a classifier's head; export the Hugging"):
            load(tmp_path / "a.gguf", Options())


# ---- damage ----


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.gguf"

    def more(writer: Any) -> None:
        writer.add_array("some.strings", ["a", "bc", ""])
        writer.add_array("some.numbers", [1, 2, 3])
        writer.add_bool("some.flag", True)

    shape = small_models.config(n_layers=1, vocab_size=8)
    write_gguf(path, shape, more=more)
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.gguf"
    for size in [*range(0, 1500, 3), *range(1500, len(good) - 31, 61), len(good) - 32]:
        path.write_bytes(good[:size])
        with pytest.raises(LlamaError):
            Container(path)


def test_hostile_numbers_are_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.gguf"

    def changed(at: int, code: str, value: Any) -> str:
        data = bytearray(good)
        struct.pack_into(code, data, at, value)
        path.write_bytes(data)
        with pytest.raises(LlamaError) as caught:
            Container(path)
        return str(caught.value)

    assert "expected a GGUF file" in changed(0, "4s", b"GGML")
    assert "version 2 or 3, found 1" in changed(4, "<I", 1)
    assert "big-endian" in changed(4, ">I", 3)
    for n in (2**64 - 1, 2**40):
        assert "its own directory" in changed(8, "<Q", n)
        assert "its own directory" in changed(16, "<Q", n)
        assert "at most" in changed(24, "<Q", n)  # the first key's length
    assert "unknown type 99" in changed(24 + 8 + len("general.architecture"), "<I", 99)
    array = good.index(b"some.strings") + len("some.strings")
    for n in (2**64 - 1, 2**61, 2**31):
        assert "some.strings" in changed(array + 8, "<Q", n)  # its count
        assert "some.strings" in changed(array + 16, "<Q", n)  # its first string's length
    assert "array of type 9" in changed(array + 4, "<I", 9)
    tensor = good.index(b"token_embd.weight") + len("token_embd.weight")
    assert "1 to 4 dimensions" in changed(tensor, "<I", 5)
    assert "impossible shape" in changed(tensor + 4, "<Q", 2**63)
    assert "impossible shape" in changed(tensor + 4, "<Q", 0)
    assert "truncated" in changed(tensor + 4, "<Q", 2**39)
    assert "unknown tensor type 77" in changed(tensor + 20, "<I", 77)
    assert "in blocks of 32" in changed(tensor + 20, "<I", int(Q.Q4_0))
    assert "not a multiple" in changed(tensor + 24, "<Q", 8)
    assert "truncated" in changed(tensor + 24, "<Q", 2**62)
    second = good.index(b"blk.0.attn_q.weight")
    assert "stands twice" in changed(second, "19s", b"blk.0.attn_k.weight")


@settings(max_examples=300)
@given(st.data())
def test_damage_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, data: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1500) | st.integers(0, len(good) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        for tensor in load(path, Options()).tensors.values():
            tensor.rows(0, 1)
    except LlamaError as error:
        assert "\n" not in str(error)
