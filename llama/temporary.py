"""What a file is called until it is whole: NAME.tmp-PID, beside the name that it will have.

A program that is killed leaves such a file, and nobody else knows whether it still grows: process
ids begin anew with each container and machine that share a folder. So who writes one holds a lock
on it, which the system takes away with the process; one without a lock is a leftover, and the next
to write that name removes it.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # no such locks on this system: leftovers stay
    flock = None  # type: ignore[assignment]


def name_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def hold(descriptor: int) -> None:
    """Keeps the open file from being taken for a leftover, until it is closed."""
    if flock is not None:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except OSError:
            pass  # a file system without locks, where remove_leftovers cannot take one either


def remove_leftovers(path: Path) -> None:
    """Removes what dead processes left of PATH, as far as that can be known and done."""
    if flock is None:
        return
    form = re.compile(re.escape(path.name) + r"\.tmp-\d+(-\w{8})?")
    try:
        names = [name for name in os.listdir(path.parent) if form.fullmatch(name)]
    except OSError:
        return
    for name in names:
        try:
            _remove_if_left(path.with_name(name))
        except OSError:
            pass  # in use, somebody else's, or gone


def _remove_if_left(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            flock(descriptor, LOCK_EX | LOCK_NB)
            path.unlink()
    finally:
        os.close(descriptor)
