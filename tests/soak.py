"""What a model that has been used for long says, against one that was opened a moment ago.

    PYTHONPATH=. python3 tests/soak.py [--time SECONDS] [--seed N] [--rounds N]

Rounds of random use on small models of random weights. A round of numbers drives an Engine: rows
of several sequences mixed, forks, trims, slides, pages read and written back, tokens drawn. A
round of words drives a Llama: prompts that share beginnings, alone, together, in threads and left
midway, under random sampling settings. Each answer is asked once more of an engine without a
history, and must be the same bits, but behind a slide. A round is all its seed's: --seed N
--rounds 1 repeats it, up to the order in which threads come. Memory may not grow behind the first
quarter of the time, or of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import small_models
import tiny_chat

from llama import SamplingParams
from llama.engine import Engine, isa_names, sample_logits
from llama.generate import Llama
from llama.quant import Kind
from llama.tokenizer import HuggingFace
from llama.trial import memory

SHAPE = small_models.config(vocab_size=60, n_kv_heads=2, max_seq_len=200)
KINDS = (Kind.F32, Kind.F16, Kind.Q8, Kind.Q4, Kind.Q8R, Kind.Q4R, Kind.Q4E)
SEQUENCES = (0, 1, 2, 3, 4, 250)
STEPS = {"numbers": 60, "words": 12}  # of a round


class Differs(AssertionError):
    """A round's seed, its steps, and where the last one came to other numbers."""


@dataclass
class Counts:
    """What was done so far."""

    rounds: int = 0
    steps: int = 0
    compared: int = 0  # rows of logits, tokens drawn, completions


@dataclass
class Kept:
    """What a sequence should hold; behind a slide only its first CLEAN tokens are as if fresh."""

    tokens: list[int] = field(default_factory=list)
    clean: int | None = None

    def cut(self, length: int) -> Kept:
        whole = self.clean is None or self.clean >= length
        return Kept(self.tokens[:length], None if whole else self.clean)


class Numbers:
    """A round on an Engine."""

    def __init__(self, rng: random.Random, path: Path, counts: Counts) -> None:
        self.rng, self.path, self.counts = rng, path, counts
        self.options: dict[str, Any] = {
            "kv": rng.choice((None, "f32", "f16", "q8")), "isa": rng.choice(isa_names()),
            "activations": rng.choice((None, 8, 16)),
        }  # fmt: skip
        self.threads = rng.choice((1, 1, 2, 3))
        self.engine = Engine(path, threads=self.threads, **self.options)
        self.kept = {s: Kept() for s in SEQUENCES}

    def __str__(self) -> str:
        return f"{self.path.name}, {self.threads} threads, {self.options}"

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        kinds = ("rows", "rows", "rows", "fork", "trim", "slide", "move", "draw", "fill")
        while True:
            yield getattr(self, "_" + self.rng.choice(kinds))()

    def close(self) -> None:
        self.engine.close()

    def fresh(self, tokens: list[int]) -> np.ndarray:
        with Engine(self.path, threads=1, **self.options) as engine:
            n = len(tokens)
            got = engine.forward(tokens, [0] * n, range(n), [True] * n)
            assert got is not None
            return got

    def compare(self, rows: list[tuple[int, int]], got: np.ndarray) -> None:
        """ROWS are (sequence, position)."""
        for s in {s for s, _ in rows}:
            kept = self.kept[s]
            right = self.fresh(kept.tokens)
            for (other, p), row in zip(rows, got, strict=True):
                if other != s or not (kept.clean is None or p < kept.clean):
                    continue
                self.counts.compared += 1
                if not np.array_equal(row, right[p]):
                    off = np.abs(row - right[p]).max()
                    raise AssertionError(f"position {p} of sequence {s} is off by {off:g}")

    def pick(self, least: int = 0) -> int | None:
        """A sequence that holds LEAST tokens."""
        found = [s for s, kept in self.kept.items() if len(kept.tokens) >= least]
        return self.rng.choice(found) if found else None

    def _rows(self) -> tuple[str, Callable[[], None]]:
        """Rows of some sequences, in any order among each other."""
        rng = self.rng
        some = rng.sample(SEQUENCES, rng.randint(1, 3))
        room = {s: SHAPE.max_seq_len - len(self.kept[s].tokens) for s in some}
        rows = [s for s in some for _ in range(min(room[s], rng.choice((1, 1, 3, 20, 70))))]
        if rng.random() < 0.5:
            rng.shuffle(rows)
        tokens = [rng.randrange(SHAPE.vocab_size) for _ in rows]
        want = [rng.random() < 0.5 for _ in rows]

        def work() -> None:
            positions = []
            for s, token in zip(rows, tokens, strict=True):
                positions.append(len(self.kept[s].tokens))
                self.kept[s].tokens.append(token)
            got = self.engine.forward(tokens, rows, positions, want)
            assert got is not None
            asked = zip(rows, positions, want, strict=True)
            self.compare([(s, p) for s, p, w in asked if w], got)

        return f"forward(tokens={tokens}, sequences={rows}, want={want})", work

    def _fill(self) -> tuple[str, Callable[[], None]]:
        """A sequence up to the context's last position; one more is refused."""
        s = self.rng.choice(SEQUENCES)
        n = SHAPE.max_seq_len - len(self.kept[s].tokens)
        if not n or self.rng.random() < 0.7:
            return self._rows()
        tokens = [self.rng.randrange(SHAPE.vocab_size) for _ in range(n)]

        def work() -> None:
            start = len(self.kept[s].tokens)
            self.kept[s].tokens += tokens
            got = self.engine.forward(tokens, [s] * n, range(start, start + n), [True] * n)
            assert got is not None
            self.compare([(s, start + i) for i in range(n)], got)

        return f"fill sequence {s} with {tokens}", work

    def _fork(self) -> tuple[str, Callable[[], None]]:
        source, target = self.rng.sample(SEQUENCES, 2)
        length = self.rng.randint(0, len(self.kept[source].tokens))

        def work() -> None:
            self.engine.fork(source, target, length)
            self.kept[target] = self.kept[source].cut(length)

        return f"fork({source}, {target}, {length})", work

    def _trim(self) -> tuple[str, Callable[[], None]]:
        s = self.rng.choice(SEQUENCES)
        length = self.rng.choice((0, self.rng.randint(0, len(self.kept[s].tokens))))

        def work() -> None:
            self.engine.trim(s, length)
            self.kept[s] = self.kept[s].cut(length)

        return f"trim({s}, {length})", work

    def _slide(self) -> tuple[str, Callable[[], None]]:
        s = self.pick(10)
        if s is None or self.rng.random() < 0.5:
            return self._trim()
        n = len(self.kept[s].tokens)
        first = self.rng.randint(0, n - 1)
        count = self.rng.randint(1, n - first)

        def work() -> None:
            self.engine.slide(s, first, count)
            kept = self.kept[s]
            clean = n if kept.clean is None else kept.clean
            del kept.tokens[first : first + count]
            self.kept[s] = Kept(kept.tokens, min(clean, first)).cut(len(kept.tokens))

        return f"slide({s}, {first}, {count})", work

    def _move(self) -> tuple[str, Callable[[], None]]:
        """Pages out and into another sequence, as a saved session does it."""
        source, target = self.rng.sample(SEQUENCES, 2)
        length = self.rng.randint(0, len(self.kept[source].tokens))
        cut = self.rng.randint(0, length)

        def work() -> None:
            first = self.engine.read_kv(source, 0, cut)
            rest = self.engine.read_kv(source, cut, length - cut)
            self.engine.trim(target, 0)
            self.engine.write_kv(target, 0, cut, first)
            self.engine.write_kv(target, cut, length - cut, rest)
            self.kept[target] = self.kept[source].cut(length)

        return f"read {length} positions of {source}, cut at {cut}, write to {target}", work

    def _draw(self) -> tuple[str, Callable[[], None]]:
        """A step whose logits stay inside, and a token drawn from them."""
        s, token = self.rng.choice(SEQUENCES), self.rng.randrange(SHAPE.vocab_size)
        if len(self.kept[s].tokens) == SHAPE.max_seq_len:
            return self._trim()
        params, completion = settings(self.rng, SHAPE.vocab_size), self.rng.randrange(1 << 40)

        def work() -> None:
            kept, at = self.kept[s], len(self.kept[s].tokens)
            kept.tokens.append(token)
            self.engine.forward([token], [s], [at], [True], keep=True)
            seen = kept.tokens[-30:]
            mu = [new_mu(params), new_mu(params)]
            got = self.engine.sample(0, params, seen, completion, at, len(seen) // 2, mu[0])
            logprob, top = self.engine.logprobs(0, got, 3)
            if kept.clean is not None:
                return
            row = self.fresh(kept.tokens)[-1]
            right = sample_logits(row, params, seen, completion, at, len(seen) // 2, mu[1])
            self.counts.compared += 1
            assert (got, mu[0]) == (right, mu[1]), f"token {got} drawn, expected {right}"
            wide = row.astype(np.float64)
            whole = wide.max() + np.log(np.exp(wide - wide.max()).sum())
            assert abs(logprob - (wide[got] - whole)) < 1e-9, "its log-probability"
            assert list(top) == list(np.argsort(-row, kind="stable")[:3]), "the likeliest"

        return f"token {token} to sequence {s}, draw by {params}, completion {completion}", work


def new_mu(params: SamplingParams) -> Any:
    return array("d", [2 * params.mirostat_tau]) if params.mirostat_tau else None


def settings(rng: random.Random, vocab_size: int, **more: Any) -> SamplingParams:
    """Any sampling settings."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.4 else off

    return SamplingParams(
        temperature=maybe(0.0, rng.choice((0.3, 0.8, 1.0, 3.0))),
        top_k=maybe(rng.randint(1, 40), 0), top_p=maybe(rng.uniform(0.1, 1.0), 1.0),
        min_p=maybe(rng.uniform(0, 0.5), 0.0), typical_p=maybe(rng.uniform(0.1, 1.0), 1.0),
        mirostat_tau=maybe(rng.uniform(1, 6), 0.0),
        repetition_penalty=maybe(rng.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({rng.randrange(vocab_size): rng.uniform(-5, 5)}, ()),
        seed=rng.randrange(1 << 30), **more,
    )  # fmt: skip


class Words:
    """A round on a Llama."""

    def __init__(self, rng: random.Random, path: Path, counts: Counts) -> None:
        self.rng, self.path, self.counts = rng, path, counts
        self.options: dict[str, Any] = {
            "kv": rng.choice((None, "f16", "q8")), "max_seq_len": rng.choice((150, 700)),
        }  # fmt: skip
        self.more = {"threads": rng.choice((1, 2)), "lookup": rng.choice((0, 0, 5))}
        self.llm = Llama(path, **self.options, **self.more)
        self.stems = ["".join(rng.choices("abc ", k=rng.randint(1, 90))) for _ in range(4)]

    def __str__(self) -> str:
        return f"{self.path.name}, {self.options}, {self.more}"

    def close(self) -> None:
        self.llm.close()

    def prompt(self) -> str:
        stem = self.rng.choice(self.stems)
        new = stem[: self.rng.randint(1, len(stem))] + "".join(
            self.rng.choices("abc ", k=self.rng.choice((0, 2, 30)))
        )
        if self.rng.random() < 0.3:
            self.stems[self.rng.randrange(4)] = new
        return new[:120]

    def one(self) -> tuple[str, SamplingParams]:
        return self.prompt(), settings(
            self.rng, 259, max_tokens=self.rng.choice((1, 5, 40)),
            logprobs=self.rng.choice((None, 0, 3)), stop=self.rng.choice(((), ("a",), ("bc", " "))),
        )  # fmt: skip

    def check(self, prompt: str, params: SamplingParams, got: Any, number: int = 0) -> None:
        with Llama(self.path, threads=1, **self.options) as fresh:
            right = fresh.generate(prompt, params, n=number + 1)[number]
        self.counts.compared += 1
        for name in ("token_ids", "text", "finish_reason", "logprobs"):
            a, b = getattr(got, name), getattr(right, name)
            assert a == b, f"{name} of {prompt!r} by {params}: {a}, expected {b}"

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        while True:
            kind = self.rng.choice(("one", "several", "batch", "threads", "left"))
            asked = [self.one() for _ in range(1 if kind in ("one", "several", "left") else 5)]
            yield f"{kind}: {asked}", partial(getattr(self, "_" + kind), asked)

    def _one(self, asked: list[tuple[str, SamplingParams]]) -> None:
        [(prompt, params)] = asked
        self.check(prompt, params, self.llm.generate(prompt, params))

    def _several(self, asked: list[tuple[str, SamplingParams]]) -> None:
        [(prompt, params)] = asked
        for number, got in enumerate(self.llm.generate(prompt, params, n=3)):
            self.check(prompt, params, got, number)

    def _batch(self, asked: list[tuple[str, SamplingParams]]) -> None:
        prompts, params = [p for p, _ in asked], [s for _, s in asked]
        for i, got in self.llm.each(prompts, params):
            self.check(prompts[i], params[i], got)

    def _threads(self, asked: list[tuple[str, SamplingParams]]) -> None:
        found: dict[int, Any] = {}

        def work(i: int) -> None:
            found[i] = self.llm.generate(*asked[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, (prompt, params) in enumerate(asked):
            self.check(prompt, params, found[i])

    def _left(self, asked: list[tuple[str, SamplingParams]]) -> None:
        stream = self.llm.stream(*asked[0])
        next(stream, None)
        del stream
        self._one(asked)


def files(folder: Path) -> dict[str, list[Path]]:
    """The models, by the kind of round that uses them."""
    numbers = [small_models.of_kind(folder, SHAPE, kind) for kind in KINDS]
    return {"numbers": numbers, "words": [tiny_chat.write(folder / "chat.bin")]}


def play(seed: int, models: dict[str, list[Path]], counts: Counts) -> None:
    """The round of SEED. Differs where an answer is not the same as without a history."""
    rng = random.Random(seed)
    kind = "words" if seed % 4 == 3 else "numbers"
    path = rng.choice(models[kind])
    rounds: type[Numbers] | type[Words] = {"numbers": Numbers, "words": Words}[kind]
    this = rounds(rng, path, counts)
    done = [f"seed {seed}: {this}"]
    try:
        for _, (text, work) in zip(range(STEPS[kind]), this.steps(), strict=False):
            done.append(text)
            work()
            counts.steps += 1
    except Exception as error:
        raise Differs("\n".join([*done, f"{type(error).__name__}: {error}"])) from error
    finally:
        this.close()
    counts.rounds += 1


def without_caches() -> None:
    """tokenizers never frees the words that a dropped tokenizer has cached: none is to cache."""
    load = HuggingFace._load

    def loaded(data: bytes) -> Any:
        found = load(data)
        found.model._resize_cache(0)
        return found

    HuggingFace._load = staticmethod(loaded)  # type: ignore[method-assign]


def grown(before: int, rounds: int) -> str | None:
    """What is wrong with memory that was BEFORE so many ROUNDS ago: more than a page a round, over
    what one more thread or a longer text may take for good."""
    found = held() - before
    if before == 0 or found <= (4 << 20) + 4096 * rounds:
        return None
    return f"memory grew by {found / 1e6:.1f} MB in {rounds} rounds"


def held() -> int:
    """This process's own memory in bytes; 0 where the system does not say."""
    found = memory()
    return found[0] if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--time", type=float, default=60, help="seconds (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    parser.add_argument("--rounds", type=int, help="so many, whatever time they take")
    args = parser.parse_args()
    counts, start, told = Counts(), time.monotonic(), 0.0
    warm: tuple[int, int] | None = None  # rounds, memory
    without_caches()
    with tempfile.TemporaryDirectory() as folder:
        models = files(Path(folder))
        while counts.rounds != args.rounds:
            seconds = time.monotonic() - start
            if args.rounds is None and seconds > args.time:
                break
            over = seconds / args.time if args.rounds is None else counts.rounds / args.rounds
            if warm is None and over > 0.25:
                gc.collect()
                warm = counts.rounds, held()
            if seconds > told:
                told = seconds + 60
                print(f"{seconds:.0f} s: {counts}, {held() / 1e6:.0f} MB", flush=True)
            try:
                play(args.seed + counts.rounds, models, counts)
            except Differs as error:
                print(error)
                return 1
    gc.collect()
    print(f"{time.monotonic() - start:.0f} s: {counts}, {held() / 1e6:.0f} MB")
    wrong = grown(warm[1], counts.rounds - warm[0]) if warm else None
    if wrong:
        print(wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
