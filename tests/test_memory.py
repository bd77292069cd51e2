"""Memory that is not there, memory that is not given back, and the plan made before any is taken."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_models
from test_not_finite import broken

from llama import _lib
from llama.quant import Kind

SHAPE = small_models.config(max_seq_len=600)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.write_bin(tmp_path_factory.mktemp("memory") / "m.bin", SHAPE)


@pytest.fixture(scope="module")
def failing() -> Path:
    """tests/failing.c, built."""
    cmake = _lib.find_cmake()
    for command in (
        [cmake, "-S", str(_lib.ROOT), "-B", str(_lib.BUILD)],
        [cmake, "--build", str(_lib.BUILD), "--target", "failing", "--parallel"],
    ):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    return _lib.BUILD / "failing"


def refused(*command: object) -> list[int]:
    """How many requests tests/failing.c refused of each file, all of them rightly answered."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [int(line.split(": ")[-1].split()[0]) for line in done.stdout.splitlines()]


def test_each_request_refused(failing: Path, path: Path, tmp_path: Path) -> None:
    q8r = small_models.of_kind(tmp_path, SHAPE, Kind.Q8R)
    assert [n > 60 for n in refused(failing, path, q8r)] == [True, True]


def test_each_request_refused_of_a_broken_model(failing: Path, path: Path, tmp_path: Path) -> None:
    name = "layers.1.feed_forward.w1.weight"
    file = broken(path, tmp_path / "nan.bin", name, np.nan)
    assert refused(failing, "broken", file)[0] > 20
