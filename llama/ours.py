"""Our engine as llama.bench measures it: a Runner for trial.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llama import limits
from llama.engine import Engine
from llama.limits import Limits, load_of
from llama.machine import revision
from llama.trial import Job

FILL = 256  # positions that are computed before a cache is filled up with copies of them


class Ours:
    """A Runner, as trial.py describes it."""

    def __init__(self, job: Job) -> None:
        self.job, self.version = job, revision()
        self.engine = Engine(
            job.path, threads=job.threads, max_seq_len=job.positions, kv=job.kv,
            activations=job.activations, isa=job.isa,
        )  # fmt: skip
        info = self.engine.info()
        self.features = f"{info.isa}, activations {info.activations}, kv {info.kv_kind}"
        self.config = self.engine.config
        self.load = load_of(self.config, self.engine.model.tensors, info.kv_bytes_per_position,
                            info.activations)  # fmt: skip
        self.limits = Limits(0, 0, 0)
        self.info = info
        self._depth = self._batch = 0

    def prompt(self, ids: Sequence[int]) -> float:
        self._clear()
        start = time.perf_counter()
        self._read(ids)
        return time.perf_counter() - start

    def fill(self, depth: int, batch: int) -> None:
        """The first positions are computed, the others are copies of them: what stands in a cache
        does not change how fast it is read."""
        self._clear()
        self._depth, self._batch = depth, batch
        if not depth:
            return
        n = min(depth, FILL)
        self._read(self.job.ids(n))
        kv, size = self.engine.read_kv(0, 0, n), self.load.kv_bytes
        for sequence in range(batch):
            for at in range(0 if sequence else n, depth, n):
                part = min(n, depth - at)
                self.engine.write_kv(sequence, at, part, kv[: part * size])

    def decode(self, n: int) -> float:
        batch = range(self._batch)
        wanted = [True] * self._batch
        start = time.perf_counter()
        for at in range(self._depth, self._depth + n):
            ids = [(at + 31 * s) % self.job.vocab_size for s in batch]
            self.engine.forward(ids, batch, [at] * self._batch, wanted)
        seconds = time.perf_counter() - start
        for sequence in batch:
            self.engine.trim(sequence, self._depth)
        return seconds

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        self._clear()
        found: list[int] = []
        for at in range(n):
            new = ids if not found else found[-1:]
            first = 0 if not found else len(ids) + at - 1
            want = [False] * (len(new) - 1) + [True]
            places = range(first, first + len(new))
            logits = self.engine.forward(new, [0] * len(new), places, want)
            assert logits is not None
            found.append(int(np.argmax(logits[-1])))
        self.engine.trim(0, 0)
        return found

    def held(self) -> dict[str, int]:
        info = self.engine.info()
        return {"kv": info.kv_bytes, "scratch": info.scratch_bytes}

    def between(self) -> float:
        now = limits.measure(self.info.threads, self.info.isa)
        self.limits = self.limits.best(now)
        return now.bandwidth

    def close(self) -> None:
        self.engine.close()

    def facts(self) -> dict[str, Any]:
        """The machine's limits, what the model asks, how it ran, and seconds of opening in the
        library alone."""
        job, info = self.job, self.info
        opening = [
            limits.time_opening(job.path, info.threads, info.activations, info.isa)
            for _ in range(job.repeats)
        ]
        return {
            "limits": asdict(self.limits), "load": asdict(self.load), "isa": info.isa,
            "threads": info.threads, "activations": info.activations, "kv": info.kv_kind,
            "dtype": self.config.dtype, "weight_bytes": self.config.weight_bytes,
            "opening_seconds": opening,
        }  # fmt: skip

    def _read(self, ids: Sequence[int]) -> None:
        want = [False] * (len(ids) - 1) + [True]
        self.engine.forward(ids, [0] * len(ids), range(len(ids)), want)

    def _clear(self) -> None:
        for sequence in range(max(1, self._batch)):
            self.engine.trim(sequence, 0)
