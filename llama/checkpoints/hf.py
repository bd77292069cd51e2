"""Hugging Face's form: config.json and weights in safetensors or pytorch_model*.bin.

Names and one order differ from Meta's: wq and wk keep the halves of each rotary pair apart, and
are put back together here. A setting that would change the numbers and that this engine does
not compute is refused by its name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.checkpoints import hf_heads, hf_tokenizer, safetensors_file, torch_file
from llama.checkpoints.checkpoint import Checkpoint, Options
from llama.checkpoints.hf_heads import Architecture
from llama.checkpoints.positions import yarn_attention
from llama.checkpoints.settings import Settings
from llama.checkpoints.tensors import Interleaved, Tensor
from llama.errors import LlamaError
from llama.format import Config, Head, Rope

# Behind the architecture's prefix.
NAMES = {"embed_tokens.weight": "tok_embeddings.weight", "norm.weight": "norm.weight"}
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
BUFFERS = re.compile(r"(\w+\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
PAIRED = re.compile(r"layers\.\d+\.attention\.w[qk]\.(weight|bias)")
# Settings that change the numbers, and the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",), "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1,),
    "sliding_window": (), "use_sliding_window": (False,), "no_rope_layers": ([],),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "clip_qkv": (),
    "qk_norm": (False,), "use_qk_norm": (False,), "rope_interleaved": (False,),
    "logit_scale": (1,), "logits_scaling": (1,), "embedding_multiplier": (1,),
    "residual_multiplier": (1,), "attention_multiplier": (),
    "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,),
}  # fmt: skip


def load(path: Path, options: Options) -> Checkpoint:
    """Reads the configuration and the weights' directories; weights stay where they are."""
    settings = Settings.read(path / "config.json")
    config = config_of(settings)
    architecture = hf_heads.architecture_of(settings)
    weights = {n: tensor for n, tensor in _weights(path).items() if not BUFFERS.fullmatch(n)}
    prefix = architecture.prefix(weights)
    own = {_meta_name(path, name, architecture, prefix): name for name in weights}
    tensors = {ours: weights[name] for ours, name in own.items()}
    for name, tensor in tensors.items():
        whole = len(tensor.shape) > 0 and tensor.shape[0] % config.head_dim == 0
        if PAIRED.fullmatch(name) and whole:
            tensors[name] = Interleaved(tensor, config.head_dim)
    notes: list[str] = []
    if settings.values.get("auto_map"):
        notes.append("it comes with code of its own (auto_map), which is not looked at")
    tokenizer, meta = hf_tokenizer.load(path, settings, config.vocab_size, options, notes)
    config = replace(config, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    name = path.resolve().name
    meta = {"general.name": name, "general.origin": f"Hugging Face {name}", **meta}
    if config.head != Head.LM:
        meta |= hf_heads.meta_of(settings, config, notes) | hf_tokenizer.frame(path, tokenizer)
    own = _own_names(config.n_layers, architecture, prefix) | own
    return Checkpoint(path, "Hugging Face", config, tensors, tokenizer, meta, notes, own)


def _meta_name(path: Path, name: str, architecture: Architecture, prefix: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem in hf_heads.OUTPUTS:
        if stem != architecture.output:
            raise LlamaError(
                f"{path}: config.json says {architecture.name}, but there is {name}, of another "
                "head"
            )
        return f"output.{part}"
    inner = name.removeprefix(prefix)
    layer = re.fullmatch(r"layers\.(\d{1,5})\.([\w.]+)\.(weight|bias)", inner)
    if name.startswith(prefix) and inner in NAMES:
        return NAMES[inner]
    if not name.startswith(prefix) or layer is None or layer[2] not in LAYER_NAMES:
        raise LlamaError(f"{path}: {name[:80]}: a tensor that a plain Llama does not have")
    return f"layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"


def _own_names(n_layers: int, architecture: Architecture, prefix: str) -> dict[str, str]:
    """Our names -> what the checkpoint would call them, for tensors that are not there."""
    own = {ours: prefix + theirs for theirs, ours in NAMES.items()}
    for part in ("weight", "bias"):
        own[f"output.{part}"] = f"{architecture.output}.{part}"
        for n in range(n_layers):
            for theirs, ours in LAYER_NAMES.items():
                own[f"layers.{n}.{ours}.{part}"] = f"{prefix}layers.{n}.{theirs}.{part}"
    return own


def config_of(settings: Settings) -> Config:
    """What config.json says of the network; no token ids, which the tokenizer knows."""
    head = hf_heads.architecture_of(settings).head
    _refuse_others(settings)
    dim, n_heads = settings.count("hidden_size"), settings.count("num_attention_heads")
    theta, scaling, numbers = _rope(settings)
    config = Config(
        vocab_size=settings.count("vocab_size"),
        dim=dim,
        hidden_dim=settings.count("intermediate_size"),
        head_dim=settings.count("head_dim", dim // max(n_heads, 1)),
        n_layers=settings.count("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=settings.count("num_key_value_heads", n_heads),
        max_seq_len=_max_seq_len(settings),
        norm_eps=settings.real("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_numbers=numbers,
        tied=head == Head.LM and settings.flag("tie_word_embeddings", False),
        attention_bias=settings.flag("attention_bias", False),
        mlp_bias=settings.flag("mlp_bias", False),
        head=head,
        n_labels=2 if head == Head.ANSWER else len(hf_heads.labels_of(settings, head)),
        output_bias=hf_heads.output_bias(settings, head),
    )
    try:
        config.check()
    except LlamaError as error:
        raise LlamaError(f"{settings.path}: {error}") from None
    return config


def _refuse_others(settings: Settings) -> None:
    """Raises LlamaError for a setting that would change the numbers. What is not listed is a key
    that transformers' Llama does not look at."""
    where = settings.path
    for key, neutral in NEUTRAL.items():
        if settings.has(key) and settings.values[key] not in neutral:
            raise LlamaError(f"{where}: {key} = {str(settings.values[key])[:60]} is not supported")
    layers = settings.values.get("layer_types") or []
    if not isinstance(layers, list) or any(each != "full_attention" for each in layers):
        raise LlamaError(f"{where}: layer_types other than full_attention are not supported")
    if settings.has("quantization_config"):
        method = settings.inside("quantization_config").values.get("quant_method", "unknown")
        raise LlamaError(
            f"{where}: quantization_config: {str(method)[:40]} weights are not supported; export "
            "the checkpoint whose weights are f32, f16 or bf16"
        )


def _rope(settings: Settings) -> tuple[float, Rope, tuple[float, ...]]:
    """Base, kind and numbers, as transformers 4 (rope_scaling) or 5 (rope_parameters) has them;
    where both stand there, transformers 5 too takes the former."""
    key = "rope_scaling" if settings.values.get("rope_scaling") else "rope_parameters"
    rope = settings.inside(key)
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise LlamaError(f"{settings.path}: {key}: one for each layer type ({name}) "
                             "is not supported")  # fmt: skip
    theta = rope.real("rope_theta", settings.real("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.real("partial_rotary_factor", 1.0) != 1:
        raise LlamaError(f"{settings.path}: partial_rotary_factor other than 1 is not supported")
    if kind in ("default", "none"):
        return theta, Rope.PLAIN, ()
    if kind == "linear":
        return theta, Rope.LINEAR, (rope.real("factor"),)
    length = settings.count("max_position_embeddings", 2048)
    original = rope.count("original_max_position_embeddings", length)
    original = settings.count("original_max_position_embeddings", original)
    if kind == "llama3":
        numbers = [rope.real(k) for k in ("factor", "low_freq_factor", "high_freq_factor")]
        return theta, Rope.LLAMA3, (*numbers, float(original))
    if kind == "dynamic":
        return theta, Rope.DYNAMIC, (rope.real("factor"), float(length))
    if kind == "yarn":
        return theta, Rope.YARN, _yarn(rope, length, original)
    raise LlamaError(f"{settings.path}: rope type {kind[:40]} is not supported")


def _max_seq_len(settings: Settings) -> int:
    """max_position_embeddings, or what it was stretched to: Vicuna's 16k models have it beside."""
    length = settings.count("max_position_embeddings", 2048)  # transformers' default
    return max(length, settings.count("max_sequence_length", 0))


def _yarn(rope: Settings, length: int, original: int) -> tuple[float, ...]:
    """The numbers of docs/format.md, with transformers' rules for those that are not given."""
    factor = rope.real("factor", length / max(original, 1))
    over, under = rope.real("mscale", 0.0), rope.real("mscale_all_dim", 0.0)
    implied = yarn_attention(factor)
    if over and under:
        whole = yarn_attention(factor, under)
        implied = yarn_attention(factor, over) / whole if whole else 0.0  # which is refused
    return (
        factor,
        float(original),
        rope.real("beta_fast", 32.0) or 32.0,
        rope.real("beta_slow", 1.0) or 1.0,
        rope.real("attention_factor", implied),
        float(rope.flag("truncate", True)),
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file, under its own name."""
    files, named = _files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        reader = safetensors_file if file.suffix == ".safetensors" else torch_file
        found = reader.read(file)
        for name in found.keys() & tensors.keys():
            raise LlamaError(f"{file}: {name[:80]} stands in two files")
        for name, at in named.items():
            if at == file.name and name not in found:
                raise LlamaError(f"{file}: {name[:80]} is missing, the index says it is here")
        tensors |= found
    return tensors


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the index's tensor -> file name where there is one."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if not index.is_file():
            continue
        named = Settings.read(index).inside("weight_map").values
        for name, file in named.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise LlamaError(f"{index}: {name[:80]}: expected a file's name, found {file!r}")
        return [path / file for file in sorted(set(named.values()))], named
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model.bin"):
        files = sorted(path.glob(pattern))
        if files:
            return files, {}
    raise LlamaError(f"{path}: expected *.safetensors or pytorch_model*.bin beside config.json")
