"""A conversation in a file: its messages, and the keys and values of its tokens.

docs/session.md draws the file. It belongs to one model, told by its fingerprint, and holds numbers
and JSON, nothing that could run. Nothing in it is believed before it is checked; a new file takes
an old one's name only when it is whole.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llama.errors import LlamaError
from llama.quant import Kind
from llama.templates import check_messages
from llama.temporary import hold, name_of, remove_leftovers

if TYPE_CHECKING:
    from llama.engine import Engine

MAGIC, VERSION = b"LlamaSes", 1
# magic, version, kv kind, model, activations, rope length, tokens, text bytes, position bytes,
# file bytes
HEADER = struct.Struct("<8sII32sIIIIQQ")
CRC = struct.Struct("<I")
MAX_TEXT, MAX_TOKENS = 1 << 26, 1 << 24
PART = 1 << 24  # bytes of keys and values handled at once


def check(messages: Any) -> list[dict[str, str]]:
    """MESSAGES as a session may hold them: a dialog, or its system message alone, or nothing."""
    if messages != []:
        several = isinstance(messages, (list, tuple))
        question = {"role": "user", "content": ""}  # a system message may stand alone here
        check_messages([*messages, question] if several and len(messages) == 1 else messages)
    found = [dict(message) for message in messages]
    try:
        "".join(message["content"] for message in found).encode("utf-8")
    except UnicodeEncodeError:
        raise LlamaError("messages: a text holds half of a surrogate pair") from None
    return found


def save(
    path: Path, engine: Engine, messages: Sequence[Mapping[str, str]],
    tokens: Sequence[int] = (), sequence: int = 0, rope_length: int = 0,
) -> None:  # fmt: skip
    """Writes MESSAGES, and with them TOKENS, the first ones of SEQUENCE, and their keys and values,
    computed for ROPE_LENGTH; LlamaError if the file cannot be written."""
    info = engine.info()
    text = json.dumps({"messages": check(messages)}, ensure_ascii=False).encode("utf-8")
    if len(text) > MAX_TEXT:
        raise LlamaError(f"{path}: a session holds {MAX_TEXT} bytes of text, found {len(text)}")
    size = info.kv_bytes_per_position
    total = HEADER.size + len(text) + (4 + size) * len(tokens) + CRC.size
    head = HEADER.pack(
        MAGIC, VERSION, int(Kind[info.kv_kind.upper()]), engine.model.fingerprint,
        info.activations, rope_length, len(tokens), len(text), size, total,
    )  # fmt: skip
    with _replacing(path) as file:
        crc = 0
        for part in (head, text, np.array(tokens, "<i4").tobytes()):
            file.write(part)
            crc = zlib.crc32(part, crc)
        for start, count in _parts(len(tokens), size):
            kv = engine.read_kv(sequence, start, count)
            file.write(kv)
            crc = zlib.crc32(kv, crc)
        file.write(CRC.pack(crc))


class Saved:
    """A session's file, open and checked but for the keys and values. A context manager."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path, self._engine = path, engine
        try:
            if path.exists() and not path.is_file():
                raise LlamaError(f"{path}: is not a regular file")
            self._file = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise LlamaError(f"{path}: cannot open: {error.strerror}") from None
        try:
            self._crc = 0
            n, text_bytes = self._read_header(os.fstat(self._file.fileno()).st_size)
            self.messages = self._read_text(text_bytes)
            ids = np.frombuffer(self._read(4 * n), "<i4")
            self._demand(bool(((ids >= 0) & (ids < engine.config.vocab_size)).all()))
            self._tokens: list[int] = ids.tolist()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def restore(self, sequence: int) -> list[int]:
        """Gives the empty SEQUENCE the keys and values, as many as its context holds; their
        tokens. A damaged file leaves it empty."""
        kept = min(len(self._tokens), self._engine.max_seq_len)
        try:
            for start, count in _parts(len(self._tokens), self._position_bytes):
                kv = self._read(count * self._position_bytes)
                fits = min(count, kept - start)
                if fits > 0:
                    self._engine.write_kv(sequence, start, fits, kv[: fits * self._position_bytes])
            crc = self._crc
            self._demand(self._read(CRC.size) == CRC.pack(crc))
        except BaseException:
            self._engine.trim(sequence, 0)
            raise
        return self._tokens[:kept]

    def _read_header(self, size: int) -> tuple[int, int]:
        """How many tokens and bytes of text follow."""
        path, info = self._path, self._engine.info()
        if size < HEADER.size:
            raise LlamaError(f"{path}: not a session: {size} bytes, expected {HEADER.size} or more")
        (magic, version, kind, model, activations, self.rope_length, n, text_bytes, position_bytes,
         total) = HEADER.unpack(self._read(HEADER.size))  # fmt: skip
        self._position_bytes = int(position_bytes)
        if magic != MAGIC:
            raise LlamaError(f"{path}: not a session: expected {MAGIC.decode()} at its start")
        if version != VERSION:
            raise LlamaError(f"{path}: expected session version {VERSION}, found {version}")
        if total != size:
            problem = "cut short" if size < total else "too long"
            raise LlamaError(f"{path}: {problem}: expected {total} bytes, found {size}")
        if model != self._engine.model.fingerprint:
            raise LlamaError(f"{path}: this session is another model's")
        if kind != Kind[info.kv_kind.upper()]:
            found = Kind(kind).label if kind in (Kind.F32, Kind.F16) else kind
            raise LlamaError(f"{path}: its keys and values are {found}, expected {info.kv_kind}: "
                             "--kv (kv) sets that")  # fmt: skip
        if activations != info.activations:
            raise LlamaError(f"{path}: it was computed with {activations}-bit activations, "
                             f"expected {info.activations}: --activations sets that")  # fmt: skip
        self._demand(
            n <= MAX_TOKENS and text_bytes <= MAX_TEXT
            and position_bytes == info.kv_bytes_per_position
            and total == HEADER.size + text_bytes + (4 + position_bytes) * n + CRC.size
        )  # fmt: skip
        return n, text_bytes

    def _read_text(self, n_bytes: int) -> list[dict[str, str]]:
        text = self._read(n_bytes)
        try:
            entry = json.loads(text.decode("utf-8"))
            self._demand(isinstance(entry, dict) and isinstance(entry.get("messages"), list))
            return check(entry["messages"])
        except (ValueError, RecursionError, LlamaError) as error:
            raise LlamaError(f"{self._path}: its messages cannot be read: {error}") from None

    def _read(self, n: int) -> bytes:
        try:
            data = self._file.read(n)
        except OSError as error:
            raise LlamaError(f"{self._path}: cannot read: {error.strerror}") from None
        self._demand(len(data) == n)
        self._crc = zlib.crc32(data, self._crc)
        return data

    def _demand(self, good: bool) -> None:
        if not good:
            raise LlamaError(f"{self._path}: damaged")


def _parts(n: int, position_bytes: int) -> Iterator[tuple[int, int]]:
    """N positions as (first, count) of about PART bytes."""
    step = max(1, PART // position_bytes)
    for start in range(0, n, step):
        yield start, min(step, n - start)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes PATH's place at the end, if all went well. Nobody else may read it:
    it holds what was said."""
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise LlamaError(f"{path}: is not a regular file")
        remove_leftovers(target)
        prefix = f"{name_of(target).name}-"
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=prefix)
        with os.fdopen(handle, "wb") as file:
            hold(handle)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
            temporary = None
    except OSError as error:
        raise LlamaError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
