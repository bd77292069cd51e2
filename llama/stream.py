"""The text of one completion while it is being made.

A Stream is pulled: each step of it is a forward pass, of its own completion alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama.batch import Batches
from llama.completion import Job, Result


class Stream(Iterator[str]):
    """The text of one completion as it comes: whole characters only, nothing of a stop string.
    The pieces joined are what generate() would have returned as text."""

    def __init__(self, batches: Batches, job: Job) -> None:
        self._job = job
        self._steps = batches.run([job])

    def __next__(self) -> str:
        for _, text in self._steps:
            if text:
                return text
        raise StopIteration

    @property
    def text(self) -> str:
        """All text so far."""
        return self._job.text

    @property
    def result(self) -> Result | None:
        """The completion, once the stream has ended."""
        return self._job.result

    def cancel(self) -> None:
        """Ends the stream at its next step; may be called from a signal handler or a thread."""
        self._job.cancelled = True

    def close(self) -> None:
        """Gives the sequence back at once; a stream that is dropped does so too."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()
