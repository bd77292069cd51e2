"""Meta's own form: params.json, consolidated.NN.pth in 1 to 16 shards, tokenizer.model.

The shards come from model-parallel training: each matrix is cut along its outputs (rows) or its
inputs (columns), norms are copied into all. The embedding is cut by columns in Llama 1 and 2 and
by rows in Llama 3; shapes tell. What params.json does not say (context length, whether it is a
chat model, which factor of rope scaling) is inferred and said to be so.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llama.checkpoints import tokenizer_file, torch_file
from llama.checkpoints.checkpoint import Checkpoint, Options, Tokenizer, show
from llama.checkpoints.family import family_by_name, sounds_like_chat
from llama.checkpoints.settings import Settings
from llama.checkpoints.tensors import ColumnShards, RowShards, Tensor
from llama.errors import LlamaError
from llama.format import Config, Rope, TokenizerKind, Value

BY_ROWS = re.compile(r"(layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])|output)\.weight")
BY_COLUMNS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
# Buffers that old files carry along with the weights.
BUFFERS = re.compile(r"(.*\.)?rope\.freqs|layers\.\d+\.attention\.mask|freqs_cis|mask")
# What params.json may say; anything else could change the numbers and is refused by name.
KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of",
         "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
         "high_freq_factor", "max_seq_len", "max_batch_size"}  # fmt: skip
# (dim, n_layers) -> the factor of use_scaled_rope: 3.1's and 3.3's 8B, 70B, 405B; 3.2's 1B, 3B
FACTORS = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}


def load(path: Path, options: Options) -> Checkpoint:
    """Reads params.json and the shards' directories; weights stay where they are."""
    params = Settings.read(path / "params.json")
    for key in sorted(params.values.keys() - KNOWN):
        if params.values[key] not in (None, False, 0, -1, "", [], {}):
            raise LlamaError(f"{params.path}: {key} is not supported")
    scales = sorted(path.glob("fp8_scales_*"))
    if scales:
        raise LlamaError(
            f"{path}: expected f32, f16 or bf16 weights, found float8_e4m3fn with scales of their "
            f"own ({scales[0].name}); export the BF16 release"
        )
    notes: list[str] = []
    tensors = _merge(path, _shards(path), params.count("dim"))
    tokenizer = tokenizer_file.beside(path, ("tokenizer.model",), options, notes)
    shape = (params.count("dim"), params.count("n_layers"))
    small = FACTORS.get(shape) == 32 and params.flag("use_scaled_rope", False)  # Llama 3.2
    config = _config(params, tensors, tokenizer, options, notes)
    if small and "output.weight" not in tensors:
        config = replace(config, tied=True)
    meta: dict[str, Value] = {
        "general.name": path.resolve().name,
        "general.origin": f"Meta {path.resolve().name}",
    }
    if options.template is None and not sounds_like_chat(path.resolve().name):
        notes.append(
            "no chat template: inferred, the directory's name says neither chat nor instruct "
            "(--template sets one)"
        )
    elif options.template is None:
        family = "llama3" if tokenizer.kind == TokenizerKind.TIKTOKEN else "llama2"
        family = family_by_name(path.resolve().name) or family
        meta["template.family"] = family
        notes.append(
            f"chat template {family}: inferred from the directory's name (--template sets another)"
        )
    return Checkpoint(
        path, "Meta", config, tensors, tokenizer, meta, notes, tied_as_published=small
    )


def _shards(path: Path) -> list[dict[str, Tensor]]:
    files = sorted(path.glob("consolidated.*.pth"))
    names = [file.name for file in files]
    if len(files) not in (1, 2, 4, 8, 16) or names != [
        f"consolidated.{n:02}.pth" for n in range(len(files))
    ]:
        raise LlamaError(
            f"{path}: expected 1, 2, 4, 8 or 16 shards consolidated.00.pth and on, found "
            f"{', '.join(names)[:200] or 'none'}"
        )
    shards = []
    for file in files:
        tensors = torch_file.read(file)
        shards.append({name: t for name, t in tensors.items() if not BUFFERS.fullmatch(name)})
        for name in shards[0].keys() ^ shards[-1].keys():
            raise LlamaError(f"{file}: {name} is not in every shard")
    return shards


def _merge(path: Path, shards: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        first = parts[0]
        for n, part in enumerate(parts):
            if part.shape != first.shape or part.dtype != first.dtype:
                raise LlamaError(
                    f"{path}: {name}: shard 0 is {first.dtype} {show(first.shape)}, "
                    f"shard {n} {part.dtype} {show(part.shape)}"
                )
        if len(parts) == 1 or len(first.shape) != 2:
            tensors[name] = first
        elif BY_ROWS.fullmatch(name):
            tensors[name] = RowShards(parts)
        elif BY_COLUMNS.fullmatch(name):
            tensors[name] = ColumnShards(parts)
        elif name == "tok_embeddings.weight":
            whole = first.shape[1] == dim
            tensors[name] = RowShards(parts) if whole else ColumnShards(parts)
        else:
            tensors[name] = first  # not known: Checkpoint.check names it
    return tensors


def _config(
    params: Settings,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    options: Options,
    notes: list[str],
) -> Config:
    dim, n_heads = params.count("dim"), params.count("n_heads")
    vocab_size = _vocab_size(params, tensors)
    # Llama 3 always says it; what came before it left 10000 out
    theta = params.real("rope_theta", None if vocab_size > 100_000 else 10000.0)
    scaling, numbers = _rope(params, options, notes)
    return Config(
        vocab_size=vocab_size,
        dim=dim,
        hidden_dim=_hidden_dim(params, tensors, dim),
        head_dim=params.count("head_dim", dim // max(n_heads, 1)),
        n_layers=params.count("n_layers"),
        n_heads=n_heads,
        n_kv_heads=params.count("n_kv_heads", n_heads),
        max_seq_len=_max_seq_len(params, theta, scaling, options, notes),
        norm_eps=params.real("norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_numbers=numbers,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
    )


def _vocab_size(params: Settings, tensors: dict[str, Tensor]) -> int:
    if "tok_embeddings.weight" not in tensors:
        raise LlamaError(f"{params.path.parent}: tok_embeddings.weight is missing")
    found = tensors["tok_embeddings.weight"].shape[0]
    said = params.count("vocab_size", -1)
    if said not in (-1, found):
        raise LlamaError(
            f"{params.path}: vocab_size is {said}, tok_embeddings.weight has {found} rows"
        )
    return found


def _hidden_dim(params: Settings, tensors: dict[str, Tensor], dim: int) -> int:
    """The rows of w1, which must be what Meta's rule makes of dim."""
    name = "layers.0.feed_forward.w1.weight"
    if name not in tensors:
        raise LlamaError(f"{params.path.parent}: {name} is missing")
    found = tensors[name].shape[0]
    multiple = params.count("multiple_of", 0)
    if multiple > 0:
        hidden = int(2 * 4 * dim / 3)
        hidden = int(params.real("ffn_dim_multiplier", 1.0) * hidden)
        hidden = -(-hidden // multiple) * multiple
        if hidden != found:
            raise LlamaError(
                f"{params.path}: multiple_of and ffn_dim_multiplier make hidden_dim {hidden}, "
                f"{name} has {found} rows"
            )
    return found


def _rope(params: Settings, options: Options, notes: list[str]) -> tuple[Rope, tuple[float, ...]]:
    if not params.flag("use_scaled_rope", False):
        return Rope.PLAIN, ()
    if params.has("rope_scaling_factor"):
        factor = params.real("rope_scaling_factor")
    else:
        shape = (params.count("dim"), params.count("n_layers"))
        chosen = options.rope_scaling is not None
        if shape not in FACTORS and not chosen:
            raise LlamaError(
                f"{params.path}: use_scaled_rope is true, but which factor goes with dim "
                f"{shape[0]} and {shape[1]} layers cannot be told: say --rope-scaling llama3:8 "
                "(as Llama 3.1 and 3.3) or llama3:32 (as 3.2)"
            )
        factor = FACTORS.get(shape, 0.0)  # 0: another takes its place
        if not chosen:
            notes.append(
                f"rope scaling llama3 x{factor:g}: inferred from the shape "
                "(--rope-scaling sets another)"
            )
    return Rope.LLAMA3, (factor, 1.0, params.real("high_freq_factor", 4.0), 8192.0)


def _max_seq_len(
    params: Settings, theta: float, scaling: Rope, options: Options, notes: list[str]
) -> int:
    if params.has("max_seq_len"):
        return params.count("max_seq_len")
    name = params.path.resolve().parent.name
    small_eps = params.real("norm_eps") < 5e-6
    first = re.fullmatch(r"(?i)(llama-?1?-)?(7|13|30|33|65)b", name)
    dim, n_heads = params.count("dim", 0), params.count("n_heads", 0)
    large = dim == 6656 or (dim == 8192 and params.count("n_kv_heads", n_heads) == n_heads)
    if scaling == Rope.LLAMA3:
        length = 131072
    elif theta >= 1e6:
        length = 16384  # Code Llama
    elif theta > 1e5:
        length = 8192  # Llama 3
    elif large or first or (small_eps and not re.search(r"(?i)llama-?2", name)):
        length = 2048  # Llama 1: its 33B and 65B have shapes of their own
    else:
        length = 4096
    own = options.max_seq_len is None
    notes.append(f"context {length}: inferred" + " (--max-seq-len sets another)" * own)
    return length
