"""A short form of tests/soak.py, whose long one is make soak TIME=3600."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soak
from pytest import MonkeyPatch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return soak.files(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("seed", [0, 1, 3])  # two rounds of numbers, one of words
def test_a_history_does_not_show(models: dict[str, list[Path]], seed: int) -> None:
    counts = soak.Counts()
    soak.play(seed, models, counts)
    assert counts.rounds == 1 and counts.compared > 10


LEAKS = """
import mmap, sys
import soak
kept, play = [], soak.play
def leaks(*args):
    play(*args)
    kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    kept[-1].write(bytes([1]) * (1 << 20))
soak.play, soak.STEPS = leaks, {"numbers": 1, "words": 1}
sys.argv = ["soak.py", "--rounds", "40"]
sys.exit(soak.main())
"""


def test_memory_that_grows_is_told() -> None:
    """In a process of its own: here, what other tests gave back goes at any time."""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", LEAKS], env=os.environ | {"PYTHONPATH": folders},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "memory grew by" in done.stdout.splitlines()[-1]


def test_one_bit_is_found(models: dict[str, list[Path]], monkeypatch: MonkeyPatch) -> None:
    right = soak.Numbers.fresh

    def off(self: soak.Numbers, tokens: list[int]) -> np.ndarray:
        got = right(self, tokens)
        got[len(tokens) // 2, 3] = np.nextafter(got[len(tokens) // 2, 3], np.inf)
        return got

    monkeypatch.setattr(soak.Numbers, "fresh", off)
    with pytest.raises(soak.Differs, match=r"(?s)^seed 0: .*forward\(tokens=.* is off by"):
        soak.play(0, models, soak.Counts())
