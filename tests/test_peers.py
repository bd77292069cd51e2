"""Other engines: a .bin as GGUF is the same model, and what is measured of a peer.

Where a peer's package is installed it runs, on a small model; its greedy tokens are ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small_models

from llama import bench, checkpoints, peers, report
from llama._lib import LIBRARY
from llama.config import Config, Head, Rope
from llama.engine import Engine, Model
from llama.errors import LlamaError
from llama.format import read
from llama.quant import Kind
from llama.to_gguf import to_gguf

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=288, dim=64, hidden_dim=96, head_dim=16, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
QUANTISE = gguf.quants.quantize


def written(source: Path, out: Path, **options: Any) -> Path:
    with Model(source) as model:
        to_gguf(model, out, QUANTISE, **options)
    return out


def logits(path: Path, n: int = 40) -> Any:
    with Engine(path) as engine:
        ids = [(11 * i + 3) % engine.config.vocab_size for i in range(n)]
        return engine.forward(ids, [0] * n, range(n), [True] * n)


def test_a_real_model_there_and_back(stories: Path, data: Path, tmp_path: Path) -> None:
    """Our own importer reads the GGUF file of stories260K: every logit is the same."""
    written(stories, tmp_path / "s.gguf")
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "tok512.bin")
    checkpoints.export(tmp_path / "s.gguf", tmp_path / "s.bin", options=options)
    assert np.array_equal(logits(tmp_path / "s.bin"), logits(stories))
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True},
        {"rope_scaling": Rope.LINEAR, "rope_numbers": (4.0,)},
        {"rope_scaling": Rope.LLAMA3, "rope_numbers": (8.0, 1.0, 4.0, 8192.0)},
        {"head_dim": 24, "rope_theta": 5e5},
    ],
    ids=["tied", "linear", "llama3", "wide heads"],
)
def test_shapes_there_and_back(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shape = replace(SHAPE, vocab_size=512, **changes)
    source = small_models.write_bin(tmp_path / "a.bin", shape, kind=Kind.F16)
    written(source, tmp_path / "a.gguf")
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "tok512.bin")
    checkpoints.export(tmp_path / "a.gguf", tmp_path / "b.bin", options=options)
    found = read(tmp_path / "b.bin")
    assert replace(found.config, bos_id=None, eos_ids=()) == read(source).config
    assert np.array_equal(logits(tmp_path / "b.bin"), logits(source))


@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_becomes_its_nearest(tmp_path: Path, kind: Kind) -> None:
    source = small_models.of_kind(tmp_path, SHAPE, kind)
    ours = read(source)
    names = {Kind.Q8: "Q8_0", Kind.Q4: "Q4_0", Kind.Q8R: "Q8_0", Kind.Q4R: "Q4_0",
             Kind.Q4E: "Q4_0"}
    for tensor in gguf.GGUFReader(written(source, tmp_path / "a.gguf")).tensors:
        if len(tensor.shape) == 2:
            assert tensor.tensor_type.name == names.get(kind, kind.name)
    w1 = next(t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if "ffn_gate" in t.name)
    values = gguf.quants.dequantize(w1.data, w1.tensor_type)
    wanted = ours.tensors["layers.0.feed_forward.w1.weight"]
    error = np.sqrt(np.mean((values - wanted) ** 2)) / wanted.std()
    assert error < {"Q8_0": 0.01, "Q4_0": 0.1}.get(names.get(kind, ""), 1e-9)
    half = gguf.GGUFReader(written(source, tmp_path / "b.gguf", only_f16=True))
    found = {t.tensor_type.name for t in half.tensors if len(t.shape) == 2}
    assert found == {names.get(kind, "F16")}


def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn = replace(SHAPE, rope_scaling=Rope.YARN, rope_numbers=(4.0, 32.0, 32.0, 1.0, 1.1, 1.0))
    with pytest.raises(LlamaError, match="yarn rope scaling is not written to GGUF"):
        written(small_models.write_bin(tmp_path / "y.bin", yarn), tmp_path / "y.gguf")
    bare = small_models.write_bin(tmp_path / "n.bin", replace(SHAPE, head=Head.NONE))
    with pytest.raises(LlamaError, match="has no language model's head"):
        written(bare, tmp_path / "n.gguf")
    usage = shutil.disk_usage(tmp_path)
    source = small_models.write_bin(tmp_path / "a.bin", SHAPE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(LlamaError, match=r"a.gguf: needs [\d,]+ bytes of disk, 100 are free"):
        written(source, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for engine, package in (("llama.cpp", "xllamacpp"), ("openvino", "openvino-genai")):
        with pytest.raises(LlamaError, match=f"{engine}: .* not installed; pip install {package}"):
            peers.find(engine)


def test_a_librarys_lack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose library is none, or another one."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "xllamacpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "xllamacpp.so").write_text("no library")
    with pytest.raises(LlamaError, match=r"xllamacpp.so: cannot be loaded"):
        peers.load_llama_cpp()
    ours = os.environ.get("LLAMA_LIBRARY", LIBRARY)
    shutil.copy(ours, package / "xllamacpp.so")
    with pytest.raises(LlamaError, match=r"has no llama_backend_init; another version is needed"):
        peers.load_llama_cpp()


def test_ratios_are_ours_over_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that takes turns with us, is twice as slow, and agrees for 3 tokens."""
    source = small_models.write_bin(tmp_path / "h.bin", SHAPE, kind=Kind.F16)
    started: list[str] = []

    def start(job: Any) -> dict[str, Any]:
        started.append(job.engine)
        ours = job.engine == "llama"
        assert (job.kv, job.greedy) == ("f16", bench.GREEDY)
        rates = [30.0, 40.0, 50.0] if ours else [20.0, 15.0, 25.0]
        seen = [0.5e6, 1e6, 2e6] if ours else []
        rows = [{"work": work, "n": 4, "depth": 0, "batch": 1, "rates": rates, "bandwidths": seen}
                for work in ("prompt", "decode")]  # fmt: skip
        facts = {
            "limits": {"bandwidth": 3e6, "f32": 1e6, "int8": 1e6}, "isa": "scalar", "threads": 1,
            "load": {"step_bytes": 10**4, "kv_bytes": 0, "token": [10, 0], "row": [0, 0]},
            "activations": 16, "kv": "f16", "dtype": "f16", "weight_bytes": 10**4,
            "opening_seconds": [0.05],
        }  # fmt: skip
        return {
            "engine": job.engine, "version": "7", "features": "NONE", "open_seconds": 1.0,
            "first_token_seconds": 2.0, "memory": {}, "rows": rows,
            "greedy": [1, 2, 3, 4] if ours else [1, 2, 3, 5], "facts": facts if ours else {},
        }  # fmt: skip

    monkeypatch.setattr(bench, "start_trial", start)
    monkeypatch.setattr(peers, "find", lambda engine: None)
    monkeypatch.setattr(peers, "gguf_of", lambda path, *rest: path.with_suffix(".gguf"))
    monkeypatch.setattr(sys, "argv", ["x", "--bin", str(source), "--against=llama.cpp", "--json=-"])
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    assert started == ["llama", "llama.cpp"] * 2
    assert [row["ratio"] for row in model["against"]["rows"]] == [2.0, 2.0]
    assert len(model["against"]["rows"][0]["rates"]) == 6
    assert model["against"]["greedy"] == {"tokens": 4, "same": 3}
    assert model["rows"][1]["share"] == 40 / 100 and model["opening_steps"] == 2.0
    text = "\n".join(report.table(model))
    ours = "| decode 4 after 0 | 40.0 (50%) | 40% of 100.0 by bandwidth, 0.0 GB/s "
    assert ours + "| 20.0 (50%) | 2.00 |" in text
    assert "greedy: the first 3 of 4 tokens are the same" in text


@pytest.mark.parametrize("engine", ["llama.cpp", "openvino"])
def test_the_real_peer(data: Path, tmp_path: Path, engine: str) -> None:
    try:
        peers.find(engine)
    except LlamaError as error:
        pytest.skip(str(error))
    half = tmp_path / "half.bin"
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "tok512.bin")
    checkpoints.export(data / "weights" / "stories260K.bin", half, dtype="f16", options=options)
    done = subprocess.run(
        [sys.executable, "-m", "llama.bench", "--bin", half, "--against", engine, "--json=-",
         "--prompt=16", "--depth=0,24", "--batch=1,3", "--tokens=4", "--repeats=1", "--turns=1",
         "--shape-dir", tmp_path / "kept"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peer = json.loads(done.stdout)["models"][0]["against"]
    assert [row["rate"] > 0 and row["ratio"] > 0 for row in peer["rows"]] == [True] * 5
    # the first may round differently; ours is compared with transformers elsewhere
    assert peer["greedy"]["tokens"] == 64 and peer["greedy"]["same"] >= 16
    assert peer["features"] and peer["memory"].get("anonymous", 1) > 0
