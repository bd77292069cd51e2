"""Threads and processes: many in one model and in several, doors shut under running calls, streams
left midway, and forks at any moment. The sanitizers (make tsan, make asan) watch these first.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_models
import tiny_chat

from llama import SamplingParams, stages
from llama.engine import Engine, Model
from llama.errors import LlamaError
from llama.generate import Llama
from llama.quant import Kind, matrix_bytes

SHAPE = small_models.config(vocab_size=50, dim=24, head_dim=6, max_seq_len=300, n_kv_heads=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.of_kind(tmp_path_factory.mktemp("threads"), SHAPE, Kind.F32)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write(tmp_path_factory.mktemp("threads") / "tiny.bin")


def feed(engine: Engine, n: int, sequence: int = 0, start: int = 0) -> np.ndarray:
    got = engine.forward([7] * n, [sequence] * n, range(start, start + n), [True] * n)
    assert got is not None
    return got


@contextmanager
def running(works: Iterable[Callable[[], None]]) -> Iterator[None]:
    """All WORKS, each in its thread, while the block runs; waits for them."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def until_closed(call: Callable[[], object], ends: list[str]) -> Callable[[], None]:
    """CALL again and again until it fails, which ENDS then says."""

    def work() -> None:
        try:
            while True:
                call()
        except LlamaError as error:
            ends.append(str(error))

    return work


def child(work: Callable[[], str], seconds: int = 120) -> str:
    """What WORK returns in a forked child, or how the child ended."""
    out, into = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            os.write(into, work().encode())
        except BaseException as error:
            os.write(into, repr(error).encode())
        finally:
            os._exit(0)
    os.close(into)
    deadline = time.monotonic() + seconds
    while os.waitpid(number, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.005)
    with open(out, "rb") as pipe:
        return pipe.read().decode() or "it hung or crashed"


# --- one engine, several, and a door that shuts


def test_threads_share_an_engine(path: Path) -> None:
    with Engine(path, threads=2) as engine:
        right = feed(engine, 60, sequence=200)
        wrong: list[int] = []

        def work(sequence: int) -> None:
            for _ in range(20):
                at = 0
                for n in (1, 20, 3, 36):
                    got = feed(engine, n, sequence, start=at)
                    if not np.array_equal(got, right[at : at + n]):
                        wrong.append(sequence)
                    at += n
                engine.fork(sequence, sequence + 50, 33)
                engine.trim(sequence, 0)
                engine.info()

        with running(partial(work, s) for s in range(4)):
            pass
        assert not wrong
        assert np.array_equal(feed(engine, 27, 53, start=33), right[33:])


def test_engines_do_not_hear_each_other(path: Path, tmp_path: Path) -> None:
    """Two sessions of one file and one of another, opened, run and closed side by side."""
    other = small_models.of_kind(tmp_path, small_models.config(), Kind.Q8)
    right = {}
    for name in (path, other):
        with Engine(name, threads=1) as engine:
            right[name] = feed(engine, 30)
    wrong: list[Path] = []

    def work(name: Path) -> None:
        for threads in (1, 2, 3, 2, 1):
            with Engine(name, threads=threads) as engine:
                if not np.array_equal(feed(engine, 30, sequence=threads), right[name]):
                    wrong.append(name)

    with running(partial(work, n) for n in (path, other, path, other)):
        pass
    assert not wrong


def test_errors_are_each_threads_own(path: Path) -> None:
    with Engine(path) as engine:
        seen: dict[int, set[str]] = {}

        def work(sequence: int) -> None:
            found = seen.setdefault(sequence, set())
            for _ in range(200):
                try:
                    engine.trim(sequence, sequence + 1)
                except LlamaError as error:
                    found.add(str(error))

        with running(partial(work, s) for s in range(4)):
            pass
    for s, messages in seen.items():
        assert messages == {f"cannot trim sequence {s} to {s + 1}: it has 0 positions"}


@pytest.mark.parametrize("_again", range(8))
def test_an_engine_closed_under_running_calls(path: Path, _again: int) -> None:
    """Each thread goes on until the door is shut on it; nobody's memory goes under its feet."""
    engine = Engine(path, threads=2)
    zeros = np.zeros((200, SHAPE.dim), np.float32)
    ends: list[str] = []

    def work(sequence: int) -> None:
        feed(engine, 50, sequence)
        engine.trim(sequence, 0)

    def stage() -> None:
        stages.run_stage(engine, 0, 0, zeros.copy(), zeros, {})

    with running(until_closed(call, ends) for call in (partial(work, 1), partial(work, 2), stage)):
        feed(engine, 100, sequence=9)
        engine.close()
    assert len(ends) == 3 and all("used after close" in end for end in ends)


@pytest.mark.parametrize("_again", range(8))
def test_a_model_closed_under_running_calls(tmp_path: Path, _again: int) -> None:
    shape = small_models.config(vocab_size=1000, dim=96, head_dim=24)
    size = matrix_bytes(Kind.Q8, shape.vocab_size, shape.dim)
    model = Model(small_models.of_kind(tmp_path, shape, Kind.F32))
    n = next(i for i, t in enumerate(model.tensors) if t.name == "tok_embeddings.weight")
    x = np.ones((3, shape.dim), np.float32)
    ends: list[str] = []
    calls: list[Callable[[], object]] = [
        lambda: model.verify(n), lambda: model.rows(n), lambda: model.meta, lambda: model.tokenizer,
        lambda: model.quantize(n, 0, shape.vocab_size, Kind.Q8, size, 2),
        lambda: stages.multiply(model, n, x, threads=2),
    ]  # fmt: skip
    with running(until_closed(call, ends) for call in calls):
        model.verify(n)
        model.close()
    assert len(ends) == len(calls) and all("used after close" in end for end in ends)


def test_streams_left_midway_by_many_threads(chat: Path) -> None:
    prompts = [f"Text {n} of" for n in range(4)]
    with Llama(chat, threads=2) as llm, Llama(chat, threads=1) as alone:
        right = [alone.generate(prompt, GREEDY).text for prompt in prompts]
        found: list[tuple[int, str]] = []

        def work(n: int) -> None:
            for _ in range(6):
                stream = llm.stream(prompts[n], GREEDY)
                next(stream)
                del stream  # in the middle
                found.append((n, llm.generate(prompts[n], GREEDY).text))

        with running(partial(work, n) for n in range(4)):
            pass
        gc.collect()
        assert len(found) == 24 and all(text == right[n] for n, text in found)
        assert not llm._batches.slots._busy


# --- forks


FOREIGN = "belongs to another process, which forked: open one here"
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.mark.forks
def test_a_forked_child(path: Path) -> None:
    """What it inherits of a session says so, whatever a thread was in the middle of when it
    forked; the file is its own, and so is a session it opens."""
    with Engine(path, threads=3) as engine:
        right = feed(engine, 40)
        calls: list[Callable[[], object]] = [
            lambda: feed(engine, 1, start=40), lambda: engine.length(0), engine.info,
            lambda: engine.trim(0, 1), lambda: engine.fork(0, 1, 1),
            lambda: engine.slide(0, 0, 1), lambda: engine.read_kv(0, 0, 1),
            lambda: engine.sample(0, GREEDY, [], 0, 0), lambda: engine.logprobs(0, 1, 1),
        ]  # fmt: skip

        def inherited() -> str:
            for call in calls:
                with pytest.raises(LlamaError, match=FOREIGN):
                    call()
            engine.model.verify(0)
            with Engine(path, threads=2) as own:
                same = np.array_equal(feed(own, 40), right)
            engine.close()
            engine.close()
            return "the same" if same else "other logits"

        stop = threading.Event()

        def busy(sequence: int) -> None:
            while not stop.is_set():
                feed(engine, 50, sequence)
                engine.trim(sequence, 0)

        with running(partial(busy, s) for s in (3, 4)):
            try:
                ends = [child(inherited) for _ in range(12)]
            finally:
                stop.set()
        assert set(ends) == {"the same"}
        assert np.array_equal(feed(engine, 40, sequence=1), right)


@pytest.mark.forks
def test_a_fork_of_a_llama_that_speaks(chat: Path) -> None:
    with Llama(chat, threads=2) as llm:
        right = llm.generate("Once", GREEDY).text
        open_stream = llm.stream("Once more", GREEDY)
        next(open_stream)

        def inherited() -> str:
            uses: list[Callable[[], object]] = [
                lambda: llm.generate("Once", GREEDY), lambda: next(llm.stream("Once")),
                lambda: next(open_stream), lambda: llm.logits([1]),
            ]  # fmt: skip
            for use in uses:
                with pytest.raises(LlamaError, match=f"this Llama {FOREIGN}"):
                    use()
            llm.close()
            with Llama(chat, threads=2) as own:
                return own.generate("Once", GREEDY).text

        stop = threading.Event()

        def busy(n: int) -> None:
            while not stop.is_set():
                llm.generate(f"Text {n}", GREEDY)

        with running(partial(busy, n) for n in range(3)):
            try:
                ends = [child(inherited) for _ in range(12)]
            finally:
                stop.set()
        assert set(ends) == {right}
        assert "".join(open_stream) and llm.generate("Once", GREEDY).text == right
