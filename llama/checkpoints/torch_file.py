"""PyTorch's .pth and .bin files, read without torch and without trusting them.

Such a file is a zip of raw storages and one pickle that says how tensors lie in them. A pickle is
a program; this reader lets it say little. First its opcodes are listed and held against those
that torch.save writes (pickle's own loader allocates whatever a memo index asks for). Then it
runs in an unpickler that knows a few names, each a sealed stand-in of ours: nothing of Python or
torch can be reached, called or changed. Weights stay in the file until they are asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama.checkpoints.tensors import Member, Plain, Tensor, Unreadable
from llama.errors import LlamaError
from llama.quant import STORED, Array, Kind
from llama.reading import File

LARGEST_PICKLE = 16 << 20
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE", "POP", "POP_MARK",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip
STORAGES: dict[str, tuple[int, Kind | None]] = {
    "FloatStorage": (4, Kind.F32), "HalfStorage": (2, Kind.F16), "BFloat16Storage": (2, Kind.BF16),
    "DoubleStorage": (8, None), "LongStorage": (8, None), "IntStorage": (4, None),
    "ShortStorage": (2, None), "CharStorage": (1, None), "ByteStorage": (1, None),
    "BoolStorage": (1, None),
}  # fmt: skip
# Dtypes that have no storage of their own: their tensors are known, so that they can be named.
UNTYPED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass(frozen=True)
class Strided:
    """A tensor whose rows do not simply follow each other in its storage."""

    storage: Plain  # (numel)
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    def rows(self, first: int, last: int) -> Array:
        shape = (last - first, *self.shape[1:])
        if 0 in shape:
            return self.storage.rows(0, 0).reshape(shape)
        start = self.start + first * self.strides[0]
        reach = sum((n - 1) * stride for n, stride in zip(shape, self.strides, strict=True))
        numbers = self.storage.rows(start, start + reach + 1)
        return np.lib.stride_tricks.as_strided(
            numbers, shape, [stride * numbers.itemsize for stride in self.strides],
            writeable=False,
        )  # fmt: skip


class _Sealed:
    """A value inside the pickle that it may pass around but neither open nor change."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("it tries to change a name")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it tries to change a name")


class _Function(_Sealed):
    """One of the names that the pickle may call."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict; forgets the attributes (_metadata) that torch hangs on it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Reader(pickle.Unpickler):
    def __init__(self, archive: _Archive, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.names = {
            ("collections", "OrderedDict"): _Function(_Dict),
            ("torch._utils", "_rebuild_tensor_v2"): _Function(archive.tensor),
            ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *rest: data),
            ("torch", "Size"): _Function(tuple),
            ("torch._utils", "_rebuild_tensor_v3"): _Function(archive.untyped),
            ("torch.storage", "UntypedStorage"): _Sealed("ByteStorage"),
            **{("torch", name): _Sealed(name) for name in (*STORAGES, *UNTYPED)},
        }
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:100]) from None

    def persistent_load(self, pid: Any) -> Any:
        return _Sealed(self.archive.storage(*pid))


class _Archive:
    """The zip: where each member's raw bytes stand in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = File(path)
        if self.file.read(0, min(4, self.file.size), "its start") != b"PK\3\4":
            raise LlamaError(
                f"{path}: expected PyTorch's zip format, found an older or another one; "
                "load and save it again with a current torch"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
        except Exception as error:  # a hostile zip can make zipfile raise anything
            raise LlamaError(f"{path}: not a whole zip file: {error}") from None
        pickles = [name for name in self.members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise LlamaError(f"{path}: expected one data.pkl inside, found {len(pickles)}")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def place(self, name: str) -> tuple[Member, int, int]:
        """A stored member, whose checksum is compared when it is read, and (offset, size)."""
        info = self.members.get(self.prefix + name)
        if info is None:
            raise LlamaError(f"{self.path}: {name} is missing inside")
        if info.compress_type != 0 or info.compress_size != info.file_size or info.flag_bits & 1:
            raise LlamaError(f"{self.path}: {name} is compressed inside, expected it stored")
        head = self.file.read(info.header_offset, LOCAL_HEADER.size, name)
        fields = LOCAL_HEADER.unpack(head)
        if fields[0] != b"PK\3\4":
            raise LlamaError(f"{self.path}: {name}: damaged zip header")
        offset = info.header_offset + LOCAL_HEADER.size + fields[9] + fields[10]
        self.file.check(offset, info.file_size, name)
        member = Member(self.file, offset, info.file_size, info.CRC, name)
        return member, offset, info.file_size

    def storage(self, tag: str, kind: _Sealed, key: str, location: str, numel: int) -> Tensor:
        """A persistent id of the pickle -> the flat storage that it names."""
        if tag != "storage" or not isinstance(kind, _Sealed) or not isinstance(key, str):
            raise pickle.UnpicklingError("it names a storage in no known way")
        if kind.value not in STORAGES:
            raise pickle.UnpicklingError(f"{kind.value} is no storage")
        item, float_kind = STORAGES[kind.value]
        member, offset, size = self.place(f"data/{key}")
        if not isinstance(numel, int) or not 0 <= numel * item <= size:
            raise pickle.UnpicklingError(f"storage {key} has {size} bytes, it asks for {numel}")
        if float_kind is None:
            return Unreadable(kind.value, (numel,), key)
        return Plain(member, offset, float_kind, (numel,), f"storage {key}")

    def tensor(
        self, sealed: _Sealed, start: int, shape: tuple[int, ...], strides: tuple[int, ...],
        requires_grad: object = None, hooks: object = None, metadata: object = None,
    ) -> _Sealed:  # fmt: skip
        """Stands for torch._utils._rebuild_tensor_v2; every index is checked here, once."""
        storage = sealed.value
        numbers = (start, *shape, *strides)
        if metadata or len(shape) != len(strides) or len(shape) > 8:
            raise pickle.UnpicklingError("a tensor is built in no known way")
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
            raise pickle.UnpicklingError("a tensor has impossible numbers")
        (numel,) = storage.shape
        last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= numel:
            raise pickle.UnpicklingError(f"a tensor reaches to {last} in a storage of {numel}")
        if isinstance(storage, Unreadable):
            return _Sealed(Unreadable(storage.dtype, shape, "a tensor"))
        plain, step = True, 1
        for n, stride in zip(reversed(shape), reversed(strides), strict=True):
            plain &= n == 1 or stride == step
            step *= n
        if not plain:
            return _Sealed(Strided(storage, start, shape, strides))
        offset = storage.offset + start * STORED[storage.kind].itemsize
        return _Sealed(Plain(storage.file, offset, storage.kind, shape, storage.name))

    def untyped(
        self, storage: _Sealed, start: int, shape: tuple[int, ...], strides: tuple[int, ...],
        requires_grad: object, hooks: object, dtype: _Sealed, metadata: object = None,
    ) -> _Sealed:  # fmt: skip
        """Stands for torch._utils._rebuild_tensor_v3, which builds tensors of newer dtypes."""
        if not isinstance(dtype, _Sealed) or dtype.value not in UNTYPED:
            raise pickle.UnpicklingError("a tensor has an unknown dtype")
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in shape) or len(shape) > 8:
            raise pickle.UnpicklingError("a tensor has impossible numbers")
        return _Sealed(Unreadable(dtype.value, tuple(shape), "a tensor"))


def _check_opcodes(data: bytes) -> None:
    memo = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"it uses {opcode.name}")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            if argument > memo:  # torch numbers them one by one
                raise pickle.UnpicklingError(f"it skips to memo {argument}")
            memo = max(memo, argument + 1)
        elif opcode.name == "MEMOIZE":
            memo += 1


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .bin by name; raises LlamaError, and never runs what is inside."""
    archive = _Archive(path)
    if archive.prefix + "byteorder" in archive.members:
        member, offset, size = archive.place("byteorder")
        order = member.read(offset, size, "byteorder")
        if order != b"little":
            raise LlamaError(f"{path}: expected little-endian weights, found {order[:10]!r}")
    member, offset, size = archive.place("data.pkl")
    if size > LARGEST_PICKLE:
        raise LlamaError(f"{path}: its pickle has {size} bytes, at most {LARGEST_PICKLE}")
    data = member.read(offset, size, "data.pkl")
    try:
        _check_opcodes(data)
        found = _Reader(archive, data).load()
    except LlamaError:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise LlamaError(f"{path}: refused, its pickle is not plain tensors: {error}") from None
    if not isinstance(found, dict):
        raise LlamaError(f"{path}: expected tensors by name, found another object")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Sealed):
            raise LlamaError(f"{path}: {str(name)[:60]}: expected a tensor, found another object")
        if not hasattr(value.value, "rows"):
            raise LlamaError(f"{path}: {name[:60]}: expected a tensor, found another object")
        tensors[name] = value.value
    readable = [each for each in tensors.values() if not isinstance(each, Unreadable)]
    if sum(math.prod(each.shape) for each in readable) > archive.file.size:  # by strides of 0
        raise LlamaError(f"{path}: its tensors have more numbers than the file has bytes")
    return tensors
