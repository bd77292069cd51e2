"""quantize.py: bytes that do not depend on threads, errors within each kind's bound, a receipt
that tells the truth, and nothing left behind when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_stops import WRITE, start, stopped_at

from llama import format
from llama.config import Config
from llama.engine import Model
from llama.errors import LlamaError
from llama.format import Record, Writer
from llama.quant import Kind, matrix_bytes, untile
from llama.shrink import shrink

ROOT = Path(__file__).resolve().parent.parent
# rows and columns that fill neither a tile nor a group
SHAPE = Config(
    vocab_size=45, dim=40, hidden_dim=51, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def write(path: Path, shape: Config = SHAPE, **changed: np.ndarray) -> Path:
    """A small random model, f32; CHANGED tensors by name with _ for dots."""
    rng = np.random.default_rng(0)
    records = [
        Record(name, Kind.F32, size) for name, size in format.expected_tensors(shape).items()
    ]
    with Writer(path, shape, records) as writer:
        for record in records:
            values = rng.normal(0, 0.1, record.shape).astype(np.float32)
            writer.write(record.name, changed.get(record.name.replace(".", "_"), values))
    return path


@pytest.mark.parametrize("bits", [8, 4])
def test_every_tensor_within_its_bound(tmp_path: Path, bits: int) -> None:
    """Decoded by numpy from docs/format.md, not by the code that encoded it."""
    source, out = write(tmp_path / "m.bin"), tmp_path / "q.bin"
    receipt = shrink(source, out, bits)
    before, after = format.read(source), format.read(out)
    assert after.config == before.config
    for name, record in after.records.items():
        a, b = before.tensors[name], after.tensors[name]
        if a.ndim == 1:
            assert record.kind == Kind.F32 and np.array_equal(a, b)
            continue
        expected = Kind.Q4 if bits == 4 and name not in ("tok_embeddings.weight", "output.weight") \
            else Kind.Q8  # fmt: skip
        assert record.kind == expected
        for c in range(0, a.shape[1], 32):
            group, error = a[:, c : c + 32], np.abs(a - b)[:, c : c + 32]
            step = np.abs(group).max(axis=1) / (127 if expected == Kind.Q8 else 7)
            # 8 bits cut off as much of the largest as serves the others
            assert (error <= step[:, None] * (1.6 if expected == Kind.Q8 else 1.01)).all()
        told = receipt.errors[name]
        assert told == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()), rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_step_reads(tmp_path: Path, tied: bool) -> None:
    """All weights, but of an embedding that is not the output matrix too only a row."""
    shrink(write(tmp_path / "m.bin", replace(SHAPE, tied=tied)), tmp_path / "q.bin", 4)
    with Model(tmp_path / "q.bin") as model:
        config, sizes = model.config, {t.name: t.bytes for t in model.tensors}
    assert config.weight_bytes == sum(sizes.values()) and config.dtype == "q4"
    unread = 0 if tied else matrix_bytes(Kind.Q8, 45, 40)
    assert config.step_bytes == config.weight_bytes - unread


def test_receipt_is_in_the_file(tmp_path: Path) -> None:
    source, out = write(tmp_path / "m.bin"), tmp_path / "q.bin"
    receipt = shrink(source, out, 8)
    with Model(out) as model:
        stored = json.loads(str(model.meta["quantize.receipt"]))
        assert stored == json.loads(receipt.text())
        weights = sum(int(np.prod(t.shape)) for t in model.tensors)
        data = sum(t.bytes for t in model.tensors)
    assert stored["bytes_before"] == source.stat().st_size
    assert stored["bytes_after"] == out.stat().st_size
    assert stored["bits_per_weight"] == pytest.approx(8 * data / weights)
    assert 0 <= stored["distance"]["mean_kl"] < 0.1 and stored["distance"]["n"] == 64
    assert stored["distance"]["same_token"] > 0.7


@pytest.mark.parametrize("bits", [8, 4])
def test_same_bytes_for_any_threads(tmp_path: Path, bits: int) -> None:
    source = write(tmp_path / "m.bin")
    outs = []
    for threads in (1, 2, 3):
        shrink(source, tmp_path / "q.bin", bits, force=True, threads=threads)
        outs.append((tmp_path / "q.bin").read_bytes())
    assert outs[0] == outs[1] == outs[2]


def test_chunks_make_the_same_bytes(tmp_path: Path) -> None:
    """A matrix quantised in one go and strip by strip."""
    with Model(write(tmp_path / "m.bin")) as model:
        index = next(i for i, t in enumerate(model.tensors) if t.name == "output.weight")
        rows, columns = model.tensors[index].shape
        for kind in (Kind.Q8, Kind.Q4, Kind.Q4E, Kind.F16, Kind.BF16):
            size = matrix_bytes(kind, rows, columns)
            whole, _ = model.quantize(index, 0, rows, kind, size)
            parts = b""
            for first in range(0, rows, 16):
                n = min(16, rows - first)
                parts += model.quantize(index, first, n, kind, matrix_bytes(kind, n, columns))[0]
            assert bytes(whole) == parts


def test_twice_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    shrink(source, tmp_path / "q4.bin", 4)
    with pytest.raises(LlamaError, match="is in q4 already"):
        shrink(tmp_path / "q4.bin", tmp_path / "q4again.bin", 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_weight_that_cannot_be_held_is_named(tmp_path: Path, value: float) -> None:
    name = "layers.1.attention.wo.weight"
    bad = np.zeros((40, 24), np.float32)
    bad[37, 11] = value
    source = write(tmp_path / "m.bin", **{name.replace(".", "_"): bad})
    with pytest.raises(LlamaError, match=rf"{name}: weight \(37, 11\) is .*cannot hold"):
        shrink(source, tmp_path / "q.bin", 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin"]


def test_damaged_source_is_found(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    data = bytearray(source.read_bytes())
    data[-100] ^= 1
    source.write_bytes(data)
    with pytest.raises(LlamaError, match="checksum"):
        shrink(source, tmp_path / "q.bin", 8)
    assert not (tmp_path / "q.bin").exists()


def test_existing_file_is_kept(tmp_path: Path) -> None:
    source, out = write(tmp_path / "m.bin"), tmp_path / "q.bin"
    out.write_text("mine")
    with pytest.raises(LlamaError, match="--force"):
        shrink(source, out, 8)
    assert out.read_text() == "mine"


EDGES = st.one_of(
    st.just(0.0), st.just(1e4), st.just(-1e4), st.just(1e-40), st.just(-1e-44), st.just(65504.0),
    st.floats(-10, 10, width=32),
)  # fmt: skip


@settings(max_examples=60)
@given(arrays.arrays(np.float32, (16, 64), elements=EDGES, fill=st.just(0.0)))
def test_odd_groups(values: np.ndarray) -> None:
    """Zeros, one outlier, subnormals: every group within its bound, zeros exactly zero."""
    import tempfile

    shape = Config(16, 64, 16, 2, 1, 1, 1, 8, 1e-5, 1e4)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.bin", shape, output_weight=values)
        with Model(path) as model:
            index = next(i for i, t in enumerate(model.tensors) if t.name == "output.weight")
            for kind, levels in ((Kind.Q8, 127), (Kind.Q4, 7)):
                size = matrix_bytes(kind, 16, 64)
                blocks, loss = model.quantize(index, 0, 16, kind, size)
                after = untile(np.frombuffer(bytes(blocks), np.uint8), kind, 16, 64)
                error = np.abs(after.astype(np.float64) - values)
                assert np.isfinite(after).all()
                assert loss.max_error == pytest.approx(error.max(), rel=1e-6, abs=1e-30)
                for c in (0, 32):
                    top = np.abs(values[:, c : c + 32]).max(axis=1)
                    # a step and what the search cuts off, and the scale's smallest step
                    # times the outermost level, which is near 127 in both kinds
                    bound = top / levels * (1.6 if kind == Kind.Q8 else 1.01) + 127 * 6e-8
                    assert (error[:, c : c + 32] <= bound[:, None]).all()
                    zero = (values[:, c : c + 32] == 0).all(axis=1)
                    assert (after[:, c : c + 32][zero] == 0).all()


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "quantize.py"), *map(str, words)],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    done = command("--bits", 4, "--bin", source)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "m-q4.bin").exists()
    for told in ("times smaller", "bits a weight", "attention.wq", "largest: ", "KL divergence"):
        assert told in done.stderr
    again = command("--bits", 4, "--bin", source)
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and "--force" in again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--bits"),
        (("--bits", "5"), "invalid choice: 5"),
        (("--bits", "8", "--bin", "no.bin"), "no.bin: No such file"),
        (("--bits", "8", "--bin", "."), "is a directory"),
        (("--bits", "8", "--sizes", "3"), "there is no --sizes, but --size"),
    ],
)
def test_bad_words_are_one_line(words: tuple[str, ...], says: str) -> None:
    done = command(*words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and says in done.stderr and "quantize.py: " in done.stderr


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while it writes: status 130, and neither the file nor a part of it."""
    source = write(tmp_path / "m.bin", SHAPE)
    stop = stopped_at(signal.SIGINT, WRITE)
    process = start("quantize.py", "--bits=4", f"--bin={source}", first=stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin"]
