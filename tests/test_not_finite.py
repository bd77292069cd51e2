"""Weights that break down: NaN and infinity are an error that names the layer where they began,
never a stream of one token."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from small_models import config, of_kind

from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import read
from llama.generate import Llama
from llama.quant import Kind
from llama.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 3
NAMES = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
         "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")  # fmt: skip


def broken(path: Path, out: Path, name: str, value: float = np.nan) -> Path:
    """PATH with VALUE as the tensor's first weight, past all that export.py refuses, its checksums
    made right. Of a quantised matrix it is the first scale."""
    found = read(path)
    record, number = found.records[name], list(found.records).index(name)
    raw = np.array([value]).astype("<f4" if record.kind == Kind.F32 else "<f2").tobytes()
    data = bytearray(path.read_bytes())
    data[record.offset : record.offset + len(raw)] = raw
    crc = zlib.crc32(data[record.offset : record.offset + record.n_bytes])
    struct.pack_into("<I", data, 256 + 128 * number + 104, crc)
    struct.pack_into("<I", data, 12, 0)
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    struct.pack_into("<I", data, 12, zlib.crc32(data[:header_bytes]))
    out.write_bytes(data)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("finite")
    shape = config(n_layers=LAYERS, dim=32, hidden_dim=64, head_dim=8)
    return {kind: of_kind(folder, shape, kind) for kind in (Kind.F32, Kind.F16, Kind.Q8, Kind.Q4R)}


def said(path: Path, isa: str | None = None) -> list[str]:
    """The errors of a forward pass that wants logits, of one that keeps them, and of logprobs; of
    the first token alone and behind a prompt."""
    errors = []
    rows = [0, 1, 0, 2, 5], [0, 0, 3, 0, 3], [0, 1, 0, 2, 1]
    want = [False, False, True, True, True]
    with Engine(path, threads=1, isa=isa) as engine:
        for act in (lambda: engine.forward(*rows, want),
                    lambda: engine.sample(1, SamplingParams(temperature=0.0), (), 0, 0),
                    lambda: engine.logprobs(2, 0, 1)):  # fmt: skip
            if errors and engine.length(0) == 0:
                engine.forward(*rows, want, keep=True)
            with pytest.raises(LlamaError) as caught:
                act()
            errors.append(str(caught.value))
        engine.forward([0], [0], [3])  # the session goes on
    return errors


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8, Kind.Q4R])
def test_the_layer_is_named(
    files: dict[Kind, Path], kind: Kind, layer: int, tmp_path: Path
) -> None:
    for name in NAMES if kind == Kind.F32 else ("attention.wv", "feed_forward.w2"):
        for value in (np.nan, np.inf) if kind == Kind.F32 else (np.nan,):
            path = broken(files[kind], tmp_path / "a.bin", f"layers.{layer}.{name}.weight", value)
            found = said(path)
            assert found == [f"layer {layer} gives numbers that are not finite"] * 3, (name, value)


def test_what_stands_around_the_layers_is_named(files: dict[Kind, Path], tmp_path: Path) -> None:
    for name, place in (("norm.weight", "the head"), ("output.weight", "the head"),
                        ("tok_embeddings.weight", "the embedding")):  # fmt: skip
        path = broken(files[Kind.F32], tmp_path / "a.bin", name)
        for isa in ("scalar", None):
            assert said(path, isa) == [f"{place} gives numbers that are not finite"] * 3


def test_a_text_ends_with_the_error(tmp_path: Path) -> None:
    path = broken(tiny_chat.write(tmp_path / "good.bin"), tmp_path / "a.bin",
                  "layers.1.feed_forward.w1.weight")  # fmt: skip
    line = "layer 1 gives numbers that are not finite"
    with Llama(path) as llm:
        for params in (SamplingParams(temperature=0.0), SamplingParams(logprobs=1)):
            with pytest.raises(LlamaError, match=line):
                llm.generate("Once", params)
    for arguments in (["Once"], ["Once", "--lookup"], ["--selftest"]):
        done = subprocess.run(
            [sys.executable, "run.py", f"--bin={path}", *arguments], cwd=ROOT, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 1 and line in done.stdout + done.stderr, done.stderr
        assert "Traceback" not in done.stderr
