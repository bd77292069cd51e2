"""What a model takes of this machine's memory, set against what is free before any of it is taken.

Keys, values and scratch must fit: pages of the KV cache are taken as texts grow, and a system that
has promised more than it has ends the process in the middle of one. Weights are mapped: what does
not fit is read from the file again, slowly, and that is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama.errors import LlamaError


@dataclass(frozen=True)
class Free:
    """Bytes that this process can still take, and who says so."""

    bytes: int
    whose: str  # "this machine", "the control group /user"


@dataclass(frozen=True)
class Plan:
    """What a session takes; sizes in bytes. FREE None: the system does not say."""

    weights: int
    scratch: int
    max_seq_len: int
    page_positions: int
    kv_bytes_per_position: int
    free: Free | None

    @property
    def kv(self) -> int:
        """Of one sequence as long as the context; more of them share what is there."""
        pages = -(-self.max_seq_len // self.page_positions)
        return pages * self.page_positions * self.kv_bytes_per_position

    @property
    def longest(self) -> int:
        """The longest context that fits, of max_seq_len at most; 0: none."""
        if self.free is None:
            return self.max_seq_len
        page = self.page_positions * self.kv_bytes_per_position
        pages = max(0, self.free.bytes - self.scratch) // page
        return min(pages * self.page_positions, self.max_seq_len)

    @property
    def refusal(self) -> str | None:
        """Why it cannot run, if it cannot."""
        if self.free is None or self.scratch + self.kv <= self.free.bytes:
            return None
        fits = f"the longest context that fits is {self.longest} (--max-seq-len)"
        return (
            f"keys and values of {self.max_seq_len} tokens, {size(self.kv)}, and scratch, "
            f"{size(self.scratch)}, do not fit the {size(self.free.bytes)} that "
            f"{self.free.whose} has free: {fits if self.longest else 'no context fits'}"
        )

    @property
    def warning(self) -> str | None:
        """What will be slow, if anything."""
        if self.free is None or self.weights <= self.free.bytes:
            return None
        return (
            f"weights of {size(self.weights)} do not fit the {size(self.free.bytes)} that "
            f"{self.free.whose} has free: what is missing is read from the file for each token"
        )

    def check(self) -> None:
        """LlamaError where it cannot run."""
        if self.refusal is not None:
            raise LlamaError(self.refusal)

    @property
    def shortened(self) -> str | None:
        """Why a context that nobody asked for becomes the longest that fits, if it does."""
        if self.free is None or self.refusal is None or not self.longest:
            return None
        return (
            f"the model's context of {self.max_seq_len} tokens would take {size(self.kv)} of the "
            f"{size(self.free.bytes)} that {self.free.whose} has free: it is {self.longest} here"
        )

    def line(self) -> str:
        """For a person."""
        free = f"{size(self.free.bytes)} free, says {self.free.whose}" if self.free else "unknown"
        return (
            f"weights {size(self.weights)}, mapped; keys and values {size(self.kv)} for "
            f"{self.max_seq_len} tokens; scratch {size(self.scratch)}; {free}"
        )


def size(n_bytes: int) -> str:
    """N_BYTES for a person: "4.5 GB"."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def free(root: Path = Path("/")) -> Free | None:
    """What the machine and this process's control groups leave, the least of them; None where the
    system does not say. ROOT is where proc and sys are."""
    found = [*_machine(root), *_groups(root)]
    return min(found, key=lambda one: one.bytes, default=None)


def _machine(root: Path) -> Iterator[Free]:
    available = _table(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        yield Free(available * 1024, "this machine")
        return
    try:  # a system without /proc: all of its memory is a bound, if a loose one
        yield Free(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine")
    except (AttributeError, ValueError, OSError):
        return


def _groups(root: Path) -> Iterator[Free]:
    """Of both versions of cgroups: each group that this process is in, up to the outermost one that
    can be seen. What a group holds of files counts as free, since it is let go for others."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            tops, names = [mounts, mounts / "unified"], ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            tops = [mounts / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for top in tops:
            # a container may see its own group as the top, under a path that is not there
            groups = [top / path.strip("/"), *(top / path.strip("/")).parents]
            for group in groups[: groups.index(top) + 1]:
                yield from _group(group, top, *names)


def _group(group: Path, top: Path, most: str, now: str, prefix: str) -> Iterator[Free]:
    limit, used = _number(group / most), _number(group / now)
    if limit is None or used is None:
        return
    held = _table(group / "memory.stat")
    files = sum(held.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
    name = "/" + str(group.relative_to(top)).removeprefix(".")
    yield Free(max(0, limit - max(0, used - files)), f"the control group {name}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    words = [line.split() for line in _lines(path)]
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def _number(path: Path) -> int | None:
    """None where there is none; "max" is no number either."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
