"""A .bin becomes a smaller .bin, with a receipt of what it lost: the whole of quantize.py.

The C library encodes a few million weights at a time on all cores, the Writer streams them out,
and memory does not grow with the model. Norms stay f32. With 4 bits the embedding and output
matrices keep 8: they are read once a token or feed the logits directly, and hurt most. A head of
labels, tiny, stays as it is.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llama import golden
from llama.cli import say
from llama.distance import Deviation, Distance, measure
from llama.engine import Loss, Model, Tensor
from llama.errors import LlamaError
from llama.format import Head, Record, TokenizerKind, Writer
from llama.quant import TILE_ROWS, Kind, matrix_bytes

BITS = {8: Kind.Q8, 4: Kind.Q4, 32: Kind.F32}  # 32: what the weights stand for, as floats
KEEP_8_BITS = ("tok_embeddings.weight", "output.weight")
CHUNK_BYTES = 1 << 24  # of weights as float32
WORST = 5  # tensors that the printed receipt names


@dataclass
class Receipt:
    """What a quantised file says of itself; stored as JSON under quantize.receipt."""

    source: str
    bits: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float  # all of the file's tensor data, padding included
    errors: dict[str, float]  # by tensor: root mean square of the error over that of the weights
    distance: Distance | Deviation | None = None

    def by_role(self) -> dict[str, float]:
        """The errors' means by what the tensors do: "attention.wq", "output"."""
        groups: dict[str, list[float]] = defaultdict(list)
        for name, error in self.errors.items():
            groups[".".join(p for p in name.split(".")[:-1] if p != "layers" and not p.isdigit())
                   ].append(error)  # fmt: skip
        return {role: sum(errors) / len(errors) for role, errors in groups.items()}

    def lines(self) -> Iterator[str]:
        """For people."""
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        smaller = before >= after
        times = before / after if smaller else after / before
        yield (
            f"{before:,.1f} MB -> {after:,.1f} MB ({times:.2f} times "
            f"{'smaller' if smaller else 'larger'}), {self.bits_per_weight:.2f} bits a weight"
        )
        yield "relative error of the weights (rms), by kind of tensor:"
        for role, error in self.by_role().items():
            yield f"  {role:<20} {100 * error:6.3f}%"
        worst = sorted(self.errors.items(), key=lambda entry: -entry[1])[:WORST]
        yield "largest: " + ", ".join(f"{name} {100 * error:.3f}%" for name, error in worst)
        if self.distance is not None:
            yield f"from the source: {self.distance}"

    def text(self) -> str:
        return json.dumps(asdict(self))


def read_receipt(text: object) -> Receipt:
    """The receipt in a file's meta, which may be anyone's; LlamaError if it is none."""
    try:
        entry = json.loads(str(text))
        names = {field.name for field in fields(Receipt)}  # a later version may say more
        receipt = Receipt(**{name: value for name, value in entry.items() if name in names})
        if receipt.distance is not None:
            kind = Distance if "mean_kl" in entry["distance"] else Deviation
            receipt.distance = kind(**entry["distance"])
        list(receipt.lines())
        return receipt
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise LlamaError("quantize.receipt cannot be read") from None


def plan(tensors: list[Tensor], bits: int, head: Head = Head.LM) -> list[Record]:
    """The kind each tensor of a model with HEAD will have."""
    records = []
    for tensor in tensors:
        kind = Kind.F32
        if len(tensor.shape) == 2:
            kind = Kind.Q8 if bits == 4 and tensor.name in KEEP_8_BITS else BITS[bits]
            labels = tensor.name == "output.weight" and head >= Head.SEQUENCE
            smaller = matrix_bytes(kind, *tensor.shape) < tensor.bytes
            if bits < 32 and (labels or not smaller):
                kind = tensor.kind  # it is as small already
        records.append(Record(tensor.name, kind, tensor.shape))
    return records


def shrink(
    source: Path, out: Path, bits: int, *, force: bool = False, threads: int | None = None
) -> Receipt:
    """Writes SOURCE in BITS (8 or 4, or 32 to decode it) bits as OUT; a person follows along on
    standard error.

    Raises LlamaError; then, and on Ctrl-C, nothing is left of OUT.
    """
    with Model(source) as model:
        tensors = model.tensors
        records = plan(tensors, bits, model.config.head)
        if all(r.kind == t.kind for r, t in zip(records, tensors, strict=True)):
            above = f", not above {bits} bits" if bits < 32 else ""
            raise LlamaError(f"{source}: is in {model.config.dtype} already{above}")
        receipt = Receipt(source.name, bits, model.config.file_bytes, 0, 0.0, {})
        name, data = model.tokenizer
        room = " " * (1024 + sum(len(t.name) + 40 for t in tensors))
        writer = Writer(
            out, model.config, records, tokenizer=(TokenizerKind[name.upper()], data),
            meta={**model.meta, golden.KEY: golden.room(model.config), "quantize.receipt": room},
            force=force,
        )  # fmt: skip
        with writer:
            _convert(model, tensors, writer, receipt, threads)
            weights = sum(math.prod(t.shape) for t in tensors)
            receipt.bytes_after = writer.file_bytes
            receipt.bits_per_weight = 8 * sum(r.size() for r in records) / weights
            writer.seal()
            receipt.distance = measure(source, writer.temporary, threads)
            writer.set_text("quantize.receipt", receipt.text())
            golden.store(writer, source, threads, say)
    return receipt


def _convert(
    model: Model, tensors: list[Tensor], writer: Writer, receipt: Receipt, threads: int | None
) -> None:
    from tqdm import tqdm

    total = sum(tensor.bytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for index, (tensor, record) in enumerate(zip(tensors, writer.records, strict=True)):
            model.verify(index)
            if len(tensor.shape) == 1:
                writer.write(record.name, model.rows(index))
                bar.update(tensor.bytes)
                continue
            loss = Loss(0, 0, 0)
            for first, n in _chunks(record):
                size = matrix_bytes(record.kind, n, record.columns)
                blocks, part = model.quantize(index, first, n, record.kind, size, threads)
                writer.write(record.name, blocks)
                loss = Loss(
                    loss.sum_squares + part.sum_squares,
                    loss.sum_squared_error + part.sum_squared_error,
                    max(loss.max_error, part.max_error),
                )
                bar.update(tensor.bytes * n // record.rows)
            error = math.sqrt(loss.sum_squared_error / loss.sum_squares) if loss.sum_squares else 0
            receipt.errors[tensor.name] = float(f"{error:.4g}")


def _chunks(record: Record) -> Iterator[tuple[int, int]]:
    step = max(CHUNK_BYTES // (4 * record.columns) // TILE_ROWS, 1) * TILE_ROWS
    for first in range(0, record.rows, step):
        yield first, min(step, record.rows - first)


def report(receipt: Receipt, out: Path) -> None:
    """Prints the receipt to standard error."""
    print(f"wrote {out}", file=sys.stderr)
    for line in receipt.lines():
        print(f"  {line}", file=sys.stderr)
