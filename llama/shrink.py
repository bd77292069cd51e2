"""A .bin becomes a smaller .bin, with a receipt of what it lost: the whole of quantize.py.

The C library encodes a few million weights at a time on all cores, the Writer streams them out,
and memory does not grow with the model. Norms stay f32. With 4 bits the embedding and output
matrices keep 8: they are read once a token or feed the logits directly, and hurt most. A head of
labels, tiny, stays as it is.

The 4-bit matrices are calibrated (calibrate.py): their errors are let fall where the model's own
inputs hardly look.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama import golden, rotation
from llama.calibrate import Calibration, hold_out, texts_of
from llama.cli import say
from llama.distance import Deviation, Distance, measure
from llama.engine import Floats, Loss, Model, Tensor
from llama.errors import LlamaError
from llama.format import Head, Record, TokenizerKind, Writer
from llama.quant import TILE_ROWS, Kind, matrix_bytes
from llama.stages import Blocks, aligned

BITS = {8: Kind.Q8, 4: Kind.Q4, 32: Kind.F32}  # 32: what the weights stand for, as floats
KEEP_8_BITS = ("tok_embeddings.weight", "output.weight")
CHUNK_BYTES = 1 << 24  # of weights as float32
OWN = "texts that the model wrote by itself"
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
    source_sha256: str = ""  # of the source's header, in which its tensors' checksums stand
    command: str = ""
    calibration: str = "none"  # the text's name
    calibration_tokens: int = 0
    held_out: Distance | Deviation | None = None  # from the source, on a part of that text

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
        if self.calibration_tokens:
            yield (
                f"calibrated with {self.calibration_tokens:,} tokens of {self.calibration}, which "
                "makes the weights' errors larger and those of the answers smaller"
            )
        for distance in (self.held_out, self.distance):
            if distance is not None:
                yield f"from the source: {distance}"

    def text(self) -> str:
        return json.dumps(asdict(self))


def read_receipt(text: object) -> Receipt:
    """The receipt in a file's meta, which may be anyone's; LlamaError if it is none."""
    try:
        entry = json.loads(str(text))
        names = {field.name for field in fields(Receipt)}  # a later version may say more
        receipt = Receipt(**{name: value for name, value in entry.items() if name in names})
        for name in ("distance", "held_out"):
            if (found := getattr(receipt, name)) is not None:
                setattr(receipt, name, (Distance if "mean_kl" in found else Deviation)(**found))
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


@dataclass(frozen=True)
class Calibrate:
    """What calibration reads: TOKENS of FILE, or of texts that the model writes by itself."""

    file: Path | None = None
    tokens: int = 8192


def calibration_of(bits: int, text: str | None, tokens: int | None) -> Calibrate | None:
    """quantize.py's two flags, where they make sense."""
    if tokens is not None and not 64 <= tokens <= 1 << 20:
        raise LlamaError(f"--calibration-tokens is {tokens}, expected 64 to {1 << 20}")
    if bits != 4 or text == "none":
        if tokens is not None or (text is not None and text != "none"):
            raise LlamaError("--calibrate and --calibration-tokens are for --bits 4 with a text")
        return None
    file = None if text in (None, "self") else Path(str(text))
    return Calibrate(file, Calibrate.tokens if tokens is None else tokens)


def shrink(
    source: Path, out: Path, bits: int, *, force: bool = False, threads: int | None = None,
    calibrate: Calibrate | None = None, rotate: bool | None = None, command: str = "",
) -> Receipt:  # fmt: skip
    """Writes SOURCE in BITS (8 or 4, or 32 to decode it) bits as OUT; a person follows along on
    standard error.

    CALIBRATE None: each weight becomes the nearest level; 8 bits know nothing else. ROTATE None:
    where it costs nothing (rotation.py). COMMAND is noted in the receipt. Raises LlamaError; then,
    and on Ctrl-C, nothing is left of OUT.
    """
    with Model(source) as model:
        tensors = model.tensors
        records = plan(tensors, bits, model.config.head)
        if all(r.kind == t.kind for r, t in zip(records, tensors, strict=True)):
            above = f", not above {bits} bits" if bits < 32 else ""
            raise LlamaError(f"{source}: is in {model.config.dtype} already{above}")
        if rotate or (rotate is None and rotation.pays(model, records, threads)):
            records = rotation.rotated(records)
        receipt = Receipt(source.name, bits, model.config.file_bytes, 0, 0.0, {},
                          source_sha256=model.fingerprint.hex(), command=command)  # fmt: skip
        name, data = model.tokenizer
        room = " " * (4096 + 12 * len(command) + sum(len(t.name) + 40 for t in tensors))
        writer = Writer(
            out, model.config, records, tokenizer=(TokenizerKind[name.upper()], data),
            meta={**model.meta, golden.KEY: golden.room(model.config), "quantize.receipt": room},
            force=force,
        )  # fmt: skip
        with writer, ExitStack() as stack:
            calibration: Calibration | None = None
            held_out: list[list[int]] = []
            if calibrate is not None and bits == 4:
                texts, held_out = _texts(source, calibrate, receipt, threads)
                if texts:
                    rotated = any(record.kind.rotated for record in records)
                    calibration = stack.enter_context(
                        Calibration(source, texts, threads, rotated)
                    )
                else:
                    say("not calibrated: only a language model writes texts; --calibrate FILE")
            _Work(model, writer, receipt, threads, calibration).convert()
            weights = sum(math.prod(t.shape) for t in tensors)
            receipt.bytes_after = writer.file_bytes
            receipt.bits_per_weight = 8 * sum(r.size() for r in records) / weights
            writer.seal()
            receipt.distance = measure(source, writer.temporary, threads)
            if held_out:
                receipt.held_out = measure(source, writer.temporary, threads, texts=held_out,
                                           name="that text, held out")  # fmt: skip
            writer.set_text("quantize.receipt", receipt.text())
            golden.store(writer, source, threads, say)
    return receipt


def _texts(
    source: Path, calibrate: Calibrate, receipt: Receipt, threads: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    from tqdm import tqdm

    n = calibrate.tokens + calibrate.tokens // 15  # and what is held out
    with tqdm(total=n, unit="tok", leave=False, desc="writing texts",
              disable=True if calibrate.file else None) as bar:  # fmt: skip
        try:
            found = texts_of(source, n, calibrate.file, threads, bar.update)
        except LlamaError:
            _name_bad_weight(source)  # as encoding would, had the model come that far
            raise
    if not found:
        return [], []
    texts, held_out = hold_out(found)
    receipt.calibration = calibrate.file.name if calibrate.file else OWN
    receipt.calibration_tokens = sum(map(len, texts))
    return texts, held_out


def _name_bad_weight(source: Path) -> None:
    """LlamaError for the first weight that is not finite, if there is one."""
    with Model(source) as model:
        for index, tensor in enumerate(model.tensors):
            columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
            step = max(CHUNK_BYTES // (4 * columns), 1)
            for first in range(0, tensor.shape[0], step):
                rows = model.rows(index, first, min(step, tensor.shape[0] - first))
                if len(bad := np.argwhere(~np.isfinite(rows))):
                    place = ", ".join(map(str, (bad[0][0] + first, *bad[0][1:])))
                    value = rows[tuple(bad[0])]
                    raise LlamaError(f"{tensor.name}: weight ({place}) is {value}")


class _Work:
    """The tensors on their way from MODEL to WRITER, in the file's order."""

    def __init__(
        self, model: Model, writer: Writer, receipt: Receipt, threads: int | None,
        calibration: Calibration | None,
    ) -> None:  # fmt: skip
        from tqdm import tqdm

        self.model, self.writer, self.receipt, self.threads = model, writer, receipt, threads
        self.calibration = calibration
        self.places = {record.name: i for i, record in enumerate(writer.records)}
        self.tensors = model.tensors
        self.ready: dict[str, NDArray[np.uint8]] = {}  # of a layer: blocks that are not written
        self.bar = tqdm(total=sum(tensor.bytes for tensor in self.tensors), unit="B",
                        unit_scale=True, leave=False, disable=None)  # fmt: skip

    def convert(self) -> None:
        with self.bar:
            for name, index in self.places.items():
                tensor = self.tensors[index]
                if len(tensor.shape) == 1:
                    self.model.verify(index)
                    self.writer.write(name, self.model.rows(index))
                    self.bar.update(tensor.bytes)
                elif self.calibration is not None and name.startswith("layers."):
                    while name not in self.ready:
                        self.calibration.layer(self.encode_layer)
                    self.writer.write(name, self.ready.pop(name).tobytes())
                else:
                    for blocks in self.encode(name):
                        self.writer.write(name, blocks)

    def encode_layer(self, name: str, factor: Floats) -> Blocks:
        record = self.writer.records[self.places[name]]
        blocks = aligned(record.size())
        at = 0
        for part in self.encode(name, factor):
            blocks[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        self.ready[name] = blocks
        return record.kind, blocks

    def encode(self, name: str, factor: Floats | None = None) -> Iterator[bytearray]:
        """A matrix's blocks, some rows at a time; what they lose goes into the receipt."""
        index = self.places[name]
        tensor, record, loss = self.tensors[index], self.writer.records[index], Loss(0, 0, 0)
        self.model.verify(index)
        for first, n in _chunks(record):
            size = matrix_bytes(record.kind, n, record.columns)
            blocks, part = self.model.quantize(
                index, first, n, record.kind, size, self.threads, factor
            )
            yield blocks
            loss = Loss(
                loss.sum_squares + part.sum_squares,
                loss.sum_squared_error + part.sum_squared_error,
                max(loss.max_error, part.max_error),
            )
            self.bar.update(tensor.bytes * n // record.rows)
        error = math.sqrt(loss.sum_squared_error / loss.sum_squares) if loss.sum_squares else 0
        self.receipt.errors[name] = float(f"{error:.4g}")


def _chunks(record: Record) -> Iterator[tuple[int, int]]:
    step = max(CHUNK_BYTES // (4 * record.columns) // TILE_ROWS, 1) * TILE_ROWS
    for first in range(0, record.rows, step):
        yield first, min(step, record.rows - first)


def report(receipt: Receipt, out: Path) -> None:
    """Prints the receipt to standard error."""
    print(f"wrote {out}", file=sys.stderr)
    for line in receipt.lines():
        print(f"  {line}", file=sys.stderr)
