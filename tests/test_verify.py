"""Checksums: a plain open reads no weights, run.py --verify, --selftest and quantize.py find each
flipped bit of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_models

from llama.engine import Model
from llama.errors import LlamaError
from llama.format import read
from llama.quant import Kind
from llama.selftest import selftest, verify
from llama.shrink import shrink

ROOT = Path(__file__).resolve().parent.parent
FLIPS = 200  # of each kind of file


def flipped(path: Path, out: Path, n: int) -> list[str]:
    """Tensors, one for each of N copies OUT0, OUT1, ... with one random bit of it turned."""
    data, records = path.read_bytes(), list(read(path).records.values())
    sizes = np.array([record.n_bytes for record in records], np.float64)
    rng = np.random.default_rng(int(sizes.sum()))
    names = []
    for number in range(n):
        record = records[rng.choice(len(records), p=sizes / sizes.sum())]
        hurt = bytearray(data)
        hurt[record.offset + rng.integers(record.n_bytes)] ^= 1 << rng.integers(8)
        out.with_name(f"{out.name}{number}").write_bytes(hurt)
        names.append(record.name)
    return names


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8, Kind.Q4R], ids=str)
def test_every_flipped_bit_is_found(
    tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small_models.of_kind(tmp_path, small_models.config(dim=64, head_dim=16), kind)
    assert verify(good) and capsys.readouterr().out.startswith("ok      checksums of ")
    for number, name in enumerate(flipped(good, tmp_path / "bad", FLIPS)):
        bad = tmp_path / f"bad{number}"
        with Model(bad) as model:  # a plain open reads no weights
            assert model.config.dim == 64
        assert not verify(bad)
        said = capsys.readouterr().out
        assert said.startswith(f"FAILED  checksums: {name} is damaged: checksum "), said
        if number < 5:
            assert not selftest(bad, 1)
            assert f"checksums: {name} is damaged" in capsys.readouterr().out
            if kind == Kind.F16:
                with pytest.raises(LlamaError, match=f"{name} is damaged: checksum"):
                    shrink(bad, tmp_path / "small.bin", 8, threads=1)
                assert not (tmp_path / "small.bin").exists()
        bad.unlink()


def test_verify_as_a_command(tmp_path: Path) -> None:
    good = small_models.write_bin(tmp_path / "good.bin", small_models.config())
    flipped(good, tmp_path / "bad", 1)

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, text=True,
                              capture_output=True)  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    status, said = run("--verify", f"--bin={good}")
    assert status == 0 and said.startswith("ok      checksums of 21 tensors, ")
    status, said = run("--verify", f"--bin={tmp_path / 'bad0'}")
    assert status == 1 and said.startswith("FAILED  checksums: ")
    assert run("--verify", "a prompt")[0] == 1
    assert run("--verify", "--info")[0] == 1
    assert run("--verify", f"--bin={tmp_path / 'none.bin'}") == (
        1, f"run.py: {tmp_path / 'none.bin'}: No such file or directory\n"
    )  # fmt: skip
