"""Weights read in pieces: files that are cut short or cannot be read while they are exported, or
while format.py decodes them, are one line and leave nothing."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import small_sources

from llama import checkpoints, format, reading
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.quant import Kind

FORMS = ("gguf", "llama2c", "safetensors", "pth")


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are so small that one read would fetch them whole."""
    monkeypatch.setattr(reading, "AHEAD", 1)


def export(form: str, folder: Path, midway: Callable[[Path], object]) -> str:
    """What is said where MIDWAY happened to the source when one tensor was written."""
    files = small_sources.sources()[form]
    checkpoint = checkpoints.load(small_sources.put(folder / "source", files))
    source, out = folder / "source" / next(iter(files)), folder / "out" / "a.bin"
    out.parent.mkdir(exist_ok=True)
    left = [midway]

    def progress(_: int) -> None:
        if left:
            left.pop()(source)

    with pytest.raises(LlamaError) as caught:
        convert(checkpoint, out, Kind.F32, force=True, progress=progress)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_cut_short_while_it_is_exported(form: str, tmp_path: Path) -> None:
    size = len(next(iter(small_sources.sources()[form].values())))
    for kept in (0, 1, size // 2):
        said = export(form, tmp_path, lambda file, kept=kept: os.truncate(file, kept))
        assert f"expected {size}: it was cut short while it was read" in said
        found = int(said.split("ends at byte ")[1].split(",")[0])
        assert kept <= found < size and "\n" not in said


@pytest.mark.parametrize("form", FORMS)
def test_a_read_that_fails(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    said = export(form, tmp_path, lambda file: monkeypatch.setattr(os, "pread", broken))
    assert said.endswith(": cannot read: Input/output error") and "\n" not in said


def test_a_bin_cut_short_while_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    size = len(small_sources.ours(path))
    found = format.read(path)
    first, *_, last = found.tensors
    assert found.tensors[last].size
    os.truncate(path, found.records[last].offset + 5)
    assert found.tensors[first].size
    with pytest.raises(LlamaError, match=rf"a\.bin: ends at byte \d+, expected {size}: it was cut"):
        found.tensors[last]


@pytest.mark.parametrize("most", [1, 7, 1 << 30])
def test_a_system_that_gives_less_than_asked(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(reading, "MOST", most)
    monkeypatch.setattr(reading, "AHEAD", 64)
    file = reading.File(tmp_path / "a")
    for offset, size in [(0, 1000), (3, 5), (0, 8), (66, 2), (950, 50), (999, 1), (1000, 0)]:
        assert file.read(offset, size, "it") == data[offset : offset + size]
    for offset, size in [(1000, 1), (-1, 2), (0, 1001), (1 << 70, 0), (5, -1)]:
        with pytest.raises(LlamaError, match="a: truncated: it needs bytes"):
            file.read(offset, size, "it")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_files_close_with_what_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    small_sources.ours(path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert format.read(path).tensors
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
