"""A .bin becomes a smaller .bin, with a receipt of what it lost: the whole of quantize.py.

The C library encodes a few million weights at a time on all cores, the Writer streams them out,
and memory does not grow with the model. Norms stay f32. With 4 bits the embedding and output
matrices keep 8: they are read once a token or feed the logits directly, and hurt most. A head of
labels, tiny, stays as it is.

The 4-bit matrices are calibrated (calibrate.py): their errors are let fall where the model's own
inputs hardly look.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama import golden, variants
from llama.calibrate import Calibration, hold_out, texts_of
from llama.cli import say
from llama.distance import measure
from llama.engine import Floats, Model
from llama.errors import LlamaError
from llama.exact import rounding
from llama.facts import Tensor
from llama.format import Head, Record, TokenizerKind, Writer, read
from llama.plan import role
from llama.quant import LAYOUTS, TILE_ROWS, Kind, matrix_bytes
from llama.receipt import KEY, Receipt, room
from llama.stages import Blocks, aligned, multiply

BITS = {8: Kind.Q8, 4: Kind.Q4, 32: Kind.F32}  # 32: what the weights stand for, as floats
KEEP_8_BITS = ("tok_embeddings.weight", "output.weight")
CHUNK_BYTES = 1 << 24  # of weights as float32
OWN = "texts that the model wrote by itself"


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


def calibration_of(bits: int | None, text: str | None, tokens: int | None) -> Calibrate | None:
    """quantize.py's two flags, where they make sense; BITS None: a mixture."""
    if tokens is not None and not 64 <= tokens <= 1 << 20:
        raise LlamaError(f"--calibration-tokens is {tokens}, expected 64 to {1 << 20}")
    if bits is None and text == "none":
        raise LlamaError("--size and --max-kld measure on a text: --calibrate self, or a FILE")
    if bits not in (4, None) or text == "none":
        if tokens is not None or (text is not None and text != "none"):
            raise LlamaError(
                "--calibrate and --calibration-tokens are for --bits 4 with a text, "
                "--size and --max-kld"
            )
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
    where it costs nothing (variants.py). COMMAND is noted in the receipt. Raises LlamaError; then,
    and on Ctrl-C, nothing is left of OUT.
    """
    with Model(source) as model:
        tensors = model.tensors
        records = plan(tensors, bits, model.config.head)
        if all(r.kind == t.kind for r, t in zip(records, tensors, strict=True)):
            above = f", not above {bits} bits" if bits < 32 else ""
            raise LlamaError(f"{source}: is in {model.config.dtype} already{above}")
        records = variants.suited(rotate, model, records, threads)
        receipt = begin(model, bits, command)
        with writer_of(model, out, records, command, force) as writer, ExitStack() as stack:
            calibration: Calibration | None = None
            held_out: list[list[int]] = []
            if calibrate is not None and bits == 4:
                texts, held_out = read_texts(source, calibrate, receipt, threads)
                if texts:
                    rotated = any(record.kind.rotated for record in records)
                    calibration = stack.enter_context(
                        Calibration(source, texts, threads, rotated)
                    )
                else:
                    say("not calibrated: only a language model writes texts; --calibrate FILE")
            with bar_of(tensors) as bar:
                encoder = Encoder(model, threads, bar.update)
                _convert(encoder, writer, calibration)
            writer.seal()
            judge(writer, source, receipt, held_out, threads)
            finish(writer, source, receipt, encoder, threads)
    return receipt


# ---- the steps, which a mixture of kinds (mixed.py) takes too


def begin(model: Model, bits: int, command: str) -> Receipt:
    """The receipt before anything was done."""
    return Receipt(model.path.name, bits, model.config.file_bytes, 0, 0.0, {},
                   source_sha256=model.fingerprint.hex(), command=command)  # fmt: skip


def writer_of(model: Model, out: Path, records: list[Record], command: str, force: bool) -> Writer:
    """For MODEL in other kinds, with room for golden answers and receipt."""
    name, data = model.tokenizer
    return Writer(
        out, model.config, records, tokenizer=(TokenizerKind[name.upper()], data),
        meta={**model.meta, golden.KEY: golden.room(model.config),
              KEY: room([r.name for r in records if len(r.shape) == 2], command)},
        force=force,
    )  # fmt: skip


def bar_of(tensors: Sequence[Tensor]) -> Any:
    """Progress through the bytes of TENSORS."""
    return tqdm(total=sum(tensor.bytes for tensor in tensors), unit="B", unit_scale=True,
                leave=False, disable=None)  # fmt: skip


def judge(
    writer: Writer, source: Path, receipt: Receipt, held_out: list[list[int]], threads: int | None
) -> None:
    """How far the sealed file is from SOURCE on texts that were HELD_OUT, if any were."""
    if held_out:
        receipt.held_out = measure(source, writer.temporary, threads, texts=held_out,
                                   name="that text, held out")  # fmt: skip


def finish(
    writer: Writer, source: Path, receipt: Receipt, encoder: Encoder, threads: int | None
) -> None:
    """The rest of the RECEIPT, and golden answers, go into the sealed file."""
    matrices = [record for record in writer.records if len(record.shape) == 2]
    receipt.bytes_after = writer.file_bytes
    weights = sum(math.prod(record.shape) for record in writer.records)
    receipt.bits_per_weight = 8 * sum(r.size() for r in writer.records) / weights
    receipt.kinds = {record.name: record.kind.label for record in matrices}
    receipt.sizes = dict.fromkeys(map(role, receipt.kinds), 0)
    for record in matrices:
        receipt.sizes[role(record.name)] += record.n_bytes
    for losses, into in ((encoder.weights, receipt.errors), (encoder.outputs, receipt.outputs)):
        into.update({r.name: losses[r.name, r.kind].relative for r in matrices
                     if (r.name, r.kind) in losses})  # fmt: skip
    receipt.distance = measure(source, writer.temporary, threads)
    if any(LAYOUTS[record.kind].columns > 1 for record in matrices):
        receipt.rounding, receipt.activations = rounding(writer.temporary, threads)
    writer.set_text(KEY, receipt.text())
    golden.store(writer, source, threads, say)


def read_texts(
    source: Path, calibrate: Calibrate, receipt: Receipt, threads: int | None
) -> tuple[list[list[int]], list[list[int]]]:
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


@dataclass
class Squares:
    """Sums of squares, of what should be and of the error: one of each, or one for each input."""

    size: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    error: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of what should be."""
        size = self.size.sum()
        return float(f"{math.sqrt(self.error.sum() / size) if size else 0:.4g}")

    @property
    def share(self) -> float:
        """The mean over inputs of the error's square over that of what should be."""
        there = self.size > 0
        return float((self.error[there] / self.size[there]).sum() / len(self.size))


def squares(rows: Floats) -> NDArray[np.float64]:
    """Each row's sum of squares."""
    found: NDArray[np.float64] = np.square(rows, dtype=np.float64).sum(axis=1)
    return found


class Encoder:
    """MODEL's matrices become blocks; DONE hears of their bytes. What each lost in which kind is
    kept, of its weights and, where it was shown inputs, of what it yields."""

    def __init__(self, model: Model, threads: int | None, done: Callable[[int], object]) -> None:
        self.model, self.threads, self._done = model, threads, done
        self.tensors = {tensor.name: tensor for tensor in model.tensors}
        self.places = {name: i for i, name in enumerate(self.tensors)}
        self._records = read(model.path).records
        self.weights: dict[tuple[str, Kind], Squares] = {}
        self.outputs: dict[tuple[str, Kind], Squares] = {}

    def vector(self, name: str) -> NDArray[np.float32]:
        self.model.verify(self.places[name])
        self._done(self.tensors[name].bytes)
        return self.model.rows(self.places[name])

    def blocks(
        self, name: str, kind: Kind, factor: Floats | None = None, inputs: Floats | None = None
    ) -> Iterator[bytearray]:
        """A matrix's blocks, some rows at a time. FACTOR is for error feedback; INPUTS (n, columns)
        are some of those that it meets."""
        index, tensor = self.places[name], self.tensors[name]
        rows, columns = tensor.shape
        weights, outputs = Squares(), Squares()
        if not any(key[0] == name for key in self.weights):  # reading it once is enough
            self.model.verify(index)
        if kind == tensor.kind:
            yield self._own(name)
            rows = 0  # nothing is lost
        step = max(CHUNK_BYTES // (4 * columns) // TILE_ROWS, 1) * TILE_ROWS
        for first in range(0, rows, step):
            n = min(step, rows - first)
            part, loss = self.model.quantize(
                index, first, n, kind, matrix_bytes(kind, n, columns), self.threads, factor
            )
            yield part
            weights.size[0] += loss.sum_squares
            weights.error[0] += loss.sum_squared_error
            if inputs is not None:
                right = multiply(self.model, index, inputs, first, n, threads=self.threads)
                ours = multiply(self.model, index, inputs, first, n,
                                (kind, np.frombuffer(part, np.uint8)), self.threads)  # fmt: skip
                outputs.size = outputs.size + squares(right)
                outputs.error = outputs.error + squares(ours - right)
            self._done(tensor.bytes * n // rows)
        self.weights[name, kind] = weights
        if inputs is not None:
            self.outputs[name, kind] = outputs

    def _own(self, name: str) -> bytearray:
        """A matrix's blocks as the model has them."""
        record = self._records[name]
        with open(self.model.path, "rb") as file:
            file.seek(record.offset)
            self._done(record.n_bytes)
            return bytearray(file.read(record.n_bytes))

    def whole(
        self, name: str, kind: Kind, factor: Floats | None = None, inputs: Floats | None = None
    ) -> Blocks:
        """All of a matrix's blocks, where kernels can read them."""
        found, at = aligned(matrix_bytes(kind, *self.tensors[name].shape)), 0
        for part in self.blocks(name, kind, factor, inputs):
            found[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        return kind, found


def _convert(encoder: Encoder, writer: Writer, calibration: Calibration | None) -> None:
    """All tensors on their way from the model to WRITER, in the file's order."""
    kinds = {record.name: record.kind for record in writer.records}
    ready: dict[str, Blocks] = {}  # of a layer: what is not written yet

    def encode(name: str, factor: Floats, inputs: Floats) -> Blocks:
        ready[name] = encoder.whole(name, kinds[name], factor, inputs)
        return ready[name]

    for record in writer.records:
        name = record.name
        if len(record.shape) == 1:
            writer.write(name, encoder.vector(name))
        elif calibration is not None and name.startswith("layers."):
            while name not in ready:
                calibration.layer(encode)
            writer.write(name, ready.pop(name)[1].tobytes())
        else:
            for blocks in encoder.blocks(name, record.kind):
                writer.write(name, blocks)


def report(receipt: Receipt, out: Path) -> None:
    """Prints the receipt to standard error."""
    print(f"wrote {out}", file=sys.stderr)
    for line in receipt.lines():
        print(f"  {line}", file=sys.stderr)
