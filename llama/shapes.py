"""Models of real size and random weights, for measuring speed: python3 -m llama.bench --shape 7b.

Speed does not depend on what the weights are, as long as they are ordinary numbers. So blocks are
drawn once, a few megabytes of them for each kind and size, and put together at random, which takes
as long as the disk needs. Each matrix keeps its input's size, as training leaves it, so that
activations and logits stay ordinary too. There is no tokenizer: token ids only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama.config import Config, expected_tensors
from llama.errors import LlamaError
from llama.format import Record, Writer
from llama.quant import LAYOUTS, TILE_ROWS, Array, Kind

# Llama 2 7B, TinyLlama 1.1B and SmolLM2 135M, as their makers publish them
SHAPES = {
    "7b": Config(
        vocab_size=32000, dim=4096, hidden_dim=11008, head_dim=128, n_layers=32, n_heads=32,
        n_kv_heads=32, max_seq_len=4096, norm_eps=1e-5, rope_theta=1e4,
    ),
    "1b": Config(
        vocab_size=32000, dim=2048, hidden_dim=5632, head_dim=64, n_layers=22, n_heads=32,
        n_kv_heads=4, max_seq_len=2048, norm_eps=1e-5, rope_theta=1e4,
    ),
    "135m": Config(
        vocab_size=49152, dim=576, hidden_dim=1536, head_dim=64, n_layers=30, n_heads=9,
        n_kv_heads=3, max_seq_len=8192, norm_eps=1e-5, rope_theta=1e5, tied=True,
    ),
}  # fmt: skip
BITS = {4: Kind.Q4, 8: Kind.Q8, 16: Kind.F16, 32: Kind.F32}
EDGES = ("tok_embeddings.weight", "output.weight")  # 8 bits in a 4-bit file, as quantize.py does
POOL = 1 << 22  # bytes of blocks that are drawn
PIECE = 1 << 24  # bytes that are written at a time
TINY = 2.0**-13  # a weight nearer to 0 is moved away: twice the least normal f16
Bytes = NDArray[np.uint8]


def random_model(name: str, bits: int, folder: Path) -> Path:
    """The file of shape NAME at BITS in FOLDER, made if it is not there yet."""
    path = folder / f"{name}-{bits}.bin"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlamaError(f"{folder}: cannot make this folder: {error.strerror}") from None
        write(path, SHAPES[name], bits)
    return path


def write(path: Path, config: Config, bits: int) -> None:
    """A .bin of random weights. The same bytes for the same shape and bits."""
    records = []
    for name, shape in expected_tensors(config).items():
        kind = Kind.Q8 if bits == 4 and name in EDGES else BITS[bits]
        records.append(Record(name, kind if len(shape) == 2 else Kind.F32, shape))
    rng = np.random.default_rng(len(records))
    pools: dict[tuple[Kind, float], Bytes] = {}
    # large enough that layers do not drown what the token was; tied, logits should not be huge
    embedding = 4 * config.dim**-0.5 if config.tied else 1.0
    total = sum(record.size() for record in records)
    with Writer(path, config, records, meta={"general.name": f"random {path.stem}"}) as writer:
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, leave=False,
                  disable=None) as bar:
            for record in records:
                if len(record.shape) == 1:
                    norm = 1 + rng.standard_normal(record.rows, np.float32) / 10
                    writer.write(record.name, norm)
                    continue
                first = record.name.startswith("tok_embeddings")
                size = embedding if first else record.columns**-0.5
                key = record.kind, size
                if key not in pools:
                    pools[key] = blocks(rng, record.kind, size)
                strip = -(-record.columns // LAYOUTS[record.kind].columns)
                strips = -(-record.rows // TILE_ROWS)
                for data in shuffled(rng, pools[key], strip, strips):
                    writer.write(record.name, data.tobytes())
                    bar.update(data.nbytes)


def shuffled(rng: np.random.Generator, pool: Bytes, each: int, n: int) -> Iterator[Bytes]:
    """N runs of EACH blocks of POOL (blocks, bytes of one), at random, some runs at a time."""
    some = max(1, PIECE // (each * pool.shape[1]))
    for first in range(0, n, some):
        count = min(some, n - first) * each
        yield pool[rng.integers(0, len(pool), count)]


def blocks(rng: np.random.Generator, kind: Kind, size: float) -> Bytes:
    """Blocks of weights of standard deviation SIZE, as docs/format.md draws them: (blocks, bytes of
    one)."""
    n = POOL // LAYOUTS[kind].block_bytes
    if kind in (Kind.F32, Kind.F16):
        values = rng.standard_normal((n, TILE_ROWS), np.float32) * np.float32(size)
        near = np.abs(values) < TINY
        values[near] = np.copysign(np.float32(TINY), values[near])
        stored: Array = values.astype("<f4" if kind == Kind.F32 else "<f2")
        return stored.view(np.uint8)
    scale = size * signed(rng, (n, TILE_ROWS))
    if kind == Kind.Q8:
        d: Array = (scale / 40).astype("<f2")
        codes: Array = codes_q8(rng, n * 32 * TILE_ROWS).reshape(n, -1)
    else:  # the levels' deviation is 70 where all codes are as likely; shifts are -2, 0 or 2
        high = (64 * scale / 70).astype("<f2").view("<u2") & 0xFFC0
        d = (high | rng.integers(31, 34, high.shape).astype("<u2")).astype("<u2")
        codes = rng.integers(0, 256, (n, 16 * TILE_ROWS), np.uint8)
    return np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=1)


def signed(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Scales about 1, of either sign: 4-bit levels are not even about 0, and a mean that all
    weights share would outgrow everything else from layer to layer."""
    drawn: NDArray[np.float64] = rng.uniform(0.8, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
    return drawn


def codes_q8(rng: np.random.Generator, n: int) -> NDArray[np.int8]:
    """N codes of standard deviation 40."""
    drawn = np.rint(40 * rng.standard_normal(n, np.float32))
    return np.clip(drawn, -127, 127).astype(np.int8)


def gguf_rows(rng: np.random.Generator, bits: int, rows: int, columns: int) -> Iterator[Bytes]:
    """Random rows of ggml's Q4_0 (BITS 4) or Q8_0 (8), some at a time: (rows, bytes of one). A
    block is 32 columns: f16 scale, then codes; Q4_0's count from -8."""
    n = POOL // 34
    scale = columns**-0.5 * signed(rng, (n, 1))
    if bits == 8:
        codes: Array = codes_q8(rng, 32 * n).reshape(n, 32)
    else:
        codes = rng.integers(0, 256, (n, 16), np.uint8)
    d = (scale / (40 if bits == 8 else 4.6)).astype("<f2")
    pool = np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=1)
    each = columns // 32
    for part in shuffled(rng, pool, each, rows):
        yield part.reshape(-1, each * pool.shape[1])


def room(folder: Path, needed: int, what: str) -> None:
    """Raises LlamaError unless FOLDER's disk has NEEDED bytes for WHAT."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LlamaError(f"{what}: needs {needed:,} bytes of disk, {free:,} are free")
