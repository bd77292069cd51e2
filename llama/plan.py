"""Which matrix gets how many bits: the arithmetic, without a model.

Each tensor has a few options, each with its bytes and what it adds to the answers' loss; losses
are taken to add up. One option of each is to be chosen so that the file keeps to a size and loses
least, or keeps to a loss and is smallest: a multiple-choice knapsack. Sizes of matrices are
multiples of a large number, so dynamic programming over bytes solves it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama.errors import LlamaError
from llama.quant import Kind

MOST_STEPS = 1 << 18  # of bytes; sizes with no common step so large are rounded up to it
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """A way to store one tensor."""

    kind: Kind
    bytes: int
    loss: float  # nats of KL divergence; of other heads a squared relative error


def useful(options: Sequence[Option]) -> list[Option]:
    """Of one tensor's OPTIONS those for which none as small loses as little, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


class Frontier:
    """The best choices among each tensor's OPTIONS, for every size and every loss."""

    def __init__(self, options: Sequence[Sequence[Option]]) -> None:
        self.options = [useful(few) for few in options]
        self.least_bytes = sum(few[0].bytes for few in self.options)
        self.most_bytes = sum(few[-1].bytes for few in self.options)
        self.least_loss = sum(few[-1].loss for few in self.options)
        extra = [[option.bytes - few[0].bytes for option in few] for few in self.options]
        whole = self.most_bytes - self.least_bytes
        common = math.gcd(*(size for sizes in extra for size in sizes)) or 1
        self._step = max(common, -(-whole // MOST_STEPS))
        n = sum(-(-sizes[-1] // self._step) for sizes in extra) + 1
        self._loss = np.zeros(n)  # the least within so many steps above least_bytes
        self._chosen = np.zeros((len(self.options), n), np.uint8)
        for chosen, few, sizes in zip(self._chosen, self.options, extra, strict=True):
            before = self._loss
            self._loss = before + few[0].loss
            for number in range(1, len(few)):
                steps = -(-sizes[number] // self._step)
                with_it = before[: n - steps] + few[number].loss
                better = with_it < self._loss[steps:]
                self._loss[steps:][better] = with_it[better]
                chosen[steps:][better] = number

    def within(self, n_bytes: int) -> list[Option]:
        """An option for each tensor, least in loss, of N_BYTES at most (at least least_bytes)."""
        steps = (n_bytes - self.least_bytes) // self._step
        found = self._trace(min(steps, len(self._loss) - 1))
        left = n_bytes - sum(option.bytes for option in found)
        while True:  # where sizes were rounded up, what that left over
            better = [
                (now.loss - more.loss, -i, more)
                for i, (few, now) in enumerate(zip(self.options, found, strict=True))
                for more in few[few.index(now) + 1 :]
                if more.bytes - now.bytes <= left
            ]
            if not better:
                return found
            _, i, more = max(better, key=lambda entry: entry[:2])
            left -= more.bytes - found[-i].bytes
            found[-i] = more

    def below(self, loss: float) -> list[Option]:
        """The smallest choice that loses at most LOSS; where none does, what loses least."""
        enough = np.flatnonzero(self._loss <= loss)
        return self._trace(int(enough[0]) if len(enough) else len(self._loss) - 1)

    def _trace(self, at: int) -> list[Option]:
        # the smallest size that is as good
        at = int(np.flatnonzero(self._loss[: at + 1] == self._loss[at])[0])
        found: list[Option] = []
        for few, chosen in zip(self.options[::-1], self._chosen[::-1], strict=True):
            option = few[chosen[at]]
            found.append(option)
            at -= -(-(option.bytes - few[0].bytes) // self._step)
        return found[::-1]


def read_size(text: str) -> int:
    """Bytes in "3.9GB", "700 MiB", "123456": GB are 10^9 bytes, GiB 2^30. LlamaError."""
    number = text.strip().rstrip("bBkKmMgGtTiI").rstrip()
    unit = UNITS.get(text.strip()[len(number) :].strip().upper())
    try:
        size = float(number) * unit if unit else math.nan
    except ValueError:
        size = math.nan
    if not 1 <= size <= 2**60:
        raise LlamaError(f"--size is {text!r}, expected a size such as 3.9GB, 700MiB or 123456789")
    return int(size)


# ---- for people


def role(name: str) -> str:
    """What a tensor does: "attention.wq", "output"."""
    return ".".join(p for p in name.split(".")[:-1] if p != "layers" and not p.isdigit())


def drawn(labels: Sequence[str]) -> str:
    """The kinds of one role's matrices, one sign a layer where they differ: "844444f"."""
    if len(set(labels)) == 1:
        return labels[0]
    signs = {"q4": "4", "q4r": "4", "q4e": "4", "q8": "8", "q8r": "8", "f16": "f", "bf16": "b"}
    return "".join(signs.get(label, "F") for label in labels)


def by_role(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """NAMES of each role, in the order in which roles come."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(role(name), []).append(name)
    yield from groups.items()
