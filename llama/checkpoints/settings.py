"""A JSON file of settings, each looked up by name with its type checked.

null counts as absent, as it does for the programs that write these files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama.errors import LlamaError

LARGEST = 64 << 20


class Settings:
    """Settings by name; PATH is for messages."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path, *, needed: bool = True) -> Settings:
        """The settings in the file at PATH; where NEEDED is false, none if there is no file."""
        if not needed and not path.is_file():
            return cls(path, {})
        try:
            if path.stat().st_size > LARGEST:
                raise LlamaError(f"{path}: expected a small JSON file")
            raw = path.read_bytes()
            found = json.loads(raw)
            if b"\\ud" in raw.lower():  # half a surrogate pair is no text
                json.dumps(found, ensure_ascii=False).encode()
        except OSError as error:
            raise LlamaError(f"{path}: cannot read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise LlamaError(f"{path}: expected JSON: {error}") from None
        if not isinstance(found, dict):
            raise LlamaError(f"{path}: expected a JSON object")
        return cls(path, found)

    def inside(self, key: str) -> Settings:
        """The settings of a nested object, none if it is absent."""
        return Settings(self.path, self._get(key, dict, "an object", {}))

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        return int(self._within(key, 1 << 63, self._get(key, int, "a whole number", default)))

    def real(self, key: str, default: float | None = None) -> float:
        return float(
            self._within(key, 1 << 127, self._get(key, (int, float), "a number", default))
        )

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, bool, "true or false", default))

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, str, "a text", default))

    def _within(self, key: str, limit: int, value: Any) -> Any:
        if not -limit < value < limit:  # NaN is not
            found = repr(value) if isinstance(value, float) else f"one of {value.bit_length()} bits"
            raise LlamaError(f"{self.path}: {key}: expected a number in range, found {found}")
        return value

    def _get(self, key: str, kind: type | tuple[type, ...], what: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "nothing" if value is None else repr(value)[:40]
            raise LlamaError(f"{self.path}: {key}: expected {what}, found {found}")
        return value
