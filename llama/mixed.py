"""A file of a given size, or of a given distance from its source: quantize.py --size, --max-kld.

Every matrix is encoded in 4 bits once, with calibration as --bits 4 has it, and kept in a file
without a name. What that alone does to the answers is measured (sensitivity.py); more bits do less
by as much as the error of what the matrix yields shrinks. Among the mixtures plan.py finds the
best. A distance is a promise about the file, so the file is measured before it gets its name, on
text that was held out, and where the prediction was off another mixture is tried.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from llama import variants
from llama.calibrate import Calibration
from llama.cli import say
from llama.config import Head
from llama.distance import Distance
from llama.engine import Floats, Model
from llama.errors import LlamaError
from llama.facts import Tensor
from llama.format import ALIGN, Record
from llama.plan import Frontier, Option, read_size
from llama.quant import TILE_ROWS, Kind, matrix_bytes, untile
from llama.receipt import Receipt
from llama.sensitivity import Sensitivity, sample, scaled
from llama.shrink import Calibrate, Encoder, begin, finish, judge, read_texts, writer_of
from llama.stages import Blocks

TRIES = 6  # mixtures that are written and measured, for --max-kld
NEAR = 0.9  # of the promised distance: what comes as near is not tried to be smaller
AIM = 0.97  # of it: for what chance the next prediction has
FOUR = (Kind.Q4, Kind.Q4R, Kind.Q4E)
EMBEDDING = "tok_embeddings.weight"


@dataclass(frozen=True)
class Goal:
    """One of the two: the file's SIZE in bytes at most, or its mean KL divergence."""

    size: int | None = None
    max_kld: float | None = None


def goal_of(size: str | None, max_kld: float | None) -> Goal:
    """quantize.py's two flags. LlamaError."""
    if max_kld is not None and not 0 < max_kld < math.inf:
        raise LlamaError(f"--max-kld is {max_kld}, expected nats above 0, such as 0.01")
    return Goal(None if size is None else read_size(size), max_kld)


def mix(
    source: Path, out: Path, goal: Goal, *, force: bool = False, threads: int | None = None,
    calibrate: Calibrate | None = None, rotate: bool | None = None, command: str = "",
) -> Receipt:  # fmt: skip
    """Writes SOURCE as OUT in the mixture of 4, 8 and 16 bits that meets GOAL; a person follows
    along on standard error. As shrink() otherwise."""
    with Model(source) as model, ExitStack() as stack:
        if goal.max_kld is not None and model.config.head != Head.LM:
            raise LlamaError("--max-kld is about next tokens, and this model gives none; --size")
        kinds = [kinds_of(tensor, model.config.head) for tensor in model.tensors]
        smallest = _records(model.tensors, [few[0] for few in kinds])
        suited = variants.suited(rotate, model, smallest, threads)
        kinds = [_like(*pair) for pair in zip(suited, kinds, strict=True)]
        # what cannot be is refused before an hour's work
        probe = writer_of(model, out, _records(model.tensors, [k[0] for k in kinds]), command,
                          force)  # fmt: skip
        probe.refuse_existing()
        if goal.size is not None and goal.size < probe.file_bytes:
            raise LlamaError(
                f"--size {goal.size:,} bytes: with each matrix in its smallest kind {source.name} "
                f"takes {probe.file_bytes:,}, the smallest possible"
            )
        receipt = begin(model, 0, command)
        texts, held_out = read_texts(source, calibrate or Calibrate(), receipt, threads)
        if not texts:
            raise LlamaError("a mixture is measured on a text, and only a language model writes "
                             "its own: --calibrate FILE")  # fmt: skip
        scratch = stack.enter_context(_scratch(out))
        trial = _Trial(model, kinds, scratch, threads)
        trial.measure(texts)
        work = _Mixture(source, out, command, force, trial, receipt, held_out)
        if goal.max_kld is not None:
            return work.below(goal.max_kld)
        assert goal.size is not None
        over = probe.file_bytes - work.frontier.least_bytes
        chosen = work.frontier.within(goal.size - over)
        if _size(chosen) == work.frontier.most_bytes:
            say("each matrix is in its largest useful kind: more bytes would bring nothing")
        found = work.write(chosen, math.inf)
        assert found is not None
        return found


def kinds_of(tensor: Tensor, head: Head) -> list[Kind]:
    """The kinds that a matrix may have, its own or smaller ones, smallest first."""
    labels = tensor.name == "output.weight" and head >= Head.SEQUENCE
    if len(tensor.shape) == 1 or labels:
        return [tensor.kind]
    half = Kind.BF16 if tensor.kind == Kind.BF16 else Kind.F16
    sizes = {kind: matrix_bytes(kind, *tensor.shape) for kind in (half, Kind.Q8, Kind.Q4)}
    smaller = [kind for kind, size in sizes.items() if size < tensor.bytes or kind == tensor.kind]
    return sorted(smaller or [tensor.kind], key=lambda kind: (sizes.get(kind, 0), kind))


def _like(smallest: Record, kinds: list[Kind]) -> list[Kind]:
    """KINDS of a matrix whose smallest became a variant: the others of them do too."""
    others = [Record(smallest.name, kind, smallest.shape) for kind in kinds[1:]]
    if smallest.kind.rotated:
        others = variants.rotated(others)
    return [smallest.kind, *(record.kind for record in others)]


def _scratch(out: Path) -> BinaryIO:
    """A file without a name beside OUT: it is gone however this process ends."""
    try:
        return tempfile.TemporaryFile(dir=out.parent)
    except OSError as error:
        raise LlamaError(f"{out}: cannot write: {error.strerror}") from None


def _records(tensors: Sequence[Tensor], kinds: Sequence[Kind]) -> list[Record]:
    return [Record(t.name, kind, t.shape) for t, kind in zip(tensors, kinds, strict=True)]


class _Trial:
    """Every matrix in 4 bits, kept in SCRATCH, and what each of its KINDS loses."""

    def __init__(
        self, model: Model, kinds: Sequence[list[Kind]], scratch: BinaryIO, threads: int | None
    ) -> None:
        self.model, self.scratch, self.threads = model, scratch, threads
        self.kinds = {t.name: few for t, few in zip(model.tensors, kinds, strict=True)}
        self.rounded = {t.name for t in model.tensors
                        if self.kinds[t.name][0] in FOUR and t.kind not in FOUR}  # fmt: skip
        self.places: dict[str, int] = {}  # of the blocks in SCRATCH
        self.losses: dict[str, float] = {}  # in 4 bits
        self.bar = tqdm(unit="pass", leave=False, disable=None, desc="measuring")
        self.encoder = Encoder(model, threads, lambda n_bytes: None)

    def measure(self, texts: list[list[int]]) -> None:
        """Runs the model on TEXTS, to calibrate it and to see what each matrix does."""
        c = self.model.config
        inside = sum(math.prod(t.shape) for t in self.model.tensors if "layers." in t.name)
        some = sample(texts, c.n_layers, inside, c.n_outputs * c.dim)
        rotated = any(kind.rotated for few in self.kinds.values() for kind in few)
        with self.bar, Calibration(self.model.path, texts, self.threads, rotated) as calibration:
            sensitivity = Sensitivity(calibration.engine, some, self._embed, self.threads,
                                      self.bar.update)  # fmt: skip
            head: dict[str, Blocks] = {}
            if EMBEDDING in self.rounded:
                blocks = self._encode(EMBEDDING)
                sensitivity.embedding(EMBEDDING, lambda token: self._embed_blocks(blocks, token))
                head = {EMBEDDING: blocks} if c.tied else {}
            self.bar.reset(sensitivity.steps())
            found: dict[str, Blocks] = {}

            def encode(name: str, factor: Floats, inputs: Floats) -> Blocks:
                if name not in self.rounded:
                    return self.encoder.whole(name, self.kinds[name][0], None, inputs)
                found[name] = self._encode(name, factor, inputs)
                return found[name]

            for number in range(c.n_layers):
                calibration.layer(encode)
                sensitivity.layer(number, found)
                found.clear()
            if "output.weight" in self.rounded:
                head["output.weight"] = self._encode("output.weight", *calibration.head())
            self.losses = sensitivity.losses(head)

    def _encode(
        self, name: str, factor: Floats | None = None, inputs: Floats | None = None
    ) -> Blocks:
        """In 4 bits; the errors of all its kinds are with the encoder then."""
        for kind in self.kinds[name][1:]:
            for _ in self.encoder.blocks(name, kind, None, inputs):
                pass
        blocks = self.encoder.whole(name, self.kinds[name][0], factor, inputs)
        self.places[name] = self.scratch.seek(0, 2)
        try:
            self.scratch.write(blocks[1].data)
        except OSError as error:
            raise LlamaError(f"cannot keep {name} beside the file: {error.strerror}") from None
        return blocks

    def _embed(self, token: int) -> Floats:
        row: Floats = self.model.rows(self.encoder.places[EMBEDDING], token, 1)[0]
        return row

    def _embed_blocks(self, blocks: Blocks, token: int) -> Floats:
        kind, columns = blocks[0], self.model.config.dim
        strip = blocks[1].reshape(-1, matrix_bytes(kind, TILE_ROWS, columns))[token // TILE_ROWS]
        row: Floats = untile(strip, kind, TILE_ROWS, columns)[token % TILE_ROWS]
        return row

    def options(self) -> list[list[Option]]:
        """Of each tensor, in the file's order."""
        found = []
        for tensor in self.model.tensors:
            first = self.kinds[tensor.name][0]
            outputs = self.encoder.outputs
            errors = outputs if (tensor.name, first) in outputs else self.encoder.weights
            loss = self.losses.get(tensor.name, 0.0)
            few = []
            for kind in self.kinds[tensor.name]:
                size = -(-Record(tensor.name, kind, tensor.shape).size() // ALIGN) * ALIGN
                lost = 0.0
                if tensor.name in self.losses:
                    shares = [errors[tensor.name, one].share for one in (first, kind)]
                    lost = float(f"{scaled(loss, *shares):.4g}")
                few.append(Option(kind, size, lost))
            found.append(few)
        return found

    def blocks(self, name: str, kind: Kind) -> bytes | None:
        """Those that were kept, if it is them."""
        if kind not in FOUR or name not in self.places:
            return None
        self.scratch.seek(self.places[name])
        return self.scratch.read(matrix_bytes(kind, *self.encoder.tensors[name].shape))


class _Rejected(Exception):
    """The file that was written is not to get its name."""


class _Mixture:
    """Files of one trial."""

    def __init__(
        self, source: Path, out: Path, command: str, force: bool, trial: _Trial,
        receipt: Receipt, held_out: list[list[int]],
    ) -> None:  # fmt: skip
        self.source, self.out, self.command, self.force = source, out, command, force
        self.trial, self.receipt, self.held_out = trial, receipt, held_out
        self.frontier = Frontier(trial.options())
        self.measured = math.nan  # of the last file

    def write(self, chosen: Sequence[Option], most: float, least: float = 0) -> Receipt | None:
        """Writes the file; it gets its name if its distance is at most MOST, and at least LEAST:
        then its receipt."""
        trial, receipt = self.trial, replace(self.receipt, errors={}, outputs={})
        tensors = trial.model.tensors
        receipt.losses = {t.name: option.loss for t, option in zip(tensors, chosen, strict=True)
                          if t.name in trial.losses}  # fmt: skip
        records = _records(tensors, [option.kind for option in chosen])
        writer = writer_of(trial.model, self.out, records, self.command, self.force)
        try:
            with writer:
                for record in records:
                    if len(record.shape) == 1:
                        writer.write(record.name, trial.encoder.vector(record.name))
                    elif (kept := trial.blocks(record.name, record.kind)) is not None:
                        writer.write(record.name, kept)
                    else:
                        for blocks in trial.encoder.blocks(record.name, record.kind):
                            writer.write(record.name, blocks)
                writer.seal()
                judge(writer, self.source, receipt, self.held_out, trial.threads)
                if isinstance(receipt.held_out, Distance):
                    self.measured = receipt.held_out.mean_kl
                if self.measured > most or self.measured < least:
                    raise _Rejected
                finish(writer, self.source, receipt, trial.encoder, trial.threads)
        except _Rejected:
            return None
        return receipt

    def below(self, most: float) -> Receipt:
        """The smallest file found whose distance on the held-out text is at most MOST."""
        good: Sequence[Option] | None = None  # the smallest that was, and the largest that was not
        bad: Sequence[Option] | None = None
        aim = most
        for _ in range(TRIES):
            chosen = self.frontier.below(aim)
            if chosen in (good, bad):
                break
            size, predicted = _size(chosen), _loss(chosen)
            enough = 0 if size == self.frontier.least_bytes else NEAR * most
            if (found := self.write(chosen, most, enough)) is not None:
                return found
            low = self.measured <= most
            say(f"{_told(chosen)}: predicted {predicted:.2e}, measured {self.measured:.2e} nats, "
                f"{'less than' if low else 'above'} {most:g}; another mixture")  # fmt: skip
            if not low and size == self.frontier.most_bytes:
                break
            good, bad = (chosen, bad) if low else (good, chosen)
            aim = predicted * most / self.measured * AIM if self.measured else 2 * aim
            if good is not None and bad is not None and not _loss(bad) > aim > _loss(good):
                aim = math.sqrt(_loss(bad) * _loss(good))
        found = self.write(good or self.frontier.within(self.frontier.most_bytes), most)
        if found is None:
            raise LlamaError(
                f"--max-kld {most:g}: with each matrix in its largest kind "
                f"{self.measured:.3g} nats were measured, the smallest possible"
            )
        return found


def _size(chosen: Sequence[Option]) -> int:
    return sum(option.bytes for option in chosen)


def _loss(chosen: Sequence[Option]) -> float:
    return sum(option.loss for option in chosen)


def _told(chosen: Sequence[Option]) -> str:
    return f"{_size(chosen) / 1e6:,.1f} MB of weights"
