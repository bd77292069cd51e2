"""The published config.json of each family member, as transformers 4 wrote it and as 5 writes it.

The numbers are those of the releases; transformers itself turns them into its newer form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models

from llama.checkpoints import hf
from llama.checkpoints.settings import Settings
from llama.errors import LlamaError
from llama.format import Config, Rope

transformers = pytest.importorskip("transformers")


def scaled(factor: float) -> dict[str, Any]:
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip


def said(
    vocab: int, dim: int, hidden: int, layers: int, heads: int, kv: int, length: int, eps: float,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": dim,
        "initializer_range": 0.02, "intermediate_size": hidden, "max_position_embeddings": length,
        "model_type": "llama", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv, "pretraining_tp": 1, "rms_norm_eps": eps, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": vocab, **more,
    }  # fmt: skip


L3 = {"rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
SMOL = {"tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": said(32000, 4096, 11008, 32, 32, 32, 4096, 1e-5),
    "Llama-2-13b-hf": said(32000, 5120, 13824, 40, 40, 40, 4096, 1e-5, pretraining_tp=2),
    "Llama-2-70b-hf": said(32000, 8192, 28672, 80, 64, 8, 4096, 1e-5),
    "CodeLlama-7b-hf": said(32016, 4096, 11008, 32, 32, 32, 16384, 1e-5, rope_theta=1000000),
    "CodeLlama-34b-hf": said(32000, 8192, 22016, 48, 64, 8, 16384, 1e-5, rope_theta=1000000),
    "CodeLlama-70b-hf": said(32016, 8192, 28672, 80, 64, 8, 16384, 1e-5, rope_theta=1000000),
    "CodeLlama-70b-Instruct-hf": said(32016, 8192, 28672, 80, 64, 8, 4096, 1e-5, rope_theta=10000),
    "Meta-Llama-3-8B": said(128256, 4096, 14336, 32, 32, 8, 8192, 1e-5, **L3),
    "Meta-Llama-3-70B": said(128256, 8192, 28672, 80, 64, 8, 8192, 1e-5, **L3),
    "Llama-3.1-8B": said(128256, 4096, 14336, 32, 32, 8, 131072, 1e-5,
                         **{**L3, "rope_scaling": scaled(8.0), "mlp_bias": False}),
    "Llama-3.1-405B": said(128256, 16384, 53248, 126, 128, 8, 131072, 1e-5,
                           **{**L3, "rope_scaling": scaled(8.0), "mlp_bias": False}),
    "Llama-3.2-1B": said(128256, 2048, 8192, 16, 32, 8, 131072, 1e-5, **{
        **L3, "rope_scaling": scaled(32.0), "tie_word_embeddings": True, "head_dim": 64}),
    "Llama-3.2-3B": said(128256, 3072, 8192, 28, 24, 8, 131072, 1e-5, **{
        **L3, "rope_scaling": scaled(32.0), "tie_word_embeddings": True, "head_dim": 128}),
    "Llama-3.3-70B-Instruct": said(128256, 8192, 28672, 80, 64, 8, 131072, 1e-5, **{
        **L3, "rope_scaling": scaled(8.0), "head_dim": 128}),
    "SmolLM2-135M-Instruct": said(49152, 576, 1536, 30, 9, 3, 8192, 1e-5, rope_theta=100000,
                                  **SMOL),
    "SmolLM2-360M-Instruct": said(49152, 960, 2560, 32, 15, 5, 8192, 1e-5, rope_theta=100000,
                                  **SMOL),
    "SmolLM2-1.7B-Instruct": said(49152, 2048, 8192, 24, 32, 32, 8192, 1e-5, rope_theta=130000,
                                  **SMOL),
    "TinyLlama-1.1B-Chat-v1.0": said(32000, 2048, 5632, 22, 32, 4, 2048, 1e-5, rope_theta=10000.0),
    "vicuna-7b-v1.3": said(32000, 4096, 11008, 32, 32, 32, 2048, 1e-6),
    "vicuna-7b-v1.5": said(32000, 4096, 11008, 32, 32, 32, 4096, 1e-5),
    "vicuna-7b-v1.5-16k": said(32000, 4096, 11008, 32, 32, 32, 4096, 1e-5, **{
        "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}}),
}  # fmt: skip
LENGTHS = {"vicuna-7b-v1.5-16k": 16384}  # what it was stretched to


def read(path: Path, settings: dict[str, Any]) -> Config:
    path.write_text(json.dumps(settings))
    return hf.config_of(Settings.read(path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_as_transformers_4_and_5_write_it(tmp_path: Path, name: str) -> None:
    four = PUBLISHED[name]
    rope = four["rope_scaling"] or {}
    kind = Rope[(rope.get("rope_type") or rope.get("type") or "plain").upper()]
    numbers = tuple(value for value in rope.values() if not isinstance(value, str))
    config = read(tmp_path / "4.json", four)
    assert config == Config(
        vocab_size=four["vocab_size"], dim=four["hidden_size"],
        hidden_dim=four["intermediate_size"],
        head_dim=four["hidden_size"] // four["num_attention_heads"],
        n_layers=four["num_hidden_layers"], n_heads=four["num_attention_heads"],
        n_kv_heads=four["num_key_value_heads"],
        max_seq_len=LENGTHS.get(name, four["max_position_embeddings"]),
        norm_eps=four["rms_norm_eps"], rope_theta=four.get("rope_theta", 1e4), rope_scaling=kind,
        rope_numbers=numbers, tied=four["tie_word_embeddings"],
    )  # fmt: skip
    transformers.LlamaConfig.from_pretrained(tmp_path / "4.json").save_pretrained(tmp_path / "5")
    five = json.loads((tmp_path / "5/config.json").read_text())
    assert "rope_parameters" in five and "rope_scaling" not in five
    assert read(tmp_path / "5.json", five) == config
    other = {"type": "rope_type", "rope_type": "type"}  # both were in use
    renamed = {other.get(key, key): value for key, value in rope.items()}
    assert read(tmp_path / "4.json", {**four, "rope_scaling": renamed or None}) == config


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e3}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3},
     "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e3},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 3e3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}, "rope_scaling": None},
])  # fmt: skip
def test_both_forms_at_once_are_read_as_transformers_does(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = small_models.hf_settings(small_models.config())
    del settings["rope_scaling"], settings["rope_theta"]
    ours = read(tmp_path / "config.json", settings | changes)
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert ours.rope_scaling == Rope[theirs["rope_type"].upper().replace("DEFAULT", "PLAIN")]
    assert ours.rope_numbers == ((theirs["factor"],) if "factor" in theirs else ())


@pytest.mark.parametrize("changes, message", [
    ({"quantization_config": {"modules_to_not_convert": ["a"] * 99, "quant_method": "fbgemm_fp8"}},
     "quantization_config: fbgemm_fp8 weights are not supported; export the checkpoint whose"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"num_experts": 8}, "num_experts = 8"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_att"),
    ({"use_qk_norm": True}, "use_qk_norm = True"),
    ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     r"rope_parameters: one for each layer type \(full_attention\)"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "partial_rotary_factor other than 1"),
    ({"head_dim": 5}, "head_dim must be even, found 5"),
])  # fmt: skip
def test_what_changes_the_numbers_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = small_models.hf_settings(small_models.config()) | changes
    with pytest.raises(LlamaError, match=message) as caught:
        read(tmp_path / "config.json", settings)
    assert "\n" not in str(caught.value)


def test_what_does_not_is_not(tmp_path: Path) -> None:
    """Keys that transformers' Llama ignores, or takes at these values for nothing."""
    settings = small_models.hf_settings(small_models.config())
    plain = read(tmp_path / "config.json", settings)
    more = {
        "pretraining_tp": 4, "sliding_window": None, "num_local_experts": 0, "something": [1],
        "layer_types": ["full_attention"] * 2, "logit_scale": 1.0, "transformers_version": "4.31",
    }  # fmt: skip
    assert read(tmp_path / "config.json", settings | more) == plain
