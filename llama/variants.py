"""Which variant of a kind suits a model's weights: found by rounding their first rows in each.

Rotated kinds (q8r, q4r; lib/quant.h) let inputs in 8 bits lose 3 to 5 times less, so that 8 bits
are enough for them and prompts take one integer pass instead of two. Weights as training leaves
them lose nothing by it; those that were 4-bit once, on even steps, would lose those steps.
Such weights are met again by 4 bits of even levels (q4e), where uneven ones (q4) suit all others.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.engine import Model
from llama.format import Record
from llama.quant import GROUP, TILE_ROWS, Kind, matrix_bytes

ROTATED = {Kind.Q8: Kind.Q8R, Kind.Q4: Kind.Q4R}
MOST = 1.05  # rotated rounding may cost this much of the plain one's squared error
LEAST = 0.5  # even levels must leave less than this of the uneven ones' squared error


def suited(
    rotate: bool | None, model: Model, records: Sequence[Record], threads: int | None = None
) -> list[Record]:
    """RECORDS of f32, f16, q8 and q4 with the variants that suit MODEL's weights. ROTATE:
    quantize.py's --rotate; None: where it pays, and no matrix of a layer has even levels, for the
    matrices of a layer share inputs, which are turned for all of them."""
    losses = Losses(model, threads)
    if not rotate:
        records = levelled(losses, records)
    if rotate is None:
        even = any(r.kind == Kind.Q4E and r.name.startswith("layers.") for r in records)
        rotate = not even and pays(losses, records)
    return rotated(records) if rotate else list(records)


def levelled(losses: Losses, records: Sequence[Record]) -> list[Record]:
    """RECORDS with even levels for the matrices that lie on such."""
    return [
        Record(r.name, Kind.Q4E, r.shape)
        if r.kind == Kind.Q4 and losses.of(r, Kind.Q4E) < LEAST * losses.of(r, Kind.Q4)
        else r
        for r in records
    ]  # fmt: skip


def rotated(records: Sequence[Record]) -> list[Record]:
    """RECORDS with the layers' quantised matrices of rotated kinds, where they can be."""
    return [
        Record(r.name, ROTATED[r.kind] if takes(r) else r.kind, r.shape) for r in records
    ]  # fmt: skip


def takes(record: Record) -> bool:
    """Whether a rotated kind can take the place of RECORD's. Not the embedding's nor the head's:
    the head's inputs have 16 bits always, as they cost nothing there."""
    whole = record.columns % GROUP == 0
    return record.kind in ROTATED and whole and record.name.startswith("layers.")


def pays(losses: Losses, records: Sequence[Record]) -> bool:
    """Whether the weights, rounded as RECORDS say, lose about as little when rotated: all matrices'
    losses together."""
    could = [record for record in records if takes(record)]
    turned = sum(losses.of(record, ROTATED[record.kind]) for record in could)
    return turned <= MOST * sum(losses.of(record, record.kind) for record in could)


class Losses:
    """What the first rows of MODEL's matrices lose, each kind tried once."""

    def __init__(self, model: Model, threads: int | None) -> None:
        self.model, self.threads = model, threads
        self._places = {tensor.name: i for i, tensor in enumerate(model.tensors)}
        self._known: dict[tuple[str, Kind], float] = {}

    def of(self, record: Record, kind: Kind) -> float:
        """The squared error of RECORD's weights in KIND, relative to their squares."""
        if (record.name, kind) not in self._known:
            self._known[record.name, kind] = self._measure(record, kind)
        return self._known[record.name, kind]

    def _measure(self, record: Record, kind: Kind) -> float:
        rows = min(TILE_ROWS, record.rows)
        size = matrix_bytes(kind, rows, record.columns)
        place = self._places[record.name]
        loss = self.model.quantize(place, 0, rows, kind, size, self.threads)[1]
        return loss.sum_squared_error / loss.sum_squares if loss.sum_squares > 0 else 0.0
