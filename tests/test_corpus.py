"""What fuzzing found, once more: every file in tests/corpus/ through its reader, and the seeds that
fuzzing starts from, without the fuzzer."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest

from llama.engine import Engine
from llama.errors import LlamaError

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "fuzz"))
READERS = ("gguf", "pth", "safetensors", "config", "tokenizer", "template", "llama2c", "session")


def past(target: str) -> list[Path]:
    return sorted((HERE / "corpus" / target).glob("*"))


@pytest.mark.parametrize("target", READERS)
def test_readers(target: str) -> None:
    import readers
    import seeds

    run = readers.trial(target)
    for data in seeds.of(target):
        run(data)
    for path in past(target):
        run(path.read_bytes())


def test_bins(tmp_path: Path) -> None:
    import seeds

    accepted = 0
    for data in [*seeds.of("bin"), *(path.read_bytes() for path in past("bin"))]:
        sealed = bytearray(data)
        struct.pack_into("<I", sealed, 12, 0)
        header_bytes = int.from_bytes(data[16:24], "little")
        struct.pack_into("<I", sealed, 12, zlib.crc32(sealed[:header_bytes]))
        (tmp_path / "a.bin").write_bytes(sealed)
        try:
            with Engine(tmp_path / "a.bin", threads=1) as engine:
                engine.forward([0, 1], [0, 0], [0, 1], [True, True])
                accepted += 1
        except LlamaError as error:
            assert "\n" not in str(error)
    assert accepted >= len(seeds.of("bin"))
