"""The published shapes at their full size, in the published number of shards, on sparse files.

torch writes the files with the room for weights left empty, so that 810 GB take a few MB of disk.
Into that room go whole rows whose 16 bits are a hash of (tensor, row, column) in the model as a
whole, at both sides of every cut and elsewhere: a shard swapped, transposed or joined along the
wrong axis shows. The same weights lie in Hugging Face's form beside it.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch

from llama.checkpoints import Checkpoint, Options, load
from llama.checkpoints.convert import CHUNK_BYTES, _chunk_rows, records_of
from llama.errors import LlamaError
from llama.format import Config, Rope, Writer
from llama.quant import Array, Kind

Place = tuple[int, int, int]  # rows, columns, and the axis along which shards are cut
GQA = {"n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5}
LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "norm_eps": 1e-5}
BIG = {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2,
       "multiple_of": 4096, "use_scaled_rope": True, **LLAMA3}  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A published checkpoint: its params.json and what is known of the model otherwise."""

    folder: str
    shards: int
    params: dict[str, Any]
    hidden: int
    vocab: int
    total: int  # weights, as its makers count them
    length: int
    factor: float = 0.0  # of llama3's rope scaling
    tied: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.F16 if self.vocab == 32000 and "rope_theta" not in self.params else Kind.BF16


RELEASES = [
    Release("7B", 1, {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                      "norm_eps": 1e-6, "vocab_size": -1},
            11008, 32000, 6_738_415_616, 2048),
    Release("13B", 2, {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40,
                       "norm_eps": 1e-6, "vocab_size": -1},
            13824, 32000, 13_015_864_320, 2048),
    Release("30B", 4, {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60,
                       "norm_eps": 1e-6, "vocab_size": -1},
            17920, 32000, 32_528_943_616, 2048),
    Release("65B", 8, {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80,
                       "norm_eps": 1e-5, "vocab_size": -1},
            22016, 32000, 65_285_660_672, 2048),
    Release("llama-2-7b", 1, {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                              "norm_eps": 1e-5, "vocab_size": -1},
            11008, 32000, 6_738_415_616, 4096),
    Release("llama-2-13b", 2, {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40,
                               "norm_eps": 1e-5, "vocab_size": -1},
            13824, 32000, 13_015_864_320, 4096),
    Release("llama-2-70b", 8, {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
                               "n_layers": 80, "vocab_size": -1, **GQA},
            28672, 32000, 68_976_648_192, 4096),
    Release("CodeLlama-7b", 1, {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256,
                                "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
                                "rope_theta": 1000000},
            11008, 32016, 6_738_546_688, 16384),
    Release("CodeLlama-13b", 2, {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256,
                                 "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
                                 "rope_theta": 1000000},
            13824, 32016, 13_016_028_160, 16384),
    Release("CodeLlama-34b", 4, {"dim": 8192, "n_layers": 48, "multiple_of": 256,
                                 "ffn_dim_multiplier": 1.0, "rope_theta": 1000000, **GQA},
            22016, 32000, 33_743_970_304, 16384),
    Release("CodeLlama-70b", 8, {"dim": 8192, "n_layers": 80, "multiple_of": 4096,
                                 "ffn_dim_multiplier": 1.3, "rope_theta": 1000000, **GQA},
            28672, 32016, 68_976_910_336, 16384),
    Release("CodeLlama-70b-Python", 8, {"dim": 8192, "n_layers": 80, "multiple_of": 4096,
                                        "ffn_dim_multiplier": 1.3, "rope_theta": 10000, **GQA},
            28672, 32016, 68_976_910_336, 4096),
    Release("Meta-Llama-3-8B", 1, {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
                                   "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **LLAMA3},
            14336, 128256, 8_030_261_248, 8192),
    Release("Meta-Llama-3-70B", 8, {"dim": 8192, "n_layers": 80, "multiple_of": 4096,
                                    "ffn_dim_multiplier": 1.3, **GQA, **LLAMA3},
            28672, 128256, 70_553_706_496, 8192),
    Release("Llama-3.1-8B", 1, {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
                                "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
                                "use_scaled_rope": True, **LLAMA3},
            14336, 128256, 8_030_261_248, 131072, 8.0),
    Release("Llama-3.1-70B", 8, {"dim": 8192, "n_layers": 80, "multiple_of": 4096,
                                 "ffn_dim_multiplier": 1.3, "use_scaled_rope": True, **GQA,
                                 **LLAMA3},
            28672, 128256, 70_553_706_496, 131072, 8.0),
    Release("Llama-3.2-1B", 1, {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8,
                                "multiple_of": 256, "ffn_dim_multiplier": 1.5,
                                "use_scaled_rope": True, **LLAMA3},
            8192, 128256, 1_235_814_400, 131072, 32.0, tied=True),
    Release("Llama-3.2-3B", 1, {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8,
                                "multiple_of": 256, "ffn_dim_multiplier": 1.0,
                                "use_scaled_rope": True, **LLAMA3},
            8192, 128256, 3_212_749_824, 131072, 32.0, tied=True),
    Release("Llama-3.1-405B-MP8", 8, {**BIG, "n_kv_heads": 8},
            53248, 128256, 405_853_388_800, 131072, 8.0),
    Release("Llama-3.1-405B-MP16", 16, {**BIG, "n_kv_heads": 16},  # each of its 8 twice
            53248, 128256, 410_081_247_232, 131072, 8.0),
]  # fmt: skip


def places(release: Release) -> dict[str, Place]:
    """Each tensor's shape, and how fairscale's layers cut it, from the published numbers alone."""
    p = release.params
    dim, head_dim = p["dim"], p["dim"] // p["n_heads"]
    kv = p.get("n_kv_heads", p["n_heads"]) * head_dim
    rows = release.vocab == 128256  # Llama 3 cuts its embedding by rows
    found: dict[str, Place] = {"tok_embeddings.weight": (release.vocab, dim, 0 if rows else 1)}
    for n in range(p["n_layers"]):
        layer = f"layers.{n}."
        found |= {
            f"{layer}attention_norm.weight": (dim, 0, -1),
            f"{layer}attention.wq.weight": (dim, dim, 0),
            f"{layer}attention.wk.weight": (kv, dim, 0),
            f"{layer}attention.wv.weight": (kv, dim, 0),
            f"{layer}attention.wo.weight": (dim, dim, 1),
            f"{layer}ffn_norm.weight": (dim, 0, -1),
            f"{layer}feed_forward.w1.weight": (release.hidden, dim, 0),
            f"{layer}feed_forward.w3.weight": (release.hidden, dim, 0),
            f"{layer}feed_forward.w2.weight": (dim, release.hidden, 1),
        }
    found["norm.weight"] = (dim, 0, -1)
    if not release.tied:
        found["output.weight"] = (release.vocab, dim, 0)
    return found


def pattern(name: str, row: int, columns: int) -> Array:
    """The 16 bits of each weight of a row: finite as f16 and as bf16, never zero."""
    at = np.arange(columns, dtype=np.uint64) + np.uint64(row * columns + zlib.crc32(name.encode()))
    mixed = (at * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    bits: Array = (mixed.astype("<u2") & np.uint16(0xBFFF)) | np.uint16(1)
    return bits


def samples(release: Release) -> Iterator[tuple[str, Place, list[int]]]:
    """The matrices looked at, and the rows that are filled: all of the last layer and some."""
    last = release.params["n_layers"] - 1
    looked = re.compile(rf"(layers\.{last}\..*|layers\.0\..*w[k2]|tok_embeddings|output)\.weight")
    for name, (rows, columns, axis) in places(release).items():
        if axis < 0 or not looked.fullmatch(name):
            continue
        cuts = release.shards if axis == 0 else 1
        edges = {n * rows // cuts + side for n in range(1, cuts) for side in (-1, 0)}
        chosen = {0, rows // 2 + 3, rows // 3, rows - 1} | edges
        yield name, (rows, columns, axis), sorted(chosen)


def write_meta(folder: Path, release: Release) -> Path:
    """The shards as torch.save writes them, on sparse files."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(release.params))
    n, dtype = release.shards, small_models.DTYPES[release.kind.label]
    for shard in range(n):
        tensors = {}
        for name, (rows, columns, axis) in places(release).items():
            cut = {-1: (rows,), 0: (rows // n, columns), 1: (rows, columns // n)}
            tensors[name] = torch.empty(cut[axis], dtype=dtype)
        file = folder / f"consolidated.{shard:02}.pth"
        with torch.serialization.skip_data():
            torch.save(tensors, file)
        room = offsets(file, tensors)
        with open(file, "r+b") as out:
            for name, (rows, columns, axis), chosen in samples(release):
                for row in chosen:
                    bits = pattern(name, row, columns)
                    if axis == 0 and row // (rows // n) == shard:
                        out.seek(room[name] + 2 * (row % (rows // n)) * columns)
                        out.write(bits.tobytes())
                    elif axis == 1:
                        width = columns // n
                        out.seek(room[name] + 2 * row * width)
                        out.write(bits[shard * width : (shard + 1) * width].tobytes())
    return folder


def offsets(file: Path, names: Iterable[str]) -> dict[str, int]:
    """Where torch itself says that each tensor's weights stand in FILE."""
    reader = torch._C.PyTorchFileReader(str(file))  # storages are numbered in the dict's order
    return {name: reader.get_record_offset(f"data/{n}") for n, name in enumerate(names)}


def write_hf(folder: Path, release: Release, n_files: int) -> Path:
    """The same in Hugging Face's form: sparse safetensors, an index, wq and wk in its order."""
    folder.mkdir(parents=True)
    dtype = {Kind.F16: "F16", Kind.BF16: "BF16"}[release.kind]
    filled = {name: chosen for name, _, chosen in samples(release)}
    shapes = places(release)
    index: dict[str, str] = {}
    for number in range(n_files):
        file = folder / f"model-{number + 1:05}-of-{n_files:05}.safetensors"
        header: dict[str, Any] = {}
        begins, end = {}, 0
        for name in list(shapes)[number::n_files]:
            rows, columns, axis = shapes[name]
            begins[name], end = end, end + 2 * rows * max(columns, 1)
            theirs = small_models.to_hf_name(name)
            header[theirs] = {
                "dtype": dtype, "shape": [rows] if axis < 0 else [rows, columns],
                "data_offsets": [begins[name], end],
            }  # fmt: skip
            index[theirs] = file.name
        text = json.dumps(header).encode()
        with open(file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
            for name, begin in begins.items():
                for row in filled.get(name, []):
                    columns = shapes[name][1]
                    out.seek(8 + len(text) + begin + 2 * columns * hf_row(release, name, row))
                    out.write(pattern(name, row, columns).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def hf_row(release: Release, name: str, row: int) -> int:
    """Where Hugging Face keeps Meta's ROW: halves of a rotary pair are half a head apart."""
    if name.split(".")[-2] not in ("wq", "wk"):
        return row
    head_dim = release.params["dim"] // release.params["n_heads"]
    head, pair, side = row // head_dim, row % head_dim // 2, row % 2
    return head * head_dim + side * (head_dim // 2) + pair


def expected(release: Release) -> Config:
    p = release.params
    return Config(
        vocab_size=release.vocab, dim=p["dim"], hidden_dim=release.hidden,
        head_dim=p["dim"] // p["n_heads"], n_layers=p["n_layers"], n_heads=p["n_heads"],
        n_kv_heads=p.get("n_kv_heads", p["n_heads"]), max_seq_len=release.length,
        norm_eps=p["norm_eps"], rope_theta=p.get("rope_theta", 1e4), tied=release.tied,
        rope_scaling=Rope.LLAMA3 if release.factor else Rope.PLAIN,
        rope_numbers=(release.factor, 1.0, 4.0, 8192.0) if release.factor else (),
    )  # fmt: skip


def wrong_rows(checkpoint: Checkpoint, release: Release) -> list[tuple[str, int]]:
    """The filled rows that are not what was written, read with a neighbour, which is empty or
    filled too."""
    wrong = []
    for name, (rows, columns, _), chosen in samples(release):
        for row in chosen:
            first = min(row, rows - 2)
            found = checkpoint.tensors[name].rows(first, first + 2).view("<u2")
            for at in (first, first + 1):
                right = pattern(name, at, columns) if at in chosen else np.zeros(columns, "<u2")
                if not np.array_equal(found[at - first], right):
                    wrong.append((name, at))
    return wrong


def check_plan(checkpoint: Checkpoint, release: Release, out: Path) -> None:
    """The file to be written: every weight in 2 bytes and norms in 4, to the byte; and chunks."""
    records = records_of(checkpoint, checkpoint.default_kind())
    writer = Writer(out, checkpoint.config, records)
    vectors = [record for record in records if len(record.shape) == 1]
    assert sum(record.rows * record.columns for record in records) == release.total
    directory = -(-(256 + 128 * len(records)) // 64) * 64
    data = 2 * release.total + 2 * sum(record.rows for record in vectors)
    assert writer.file_bytes == directory + data
    assert all(4 * _chunk_rows(record) * record.columns <= CHUNK_BYTES for record in records)


@pytest.fixture(autouse=True)
def holes(tmp_path: Path) -> Iterator[None]:
    """Skips where a file system fills the room that was left empty; leaves nothing behind, since
    what was never written out is quick to take away."""
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 30)
    if (tmp_path / "hole").stat().st_blocks * 512 > 1 << 20:
        pytest.skip("no sparse files here: the full sizes would take terabytes")
    yield
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: str(release.folder))
def test_meta_and_hugging_face_at_full_size(tmp_path: Path, release: Release) -> None:
    meta = load(write_meta(tmp_path / release.folder, release))
    assert meta.config == expected(release)
    assert meta.default_kind() == release.kind
    assert wrong_rows(meta, release) == []
    check_plan(meta, release, tmp_path / "a.bin")

    folder = write_hf(tmp_path / "hf", release, n_files=191 if "405B" in release.folder else 3)
    scaling = dict(zip(("factor", "low_freq_factor", "high_freq_factor", small_models.ORIGINAL),
                       meta.config.rope_numbers, strict=False))  # fmt: skip
    rope = {"rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None}
    if scaling:
        rope["rope_scaling"][small_models.ORIGINAL] = 8192
    (folder / "config.json").write_text(json.dumps(small_models.hf_settings(meta.config, **rope)))
    hf = load(folder)
    assert hf.config == meta.config
    assert wrong_rows(hf, release) == []
    check_plan(hf, release, tmp_path / "a.bin")
    disk = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file())
    assert disk < 200e6


LARGE = next(release for release in RELEASES if release.folder == "llama-2-70b")


def test_shards_in_another_order_would_show(tmp_path: Path) -> None:
    """What the test above can see: it fails where two shards have each other's name."""
    release = replace(LARGE, params=LARGE.params | {"n_layers": 2})
    folder = write_meta(tmp_path / "m", release)
    assert wrong_rows(load(folder), release) == []
    one, two = (folder / f"consolidated.{n:02}.pth" for n in (3, 4))
    one.rename(folder / "other")
    two.rename(one)
    (folder / "other").rename(two)
    wrong = {name for name, _ in wrong_rows(load(folder), release)}
    assert wrong == {name for name, _, _ in samples(release)}


def test_a_second_copy_of_the_embedding_is_not_stored(tmp_path: Path) -> None:
    """Llama 3.2 1B at its full size, with output.weight in the file as well."""
    release = next(each for each in RELEASES if each.folder == "Llama-3.2-1B")
    both = replace(release, tied=False)
    folder = write_meta(tmp_path / "m", both)
    heard: list[tuple[int, int]] = []
    kept = load(folder, Options(), lambda done, total: heard.append((done, total)))
    assert not kept.config.tied and heard == []
    assert "output.weight differs from tok_embeddings.weight, other than" in kept.notes[-1]
    room = offsets(folder / "consolidated.00.pth", places(both))
    filled = {name: chosen for name, _, chosen in samples(both)}
    with open(folder / "consolidated.00.pth", "r+b") as file:
        for row in {*filled["tok_embeddings.weight"], *filled["output.weight"]}:
            file.seek(room["tok_embeddings.weight"] + 2 * row * 2048)
            weights = file.read(2 * 2048)
            file.seek(room["output.weight"] + 2 * row * 2048)
            file.write(weights)
    tied = load(folder, Options(), lambda done, total: heard.append((done, total)))
    assert tied.config == expected(release) and "output.weight" not in tied.tensors
    assert "stored once (tied)" in tied.notes[-1]
    assert heard[-1] == (128256, 128256) and len(heard) == -(-128256 // 2048)
    check_plan(tied, release, tmp_path / "a.bin")
    with open(folder / "consolidated.00.pth", "r+b") as file:
        file.seek(room["output.weight"] + 2 * 128256 * 2048 - 2)
        file.write(b"\1\1")
    assert not load(folder).config.tied


def test_kv_heads_below_the_shards_are_named(tmp_path: Path) -> None:
    """An MP16 directory with MP8's params.json: its files hold each kv head twice."""
    release = next(each for each in RELEASES if each.folder.endswith("MP16"))
    folder = write_meta(tmp_path / "m", replace(release, params=release.params | {"n_layers": 1}))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"n_kv_heads": 8}))
    with pytest.raises(LlamaError, match="wk.weight: expected 1024 x 16384, found 2048 x 16384"):
        load(folder, Options(rope_scaling="llama3:8"))
