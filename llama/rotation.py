"""Whether a model's weights are rotated before they become codes.

Rotated kinds (lib/quant.h) let inputs in 8 bits lose 3 to 5 times less, so that 8 bits are enough
for them and prompts take one integer pass instead of two. Weights as training leaves them lose
nothing by it; those that were 4-bit once lie on even steps, which rotation would take from them.
So each model is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.engine import Model
from llama.format import Record
from llama.quant import GROUP, TILE_ROWS, Kind, matrix_bytes

ROTATED = {Kind.Q8: Kind.Q8R, Kind.Q4: Kind.Q4R}
MOST = 1.05  # rotated rounding may cost this much of the plain one's squared error


def wanted(
    rotate: bool | None, model: Model, records: Sequence[Record], threads: int | None = None
) -> bool:
    """What quantize.py's --rotate asks for; None: what pays() says."""
    return pays(model, records, threads) if rotate is None else rotate


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


def pays(model: Model, records: Sequence[Record], threads: int | None = None) -> bool:
    """Whether the weights of MODEL, rounded as RECORDS say, lose about as little when rotated:
    the relative squared errors of all matrices, each by its first rows."""
    plain = turned = 0.0
    places = {tensor.name: i for i, tensor in enumerate(model.tensors)}
    for record in filter(takes, records):
        rows = min(TILE_ROWS, record.rows)
        one, other = (
            model.quantize(places[record.name], 0, rows, kind,
                           matrix_bytes(kind, rows, record.columns), threads)[1]
            for kind in (record.kind, ROTATED[record.kind])
        )  # fmt: skip
        if one.sum_squares > 0:
            plain += one.sum_squared_error / one.sum_squares
            turned += other.sum_squared_error / other.sum_squares
    return turned <= MOST * plain
