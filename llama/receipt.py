"""What a quantised file says of itself: what was done, and what that lost.

Stored as JSON in the file's meta, printed by quantize.py and run.py --info. docs/format.md lists
the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields

from llama.distance import Deviation, Distance
from llama.errors import LlamaError
from llama.plan import by_role, drawn
from llama.quant import LAYOUTS, TILE_ROWS, Kind

KEY = "quantize.receipt"
WORST = 5  # tensors that the printed receipt names


@dataclass
class Receipt:
    """Errors are by tensor, root mean squares over that of what should be."""

    source: str
    bits: int  # asked for; 0: a mixture
    bytes_before: int
    bytes_after: int
    bits_per_weight: float  # all of the file's tensor data, padding included
    errors: dict[str, float]  # of the weights
    distance: Distance | Deviation | None = None
    source_sha256: str = ""  # of the source's header, in which its tensors' checksums stand
    command: str = ""
    calibration: str = "none"  # the text's name
    calibration_tokens: int = 0
    held_out: Distance | Deviation | None = None  # from the source, on a part of that text
    outputs: dict[str, float] = field(default_factory=dict)  # errors of what matrices yield
    kinds: dict[str, str] = field(default_factory=dict)  # of the matrices: "q4"
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the matrices of each role
    losses: dict[str, float] = field(default_factory=dict)  # a mixture's, predicted, by tensor
    activations: int = 0  # bits, with which held_out and distance were measured
    rounding: Distance | Deviation | None = None  # the engine's own, from exact arithmetic

    @property
    def predicted(self) -> float:
        """The sum of a mixture's predicted losses."""
        return sum(self.losses.values())

    def lines(self) -> Iterator[str]:
        """For people."""
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        smaller = before >= after
        times = before / after if smaller else after / before
        yield (
            f"{before:,.1f} MB -> {after:,.1f} MB ({times:.2f} times "
            f"{'smaller' if smaller else 'larger'}), {self.bits_per_weight:.2f} bits a weight"
        )
        yield from self._table()
        worst = sorted(self.errors.items(), key=lambda entry: -entry[1])[:WORST]
        yield "largest: " + ", ".join(f"{name} {100 * error:.3f}%" for name, error in worst)
        if self.calibration_tokens:
            yield (
                f"calibrated with {self.calibration_tokens:,} tokens of {self.calibration}, which "
                "makes the weights' errors larger and those of the answers smaller"
            )
        for distance in (self.held_out, self.distance):
            if distance is not None:
                yield f"from the source: {distance}"
        if self.rounding is not None:
            yield (
                f"measured with --activations {self.activations}; the engine's own rounding "
                f"alone: {self.rounding}"
            )

    def _table(self) -> Iterator[str]:
        title = "relative errors (rms) by kind of tensor: of weights"
        title += ", of outputs on the calibration text" * bool(self.outputs)
        title += "; the KL divergence that it adds, as predicted" * bool(self.losses)
        yield title + "; kinds" * bool(self.kinds) + ", layer by layer" * bool(self.losses)
        for role, names in by_role([*self.errors]):
            cells = [f"  {role:<16}"]
            for errors in (self.errors, self.outputs):
                found = [errors[name] for name in names if name in errors]
                mean = f"{100 * sum(found) / len(found):.3f}%" if found else "-"
                cells += [f"{mean:>8}"] * bool(errors)
            if self.losses:
                cells.append(f"{sum(self.losses.get(name, 0) for name in names):9.1e}")
            if self.kinds:
                kinds = [self.kinds[name] for name in names]
                bits = sum(nominal_bits(kind) for kind in kinds) / len(kinds)
                cells.append(f"{self.sizes[role] / 1e6:9,.2f} MB {bits:6.2f} bits  {drawn(kinds)}")
            yield " ".join(cells)
        if self.losses:
            total = sum(self.sizes.values()) / 1e6
            cells = ["  all of it       ", *[" " * 8] * (1 + bool(self.outputs))]
            yield " ".join([*cells, f"{self.predicted:9.1e} {total:9,.2f} MB"])

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def nominal_bits(label: str) -> float:
    """A weight's bits in the kind called LABEL, padding apart."""
    layout = LAYOUTS[Kind[label.upper()]]
    return 8 * layout.block_bytes / (layout.columns * TILE_ROWS)


def room(names: Sequence[str], command: str) -> str:
    """Spaces in which the receipt of a file with these tensors will find room."""
    return " " * (4096 + 12 * len(command) + sum(4 * len(name) + 60 for name in names))


def read_receipt(text: object) -> Receipt:
    """The receipt in a file's meta, which may be anyone's; LlamaError if it is none."""
    try:
        entry = json.loads(str(text))
        names = {field.name for field in fields(Receipt)}  # a later version may say more
        receipt = Receipt(**{name: value for name, value in entry.items() if name in names})
        for name in ("distance", "held_out", "rounding"):
            if (found := getattr(receipt, name)) is not None:
                setattr(receipt, name, (Distance if "mean_kl" in found else Deviation)(**found))
        list(receipt.lines())
        return receipt
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError):
        raise LlamaError("quantize.receipt cannot be read") from None
