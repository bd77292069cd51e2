"""The same logits to the last bit, whatever else is going on.

A row's logits depend on its sequence's tokens and on nothing else: not on threads, on how a
prompt was cut into calls, on what else is in the batch, on what was trimmed or forked before.
Everything here is compared with `Alone`: one thread, an empty sequence, all tokens in one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from llama.engine import Engine
from llama.quant import Kind

F32 = NDArray[np.float32]

SHAPE = small_models.config(
    vocab_size=171, dim=68, hidden_dim=150, head_dim=14, n_heads=4, n_kv_heads=2, n_layers=2,
    max_seq_len=1400,
)  # fmt: skip
PAGE = 32
# And activations' bits, and how keys and values are kept.
KINDS = [(kind, 16, None) for kind in Kind] + [(Kind.Q8, 8, None), (Kind.Q4R, 8, "q8")]
slow = settings(max_examples=15, suppress_health_check=list(HealthCheck))


class Alone:
    """What the logits of a list of tokens are."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.engine = Engine(path, threads=1, **options)
        self.known: dict[tuple[int, ...], F32] = {}

    def __call__(self, tokens: list[int]) -> F32:
        """(len(tokens), vocab_size)"""
        key, n = tuple(tokens), len(tokens)
        if key not in self.known:
            got = self.engine.forward(tokens, [0] * n, range(n), [True] * n)
            assert got is not None
            self.engine.trim(0, 0)
            self.known[key] = got
        return self.known[key]


class Bench:
    """A model of one kind: its file, what is right, and an engine under test."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.options = path, options
        self.alone = Alone(path, **options)
        self.engine = Engine(path, threads=2, **options)


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0].label}-{p[1]}-{p[2]}")
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    kind, activations, kv = request.param
    path = small_models.of_kind(tmp_path_factory.mktemp("same"), SHAPE, kind)
    made = Bench(path, activations=activations, kv=kv)
    yield made
    made.engine.close()
    made.alone.engine.close()


def tokens_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab_size, n).tolist()  # type: ignore[no-any-return]


def feed(engine: Engine, sequence: int, tokens: list[int], start: int = 0) -> F32:
    """Logits of TOKENS at positions START and on."""
    n = len(tokens)
    got = engine.forward(tokens, [sequence] * n, range(start, start + n), [True] * n)
    assert got is not None
    return got


def clear(engine: Engine) -> None:
    for sequence in range(engine.MAX_SEQUENCES):
        engine.trim(sequence, 0)


# --- threads and chunks


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(bench: Bench, threads: int) -> None:
    tokens = tokens_of(0, 90)
    with Engine(bench.path, threads=threads, **bench.options) as engine:
        assert engine.info().threads == threads
        assert np.array_equal(feed(engine, 3, tokens), bench.alone(tokens))
        for i, token in enumerate(tokens):
            assert np.array_equal(feed(engine, 4, [token], i)[0], bench.alone(tokens)[i])


@slow
@given(cuts=st.sets(st.integers(1, 99)))
def test_any_cut_of_a_prompt(bench: Bench, cuts: set[int]) -> None:
    tokens = tokens_of(0, 100)
    clear(bench.engine)
    for start, end in itertools.pairwise([0, *sorted(cuts), 100]):
        got = feed(bench.engine, 0, tokens[start:end], start)
        assert np.array_equal(got, bench.alone(tokens)[start:end])


def test_a_prompt_longer_than_the_scratch(bench: Bench) -> None:
    """One call that the engine runs in parts of 512 rows is the same as calls of 100."""
    tokens = tokens_of(1, 1300)
    clear(bench.engine)
    pieces = [feed(bench.engine, 0, tokens[i : i + 100], i) for i in range(0, 1300, 100)]
    assert np.array_equal(np.concatenate(pieces), bench.alone(tokens))
    want = np.random.default_rng(2).random(1300) < 0.1
    got = bench.engine.forward(tokens, [1] * 1300, range(1300), want)
    assert np.array_equal(got, bench.alone(tokens)[want])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_positions_in_pieces(bench: Bench, threads: int) -> None:
    """Attention shares out pieces of 512 positions when rows are few, and not in a prompt."""
    tokens = tokens_of(1, 1300)
    places = [511, 512, 513, 1023, 1024, 1299]
    with Engine(bench.path, threads=threads, **bench.options) as engine:
        feed(engine, 0, tokens)
        for i, at in enumerate(places):
            engine.fork(0, i + 1, at)
        n = len(places)
        for rows in [[i] for i in range(n)], [list(range(n))]:
            for row in rows:
                positions = [places[i] for i in row]
                got = engine.forward([tokens[p] for p in positions], [i + 1 for i in row],
                                     positions, [True] * len(row))  # fmt: skip
                assert np.array_equal(got, bench.alone(tokens)[positions])
                for i in row:
                    engine.trim(i + 1, places[i])


@slow
@given(want=st.lists(st.booleans(), min_size=1, max_size=80))
def test_any_rows_may_want_logits(bench: Bench, want: list[bool]) -> None:
    tokens = tokens_of(2, 80)[: len(want)]
    clear(bench.engine)
    n = len(want)
    got = bench.engine.forward(tokens, [0] * n, range(n), want)
    assert np.array_equal(got, bench.alone(tokens)[want])


# --- batches


@slow
@given(data=st.data())
def test_any_interleaving_of_sequences(bench: Bench, data: st.DataObject) -> None:
    """Some sequences, their rows shuffled into one order that keeps each one's own, and that
    order cut into calls."""
    numbers = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6, unique=True))
    texts = {s: tokens_of(s, data.draw(st.integers(1, 70))) for s in numbers}
    order = data.draw(st.permutations([s for s in numbers for _ in texts[s]]))
    at = dict.fromkeys(numbers, 0)
    rows = []
    for s in order:
        rows.append((texts[s][at[s]], s, at[s]))
        at[s] += 1
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)), max_size=5)))
    clear(bench.engine)
    for start, end in itertools.pairwise([0, *cuts, len(rows)]):
        if start == end:
            continue
        tokens, sequences, positions = zip(*rows[start:end], strict=True)
        got = bench.engine.forward(tokens, sequences, positions, [True] * (end - start))
        right = [bench.alone(texts[s])[p] for s, p in zip(sequences, positions, strict=True)]
        assert np.array_equal(got, right)


def test_all_sequences_at_once(bench: Bench) -> None:
    clear(bench.engine)
    n = bench.engine.MAX_SEQUENCES
    texts = [tokens_of(s, 1 + s % 37) for s in range(n)]
    for position in range(37):
        rows = [(t[position], s, position) for s, t in enumerate(texts) if position < len(t)]
        tokens, sequences, positions = zip(*rows, strict=True)
        got = bench.engine.forward(tokens, sequences, positions, [True] * len(rows))
        right = [bench.alone(texts[s])[position] for s in sequences]
        assert np.array_equal(got, right)


# --- going back, and forks

PLACES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 75]


@pytest.mark.parametrize("back_to", PLACES)
def test_trim_and_feed_again(bench: Bench, back_to: int) -> None:
    """Once with the same tokens and once with others."""
    first, other = tokens_of(3, 80), tokens_of(4, 80)
    clear(bench.engine)
    feed(bench.engine, 0, first)
    for tail in (first[back_to:], other[back_to:], first[back_to:]):
        bench.engine.trim(0, back_to)
        got = feed(bench.engine, 0, tail, back_to)
        assert np.array_equal(got, bench.alone(first[:back_to] + tail)[back_to:])


@pytest.mark.parametrize("at", PLACES)
def test_forks_never_write_to_each_other(bench: Bench, at: int) -> None:
    """A trunk and two forks of it grow in turns; a fork of a fork, cut inside the shared part."""
    trunk = tokens_of(5, 75)
    clear(bench.engine)
    feed(bench.engine, 0, trunk)
    bench.engine.fork(0, 1, at)
    bench.engine.fork(1, 2, at)
    bench.engine.fork(2, 3, at // 2)
    texts = {0: trunk, 1: trunk[:at], 2: trunk[:at], 3: trunk[: at // 2]}
    for step in range(3):
        for s in (2, 0, 3, 1):
            new = tokens_of(10 * step + s, 15)
            got = feed(bench.engine, s, new, len(texts[s]))
            start, texts[s] = len(texts[s]), texts[s] + new
            assert np.array_equal(got, bench.alone(texts[s])[start:]), (step, s)
    bench.engine.trim(0, 0)  # what the others share must outlive it
    for s in (1, 2, 3):
        got = feed(bench.engine, s, [1], len(texts[s]))
        assert np.array_equal(got[0], bench.alone([*texts[s], 1])[-1])


def test_forks_grow_in_one_batch(bench: Bench) -> None:
    """The page that all share is copied once for each within the same call."""
    trunk = tokens_of(6, PAGE + 5)
    clear(bench.engine)
    feed(bench.engine, 0, trunk)
    for s in range(1, 9):
        bench.engine.fork(0, s, len(trunk))
    texts = [[*trunk, s] for s in range(9)]
    got = bench.engine.forward(range(9), range(9), [len(trunk)] * 9, [True] * 9)
    assert np.array_equal(got, [bench.alone(text)[-1] for text in texts])


def test_a_fork_over_what_was_there(bench: Bench) -> None:
    clear(bench.engine)
    one, two = tokens_of(7, 70), tokens_of(8, 50)
    feed(bench.engine, 0, one)
    feed(bench.engine, 1, two)
    bench.engine.fork(0, 1, 40)
    assert bench.engine.length(1) == 40
    assert np.array_equal(
        feed(bench.engine, 1, two[40:], 40), bench.alone(one[:40] + two[40:])[40:]
    )
    bench.engine.fork(1, 0, 0)
    assert bench.engine.length(0) == 0
    assert np.array_equal(feed(bench.engine, 0, two), bench.alone(two))


# --- anything in any order


class Walk(RuleBasedStateMachine):
    """Random extends, trims and forks of four sequences; `texts` says what each should hold."""

    model: Bench
    texts: dict[int, list[int]]

    @initialize()
    def start(self) -> None:
        clear(self.model.engine)
        self.texts = {s: [] for s in range(4)}

    @rule(
        rows=st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, SHAPE.vocab_size - 1), st.booleans()),
            min_size=1, max_size=70,
        )
    )  # fmt: skip
    def extend(self, rows: list[tuple[int, int, bool]]) -> None:
        positions = []
        for s, token, _ in rows:
            positions.append(len(self.texts[s]))
            self.texts[s].append(token)
        sequences, tokens, want = zip(*rows, strict=True)
        got = self.model.engine.forward(tokens, sequences, positions, want)
        wanted = [(s, p) for s, p, w in zip(sequences, positions, want, strict=True) if w]
        assert got is not None and len(got) == len(wanted)
        for row, (s, p) in zip(got, wanted, strict=True):
            assert np.array_equal(row, self.model.alone(self.texts[s])[p])

    @rule(s=st.integers(0, 3), share=st.floats(0, 1))
    def trim(self, s: int, share: float) -> None:
        length = round(share * len(self.texts[s]))
        self.model.engine.trim(s, length)
        del self.texts[s][length:]

    @rule(source=st.integers(0, 3), step=st.integers(1, 3), share=st.floats(0, 1))
    def fork(self, source: int, step: int, share: float) -> None:
        target = (source + step) % 4
        length = round(share * len(self.texts[source]))
        self.model.engine.fork(source, target, length)
        self.texts[target] = self.texts[source][:length]

    @precondition(lambda self: any(self.texts.values()))
    @rule()
    def next_token_of_each(self) -> None:
        self.extend([(s, 5, True) for s in range(4)])

    @invariant()
    def lengths(self) -> None:
        for s, text in getattr(self, "texts", {}).items():
            assert self.model.engine.length(s) == len(text)


def test_random_walk(bench: Bench) -> None:
    class Here(Walk):
        model = bench

    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Here,
        settings=settings(
            max_examples=12, stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
