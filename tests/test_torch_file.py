"""The .pth reader against torch.load, and against files that want to do more than hold tensors."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.checkpoints import torch_file
from llama.errors import LlamaError
from llama.quant import widen

ROOT = Path(__file__).resolve().parent.parent


def same(path: Path) -> None:
    expected = torch.load(path, weights_only=False)
    found = torch_file.read(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        ours = found[name]
        assert ours.shape == tuple(tensor.shape)
        rows = widen(ours.rows(0, ours.shape[0]))
        assert np.array_equal(rows, tensor.detach().float().numpy(), equal_nan=True), name
        if ours.shape[0] > 2:
            assert np.array_equal(widen(ours.rows(1, 3)), tensor[1:3].detach().float().numpy())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_are_torchs(tmp_path: Path, protocol: int) -> None:
    torch.manual_seed(1)
    base = torch.randn(10, 12)
    tensors = {
        "f32": base,
        "f16": torch.randn(5, 3).half(),
        "bf16": torch.randn(5, 3).bfloat16(),
        "vector": torch.randn(7),
        "row slice": base[2:5],
        "column slice": base[:, 3:7],
        "transposed": base.t(),
        "steps": base[::3, ::2],
        "expanded": torch.randn(1, 4).expand(6, 4),
        "one row": base[3:4].t().t(),
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
        "three": torch.randn(3, 4, 5),
    }
    torch.save(tensors, tmp_path / "a.pth", pickle_protocol=protocol)
    same(tmp_path / "a.pth")
    torch.save(OrderedDict(tensors), tmp_path / "b.pth", pickle_protocol=protocol)
    same(tmp_path / "b.pth")


def test_a_modules_state_is_torchs(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(model.state_dict(), tmp_path / "a.pth")  # an OrderedDict with _metadata
    same(tmp_path / "a.pth")


def test_other_dtypes_are_known_but_not_read(tmp_path: Path) -> None:
    torch.save({"mask": torch.ones(2, 2, dtype=torch.bool), "n": torch.arange(3)}, tmp_path / "a")
    found = torch_file.read(tmp_path / "a")
    assert (found["mask"].dtype, found["n"].dtype) == ("BoolStorage", "LongStorage")
    with pytest.raises(LlamaError, match="found BoolStorage"):
        found["mask"].rows(0, 1)


def test_real_meta_file_is_torchs(data: Path) -> None:
    same(data / "weights/meta_tiny/consolidated.00.pth")


# ---- hostile files ----


def zipped(path: Path, pkl: bytes, storages: dict[str, bytes] | None = None, **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("a/data.pkl", pkl)
        for key, raw in (storages or {}).items():
            archive.writestr(f"a/data/{key}", raw)
    return path


def refused(path: Path) -> str:
    with pytest.raises(LlamaError) as caught:
        torch_file.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Runs:
    """Pickles as a call of FUNCTION."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_executes(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    for payload in (
        Runs(os.system, f"touch {mark}"),
        Runs(eval, f"open({str(mark)!r}, 'w')"),
        Runs(exec, f"open({str(mark)!r}, 'w')"),
        Runs(getattr, os, "system"),
        Runs(torch.load, str(mark)),
        Runs(Path, str(mark)),
    ):
        data = io.BytesIO()
        try:
            pickle.Pickler(data, protocol).dump({"w": payload})
        except Exception:  # a module cannot be pickled; torch.load can
            continue
        path = zipped(tmp_path / "evil.pth", data.getvalue())
        assert "refused" in refused(path)
        assert not mark.exists()
    evil = tmp_path / "torch.pth"  # the same through torch's own writer
    torch.save({"w": torch.ones(2), "x": Runs(os.system, f"touch {mark}")}, evil)
    refused(evil)
    assert not mark.exists()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "pkl, message",
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo"),  # pickle would allocate 16 GB of memo
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", ""),  # BYTEARRAY8 of a terabyte
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93.", "OrderedDict.__class__"),
        # BUILD on a function: change what the reader itself calls
        (b"\x80\x02" + TENSOR + b"N}X\x0c\x00\x00\x00__defaults__Ns\x86b.", "change a name"),
        (b"\x80\x02" + TENSOR + b"}X\x05\x00\x00\x00valueNsb.", "change a name"),
        (b"\x80\x02" + TENSOR + b")R.", ""),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", ""),
        (b"\x80\x02ccollections\nOrderedDict\n.", "expected tensors by name"),
        (b"\x80\x02K\x01.", "expected tensors by name"),
        (b"\x80\x02}K\x01K\x02s.", "expected a tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bs.", "expected a tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\ns.", "expected a tensor"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", ""),
        (b"\x80\x02", ""),
        (b"", ""),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", ""),
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, pkl: bytes, message: str) -> None:
    assert message in refused(zipped(tmp_path / "a.pth", pkl))


def tensor_pickle(key: str, numel: int, start: int, shape: Any, strides: Any) -> bytes:
    """What torch writes for one tensor, with numbers of our choice."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value[1] if isinstance(value, tuple) and value[:1] == ("pid",) else None

    pid = ("pid", ("storage", torch.FloatStorage, key, "cpu", numel))
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Runs(rebuild, pid, start, shape, strides, False, OrderedDict())
    data = io.BytesIO()
    Writer(data, 2).dump({"w": tensor})
    return data.getvalue()


def test_tensors_stay_inside_their_storage(tmp_path: Path) -> None:
    raw = np.arange(6, dtype=np.float32).tobytes()

    def made(*numbers: Any) -> Path:
        return zipped(tmp_path / "a.pth", tensor_pickle("0", *numbers), {"0": raw})

    found = torch_file.read(made(6, 0, (2, 3), (3, 1)))["w"]
    assert np.array_equal(found.rows(0, 2), np.arange(6, dtype=np.float32).reshape(2, 3))
    for numbers in [
        (7, 0, (2, 3), (3, 1)),
        (6, 1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (4, 1)),
        (6, 0, (3, 3), (3, 1)),
        (6, -1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (3, -1)),
        (6, 0, (2, -3), (3, 1)),
        (6, 0, (2, 3), (3,)),
        (6, 0, (2**60, 2**60), (0, 0)),
        (-1, 0, (0,), (1,)),
        (6, 0, (2, 3.0), (3, 1)),
        (6, 0, "23", "31"),
        (6, 0, (1,) * 9, (1,) * 9),
        (2**70, 0, (1,), (1,)),
    ]:
        refused(made(*numbers))


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    pkl = tensor_pickle("0", 6, 0, (2, 3), (3, 1))
    zipped(path, pkl, {"0": bytes(24)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)
    assert "data/0 is missing" in refused(zipped(path, pkl))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/x", "")
    assert "one data.pkl" in refused(path)
    zipped(path, pkl, {"0": bytes(24)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/byteorder", "big")
    assert "little-endian" in refused(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "zip format, found an older" in refused(path)
    path.write_bytes(b"")
    assert "empty" in refused(path)
    path.write_bytes(b"PK\3\4 and nothing more")
    assert "zip" in refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(20, 20), "v": torch.ones(3)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for size in range(0, len(whole), 41):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        refused(tmp_path / "cut.pth")


def test_every_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    """By the zip's checksums, when a tensor is read; where torch was told to leave them out, none
    is asked for."""
    tensors = {"w": torch.randn(20, 20), "t": torch.randn(8, 9).t()}
    path, bad = tmp_path / "a.pth", tmp_path / "bad.pth"
    torch.save(tensors, path)
    same(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        stored = tensor.t() if name == "t" else tensor
        start = whole.index(stored.contiguous().numpy().tobytes())
        for bit in rng.choice(32 * tensor.numel(), 100, replace=False):
            hurt = bytearray(whole)
            hurt[start + bit // 8] ^= 1 << bit % 8
            bad.write_bytes(hurt)
            found = torch_file.read(bad)
            with pytest.raises(LlamaError, match=r"bad.pth: data/\d is damaged: checksum"):
                found[name].rows(0, 1)
    place = whole.index(b"cpu")
    bad.write_bytes(whole[:place] + b"gpu" + whole[place + 3 :])
    assert "data.pkl is damaged: checksum" in refused(bad)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    same(path)


@settings(max_examples=300)
@given(st.data())
def test_damage_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.pth").exists():
        torch.save({"w": torch.ones(3, 4), "v": torch.ones(3).half()}, folder / "whole.pth")
    changed = bytearray((folder / "whole.pth").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (folder / "changed.pth").write_bytes(changed)
    try:
        for tensor in torch_file.read(folder / "changed.pth").values():
            if tensor.shape and tensor.dtype in ("f32", "f16", "bf16"):
                tensor.rows(0, min(tensor.shape[0], 100))
    except LlamaError:
        pass


def test_torch_is_not_needed() -> None:
    program = (
        "import sys, llama.checkpoints, llama.checkpoints.meta, llama.checkpoints.hf, "
        "llama.checkpoints.gguf, llama.checkpoints.default\n"
        "assert not {'torch', 'cffi', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
