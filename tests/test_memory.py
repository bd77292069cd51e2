"""Memory that is not there, memory that is not given back, and the plan before any is taken."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
import tiny_chat
from building import build
from test_not_finite import broken

from llama import SamplingParams, cli, engine, memory
from llama.engine import Engine
from llama.errors import LlamaError
from llama.generate import Llama
from llama.info import describe
from llama.memory import Free, Plan
from llama.quant import Kind

SHAPE = small_models.config(max_seq_len=600)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.write_bin(tmp_path_factory.mktemp("memory") / "m.bin", SHAPE)


@pytest.fixture(scope="module")
def failing() -> Path:
    """tests/failing.c, built; under AddressSanitizer where the library is."""
    library = os.environ.get("LLAMA_LIBRARY")
    watched = Path(library).with_name("failing") if library else None
    return watched if watched and watched.exists() else build("failing") / "failing"


def refused(*command: object) -> list[int]:
    """How many requests tests/failing.c refused of each file, all of them rightly answered."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [int(line.split(": ")[-1].split()[0]) for line in done.stdout.splitlines()]


def test_each_request_refused(failing: Path, path: Path, tmp_path: Path) -> None:
    q8r = small_models.of_kind(tmp_path, SHAPE, Kind.Q8R)
    assert [n > 60 for n in refused(failing, path, q8r)] == [True, True]


def test_each_request_refused_of_a_broken_model(failing: Path, path: Path, tmp_path: Path) -> None:
    name = "layers.1.feed_forward.w1.weight"
    file = broken(path, tmp_path / "nan.bin", name, np.nan)
    assert refused(failing, "broken", file)[0] > 20


# --- nothing stays behind

OPENINGS, TEXTS = (1000, 10000) if os.environ.get("LLAMA_TEST_LONG") else (50, 150)


RESIDENT, DATA = 1, 5  # columns of /proc/self/statm


def held(what: int) -> int:
    """This process's memory or, written to or not, its heap and private maps, in bytes."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm")
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[what]) * os.sysconf("SC_PAGE_SIZE")


def sanitized() -> bool:
    """A sanitizer keeps what was freed; AddressSanitizer finds each byte that was not."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "san.so" in maps.read_text()


def check_flat(once: Callable[[], object], times: int, most: int, what: int = RESIDENT) -> None:
    """So many add no more than MOST bytes, when some have filled what is kept for later."""
    for _ in range(times // 5):
        once()
    for _ in range(3):  # a page of the system's becomes a large one by chance; leaks, each time
        before = held(what)
        for _ in range(times):
            once()
        grown = held(what) - before
        if grown < most or sanitized():
            return
    raise AssertionError(f"{grown} bytes more, at most {most}")


def test_opened_and_closed_again_and_again(path: Path) -> None:
    def once() -> None:
        with Engine(path, threads=2) as opened:
            opened.forward([1, 2, 3], [0, 0, 1], [0, 1, 0], [True] * 3)

    check_flat(once, OPENINGS, 1 << 20)


def test_a_heap_that_others_use_too(tmp_path: Path) -> None:
    """A tokenizer's first text makes its library keep a little for good: where that lies beside
    what a closed model gave back, the next one must still not ask for more."""
    path = tiny_chat.write(tmp_path / "tiny.bin")

    def once() -> None:
        with Llama(path, threads=1, max_seq_len=200) as llm:
            llm.generate("abc", SamplingParams(max_tokens=3))

    check_flat(once, OPENINGS, 8 << 20, DATA)


def test_text_after_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Llama(tiny_chat.write(tmp_path / "tiny.bin"), threads=1, max_seq_len=200) as llm:

        def once() -> None:
            words = bytes(rng.integers(97, 123, 20)).decode()
            llm.generate(words, SamplingParams(max_tokens=3, top_k=20, logprobs=2))

        check_flat(once, TEXTS, 4 << 20)


# --- the plan


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:       8000000 kB\nMemAvailable:    1000000 kB\n"
V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    "groups, right",
    [
        ({}, Free(1_024_000_000, "this machine")),
        # files that the group holds can go
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "900\n",
          f"{V2}/a/b/memory.current": "500\n",
          f"{V2}/a/b/memory.stat": "anon 300\nactive_file 90\ninactive_file 10\n"},
         Free(500, "the control group /a/b")),
        # a limit of a group around it; its own is none
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max\n",
          f"{V2}/a/b/memory.current": "5\n", f"{V2}/a/memory.max": "7000\n",
          f"{V2}/a/memory.current": "9000\n"}, Free(0, "the control group /a")),
        # a container that is told its path outside, and sees its own group on top
        ({"proc/self/cgroup": "12:cpu,cpuacct:/x\n3:rdma,memory:/docker/1f\n",
          f"{V1}/memory.limit_in_bytes": "4000\n", f"{V1}/memory.usage_in_bytes": "1000\n",
          f"{V1}/memory.stat": "active_file 1\ntotal_active_file 200\n"},
         Free(3200, "the control group /")),
        # no limit, as version 1 writes it
        ({"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
          f"{V1}/memory.usage_in_bytes": "1000\n"}, Free(1_024_000_000, "this machine")),
    ],
)  # fmt: skip
def test_what_is_free(tmp_path: Path, groups: dict[str, str], right: Free) -> None:
    assert memory.free(write(tmp_path, {"proc/meminfo": MEMINFO, **groups})) == right


def test_here_something_is_free() -> None:
    found = memory.free()
    assert found is not None and 1 << 20 < found.bytes < 1 << 50


def test_the_plan_to_the_byte() -> None:
    """Pages of 32 positions: 100 positions take four."""
    plan = Plan(weights=10**6, scratch=1000, max_seq_len=100, page_positions=32,
                kv_bytes_per_position=10, free=Free(1000 + 4 * 320, "it"))  # fmt: skip
    assert plan.kv == 4 * 320 and plan.refusal is None and plan.longest == 100
    less = replace(plan, free=Free(1000 + 4 * 320 - 1, "it"))
    assert less.longest == 96 and less.refusal and replace(less, max_seq_len=96).refusal is None
    nothing = replace(plan, free=Free(500, "it"))
    assert nothing.longest == 0 and nothing.refusal and "no context fits" in nothing.refusal
    assert plan.warning and replace(plan, weights=2000).warning is None
    unknown = replace(plan, free=None)
    assert unknown.refusal is unknown.warning is None and unknown.longest == 100


def test_what_cannot_fit_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(path) as opened:
        info = opened.info()
    room = info.scratch_bytes + 64 * info.kv_bytes_per_position
    monkeypatch.setattr(engine, "free", lambda: Free(room, "a test"))
    with pytest.raises(LlamaError, match=r"65 tokens.* a test has free: .* is 64 \(--max-seq"):
        Engine(path, max_seq_len=65)
    with pytest.warns(UserWarning, match="600 tokens would take .* a test has free: it is 64 here"):
        opened = Engine(path)
    with opened:
        assert opened.max_seq_len == 64
    lines = list(describe(path))
    assert "scratch" in lines[-2] and "the longest context that fits is 64" in lines[-1]
    with Engine(path, max_seq_len=64) as opened:
        n = range(64)
        assert opened.forward([1] * 64, [0] * 64, n) is not None
        assert opened.info().kv_bytes + opened.info().scratch_bytes <= room


def test_weights_that_do_not_fit_are_a_note(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Engine._plan

    def heavy(self: Engine) -> Plan:
        return replace(right(self), weights=10**15)

    monkeypatch.setattr(Engine, "_plan", heavy)
    with pytest.warns(UserWarning, match="weights of 1,000,000.0 GB do not fit"):
        Engine(path).close()
    parser = cli.Parser(prog="run.py")
    cli.add_model_flags(parser)
    cli.add_speculation_flags(parser)
    cli.add_overflow_flags(parser, "stop", "stop")
    cli.open_model(parser.parse_args(["--bin", str(path)])).close()
    assert "note: weights of 1,000,000.0 GB do not fit" in capsys.readouterr().err
