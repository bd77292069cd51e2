"""A GGUF file of architecture llama: metadata to config, llama.cpp's tensor names to Meta's.

llama.cpp's own converter puts wq and wk into Meta's order of rotary pairs, so rows are taken as
they are. Llama 3.1's rope scaling is baked into a tensor, rope_freqs.weight: it is recognised by
recomputing it from the published settings.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from llama.checkpoints import tokenizer_file, vocabulary
from llama.checkpoints.checkpoint import Checkpoint, Options, Tokenizer
from llama.checkpoints.family import family_of
from llama.checkpoints.gguf_container import Container
from llama.checkpoints.positions import yarn_attention
from llama.checkpoints.tensors import Tensor
from llama.errors import LlamaError
from llama.format import Config, Rope, Value

ROPE = "rope_freqs.weight"
NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
# (factor, low_freq_factor, high_freq_factor, original_max_seq_len) as published: 3.1 and 3.3, 3.2
LLAMA3_ROPES = [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0)]
# Settings that change the numbers, and the value at which they do not.
NEUTRAL = {
    "expert_count": 0, "expert_used_count": 0, "logit_scale": 1, "residual_scale": 1,
    "embedding_scale": 1, "attention.scale": 0, "attention.causal": True, "pooling_type": 0,
    "attention.sliding_window": 0, "attention.max_alibi_bias": 0, "attention.clamp_kqv": 0,
    "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "use_parallel_residual": False,
    "rope.scaling.yarn_log_multiplier": 0, "rope.scaling.yarn_attn_factor": 1,
}  # fmt: skip


def load(path: Path, options: Options) -> Checkpoint:
    """Reads the directory of a GGUF file; weights stay where they are."""
    container = Container(path)
    metadata = container.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise LlamaError(
            f"{path}: expected general.architecture llama, found {str(architecture)[:60]!r}"
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise LlamaError(f"{path}: one part of a split GGUF; merge the parts first")
    notes: list[str] = []
    tensors = dict(container.tensors)
    freqs = tensors.pop(ROPE, None)
    tensors = {_meta_name(path, name): tensor for name, tensor in tensors.items()}
    if options.tokenizer is not None:
        tokenizer = tokenizer_file.read(options.tokenizer)
    else:
        tokenizer = vocabulary.from_gguf(path, metadata, notes)
    chosen = options.rope_scaling is not None
    config = _config(path, metadata, tensors, freqs, tokenizer, chosen)
    own = {_meta_name(path, name): name for name in container.tensors if name != ROPE}
    meta = _meta(path, metadata)
    return Checkpoint(path, "GGUF", config, tensors, tokenizer, meta, notes, own)


def _meta_name(path: Path, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    if name.startswith("cls."):
        raise LlamaError(
            f"{path}: {name}: a classifier's head; export the Hugging Face checkpoint instead"
        )
    layer = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in LAYER_NAMES:
        raise LlamaError(f"{path}: {name}: a tensor that a plain Llama does not have")
    return f"layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"


class _Fields:
    """Numbers of the metadata by name, with the type checked."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata

    def count(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise LlamaError(f"{self.path}: llama.{key}: expected a number, found {_short(value)}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise LlamaError(f"{self.path}: llama.{key}: expected a number, found {_short(value)}")
        return float(value)


def _short(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _config(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    freqs: Tensor | None,
    tokenizer: Tokenizer,
    chosen: bool,
) -> Config:
    fields = _Fields(path, metadata)
    for key, neutral in NEUTRAL.items():
        value = metadata.get(f"llama.{key}", neutral)
        if value != neutral:
            raise LlamaError(f"{path}: llama.{key} = {_short(value)} is not supported")
    if "tok_embeddings.weight" not in tensors:
        raise LlamaError(f"{path}: token_embd.weight is missing")
    dim, n_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", dim // max(n_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.count(key, head_dim) != head_dim:
            raise LlamaError(
                f"{path}: llama.{key}: expected the head's {head_dim}, found {fields.count(key)}"
            )
    theta = fields.real("rope.freq_base", 10000.0)
    scaling, numbers = _rope(path, fields, freqs, theta, head_dim, chosen)
    return Config(
        vocab_size=tensors["tok_embeddings.weight"].shape[0],
        dim=dim,
        hidden_dim=fields.count("feed_forward_length"),
        head_dim=head_dim,
        n_layers=fields.count("block_count"),
        n_heads=n_heads,
        n_kv_heads=fields.count("attention.head_count_kv", n_heads),
        max_seq_len=fields.count("context_length"),
        norm_eps=fields.real("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_numbers=numbers,
        tied="output.weight" not in tensors,
        attention_bias=_any_bias(tensors, "attention"),
        mlp_bias=_any_bias(tensors, "feed_forward"),
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
    )


def _any_bias(tensors: dict[str, Tensor], group: str) -> bool:
    """Whether a matrix of GROUP has one; then all must, as Checkpoint.check sees to."""
    return any(re.fullmatch(rf"layers\.\d+\.{group}\.\w+\.bias", name) for name in tensors)


def _rope(
    path: Path, fields: _Fields, freqs: Tensor | None, theta: float, head_dim: int, chosen: bool
) -> tuple[Rope, tuple[float, ...]]:
    kind = fields.metadata.get("llama.rope.scaling.type", "none")
    factor = fields.real("rope.scaling.factor", fields.real("rope.scale_linear", 1.0))
    if "llama.rope.scaling.type" not in fields.metadata and factor != 1:
        kind = "linear"  # as llama.cpp reads files from before the type was written
    if kind not in ("none", "linear", "yarn"):
        raise LlamaError(f"{path}: llama.rope.scaling.type {_short(kind)} is not supported")
    for key in ("attn_factor",) * (kind != "yarn") + ("yarn_ext_factor",) * (kind == "yarn"):
        if fields.real(f"rope.scaling.{key}", 1.0) != 1:
            raise LlamaError(f"{path}: llama.rope.scaling.{key} other than 1 is not supported")
    if freqs is None:
        if kind == "yarn":
            return Rope.YARN, _yarn(fields, factor or 1.0)
        if kind == "linear" and factor not in (0, 1):
            return Rope.LINEAR, (factor,)
        return Rope.PLAIN, ()
    if kind != "none":
        raise LlamaError(f"{path}: both rope_freqs.weight and {kind} rope scaling")
    if freqs.shape != (head_dim // 2,):
        raise LlamaError(
            f"{path}: rope_freqs.weight: expected {head_dim // 2} numbers, found {freqs.shape}"
        )
    found = freqs.rows(0, head_dim // 2).astype(np.float64)
    if np.all(found == 1):
        return Rope.PLAIN, ()
    for numbers in LLAMA3_ROPES:
        if np.allclose(found, _llama3_factors(theta, head_dim, numbers), rtol=1e-4):
            return Rope.LLAMA3, numbers
    if chosen:
        return Rope.LLAMA3, (0.0, 1.0, 4.0, 8192.0)  # --rope-scaling takes its place
    raise LlamaError(
        f"{path}: rope_freqs.weight fits none of the published llama3 rope scalings; "
        "--rope-scaling llama3:FACTOR says which it is"
    )


def _yarn(fields: _Fields, factor: float) -> tuple[float, ...]:
    """The numbers of docs/format.md; llama.cpp multiplies attn_factor by what factor implies."""
    return (
        factor,
        float(fields.count("rope.scaling.original_context_length", fields.count("context_length"))),
        fields.real("rope.scaling.yarn_beta_fast", 32.0),
        fields.real("rope.scaling.yarn_beta_slow", 1.0),
        fields.real("rope.scaling.attn_factor", 1.0) * yarn_attention(factor),
        1.0,
    )


def _llama3_factors(theta: float, head_dim: int, numbers: tuple[float, ...]) -> list[float]:
    """What each rotary frequency is divided by under llama3 scaling."""
    factor, low, high, original = numbers
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _meta(path: Path, metadata: dict[str, Any]) -> dict[str, Value]:
    meta: dict[str, Value] = {"general.origin": f"GGUF {path.name}"}
    for key in ("general.name", "general.license"):
        if isinstance(metadata.get(key), str):
            meta[key] = metadata[key]
    jinja = metadata.get("tokenizer.chat_template")
    if isinstance(jinja, str):
        meta["template.jinja"] = jinja
        family = family_of(jinja)
        if family is not None:
            meta["template.family"] = family
    return meta
