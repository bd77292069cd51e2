"""What happens when the context is full: the text stops, an error is raised, or the window slides.

Sliding keeps a text's first tokens, drops the oldest half of the rest and goes on (StreamingLLM,
arXiv:2309.17453). The first few are kept whatever they say: attention rests on them when nothing
else matters, and without them the text falls apart. Where a dialog's turns begin is known, the
window slides to the beginning of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llama.errors import LlamaError
from llama.sampling import whole_number

if TYPE_CHECKING:
    from llama.config import Config

POLICIES = ("stop", "slide", "error")
SINKS = 4  # first tokens kept, unless told otherwise


@dataclass(frozen=True)
class Overflow:
    """A policy and the context it is for. KEEP: first tokens that sliding never drops; None: 4, or
    what a dialog says before its first question; never more than half of the context."""

    policy: str
    size: int
    keep: int | None = None
    whole: bool = False  # nothing of the text may be dropped

    def for_whole(self, size: int | None = None) -> Overflow:
        """For a text that must stay whole, in SIZE tokens, if that is less: it stops instead of
        sliding."""
        policy = "stop" if self.policy == "slide" else self.policy
        return replace(self, policy=policy, size=min(self.size, size or self.size), whole=True)

    @classmethod
    def checked(cls, policy: str, keep: int | None, config: Config, size: int) -> Overflow:
        """The policy for a context of SIZE tokens; LlamaError where it cannot be."""
        if policy not in POLICIES:
            raise LlamaError(f"overflow must be {', '.join(POLICIES)}, found {policy!r}")
        if keep is not None:
            keep = whole_number("keep", keep, 0, size // 2)
        if policy == "slide" and not slides(config, size):
            raise LlamaError(
                f"overflow 'slide' takes a context of at most {config.rope_numbers[1]:.0f} tokens, "
                f"found {size}: beyond, this model's dynamic rope scaling turns keys by bases of "
                "their own"
            )
        return cls(policy, size, keep)


def slides(config: Config, size: int) -> bool:
    """Whether stored keys can be turned to other positions: all of one set of frequencies."""
    return not config.rope_length(size)


class Window:
    """The part of one text that its context holds: the first `keep` tokens and the latest ones."""

    def __init__(
        self, overflow: Overflow, starts: Callable[[], Sequence[int]] | None = None
    ) -> None:
        """STARTS gives where the dialog's questions begin, the first one being what is kept; it is
        asked only when something must go."""
        self.overflow = overflow
        self.dropped = 0  # tokens that the text has lost,
        self.slid = 0  # and how many of them had been computed
        self._ask = starts
        self._keep: int | None = None
        self._starts: list[int] = []

    def twin(self) -> Window:
        return Window(self.overflow, self._ask)

    def fit(self, prompt: Sequence[int]) -> list[int]:
        """PROMPT, or what of it the context holds, as if the window had slid over it; LlamaError
        where that is not allowed."""
        ids, size = list(prompt), self.overflow.size
        if len(ids) > size and self.overflow.policy != "slide":
            slide = ", overflow slide drops what does not fit" * (not self.overflow.whole)
            raise LlamaError(
                f"the prompt has {len(ids)} tokens and the context holds {size}: max_seq_len makes "
                f"it longer{slide}"
            )
        while len(ids) > size:
            first, count = self._advance(len(ids))
            del ids[first : first + count]
        return ids

    def limit(self, prompt: int, max_tokens: int | None) -> int | None:
        """How many tokens may follow PROMPT of them; None: as many as it likes."""
        if self.overflow.policy == "slide":
            return max_tokens
        room = self.overflow.size - prompt
        return room if max_tokens is None else min(room, max_tokens)

    def refuse_end(self) -> None:
        """Raises where the context's end is an error."""
        if self.overflow.policy == "error":
            slide = ", slide drops its oldest tokens" * (not self.overflow.whole)
            raise LlamaError(
                f"the context of {self.overflow.size} tokens is full: max_seq_len makes it longer, "
                f"overflow stop ends the text there{slide}"
            )

    def slide(self, length: int) -> tuple[int, int]:
        """Of LENGTH tokens in the context, (the first to drop, how many)."""
        first, count = self._advance(length)
        self.slid += count
        return first, count

    def _advance(self, length: int) -> tuple[int, int]:
        keep = self._kept()
        rest = length - keep
        count = (rest + 1) // 2
        # the turn that begins next; else the last one, if that frees enough
        turns = [start - keep for start in self._starts if rest // 4 <= start - keep < rest]
        if turns:
            count = next((start for start in turns if start >= count), turns[-1])
        self._starts = [start - count for start in self._starts if start > keep + count]
        self.dropped += count
        return keep, count

    def _kept(self) -> int:
        if self._keep is None:
            keep, self._starts = SINKS, []
            if self._ask is not None:
                keep, *self._starts = self._ask()
            if self.overflow.keep is not None:
                keep = self.overflow.keep
            self._keep = min(keep, self.overflow.size // 2)
        return self._keep
