"""The .bin file, byte by byte as docs/format.md draws it: a streaming writer and a plain reader.

Twin of lib/format.c. Every size is known before the first byte is written: the writer takes the
whole directory up front, checks the free space, then streams the tensors in that order into a
temporary file beside the target and renames it at the end, so no half file ever has the real
name. The reader decodes with numpy alone and shares nothing with the C library: it is the
tests' second opinion and what llama/model.py loads.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llama import temporary
from llama.config import MAX_EOS, ROPE_COUNTS, Config, Head, Rope, expected_tensors
from llama.errors import LlamaError
from llama.quant import GROUP, TILE_ROWS, Array, Kind, matrix_bytes, tile, untile
from llama.reading import File

__all__ = ["Bin", "Config", "Head", "Record", "Required", "Rope", "Tensors", "TokenizerKind",
           "Writer", "expected_tensors", "read"]  # fmt: skip
MAGIC = b"LlamaBin"
VERSION = 1
ALIGN = 64
# A file system that can keeps what is written at once in one piece: in pages of 2 MiB, which a
# reader of the mapped file finds with a 512th of the faults.
LARGE_WRITE = 4 << 20
# magic version crc | header_bytes file_bytes | n_tensors n_meta | meta and tokenizer: offset,
# bytes | tokenizer_kind flags | eight sizes | eps theta | rope | bos n_eos eos | head n_labels |
# zeros
HEADER = struct.Struct("<8sII QQ II QQQQ II 8I ff I8f iI8i II 52x")
CRC_OFFSET = 12
# name | kind n_dims | shape | offset bytes | crc | zeros
RECORD = struct.Struct("<64s II QQ QQ I 20x")
# type flags key_bytes zero | value_bytes
META = struct.Struct("<IIII Q")
MAX_TENSORS, MAX_META = 65_536, 4_096
# Required keys that this reader understands: none so far.
UNDERSTOOD: frozenset[str] = frozenset()

Value = int | float | str | bytes


class TokenizerKind(IntEnum):
    """What the tokenizer's bytes are."""

    NONE = 0
    SENTENCEPIECE = 1
    JSON = 2
    TIKTOKEN = 3


@dataclass(frozen=True)
class Required:
    """A meta value that a reader must understand or refuse the file."""

    value: Value


@dataclass
class Record:
    """One tensor's line in the directory; the writer fills the last three fields."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # true: (length,) for a vector, (rows, columns) for a matrix
    offset: int = 0
    n_bytes: int = 0
    crc32: int = 0

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    def size(self) -> int:
        """Bytes of data that kind and shape need, padding included."""
        if len(self.shape) == 1:
            return 4 * self.rows
        return matrix_bytes(self.kind, self.rows, self.columns)

    def pack(self) -> bytes:
        return RECORD.pack(
            self.name.encode("ascii"), self.kind, len(self.shape), self.rows, self.columns,
            self.offset, self.n_bytes, self.crc32,
        )  # fmt: skip


def _align(n: int, to: int = ALIGN) -> int:
    return -(-n // to) * to


def _pack_meta(meta: Mapping[str, Value | Required]) -> bytes:
    out = bytearray()
    for key, entry in meta.items():
        flags, value = (1, entry.value) if isinstance(entry, Required) else (0, entry)
        name = key.encode("ascii", "replace")
        if not _good_key(key):
            raise LlamaError(f"meta key: expected 1 to 255 ASCII characters, found {key!r}")
        if isinstance(value, int):
            kind, data = 1, struct.pack("<q", value)
        elif isinstance(value, float):
            kind, data = 2, struct.pack("<d", value)
        elif isinstance(value, str):
            kind, data = 3, value.encode("utf-8", "replace")  # a directory's odd name
        else:
            kind, data = 4, bytes(value)
        out += META.pack(kind, flags, len(name), 0, len(data)) + name + data
        out += bytes(-len(out) % 8)
    return bytes(out)


class Writer:
    """Writes one .bin, tensors streamed in the order of RECORDS; a context manager.

    with Writer(path, config, records, tokenizer=(kind, data), meta={...}) as writer:
        for name, rows in ...:
            writer.write(name, rows)      # arrays to tile, or ready-made blocks

    The file gets its name when the block ends well; on any exception, Ctrl-C included, nothing
    is left. Raises LlamaError where the target exists and FORCE is false, where the disk is too
    small, and where the config cannot be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Config,
        records: Sequence[Record],
        *,
        tokenizer: tuple[TokenizerKind, bytes] = (TokenizerKind.NONE, b""),
        meta: Mapping[str, Value | Required] | None = None,
        force: bool = False,
    ) -> None:
        config.check()
        if (tokenizer[0] == TokenizerKind.NONE) != (not tokenizer[1]):
            raise ValueError(f"a tokenizer of kind {tokenizer[0]} with {len(tokenizer[1])} bytes")
        self.path = Path(path)
        self.temporary = temporary.name_of(self.path)
        self.config, self.records, self.tokenizer = config, list(records), tokenizer
        self.force = force
        self._entries = dict(meta or {})
        self._meta = _pack_meta(self._entries)
        self._file: BinaryIO | None = None
        self._next = self._rows = 0  # the current tensor, and its rows already written
        self._pending = bytearray()  # what waits for a whole LARGE_WRITE
        self._plan()

    def _plan(self) -> None:
        names = [record.name for record in self.records]
        if len(names) > MAX_TENSORS or len(set(names)) != len(names):
            raise LlamaError(f"{self.path}: tensor names must be unique, at most {MAX_TENSORS}")
        if len(self._entries) > MAX_META:
            raise LlamaError(f"{self.path}: at most {MAX_META} meta entries")
        self.header_bytes = end = _align(
            HEADER.size + RECORD.size * len(names) + len(self._meta) + len(self.tokenizer[1])
        )
        for record in self.records:
            if not 1 <= len(record.name.encode("ascii")) <= 63:
                raise LlamaError(f"{record.name}: a tensor name is 1 to 63 bytes long")
            if len(record.shape) == 1 and record.kind != Kind.F32:
                raise LlamaError(f"{record.name}: a vector must be f32, not {record.kind.label}")
            if record.kind.rotated and record.columns % GROUP:
                raise LlamaError(f"{record.name}: {record.columns} columns are no whole groups of "
                                 f"{GROUP} to rotate")  # fmt: skip
            record.offset, record.n_bytes, record.crc32 = end, record.size(), 0
            end = _align(end + record.n_bytes)
        self.file_bytes = end

    def __enter__(self) -> Writer:
        self.refuse_existing()
        temporary.remove_leftovers(self.path)
        free = _free_bytes(self.path.parent)
        if free < self.file_bytes:
            raise LlamaError(
                f"{self.path}: needs {self.file_bytes:,} bytes of disk, {free:,} are free"
            )
        try:
            self._file = open(self.temporary, "wb")
            temporary.hold(self._file.fileno())
            self._pending += bytes(self.header_bytes)  # the header itself is known at the end
        except OSError as error:
            raise LlamaError(f"{self.path}: cannot write: {error.strerror}") from None
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, chunk: Array | bytes | bytearray) -> None:
        """Writes the next rows of tensor NAME.

        An array is float32, float16 or uint16 (bf16): (rows, columns) of a float-kind matrix,
        or a vector's values. Bytes are whole strips of blocks, ready-made. Chunks but a
        tensor's last must be a multiple of 16 rows.
        """
        record = self.records[self._next]
        if record.name != name:
            raise ValueError(f"expected rows of {record.name}, got {name}")
        if isinstance(chunk, bytes | bytearray | memoryview):
            data: memoryview = memoryview(chunk).cast("B")
            per_strip = matrix_bytes(record.kind, TILE_ROWS, record.columns)
            strips, left = divmod(data.nbytes, per_strip)
            n = min(strips * TILE_ROWS, record.rows - self._rows)
            whole = left == 0 and strips == -(-n // TILE_ROWS)
        else:
            n = len(chunk)
            matrix = len(record.shape) == 2
            stored = tile(chunk, record.kind) if matrix else chunk.astype("<f4")
            data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
            whole = chunk.shape[1:] == record.shape[1:]
        last = self._rows + n == record.rows
        if not whole or n == 0 or self._rows + n > record.rows or (n % TILE_ROWS and not last):
            raise ValueError(f"{name}: a chunk of {n} rows after {self._rows} does not fit")
        record.crc32 = zlib.crc32(data, record.crc32)
        self._put(data)
        self._rows += n
        if last:
            self._next, self._rows = self._next + 1, 0
            self._put(bytes(-record.n_bytes % ALIGN))

    def set_text(self, key: str, text: str) -> None:
        """Changes a text entry, within the room it had from the start; the rest is spaces."""
        room = len(str(self._entries[key]).encode("utf-8"))
        n = len(text.encode("utf-8"))
        if n > room:
            raise ValueError(f"{key}: {n} bytes do not fit the {room} that were set aside")
        self._entries[key] = text + " " * (room - n)
        self._meta = _pack_meta(self._entries)

    def seal(self) -> None:
        """Makes the temporary file a whole .bin, so that it can be opened before it is named."""
        if self._next != len(self.records):
            raise ValueError(f"{self.records[self._next].name} was not written to its end")
        assert self._file is not None
        try:
            self._file.write(self._pending)
            self._pending.clear()
            self._file.seek(0)
            self._file.write(self._header())
            self._file.truncate(self.file_bytes)
            self._file.flush()
        except OSError as error:
            raise LlamaError(f"{self.path}: cannot write: {error.strerror}") from None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()

    def _put(self, data: memoryview | bytes) -> None:
        assert self._file is not None
        self._pending += data
        whole = len(self._pending) // LARGE_WRITE * LARGE_WRITE
        try:
            with memoryview(self._pending) as pending:
                self._file.write(pending[:whole])
        except OSError as error:
            raise LlamaError(f"{self.path}: cannot write: {error.strerror}") from None
        del self._pending[:whole]

    def refuse_existing(self) -> None:
        """LlamaError where the target may not be written over; entering asks too."""
        if self.path.is_dir():
            raise LlamaError(f"{self.path}: expected a file name, found a directory")
        if self.path.exists():
            if not self.path.is_file():  # renaming over /dev/null would take it from everybody
                raise LlamaError(f"{self.path}: is not a regular file")
            if not self.force:
                raise LlamaError(f"{self.path}: exists already; --force replaces it")

    def _finish(self) -> None:
        self.seal()
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
            self.refuse_existing()
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise LlamaError(f"{self.path}: cannot write: {error.strerror}") from None

    def _abandon(self) -> None:
        """Closes and removes the temporary file, unless it has its real name by now."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # a full disk fails here once more; it has been said already
        self.temporary.unlink(missing_ok=True)

    def _header(self) -> bytes:
        c = self.config
        records = b"".join(record.pack() for record in self.records)
        meta_offset = HEADER.size + len(records)
        tokenizer_kind, tokenizer = self.tokenizer
        numbers = [*c.rope_numbers, *[0.0] * (8 - len(c.rope_numbers))]
        eos = [*c.eos_ids, *[0] * (MAX_EOS - len(c.eos_ids))]
        flags = c.tied | c.attention_bias << 1 | c.mlp_bias << 2 | c.output_bias << 3
        head = HEADER.pack(
            MAGIC, VERSION, 0, self.header_bytes, self.file_bytes, len(self.records),
            len(self._entries), meta_offset, len(self._meta), meta_offset + len(self._meta),
            len(tokenizer), tokenizer_kind, flags, c.vocab_size, c.dim, c.hidden_dim,
            c.head_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.max_seq_len, c.norm_eps,
            c.rope_theta, c.rope_scaling, *numbers, -1 if c.bos_id is None else c.bos_id,
            len(c.eos_ids), *eos, c.head, c.n_labels,
        )  # fmt: skip
        whole = bytearray((head + records + self._meta + tokenizer).ljust(self.header_bytes, b"\0"))
        struct.pack_into("<I", whole, CRC_OFFSET, zlib.crc32(whole))
        return bytes(whole)


def _free_bytes(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError as error:
        raise LlamaError(f"{directory}: cannot write there: {error.strerror}") from None


class Tensors(Mapping[str, NDArray[np.float32]]):
    """Tensors by name, decoded to float32 of their true shape when asked for."""

    def __init__(self, file: File, records: dict[str, Record]) -> None:
        self._file, self._records = file, records

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        record = self._records[name]
        data = np.frombuffer(self._file.read(record.offset, record.n_bytes, name), np.uint8)
        if zlib.crc32(data.data) != record.crc32:
            raise LlamaError(f"{self._file.path}: {name}: checksum differs, the file is damaged")
        if len(record.shape) == 1:
            return data.view("<f4").astype(np.float32)
        return untile(data, record.kind, record.rows, record.columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True)
class Bin:
    """An open .bin: what `read` returns."""

    path: Path
    config: Config
    tokenizer: tuple[TokenizerKind, bytes]
    meta: dict[str, Value]
    records: dict[str, Record]
    tensors: Tensors = field(repr=False)


def read(path: str | os.PathLike[str]) -> Bin:
    """Opens a .bin and checks its header and directory; tensors decode when asked for.

    Raises LlamaError, one line, for anything that is not exactly such a file.
    """
    file = File(Path(path))
    try:
        return _parse(file)
    except (struct.error, UnicodeDecodeError) as error:
        raise LlamaError(f"{file.path}: damaged: {error}") from None


def _parse(file: File) -> Bin:
    path, size = file.path, file.size

    def demand(good: bool, what: str) -> None:
        if not good:
            raise LlamaError(f"{path}: {what}")

    demand(size >= HEADER.size, f"expected a .bin of {HEADER.size}+ bytes, found {size}")
    head = HEADER.unpack(file.read(0, HEADER.size, "the header"))
    (magic, version, crc, header_bytes, file_bytes, n_tensors, n_meta, meta_offset, meta_bytes,
     tokenizer_offset, tokenizer_bytes, tokenizer_kind, flags) = head[:13]  # fmt: skip
    demand(magic == MAGIC, f"not a .bin: expected {MAGIC.decode()} at its start")
    demand(version == VERSION, f"expected version {VERSION}, found {version}")
    demand(file_bytes == size, f"expected {file_bytes} bytes, found {size}")
    demand(header_bytes % ALIGN == 0 and header_bytes <= size, "header_bytes is impossible")
    demand(n_tensors <= MAX_TENSORS and n_meta <= MAX_META, "too many tensors or meta entries")
    meta_end = meta_offset + meta_bytes
    demand(
        meta_offset == HEADER.size + RECORD.size * n_tensors
        and meta_bytes % 8 == 0
        and tokenizer_offset == meta_end
        and header_bytes == _align(meta_end + tokenizer_bytes),
        "the header's sections do not follow each other",
    )
    front = bytearray(file.read(0, header_bytes, "the header"))
    struct.pack_into("<I", front, CRC_OFFSET, 0)
    demand(zlib.crc32(front) == crc, "header checksum differs, the file is damaged")
    demand(
        tokenizer_kind in set(TokenizerKind) and (tokenizer_kind == 0) == (tokenizer_bytes == 0),
        f"unknown tokenizer kind {tokenizer_kind} with {tokenizer_bytes} bytes",
    )
    demand(flags < 16, f"unknown flags {flags:#x}")
    config = _unpack_config(path, head[13:], flags)
    records = _unpack_records(path, front, n_tensors, header_bytes, file_bytes)
    found = {name: record.shape for name, record in records.items()}
    for name, shape in expected_tensors(config).items():
        demand(name in found, f"{name} is missing")
        demand(found[name] == shape, f"{name}: expected {shape}, found {found[name]}")
    meta = _unpack_meta(path, front[meta_offset:meta_end], n_meta)
    tokenizer = bytes(front[meta_end : meta_end + tokenizer_bytes])
    tensors = Tensors(file, records)
    return Bin(path, config, (TokenizerKind(tokenizer_kind), tokenizer), meta, records, tensors)


def _unpack_config(path: Path, values: tuple[Any, ...], flags: int) -> Config:
    (vocab_size, dim, hidden_dim, head_dim, n_layers, n_heads, n_kv_heads, max_seq_len,
     norm_eps, rope_theta, scaling) = values[:11]  # fmt: skip
    numbers, bos_id, n_eos, eos = values[11:19], values[19], values[20], values[21:29]
    head, n_labels = values[29:]
    if scaling not in set(Rope) or n_eos > MAX_EOS or head not in set(Head):
        raise LlamaError(
            f"{path}: unknown rope scaling {scaling} or head {head}, or too many eos ids {n_eos}"
        )
    count = ROPE_COUNTS[Rope(scaling)]
    config = Config(
        vocab_size, dim, hidden_dim, head_dim, n_layers, n_heads, n_kv_heads, max_seq_len,
        norm_eps, rope_theta, Rope(scaling), tuple(numbers[:count]), tied=bool(flags & 1),
        attention_bias=bool(flags & 2), mlp_bias=bool(flags & 4),
        bos_id=None if bos_id == -1 else bos_id, eos_ids=tuple(eos[:n_eos]), head=Head(head),
        n_labels=n_labels, output_bias=bool(flags & 8),
    )  # fmt: skip
    try:
        config.check()
    except LlamaError as error:
        raise LlamaError(f"{path}: {error}") from None
    return config


def _unpack_records(
    path: Path, front: bytearray, n_tensors: int, header_bytes: int, file_bytes: int
) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for i in range(n_tensors):
        raw, kind, n_dims, rows, columns, offset, size, crc = RECORD.unpack_from(
            front, HEADER.size + i * RECORD.size
        )
        name = raw.rstrip(b"\0").decode("ascii")
        if kind not in set(Kind):
            raise LlamaError(f"{path}: {name}: made by an older version, quantize again")
        shape = (rows, columns) if n_dims == 2 else (rows,)
        record = Record(name, Kind(kind), shape, offset, size, crc)
        fits = (
            n_dims in (1, 2)
            and (n_dims == 2 or (columns == 1 and kind == Kind.F32))
            and 1 <= rows <= 2**24
            and 1 <= columns <= 2**24
            and not (Kind(kind).rotated and columns % GROUP)
            and raw[-1] == 0
            and len(name) > 0
            and name not in records
            and size == record.size()
            and offset % ALIGN == 0
            and header_bytes <= offset <= file_bytes - size
        )
        if not fits:
            raise LlamaError(f"{path}: tensor record {i} ({name!r}) is impossible")
        records[name] = record
    _check_overlaps(path, records)
    return records


def _check_overlaps(path: Path, records: dict[str, Record]) -> None:
    end, before = 0, ""
    for record in sorted(records.values(), key=lambda record: record.offset):
        if record.offset < end:
            raise LlamaError(f"{path}: tensors {before} and {record.name} overlap")
        end, before = record.offset + record.n_bytes, record.name


def _unpack_meta(path: Path, section: bytearray, n_meta: int) -> dict[str, Value]:
    meta: dict[str, Value] = {}
    at = 0
    for i in range(n_meta):
        kind, flags, key_bytes, _, value_bytes = META.unpack_from(section, at)
        start = at + META.size + key_bytes
        end = start + value_bytes
        key = section[at + META.size : start].decode("ascii")
        if end > len(section) or not _good_key(key) or key in meta:
            raise LlamaError(f"{path}: meta entry {i} ({key[:64]!r}) is impossible")
        if flags & 1 and key not in UNDERSTOOD:
            raise LlamaError(f"{path}: needs {key!r}, which this version does not know")
        data = bytes(section[start:end])
        if kind in (1, 2):
            if value_bytes != 8:
                raise LlamaError(f"{path}: meta {key}: expected 8 bytes, found {value_bytes}")
            meta[key] = struct.unpack("<q" if kind == 1 else "<d", data)[0]
        elif kind in (3, 4):  # another kind is of a later version, and optional
            meta[key] = data.decode("utf-8", "replace") if kind == 3 else data
        at = _align(end, 8)
    if at != len(section):
        raise LlamaError(f"{path}: meta entries take {at} bytes, expected {len(section)}")
    return meta


def _good_key(key: str) -> bool:
    return 1 <= len(key) <= 255 and all("!" <= c <= "~" for c in key)
