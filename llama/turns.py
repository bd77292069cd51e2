"""A lock that is fair: forward passes of several threads take turns by it."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that threads get in the order in which they asked. A plain Lock would let a thread
    that steps in a loop take it again before the next in line wakes up."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._line: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._line.append(mine)
        try:
            mine.wait()
        except BaseException:
            with self._mutex:
                waiting = mine in self._line
                if waiting:
                    self._line.remove(mine)
            if not waiting:  # it was handed over just now: hand it on
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._line:
                self._line.popleft().set()
            else:
                self._held = False
