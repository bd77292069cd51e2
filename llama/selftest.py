"""run.py --selftest: is this file whole, and does this machine compute what it says of itself?
--verify asks the first alone.

The file's checksums first, then its tokenizer, then the network: the scalar kernels against the
answers that the file holds (golden.py), every other kernel set of this CPU against the scalar
ones, other devices against the file. Each check is one line, which names what differs first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama import golden
from llama.config import Head
from llama.engine import Model, isa_names
from llama.errors import LlamaError, one_line
from llama.golden import Golden, Layer
from llama.quant import Kind
from llama.receipt import read_receipt

# How far apart two layers may be, as Layer.distance has it. On one CPU nothing may differ but the
# cosines and sines of the system's C library. Those wrong in their last bit moved no layer of a
# float file by more than 2e-6, and of a quantised one, whose activations are rounded, by 2e-4.
FLOAT, QUANTISED = 1e-4, 1e-3
OTHER_DEVICES = 1e-2
DEVICES = ("cuda",)  # besides the CPU
NAMED = 5  # damaged tensors that the report names


class Report:
    """The lines of checks, on standard output as they are made, and how many there were."""

    def __init__(self) -> None:
        self.checks = self.failures = 0

    def check(self, what: str, failure: str | None = None) -> None:
        """A check of which FAILURE says how it failed, WHAT else what it found."""
        self.checks += 1
        self.failures += failure is not None
        self.say("ok" if failure is None else "FAILED", what if failure is None else failure)

    def note(self, what: str) -> None:
        self.say("-", what)

    def say(self, mark: str, text: str) -> None:
        print(one_line(f"{mark:<6}  {text}"), flush=True)

    def summary(self) -> str:
        if self.failures:
            return f"selftest: {self.failures} of {self.checks} checks FAILED"
        return f"selftest: all {self.checks} checks passed"


def selftest(path: Path, threads: int | None = None) -> bool:
    """Makes and prints every check of the file at PATH; whether all passed. LlamaError where it
    cannot be opened."""
    report = Report()
    _checksums(path, report)
    with Model(path) as model:
        meta, config = model.meta, model.config
    stored = None
    try:
        stored = golden.load(meta, config)
        if stored is None:
            report.note("the file holds no answers to compare with; export.py writes them")
    except LlamaError as error:
        report.check("", f"the file's stored answers cannot be read: {error}")
    _tokenizer(path, stored, report)
    floats = config.dtype in (Kind.F32.label, Kind.F16.label, Kind.BF16.label)
    found = _cpu(path, stored, FLOAT if floats else QUANTISED, threads, report)
    if stored is not None:
        _others(path, stored, report)
    if "quantize.receipt" in meta:
        try:
            receipt = read_receipt(meta["quantize.receipt"])
            if receipt.distance is not None:
                then = receipt.distance
                report.note(f"from its source, {receipt.source}, when quantised: {then}")
        except LlamaError as error:
            report.check("", str(error))
    if stored is not None and found is not None and stored.source:
        now = source_distance(stored.source, found, config.head)
        report.note(f"from its source, now, after the self-test's text: {now}")
    print(report.summary(), flush=True)
    return not report.failures


def verify(path: Path) -> bool:
    """Prints whether every tensor of the file at PATH is as its writer left it; LlamaError where it
    cannot be opened, which checks all before the tensors."""
    report = Report()
    _checksums(path, report)
    return not report.failures


def _checksums(path: Path, report: Report) -> None:
    from tqdm import tqdm

    with Model(path) as model:
        tensors = model.tensors
        total, bad = sum(tensor.bytes for tensor in tensors), []
        with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for index, tensor in enumerate(tensors):
                try:
                    model.verify(index)
                except LlamaError as error:
                    bad.append(str(error).removeprefix(f"{path}: "))
                bar.update(tensor.bytes)
    more = f" (and {len(bad) - NAMED} tensors more)" if len(bad) > NAMED else ""
    report.check(f"checksums of {len(tensors)} tensors, {total / 1e6:,.1f} MB",
                 f"checksums: {'; '.join(bad[:NAMED])}{more}" if bad else None)  # fmt: skip


def _tokenizer(path: Path, stored: Golden | None, report: Report) -> None:
    try:
        with Model(path) as model:
            tokenizer = golden.tokenizer_of(model)
        if stored is None or stored.text is None:
            return
        ids = golden.encode(tokenizer, stored.text)
    except LlamaError as error:
        report.check("", f"tokenizer: {error}")
        return
    if ids == stored.ids:
        report.check(f"tokenizer: the {len(ids)} ids of a text, as stored")
        return
    pairs = zip((*stored.ids, None), (*ids, None), strict=False)
    place, (expected, found) = next((i, pair) for i, pair in enumerate(pairs) if len({*pair}) > 1)
    words = [
        "the end" if token is None else f"{token} {tokenizer.piece(token)!r}"
        for token in (expected, found)
    ]
    report.check("", f"tokenizer: id {place} of a text: expected {words[0]}, found {words[1]}")


def _cpu(
    path: Path, stored: Golden | None, tolerance: float, threads: int | None, report: Report
) -> Golden | None:
    """The scalar kernels against the file, the others against these; the scalar ones' answers."""
    found = _answers(path, "scalar", stored, threads, report)
    if found is None:
        return None
    if stored is not None:
        # Cosines and sines enter every layer alike: where the first layer is the same, they are,
        # and what differs after it is no matter of the C library.
        known = stored.layers[1].crc32 == found.layers[1].crc32
        _compare("cpu scalar", "as stored", stored, found, 0.0 if known else tolerance, report)
    for isa in reversed(isa_names()):
        if isa != "scalar" and (other := _answers(path, isa, found, threads, report)) is not None:
            _compare(f"cpu {isa}", "as cpu scalar", found, other, 0.0, report)
    return found


def _others(path: Path, stored: Golden, report: Report) -> None:
    """Other devices against the file."""
    for device in DEVICES:
        try:
            found = _compute(path, device, None, stored, None)
        except LlamaError as error:
            report.note(f"{device}: not tested: {error}")
            continue
        _compare(device, "as stored", stored, found, OTHER_DEVICES, report)


def _answers(
    path: Path, isa: str, known: Golden | None, threads: int | None, report: Report
) -> Golden | None:
    try:
        return _compute(path, "cpu", isa, known, threads)
    except LlamaError as error:
        report.check("", f"cpu {isa}: {error}")
        return None


def _compute(
    path: Path, device: str, isa: str | None, known: Golden | None, threads: int | None
) -> Golden:
    return golden.patiently(
        lambda: golden.compute(path, known, isa=isa, device=device, threads=threads),
        f"{device} {isa or ''}",
    )


# --- what differs, and how far


def _compare(
    who: str, what: str, expected: Golden, found: Golden, tolerance: float, report: Report
) -> None:
    n = len(expected.layers) - 1
    furthest = max(a.distance(b) for a, b in zip(expected.layers, found.layers, strict=True))
    exact = not furthest and expected.outputs == found.outputs
    how = "to the last bit" if exact else f"within {furthest:.1e}"
    problem = difference(expected, found, tolerance)
    report.check(f"{who}: {n} layer{'s' * (n > 1)} and the head {what}, {how}",
                 problem and f"{who}: {problem}")  # fmt: skip


def difference(expected: Golden, found: Golden, tolerance: float) -> str | None:
    """What is further apart than TOLERANCE first, or None; FOUND was computed here. Nothing may be
    with the embedding, a table that is only read."""
    for number, (a, b) in enumerate(zip(expected.layers, found.layers, strict=True)):
        allowed = tolerance if number else 0.0
        if a.distance(b) > allowed or (not allowed and a.crc32 != b.crc32):
            by = f" by more than {allowed:.0e}" if allowed else ""
            return f"{golden.place_of(number)} differs first{by}: {_numbers(a, b)}"
    scale = max(map(abs, expected.top.values()))
    for index, value in expected.top.items():
        other = found.last[index]
        if abs(value - other) > tolerance * scale:
            numbers = f"expected {value:.9g}, found {other:.9g}"
            return f"the head differs first: output {index}: {numbers}"
    if not tolerance and expected.outputs != found.outputs:
        return "the head differs first, in none of the largest outputs of the last position"
    return None


def _numbers(a: Layer, b: Layer) -> str:
    if a.rms == b.rms and a.projections == b.projections:
        return f"expected checksum {a.crc32:08x}, found {b.crc32:08x}"
    return f"expected rms {a.rms:.9g}, found {b.rms:.9g}, distance {a.distance(b):.1e}"


# --- quantised files


def source_distance(source: Mapping[int, float], found: Golden, head: Head) -> str:
    """A language model's KL divergence, of the softmaxes over the tokens that the source finds
    likeliest; of other heads the furthest of the source's largest outputs."""
    a, b = np.array([*source.values()]), found.last[[*source]].astype(np.float64)
    if head != Head.LM:
        far, largest = np.abs(a - b).max(), np.abs(a).max()
        return f"outputs off by {far:.2e} at most, the largest {largest:.2e}"
    p, q = _softmax(a), _softmax(b)
    same = "the same" if next(iter(source)) == next(iter(found.top)) else "another"
    return (
        f"KL divergence {float((p * np.log(p / q)).sum()):.2e} nats over the source's "
        f"{len(p)} likeliest tokens, {same} next token"
    )


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    shares: NDArray[np.float64] = np.maximum(weights / weights.sum(), np.finfo(np.float64).tiny)
    return shares
