"""A file of weights read in pieces, each when it is asked for: what is not there is an error.

A map would be as quick, but where the file is cut short under it, or its disk fails, the system
ends the process (SIGBUS); a read says so.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from llama.errors import LlamaError

AHEAD = 1 << 16  # bytes fetched for a smaller read: directories are read a number at a time
MOST = 1 << 30  # bytes asked of the system at once, which may give less


class File:
    """A file, open for as long as this is in use, by one thread; LlamaError where it cannot be
    read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
            weakref.finalize(self, file.close)
            self._handle = file.fileno()
            self.size = os.fstat(self._handle).st_size
        except OSError as error:
            raise LlamaError(f"{path}: cannot open: {error.strerror}") from None
        if self.size == 0:
            raise LlamaError(f"{path}: the file is empty")
        self._ahead, self._ahead_at = b"", 0

    def read(self, offset: int, size: int, what: str) -> bytes:
        """SIZE bytes from OFFSET; WHAT names them if the file is too short."""
        self.check(offset, size, what)
        if size >= AHEAD:
            return self._fetch(offset, size)
        at = offset - self._ahead_at
        if not 0 <= at <= len(self._ahead) - size:
            self._ahead = self._fetch(offset, min(AHEAD, self.size - offset))
            self._ahead_at, at = offset, 0
        return self._ahead[at : at + size]

    def check(self, offset: int, size: int, what: str) -> None:
        """Raises LlamaError unless bytes [offset, offset + size) are in the file."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise LlamaError(
                f"{self.path}: truncated: {what} needs bytes {offset} to {offset + size}, "
                f"the file has {self.size}"
            )

    def _fetch(self, offset: int, size: int) -> bytes:
        parts, end = [], offset + size
        while offset < end:
            try:
                parts.append(os.pread(self._handle, min(end - offset, MOST), offset))
            except OSError as error:
                raise LlamaError(f"{self.path}: cannot read: {error.strerror}") from None
            if not parts[-1]:
                raise LlamaError(
                    f"{self.path}: ends at byte {offset}, expected {self.size}: it was cut short "
                    "while it was read"
                )
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)
