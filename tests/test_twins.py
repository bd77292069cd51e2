"""Twins: what format.py writes format.c reads, and what one refuses the other refuses too."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_format

from llama.errors import LlamaError
from llama.format import Config, TokenizerKind, read
from llama.quant import Kind, matrix_bytes, narrow, tile, untile

_lib = pytest.importorskip("llama._lib", reason="the C library cannot be built here")
ffi, lib = _lib.ffi, _lib.lib


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    model = ffi.new("llama_model **")
    _lib.check(lib.llama_open(str(path).encode(), model))
    yield model[0]
    lib.llama_close(model[0])


def open_in_c(path: Path) -> None:
    with opened(path):
        pass


def rows_of(model: Any, index: int, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.float32)
    pointer = ffi.cast("float *", out.ctypes.data)
    _lib.check(lib.llama_read_rows(model, index, 0, shape[0], pointer))
    return out


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_c_reads_what_python_writes(tmp_path: Path, kind: Kind) -> None:
    config = Config(37, 50, 70, 6, 2, 4, 2, 9, 1e-5, 1e4, bos_id=1, eos_ids=(2, 4))
    test_format.write(tmp_path / "a.bin", config, kind=kind, meta={"general.name": "é", "n": 3})
    ours = read(tmp_path / "a.bin")
    with opened(tmp_path / "a.bin") as model:
        found = ffi.new("llama_config *")
        lib.llama_get_config(model, found)
        for name in ("vocab_size", "dim", "hidden_dim", "head_dim", "n_layers", "n_heads",
                     "n_kv_heads", "max_seq_len", "norm_eps", "rope_theta", "bos_id"):  # fmt: skip
            assert getattr(found, name) == getattr(ours.config, name)
        assert list(found.eos_ids)[: found.n_eos] == [2, 4] and found.kind == kind
        assert lib.llama_count_meta(model) == 2
        for index in range(lib.llama_count_tensors(model)):
            tensor = ffi.new("llama_tensor *")
            _lib.check(lib.llama_get_tensor(model, index, tensor))
            name = ffi.string(tensor.name).decode()
            _lib.check(lib.llama_verify(model, index))
            assert tensor.crc32 == ours.records[name].crc32
            array = ours.tensors[name]
            assert np.array_equal(rows_of(model, index, array.shape), array), name


@pytest.mark.parametrize("kind", list(Kind))
def test_python_decodes_what_c_encodes(tmp_path: Path, kind: Kind) -> None:
    config = Config(37, 50, 64, 6, 1, 4, 2, 9, 1e-5, 1e4)
    arrays = test_format.write(tmp_path / "a.bin", config)
    with opened(tmp_path / "a.bin") as model:
        for index, array in enumerate(arrays.values()):
            if array.ndim == 1 or (kind.rotated and array.shape[1] % 32):
                continue
            data = np.empty(matrix_bytes(kind, *array.shape), np.uint8)
            loss = ffi.new("llama_loss *")
            out = ffi.cast("void *", data.ctypes.data)
            _lib.check(lib.llama_quantize(model, index, 0, len(array), kind, ffi.NULL, 2, out,
                                          data.size, loss))  # fmt: skip
            found = untile(data, kind, *array.shape)
            error = np.square(found.astype(np.float64) - array).sum()
            assert error == pytest.approx(loss.sum_squared_error, rel=1e-6, abs=1e-30)
            if kind in (Kind.F32, Kind.F16, Kind.BF16):
                assert tile(narrow(array, kind), kind).tobytes() == data.tobytes()


def test_both_refuse_the_same(tmp_path: Path) -> None:
    """One byte of the front changed, its checksum made right again: twice the same verdict."""
    path = tmp_path / "a.bin"
    meta = {"general.name": "x", "other": 1.5}
    test_format.write(path, tokenizer=(TokenizerKind.JSON, b"{}"), meta=meta)
    good = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    draw = random.Random(0)
    for n in range(3000):
        changed = bytearray(good)
        at = draw.randrange(256 + 128 * 2) if n % 2 else draw.randrange(header_bytes)
        changed[at] = draw.choice([0, 1, 2, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(changed if 16 <= at < 24 else test_format.reseal(changed))
        verdicts = []
        for reader in (read, open_in_c):
            try:
                reader(path)
                verdicts.append("")
            except LlamaError as error:
                verdicts.append(str(error))
        text = "utf-8" in verdicts[0]  # only Python looks into texts
        assert bool(verdicts[0]) == bool(verdicts[1]) or text, (at, changed[at], verdicts)
