"""One engine at work on one file, measured in a process of its own: python3 -m llama.trial.

llama.bench starts it, writes a Job to its standard input as JSON and reads its Result from the last
line of its standard output. A process of its own, so that its memory can be told from others' and
no thread of an engine that is not measured is awake. Ours and the peers' engines are all driven by
the same lines, measure() below; ours.py and peers.py hold the engines.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llama.cli import run

GREEDY_PROMPT = 32
LAST_LOOKS = 3  # more measurements of the limits, for runs of few repeats


@dataclass(frozen=True)
class Job:
    """What is to be measured. Depths: positions in the cache before decoding begins; batches:
    sequences decoded together. GREEDY: so many tokens are chosen greedily, after the prompt."""

    engine: str  # "llama", "llama.cpp" or "openvino"
    path: str
    threads: int
    prompts: list[int]
    depths: list[int]
    batches: list[int]
    tokens: int
    repeats: int
    vocab_size: int
    activations: int | None = None  # None: as the file has it
    isa: str | None = None
    kv: str | None = None
    greedy: int = 0

    @property
    def positions(self) -> int:
        """The longest sequence that any of it needs."""
        return max(*self.prompts, max(self.depths) + self.tokens, self.greedy + GREEDY_PROMPT)

    def ids(self, n: int) -> list[int]:
        """N token ids, none of them special in any way."""
        return [(7 * i + i * i) % self.vocab_size for i in range(n)]


@dataclass
class Row:
    """One measurement: tokens a second of each repeat, and the bandwidth before and after it (the
    larger), where the engine measures that. WORK is "prompt" or "decode"; N the prompt's tokens,
    or those that each sequence decoded."""

    work: str
    n: int
    depth: int
    batch: int
    rates: list[float]
    bandwidths: list[float]


@dataclass
class Result:
    """What an engine did. Memory in bytes: "anonymous" is what the process has of its own beyond
    what it had before the file was opened, "file" what it looks at of mapped files, after the
    prompts and where the system tells; the others are what the engine says."""

    engine: str
    version: str
    features: str
    open_seconds: float
    first_token_seconds: float  # from before opening to the first logits of the first prompt
    memory: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # what only this engine tells


class Runner(Protocol):
    """An engine with a file open."""

    version: str
    features: str

    def prompt(self, ids: Sequence[int]) -> float:
        """Seconds that a fresh sequence of these tokens takes, to its last one's logits."""

    def fill(self, depth: int, batch: int) -> None:
        """Makes BATCH sequences of DEPTH positions each, that share no memory."""

    def decode(self, n: int) -> float:
        """Seconds of N steps of what fill() made, which is as it was afterwards."""

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The N likeliest next tokens, one after another."""

    def held(self) -> dict[str, int]:
        """Bytes that the engine itself says it holds, by what for."""

    def between(self) -> float | None:
        """Called between measurements, when nothing else runs; the memory's bandwidth in bytes a
        second, where this measures it."""

    def close(self) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What only this engine tells; asked after close()."""


def memory() -> tuple[int, int] | None:
    """This process's own memory and what it looks at of mapped files, in bytes; None where the
    system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = dict(line.split(":", 1) for line in lines.splitlines() if ":" in line)
        own, mapped = (int(found[name].split()[0]) for name in ("RssAnon", "RssFile"))
        return 1024 * own, 1024 * mapped
    except (OSError, KeyError, ValueError):
        return None


def measure(job: Job, opened: Callable[[Job], Runner]) -> Result:
    """All that the job asks for."""
    before = memory()
    start = time.perf_counter()
    runner = opened(job)
    open_seconds = time.perf_counter() - start
    first = open_seconds + runner.prompt(job.ids(job.prompts[0]))
    result = Result(job.engine, runner.version, runner.features, open_seconds, first)

    def repeated(row: Row, work: Callable[[], float]) -> None:
        """Fills in the row, which joins the others."""
        looks = [runner.between()]
        for _ in range(job.repeats):
            row.rates.append(row.n * row.batch / work())
            looks.append(runner.between())
        pairs = itertools.pairwise(look for look in looks if look is not None)
        row.bandwidths += [max(pair) for pair in pairs]
        result.rows.append(row)

    for n in job.prompts:
        repeated(Row("prompt", n, 0, 1, [], []), partial(runner.prompt, job.ids(n)))
    runner.fill(0, 1)
    runner.decode(1)
    now = memory()
    if before and now:
        result.memory = {"anonymous": now[0] - before[0], "file": now[1]}
    result.memory |= runner.held()
    for batch in job.batches:
        for depth in job.depths:
            runner.fill(depth, batch)
            runner.decode(min(2, job.tokens))
            row = Row("decode", job.tokens, depth, batch, [], [])
            repeated(row, partial(runner.decode, job.tokens))
    if job.greedy:
        result.greedy = runner.greedy(job.ids(GREEDY_PROMPT), job.greedy)
    for _ in range(LAST_LOOKS):
        runner.between()
    runner.close()
    result.facts = runner.facts()
    return result


def main() -> int:
    job = Job(**json.load(sys.stdin))
    opened: Callable[[Job], Runner]
    if job.engine == "llama":
        from llama.ours import Ours

        opened = Ours
    else:
        from llama.peers import find

        opened = find(job.engine)
    # peers may write to standard output; what counts is the last line
    print("\n" + json.dumps(asdict(measure(job, opened))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.bench", main))
