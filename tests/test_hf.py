"""Hugging Face checkpoints against safetensors, torch and transformers themselves."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llama.checkpoints import Options, load, safetensors_file
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.format import Bin, Config, Rope, TokenizerKind, read
from llama.quant import widen


def export(source: Path, out: Path) -> Bin:
    checkpoint = load(source)
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    return read(out)


def tiny(data: Path, folder: Path, *files: str) -> Path:
    folder.mkdir()
    shutil.copy(data / "tiny_hf/tiny_llama_config.json", folder / "config.json")
    for file in files:
        shutil.copy(data / "tiny_hf" / file, folder / file)
    return folder


# ---- the numbers ----


def test_logits_of_an_independent_forward(data: Path, tmp_path: Path) -> None:
    folder = tiny(data, tmp_path / "hf", "tiny_llama.safetensors")
    found = export(folder, tmp_path / "a.bin")
    known = json.loads((data / "tiny_hf/tiny_llama_logits.json").read_text())
    for tokens, logits in zip(known["sequences"], known["logits"], strict=True):
        ours = small_models.forward(found, tokens)
        assert np.abs(ours - np.reshape(logits, ours.shape)).max() < 1e-5


def test_sharded_is_whole(data: Path, tmp_path: Path) -> None:
    whole = export(tiny(data, tmp_path / "a", "tiny_llama.safetensors"), tmp_path / "a.bin")
    shards = [f"tiny_llama-0000{n}-of-00002.safetensors" for n in (1, 2)]
    folder = tiny(data, tmp_path / "b", *shards)
    index = (data / "tiny_hf/tiny_llama.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(index)
    for name, record in export(folder, tmp_path / "b.bin").records.items():
        assert record.crc32 == whole.records[name].crc32
    changed = json.loads(index)
    changed["weight_map"]["model.norm.weight"] = shards[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
    with pytest.raises(LlamaError, match="model.norm.weight is missing, the index says"):
        load(folder)
    changed["weight_map"]["model.norm.weight"] = "../b/" + shards[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
    with pytest.raises(LlamaError, match="expected a file's name"):
        load(folder)


@pytest.mark.parametrize("seed", range(4))
def test_logits_are_transformers(tmp_path: Path, seed: int) -> None:
    """transformers makes the model and the directory: nothing of ours on that side."""
    transformers = pytest.importorskip("transformers")
    random = np.random.default_rng(seed)
    n_kv, group, head = (int(n) for n in random.integers(1, 4, 3))
    torch.manual_seed(seed)
    settings_ = transformers.LlamaConfig(
        vocab_size=37, hidden_size=n_kv * group * int(random.integers(2, 8)), intermediate_size=22,
        num_hidden_layers=2, num_attention_heads=n_kv * group, num_key_value_heads=n_kv,
        head_dim=2 * head, max_position_embeddings=64, tie_word_embeddings=bool(seed % 2),
        initializer_range=0.4, bos_token_id=1, eos_token_id=[2, 5],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings_).eval()
    model.save_pretrained(tmp_path / "hf")
    found = export(tmp_path / "hf", tmp_path / "a.bin")
    assert found.config.tied == bool(seed % 2) and found.config.eos_ids == (2, 5)
    tokens = [int(t) for t in random.integers(0, 37, 20)]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    ours = small_models.forward(found, tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_transformers_own_shards(tmp_path: Path) -> None:
    """save_pretrained cuts a model into many files and an index."""
    model = small_models.transformers_llama(small_models.config(n_kv_heads=2))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    whole = export(tmp_path / "one", tmp_path / "one.bin")
    many = export(tmp_path / "many", tmp_path / "many.bin")
    assert many.config == whole.config and many.records == whole.records


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_pytorch_bin_is_safetensors(tmp_path: Path, dtype: str) -> None:
    shape = small_models.config()
    weights = small_models.weights(shape, dtype)
    whole = export(small_models.write_hf(tmp_path / "a", shape, weights), tmp_path / "a.bin")
    folder = small_models.write_hf(tmp_path / "b", shape, weights)
    (folder / "model.safetensors").unlink()
    tensors = list(small_models.to_hf(weights, shape).items())
    names: dict[str, str] = {}
    for n, part in enumerate((tensors[:9], tensors[9:])):
        file = f"pytorch_model-{n}.bin"
        torch.save(dict(part), folder / file)
        names |= dict.fromkeys(dict(part), file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = export(folder, tmp_path / "b.bin")
    for name, record in whole.records.items():
        assert found.records[name].crc32 == record.crc32 and found.records[name].kind == record.kind


# ---- config.json ----


def config_of(folder: Path, **changes: Any) -> Config:
    shape = small_models.config()
    if not folder.exists():
        small_models.write_hf(folder, shape, small_models.weights(shape))
    settings_ = small_models.hf_settings(shape, **changes)
    (folder / "config.json").write_text(json.dumps(settings_))
    return load(folder).config


def test_rope_as_transformers_4_and_5_write_it(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    plain = config_of(folder, rope_theta=5e5)
    assert (plain.rope_theta, plain.rope_scaling) == (5e5, Rope.PLAIN)
    five = {"rope_type": "default", "rope_theta": 5e5}
    assert config_of(folder, rope_parameters=five, rope_theta=None) == plain
    linear = config_of(folder, rope_scaling={"type": "linear", "factor": 4})
    assert (linear.rope_scaling, linear.rope_numbers) == (Rope.LINEAR, (4.0,))
    five = {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}
    assert config_of(folder, rope_parameters=five, rope_theta=None) == linear
    numbers = {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    three = config_of(folder, rope_scaling={"rope_type": "llama3", **numbers})
    assert three.rope_numbers == (32.0, 1.0, 4.0, 8192.0)
    five = {"rope_type": "llama3", "rope_theta": 1e4, **numbers}
    assert config_of(folder, rope_parameters=five, rope_theta=None) == three
    numbers = {"factor": 4.0, "original_max_position_embeddings": 16}
    yarn = config_of(folder, rope_scaling={"type": "yarn", **numbers})
    assert yarn.rope_scaling == Rope.YARN
    assert yarn.rope_numbers == pytest.approx((4.0, 16.0, 32.0, 1.0, 0.1 * np.log(4) + 1, 1.0))
    five = {"rope_type": "yarn", "rope_theta": 1e4, **numbers}
    assert config_of(folder, rope_parameters=five, rope_theta=None) == yarn
    told = {"factor": None, "mscale": 2, "mscale_all_dim": 1.0, "beta_fast": 0, "truncate": False}
    yarn = config_of(folder, rope_scaling=numbers | {"type": "yarn"} | told)
    attention = (0.2 * np.log(2) + 1) / (0.1 * np.log(2) + 1)  # 32 positions, of 16 at first
    assert yarn.rope_numbers == pytest.approx((2.0, 16.0, 32.0, 1.0, attention, 0.0))
    beside = {"original_max_position_embeddings": 8, "rope_scaling": {"type": "yarn", **numbers}}
    assert config_of(folder, **beside).rope_numbers[1] == 8  # as transformers has it
    dynamic = config_of(folder, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert (dynamic.rope_scaling, dynamic.rope_numbers) == (Rope.DYNAMIC, (2.0, 32.0))
    five = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert config_of(folder, rope_parameters=five, rope_theta=None) == dynamic
    for kind in ("longrope", "proportional"):
        with pytest.raises(LlamaError, match=f"rope type {kind} is not supported"):
            config_of(folder, rope_scaling={"type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "0.self_attn.q_proj.bias is missing, expected 24"),
        ({"mlp_bias": True}, "0.mlp.gate_proj.bias is missing, expected 76"),
        ({"mlp_bias": 1}, "mlp_bias: expected true or false, found 1"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"architectures": ["MistralForCausalLM"]}, "LlamaForCausalLM, found .*Mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
        ({"model_type": "mistral"}, "model_type = mistral"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "big"}, "hidden_size: expected a whole number, found 'big'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected .* found nothing"),
        ({"num_hidden_layers": 10**9}, "n_layers must be"),
        ({"rms_norm_eps": 0}, "norm_eps must be"),
        ({"num_attention_heads": 0}, "n_heads must be"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing, expected 24"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"intermediate_size": 75}, "mlp.gate_proj.weight: expected 75 x 24, found 76 x 24"),
        ({"num_key_value_heads": 2}, "k_proj.weight: expected 12 x 24, found 24 x 24"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
    ],
)
def test_settings_that_change_numbers_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LlamaError, match=message) as caught:
        config_of(tmp_path / "hf", **changes)
    assert "\n" not in str(caught.value)


def test_defaults_are_transformers(tmp_path: Path) -> None:
    config = config_of(
        tmp_path / "hf", head_dim=None, num_key_value_heads=None, rope_theta=None,
        rms_norm_eps=None, max_position_embeddings=None, tie_word_embeddings=None,
    )  # fmt: skip
    assert (config.head_dim, config.n_kv_heads, config.max_seq_len) == (6, 4, 2048)
    assert (config.rope_theta, config.norm_eps, config.tied) == (1e4, 1e-6, False)


def test_code_of_its_own_is_mentioned(tmp_path: Path) -> None:
    shape = small_models.config()
    code = {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}
    folder = small_models.write_hf(tmp_path, shape, small_models.weights(shape), auto_map=code)
    assert any("auto_map" in note for note in load(folder).notes)


def test_broken_directories_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for text in ("", "[1]", "{", "\xff", "[" * 100_000):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(LlamaError, match="expected"):
            load(folder)
    (folder / "config.json").write_text(json.dumps(small_models.hf_settings(small_models.config())))
    with pytest.raises(LlamaError, match=r"expected \*.safetensors or pytorch_model"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(LlamaError, match="empty"):
        load(folder)


# ---- the tokenizer, ids and template ----


def llama3(data: Path, folder: Path, version: str) -> Path:
    shape = small_models.config(vocab_size=128256)
    small_models.write_hf(folder, shape, small_models.weights(shape))
    for name, file in [
        ("hf_llama3_tokenizer.json", "tokenizer.json"),
        (f"hf_{version}_tokenizer_config.json", "tokenizer_config.json"),
    ]:
        shutil.copy(data / "tokenizers" / name, folder / file)
    return folder


def test_llama3_directory(data: Path, tmp_path: Path) -> None:
    folder = llama3(data, tmp_path / "hf", "llama3_1")
    found = load(folder)
    assert found.tokenizer.kind == TokenizerKind.JSON
    assert (found.config.bos_id, found.config.eos_ids) == (128000, (128009,))
    assert found.meta["template.family"] == "llama3"
    assert "<|start_header_id|>" in str(found.meta["template.jinja"])
    ids = {"bos_token_id": 128000, "eos_token_id": [128001, 128008]}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    assert load(folder).config.eos_ids == (128001, 128008, 128009)
    (folder / "chat_template.jinja").write_text("{{ '<|im_start|>' + '<|im_end|>' }}")
    assert load(folder).meta["template.family"] == "chatml"
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"add_bos_token": False}))
    assert load(folder).config.bos_id is None


def test_vicuna_is_known_by_its_name(data: Path, tmp_path: Path) -> None:
    """Its checkpoints hold no template."""
    shape = small_models.config(vocab_size=32000)
    model = (data / "tokenizers/llama2_tokenizer.model").read_bytes()
    for name, family in (("vicuna-7b-v1.5", "vicuna"), ("some-7b", None)):
        folder = small_models.write_hf(tmp_path / name, shape, small_models.weights(shape))
        (folder / "tokenizer.model").write_bytes(model)
        found = load(folder)
        assert found.meta.get("template.family") == family
        assert any("chat template vicuna: inferred" in note for note in found.notes) == bool(family)


def test_which_tokenizer(data: Path, tmp_path: Path) -> None:
    shape = small_models.config(vocab_size=32003)
    folder = small_models.write_hf(tmp_path / "hf", shape, small_models.weights(shape))
    assert load(folder).notes == [
        "no tokenizer.model or tokenizer.json beside it: the model will take token ids only"
    ]
    document = json.loads((data / "tokenizers/hf_llama2_tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = load(folder)
    assert found.tokenizer.kind == TokenizerKind.JSON and found.config.bos_id is None
    (folder / "config.json").write_text(
        json.dumps(small_models.hf_settings(shape, bos_token_id=1, eos_token_id=2))
    )
    assert (load(folder).config.bos_id, load(folder).config.eos_ids) == (1, (2,))
    shutil.copy(data / "tokenizers/llama2_tokenizer.model", folder / "tokenizer.model")
    assert load(folder).tokenizer.kind == TokenizerKind.SENTENCEPIECE
    document["added_tokens"].append({**document["added_tokens"][0], "id": 32000, "content": "<x>"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = load(folder)
    assert found.tokenizer.kind == TokenizerKind.JSON and "tokenizer.json taken" in found.notes[0]
    chosen = load(folder, Options(tokenizer=data / "tokenizers/llama2_tokenizer.model"))
    assert chosen.tokenizer.kind == TokenizerKind.SENTENCEPIECE
    with pytest.raises(LlamaError, match="the tokenizer has 128256 tokens, the model only 32003"):
        load(folder, Options(tokenizer=data / "tokenizers/llama3_tokenizer.model"))


# ---- safetensors ----


def test_tensors_are_safetensors_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(5, 7), "b": torch.randn(3).half(), "c": torch.randn(9, 2).bfloat16(),
        "d": torch.randn(2, 3, 4), "e": torch.arange(4), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = safetensors_file.read(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name in "abcd":
        rows = widen(found[name].rows(0, len(tensors[name])))
        assert np.array_equal(rows, tensors[name].float().numpy())
    assert found["e"].dtype == "I64"


def raw(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000, b"1" * 5000,
        {"a": 1}, {"a": {}}, {"a": {**GOOD, "shape": [2, 4]}}, {"a": {**GOOD, "shape": [2, -3]}},
        {"a": {**GOOD, "shape": [2.0, 3]}}, {"a": {**GOOD, "shape": None}},
        {"a": {**GOOD, "shape": [1] * 99}}, {"a": {**GOOD, "shape": [2**40, 2**40]}},
        {"a": {**GOOD, "data_offsets": [0, 25]}}, {"a": {**GOOD, "data_offsets": [24, 0]}},
        {"a": {**GOOD, "data_offsets": [-24, 0]}}, {"a": {**GOOD, "data_offsets": [4, 28]}},
        {"a": {**GOOD, "data_offsets": [0, 2**63]}}, {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {**GOOD, "data_offsets": 5}}, {"a": {**GOOD, "shape": [True, 3]}},
    ],
)  # fmt: skip
def test_broken_safetensors_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(LlamaError):
        safetensors_file.read(raw(tmp_path / "a", header))


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    whole = raw(tmp_path / "a", {"a": GOOD}).read_bytes()
    assert safetensors_file.read(tmp_path / "a")["a"].shape == (2, 3)
    for size in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(LlamaError):
            safetensors_file.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(struct.pack("<Q", 2**62) + whole)
    with pytest.raises(LlamaError, match="a header of"):
        safetensors_file.read(tmp_path / "a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(max_size=4),
        json_values
        | st.fixed_dictionaries(
            {"dtype": json_values, "shape": json_values, "data_offsets": json_values}
        ),
        max_size=3,
    )
)
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any
) -> None:
    try:
        safetensors_file.read(raw(tmp_path_factory.getbasetemp() / "any", header))
    except LlamaError:
        pass
