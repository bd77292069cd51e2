"""A short form of tests/soak.py, whose long one is make soak TIME=3600."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

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


def test_memory_that_grows_is_told(
    monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, play = [], soak.play

    def leaks(*args: Any) -> None:
        play(*args)
        # not from what earlier tests gave back
        kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"\1" * (1 << 20))

    monkeypatch.setattr(soak, "play", leaks)
    monkeypatch.setattr(soak, "without_caches", lambda: None)  # of all tests behind this one
    monkeypatch.setattr(soak, "STEPS", {"numbers": 1, "words": 1})
    monkeypatch.setattr("sys.argv", ["soak.py", "--rounds", "40"])
    assert soak.main() == 1
    assert "memory grew by" in capsys.readouterr().out.splitlines()[-1]


def test_one_bit_is_found(models: dict[str, list[Path]], monkeypatch: MonkeyPatch) -> None:
    right = soak.Numbers.fresh

    def off(self: soak.Numbers, tokens: list[int]) -> np.ndarray:
        got = right(self, tokens)
        got[len(tokens) // 2, 3] = np.nextafter(got[len(tokens) // 2, 3], np.inf)
        return got

    monkeypatch.setattr(soak.Numbers, "fresh", off)
    with pytest.raises(soak.Differs, match=r"(?s)^seed 0: .*forward\(tokens=.* is off by"):
        soak.play(0, models, soak.Counts())
