"""Small random Llamas written in the forms of others, as .bin files of any kind, and made by
transformers; and a plain forward pass to judge what was read.

Weights are made under Meta's names. The Hugging Face order of wq and wk and the cutting into
shards are done here in torch, as the published conversion scripts do them, and share no code
with the readers under test.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.format import Bin, Config, Head, Record, Rope, Writer, expected_tensors
from llama.quant import GROUP, Kind

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HF_LAYERS = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
HF_REST = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
ROPE_NAMES = {
    Rope.PLAIN: [], Rope.LINEAR: ["factor"],
    Rope.LLAMA3: ["factor", "low_freq_factor", "high_freq_factor", ORIGINAL],
    Rope.YARN: ["factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "truncate"],
    Rope.DYNAMIC: ["factor"],
}  # fmt: skip

CLASSES = {
    Head.LM: "LlamaForCausalLM", Head.NONE: "LlamaModel",
    Head.SEQUENCE: "LlamaForSequenceClassification", Head.ANSWER: "LlamaForQuestionAnswering",
    Head.TOKEN: "LlamaForTokenClassification",
}  # fmt: skip


def config(**changes: Any) -> Config:
    """A shape with nothing round about it, that 4 shards can still cut."""
    base = Config(
        vocab_size=44, dim=24, hidden_dim=76, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=4,
        max_seq_len=32, norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    return replace(base, **changes)


def weights(shape: Config, dtype: str = "f32", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Meta's names; no two rows or columns alike."""
    torch.manual_seed(seed)
    return {
        name: torch.randn(size).mul(0.5).to(DTYPES[dtype])
        for name, size in expected_tensors(shape).items()
    }


def to_hf_name(name: str) -> str:
    *parts, last = name.split(".")
    if parts[0] != "layers":
        return f"{HF_REST[parts[0]]}.{last}"
    return f"model.layers.{parts[1]}.{HF_LAYERS['.'.join(parts[2:])]}.{last}"


def to_hf(tensors: dict[str, torch.Tensor], shape: Config) -> dict[str, torch.Tensor]:
    """Hugging Face's names, and its order of wq's and wk's rows."""
    out = {}
    for name, tensor in tensors.items():
        if name.split(".")[-2] in ("wq", "wk"):
            heads = tensor.view(-1, shape.head_dim // 2, 2, *tensor.shape[1:])
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        out[to_hf_name(name)] = tensor.contiguous()
    return out


def hf_settings(shape: Config, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.dim, "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta, "rope_scaling": None,
        "tie_word_embeddings": shape.tied, "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
    }  # fmt: skip
    return settings | changes


def write_hf(folder: Path, shape: Config, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """One safetensors file and config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_hf(tensors, shape), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_settings(shape, **changes)))
    return folder


def meta_shards(
    tensors: dict[str, torch.Tensor], n: int, embeddings: str
) -> list[dict[str, torch.Tensor]]:
    """Cut as fairscale's layers cut; EMBEDDINGS is "rows" (Llama 3) or "columns" (1 and 2)."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        stem = name.split(".")[-2]
        if tensor.ndim == 1:
            parts = [tensor] * n
        elif stem in ("wo", "w2") or (stem == "tok_embeddings" and embeddings == "columns"):
            parts = list(tensor.chunk(n, dim=1))
        else:
            parts = list(tensor.chunk(n, dim=0))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def write_meta(
    folder: Path,
    shape: Config,
    tensors: dict[str, torch.Tensor],
    n: int = 1,
    embeddings: str = "columns",
    **changes: Any,
) -> Path:
    """params.json and N shards; multiple_of is left out, so that any hidden_dim will do."""
    folder.mkdir(parents=True, exist_ok=True)
    params: dict[str, Any] = {
        "dim": shape.dim, "n_layers": shape.n_layers, "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads, "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta, "vocab_size": -1,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params | changes))
    for i, shard in enumerate(meta_shards(tensors, n, embeddings)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def forward(model: Bin, tokens: list[int]) -> np.ndarray:
    """Logits (len(tokens), vocab_size) in float64, straight from the papers."""
    c = model.config
    w: dict[str, Any] = {name: t.astype(np.float64) for name, t in model.tensors.items()}

    def norm(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rope(x: np.ndarray) -> np.ndarray:  # (n, heads, head_dim): neighbours are a pair
        n = np.arange(c.head_dim // 2)
        angles = np.arange(len(tokens))[:, None] * c.rope_theta ** (-2 * n / c.head_dim)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["tok_embeddings.weight"][tokens]
    hidden = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for i in range(c.n_layers):
        layer = {name: w[f"layers.{i}.{name}.weight"] for name in HF_LAYERS}
        y = norm(x, layer["attention_norm"])
        heads = (len(tokens), -1, c.head_dim)
        q = rope((y @ layer["attention.wq"].T).reshape(heads))
        k = rope((y @ layer["attention.wk"].T).reshape(heads))
        v = (y @ layer["attention.wv"].T).reshape(heads)
        k, v = (np.repeat(a, c.n_heads // c.n_kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        y = np.einsum("hqk,khd->qhd", scores, v).reshape(len(tokens), -1)
        x = x + y @ layer["attention.wo"].T
        y = norm(x, layer["ffn_norm"])
        gate = y @ layer["feed_forward.w1"].T
        gate = gate / (1 + np.exp(-gate)) * (y @ layer["feed_forward.w3"].T)
        x = x + gate @ layer["feed_forward.w2"].T
    output = w["tok_embeddings.weight" if c.tied else "output.weight"]
    logits: np.ndarray = norm(x, w["norm.weight"]) @ output.T
    return logits


# --- as .bin files


def write_bin(
    path: Path, shape: Config, seed: int = 0, kind: Kind = Kind.F32, golden: bool = False,
    **more: Any,
) -> Path:  # fmt: skip
    """A .bin of random weights, of a float kind; MORE goes to the Writer. GOLDEN: with what
    run.py --selftest compares.

    Sizes are as training leaves them: each product keeps its input's size, so that attention is
    neither flat nor stuck to one token.
    """
    rng = np.random.default_rng(seed)
    records = [
        Record(name, kind if len(size) == 2 else Kind.F32, size)
        for name, size in expected_tensors(shape).items()
    ]
    if golden:
        from llama.golden import KEY, room, store

        more["meta"] = {**more.get("meta", {}), KEY: room(shape)}
    with Writer(path, shape, records, **more) as writer:
        for record in records:
            values = rng.standard_normal(record.shape, np.float32)
            if "norm" in record.name:
                values = 1 + values / 5
            elif len(record.shape) == 2:
                values /= np.float32(record.columns**0.5)
            writer.write(record.name, values)
        if golden:
            store(writer)
    return path


def quantized(path: Path, out: Path, kind: Kind) -> Path:
    """PATH with its matrices in KIND, encoded by the library in one piece; those that cannot be
    rotated in its plain twin."""
    from llama.engine import Model
    from llama.variants import ROTATED

    plain = {rotated: plain for plain, rotated in ROTATED.items()}.get(kind, kind)

    with Model(path) as model:
        shape = Config(**{name: getattr(model.config, name) for name in Config.__match_args__})
        records = [
            Record(t.name, Kind.F32 if len(t.shape) == 1 else plain if t.shape[1] % GROUP else kind,
                   t.shape)
            for t in model.tensors
        ]  # fmt: skip
        with Writer(out, shape, records) as writer:
            for i, record in enumerate(records):
                if len(record.shape) == 1:
                    writer.write(record.name, model.rows(i))
                    continue
                blocks, _ = model.quantize(i, 0, record.rows, record.kind, record.size())
                writer.write(record.name, blocks)
    return out


def of_kind(folder: Path, shape: Config, kind: Kind, seed: int = 0) -> Path:
    """A .bin of random weights in FOLDER, of any kind; for rotated ones dim and hidden_dim are
    rounded up to whole groups."""
    if kind.rotated:
        shape = replace(shape, dim=-(-shape.dim // GROUP) * GROUP,
                        hidden_dim=-(-shape.hidden_dim // GROUP) * GROUP)  # fmt: skip
    path = folder / f"{kind.label}-{seed}.bin"
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        return write_bin(path, shape, seed, kind)
    source = write_bin(folder / f"source-of-{path.name}", shape, seed)
    return quantized(source, path, kind)


# --- by transformers


def transformers_llama(
    shape: Config, dtype: str = "f32", seed: int = 0, rope: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:  # fmt: skip
    """transformers' own model of SHAPE and its head, random; weights rounded to DTYPE and kept in
    float32.

    ROPE are rope_parameters to take in place of the shape's, all but rope_theta; CHANGES are
    settings of config.json.
    """
    import transformers

    if rope is None:
        rope = dict(zip(ROPE_NAMES[shape.rope_scaling], shape.rope_numbers, strict=False))
        if ORIGINAL in rope:
            rope[ORIGINAL] = int(rope[ORIGINAL])
        if "truncate" in rope:
            rope["truncate"] = bool(rope["truncate"])
        plain = shape.rope_scaling == Rope.PLAIN
        rope["rope_type"] = "default" if plain else shape.rope_scaling.name.lower()
    parameters = {**rope, "rope_theta": shape.rope_theta}
    settings = hf_settings(shape, rope_parameters=parameters, pad_token_id=None)
    if shape.n_labels:
        settings["num_labels"] = shape.n_labels
    settings |= changes
    del settings["rope_scaling"], settings["rope_theta"]
    torch.manual_seed(seed)
    made = getattr(transformers, CLASSES[shape.head])
    model = made(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1.0, 0.2)
            elif name.endswith(".bias"):
                weight.normal_(0.0, 1.0)
                weight.copy_(weight.to(DTYPES[dtype]))
            else:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
                weight.copy_(weight.to(DTYPES[dtype]))
    return model
