"""The engine's door: what it refuses and how, what a failure leaves behind, and what it holds.

Every refusal is one line that says what was expected and what was found, and after it everything
is as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from llama._lib import ffi, lib
from llama.engine import Engine, Model, isa_names, measure_bandwidth, sample_logits
from llama.errors import LlamaError
from llama.format import read
from llama.quant import Kind, matrix_bytes
from llama.sampling import SamplingParams

SHAPE = small_models.config(vocab_size=50, dim=24, head_dim=6, max_seq_len=300, n_kv_heads=2)
PAGE = 32
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.of_kind(tmp_path_factory.mktemp("engine"), SHAPE, Kind.F32)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path, threads=2) as made:
        yield made


def feed(engine: Engine, n: int, sequence: int = 0, start: int = 0) -> np.ndarray:
    got = engine.forward([7] * n, [sequence] * n, range(start, start + n), [True] * n)
    assert got is not None
    return got


def says(message: str) -> Any:
    return pytest.raises(LlamaError, match=f"^[^\n]*{message}[^\n]*$")


# --- opening


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "gpu"}, 'device "gpu", expected cpu or cuda'),
        ({"device": ""}, 'device "", expected cpu or cuda'),
        ({"device": "CPU"}, "expected cpu or cuda"),
        ({"isa": "sse9"}, 'isa "sse9" is not among the kernels'),
        ({"isa": "Scalar"}, 'isa "Scalar" is not among'),
        ({"kv": "q4"}, "kv is 'q4', expected 'f32', 'f16' or 'q8'"),
        ({"kv": ""}, "kv is '', expected"),
        ({"activations": 4}, "activations is 4, expected 8 or 16"),
        ({"activations": 0}, "activations is 0, expected 8 or 16"),
        ({"threads": 0}, "threads is 0, expected 1 to 1024"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 1025}, "threads is 1025, expected 1 to 1024"),
        ({"threads": 2**40}, "threads is"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_seq_len": 2**24 + 1}, "max_seq_len is 16777217"),
    ],
)
def test_bad_options(path: Path, options: dict[str, Any], message: str) -> None:
    with says(message):
        Engine(path, **options)


def test_cuda_is_used_or_refused_in_one_line(path: Path) -> None:
    try:
        with Engine(path, device="cuda") as engine:
            assert engine.info().device == "cuda"
    except LlamaError as error:
        assert "cuda" in str(error).lower() and "\n" not in str(error)


def test_every_isa_opens_and_scalar_is_last(path: Path) -> None:
    names = isa_names()
    assert names[-1] == "scalar" and len(set(names)) == len(names)
    for name in names:
        with Engine(path, isa=name) as engine:
            assert engine.info().isa == name
    with Engine(path) as engine:
        assert engine.info().isa == names[0]


def test_two_models_open_at_once(path: Path, tmp_path: Path) -> None:
    other = small_models.of_kind(tmp_path, small_models.config(vocab_size=33), Kind.Q8)
    with Engine(path) as a, Engine(other) as b, Engine(path) as c:
        first = feed(a, 40)
        second = feed(b, 20)
        assert np.array_equal(feed(c, 40), first)
        a.close()
        assert np.array_equal(feed(b, 20, sequence=1), second)
        assert np.array_equal(feed(c, 40, sequence=1), first)


# --- bad batches


def snapshot(engine: Engine) -> list[int]:
    return [engine.length(s) for s in range(engine.MAX_SEQUENCES)]


@pytest.mark.parametrize(
    "tokens, sequences, positions, message",
    [
        ([50], [0], [10], "token id 50, expected 0 to 49"),
        ([-1], [0], [10], "token id -1, expected 0 to 49"),
        ([2**31], [0], [10], "token id -1, expected"),
        ([2**63], [0], [10], "token id -1, expected"),
        ([2**70], [0], [10], "tokens: expected integers"),
        ([1.5], [0], [10], "tokens: expected integers, found float64"),
        (["7"], [0], [10], "tokens: expected integers"),
        ([None], [0], [10], "tokens: expected integers"),
        ([7], [256], [0], "sequence 256, expected 0 to 255"),
        ([7], [-1], [0], "sequence -1, expected 0 to 255"),
        ([7], [2**31 - 1], [0], "sequence 2147483647, expected"),
        ([7], [0], [9], "position 9 of sequence 0, expected 10, its length"),
        ([7], [0], [11], "position 11 of sequence 0, expected 10, its length"),
        ([7], [1], [1], "position 1 of sequence 1, expected 0, its length"),
        ([7], [0], [-1], "position -1 does not fit the context of 300 tokens"),
        ([7], [0], [300], "position 300 does not fit the context of 300 tokens"),
        ([7], [0], [2**31], "position -1 does not fit"),
        ([7, 7], [0, 0], [10, 10], "position 10 of sequence 0, expected 11"),
        ([7, 7], [0, 0], [11, 10], "position 11 of sequence 0, expected 10"),
        ([7, 7, 50], [0, 1, 0], [10, 0, 11], "token id 50"),
        ([7, 7], [0], [10, 11], "2 tokens, 1 sequences, 2 positions"),
        ([7], [0], [], "1 tokens, 1 sequences, 0 positions"),
        ([], [0], [10], "0 tokens, 1 sequences, 1 positions"),
    ],
)
def test_bad_batches_change_nothing(
    engine: Engine, tokens: Any, sequences: Any, positions: Any, message: str
) -> None:
    first = feed(engine, 10)
    lengths, held = snapshot(engine), engine.info().kv_bytes
    for keep in (False, True):
        with says(message):
            engine.forward(tokens, sequences, positions, [True] * len(tokens), keep=keep)
    assert snapshot(engine) == lengths and engine.info().kv_bytes == held
    after = feed(engine, 5, start=10)
    engine.trim(0, 0)
    assert np.array_equal(feed(engine, 15), np.concatenate([first, after]))


def test_want_must_have_a_row_each(engine: Engine) -> None:
    for want in ([True], [True] * 3, []):
        with says(f"2 tokens, 2 sequences, 2 positions, {len(want)} wants"):
            engine.forward([1, 2], [0, 0], [0, 1], want)
    assert engine.length(0) == 0


def test_the_context_ends_where_it_says(path: Path) -> None:
    with Engine(path, max_seq_len=37) as engine:
        assert engine.max_seq_len == engine.info().max_seq_len == 37
        with says("position 37 does not fit the context of 37 tokens"):
            feed(engine, 38)
        assert engine.length(0) == 0
        feed(engine, 37)
        with says("position 37 does not fit the context of 37 tokens"):
            feed(engine, 1, start=37)
        assert engine.length(0) == 37
    with Engine(path, max_seq_len=400) as engine:  # longer than trained for is the caller's choice
        assert feed(engine, 400).shape == (400, 50)


def test_empty_batches_do_nothing(engine: Engine) -> None:
    got = engine.forward([], [], [])
    assert got is not None and got.shape == (0, 50)
    assert engine.forward([], [], [], keep=True) is None
    got = engine.forward([7, 7], [0, 0], [0, 1])
    assert got is not None and got.shape == (0, 50) and engine.length(0) == 2


# --- trim and fork


def test_bad_trims_and_forks_change_nothing(engine: Engine) -> None:
    feed(engine, 40)
    feed(engine, 5, sequence=1)
    lengths, held = snapshot(engine), engine.info().kv_bytes
    bad: list[tuple[Any, tuple[int, ...], str]] = [
        (engine.trim, (0, 41), "cannot trim sequence 0 to 41: it has 40 positions"),
        (engine.trim, (2, 1), "cannot trim sequence 2 to 1: it has 0 positions"),
        (engine.trim, (0, -1), "length -1"),
        (engine.trim, (0, 2**40), "length"),
        (engine.trim, (256, 0), "sequence 256, expected 0 to 255"),
        (engine.trim, (-1, 0), "sequence -1, expected 0 to 255"),
        (engine.trim, (2**40, 0), "sequence 1099511627776, expected 0 to 255"),
        (engine.length, (256,), "sequence 256"),
        (engine.length, (-(2**40),), "sequence -1099511627776"),
        (engine.fork, (0, 0, 3), "cannot fork sequence 0 onto itself"),
        (engine.fork, (0, 1, 41), "cannot fork 41 positions of sequence 0: it has 40"),
        (engine.fork, (2, 1, 1), "cannot fork 1 positions of sequence 2: it has 0"),
        (engine.fork, (0, 256, 1), "sequence 256"),
        (engine.fork, (-1, 1, 1), "sequence -1"),
        (engine.fork, (0, 1, -1), "length -1"),
    ]
    for call, arguments, message in bad:
        with says(message):
            call(*arguments)
    assert snapshot(engine) == lengths and engine.info().kv_bytes == held


# --- sampling


def test_sampling_needs_kept_rows(engine: Engine) -> None:
    def sample(row: int) -> int:
        return engine.sample(row, GREEDY, [], 0, 0)

    with says("no logits kept for row 0: the last forward kept 0"):
        sample(0)
    engine.forward([7] * 3, [0] * 3, range(3), [True, False, True], keep=True)
    right = feed(engine, 3, sequence=1)
    engine.trim(1, 0)
    engine.forward([7] * 3, [1] * 3, range(3), [True, False, True], keep=True)
    assert [sample(0), sample(1)] == right[[0, 2]].argmax(axis=1).tolist()
    with says("no logits kept for row 2: the last forward kept 2"):
        sample(2)
    with says("row -1"):
        sample(-1)
    engine.forward([7], [0], [3], keep=True)
    with says("no logits kept for row 0: the last forward kept 0"):
        sample(0)
    engine.forward([7], [0], [4], [True], keep=True)
    sample(0)
    feed(engine, 1, start=5)  # these logits went to the caller: none are kept
    with says("no logits kept for row 0"):
        sample(0)


def test_kept_logits_are_those_handed_out(engine: Engine) -> None:
    params = SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.3, seed=4)
    right = feed(engine, 30)
    engine.forward([7] * 30, [1] * 30, range(30), [True] * 30, keep=True)
    for row in range(30):
        a = engine.sample(row, params, [1, 2, 7], 5, row)
        assert a == sample_logits(right[row], params, [1, 2, 7], 5, row)


def test_sampling_refuses_what_is_no_number() -> None:
    fine = np.zeros(10, np.float32)
    for bad in (np.nan, np.inf):
        broken = fine.copy()
        broken[3] = bad
        for params in (GREEDY, SamplingParams(temperature=1.0), SamplingParams(top_k=2)):
            with says("logit of token 3 is"):
                sample_logits(broken, params)
    with says("every logit is -infinity"):
        sample_logits(np.full(10, -np.inf), GREEDY)
    masked = fine - np.inf
    masked[6] = -1e30
    assert sample_logits(masked, SamplingParams(temperature=1.0)) == 6
    with says("0 logits, expected 1"):
        sample_logits([], GREEDY)
    for seen in ([10], [-1], [0, 2**40]):
        with says("seen token id"):
            sample_logits(fine, GREEDY, seen)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """A model whose sums break down says where; tests/test_not_finite.py has the rest."""
    path = small_models.of_kind(tmp_path, SHAPE, Kind.F32)
    data = bytearray(path.read_bytes())
    with Model(path) as model:
        names = [t.name for t in model.tensors]
    record = read(path).records["layers.0.attention.wq.weight"]
    data[record.offset : record.offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with Model(path) as model, says("layers.0.attention.wq.weight is damaged"):
        model.verify(names.index(record.name))
    with Engine(path) as engine:
        with says("layer 0 gives numbers that are not finite"):
            feed(engine, 3)
        assert engine.length(0) == 0
        engine.forward([7], [0], [0], [True], keep=True)
        with says("layer 0 gives numbers that are not finite"):
            engine.sample(0, GREEDY, [], 0, 0)


# --- after close


def test_use_after_close(path: Path) -> None:
    engine = Engine(path)
    feed(engine, 3)
    model = engine.model
    engine.close()
    engine.close()
    calls: list[Any] = [
        lambda: feed(engine, 1, start=3),
        lambda: engine.forward([], [], []),
        lambda: engine.forward([1], [1], [0], [True], keep=True),
        lambda: engine.trim(0, 0),
        lambda: engine.fork(0, 1, 1),
        lambda: engine.length(0),
        lambda: engine.sample(0, GREEDY, [], 0, 0),
        engine.info,
        lambda: model.config,
        lambda: model.meta,
        lambda: model.tensors,
        lambda: model.tokenizer,
        lambda: model.verify(0),
        lambda: model.rows(0),
        lambda: model.quantize(0, 0, 16, Kind.Q8, 544),
    ]
    for call in calls:
        with says("used after close"):
            call()


# --- what it holds


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_pages_are_taken_on_demand_and_used_again(path: Path, kv: str) -> None:
    with Engine(path, kv=kv, max_seq_len=2**20) as engine:
        info = engine.info()
        head = {"f32": 4 * SHAPE.head_dim, "f16": 2 * SHAPE.head_dim, "q8": SHAPE.head_dim + 4}[kv]
        per_position = 2 * SHAPE.n_layers * SHAPE.n_kv_heads * head
        assert info.kv_bytes_per_position == per_position and info.page_positions == PAGE
        assert info.kv_bytes == 0  # nothing is reserved for a context of a million
        page = per_position * PAGE

        def pages() -> int:
            n, rest = divmod(engine.info().kv_bytes, page)
            assert rest == 0
            return n

        for length in range(1, 3 * PAGE):
            feed(engine, 1, start=length - 1)
            assert pages() == -(-length // PAGE)
        engine.trim(0, 0)
        assert pages() == 3  # free, and kept
        feed(engine, PAGE, sequence=1)
        feed(engine, PAGE + 1, sequence=2)
        assert pages() == 3
        feed(engine, 1, sequence=3)
        assert pages() == 4
        engine.fork(2, 4, PAGE + 1)
        assert pages() == 4  # shared
        feed(engine, 1, sequence=4, start=PAGE + 1)
        assert pages() == 5  # the page that it wrote into was copied, the whole one was not
        feed(engine, 1, sequence=2, start=PAGE + 1)
        assert pages() == 5  # whose only owner is now sequence 2
        engine.fork(3, 2, 1)  # what sequence 2 held is free again: its copy and, with 4's, both
        engine.trim(4, 0)
        for s in range(5, 8):
            feed(engine, 1, sequence=s)
        assert pages() == 5
        for s in range(8):
            engine.trim(s, 0)
        feed(engine, 5 * PAGE)
        assert pages() == 5
        with says("position"):
            feed(engine, 1, start=9)
        assert pages() == 5


@pytest.mark.limits_memory
def test_no_memory_for_a_page_changes_nothing(tmp_path: Path) -> None:
    """A batch of two sequences that share a page, with room left for a few pages of 512 KB."""
    shape = small_models.config(dim=64, head_dim=64, n_heads=8, n_kv_heads=8, n_layers=4,
                                max_seq_len=30000)  # fmt: skip
    program = """if True:
        import resource, sys
        import numpy as np
        from llama.engine import Engine
        from llama.errors import LlamaError
        with Engine(sys.argv[1], threads=2) as engine:
            def feed(n, sequence, start=0):
                return engine.forward([7] * n, [sequence] * n, range(start, start + n), [True] * n)
            first = feed(40, 0)
            engine.fork(0, 1, 40)
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (40 << 20), -1))
            try:
                engine.forward([7] * 9603, [1] * 3 + [0] * 9600, [40, 41, 42, *range(40, 9640)])
            except LlamaError as error:
                print(error)
            assert engine.length(0) == engine.length(1) == 40
            more = feed(5, 1, 40)
            assert np.array_equal(feed(5, 0, 40), more)
            assert np.array_equal(feed(45, 2), np.concatenate([first, more]))
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm to know where to set the limit")
    path = small_models.of_kind(tmp_path, shape, Kind.F32)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program, path], cwd=root, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out of memory for a KV page of 524288 bytes\n"


def test_scratch_does_not_grow_with_the_context(path: Path) -> None:
    with Engine(path, max_seq_len=64) as a, Engine(path, max_seq_len=2**24) as b:
        assert a.info().scratch_bytes == b.info().scratch_bytes
        before = a.info().scratch_bytes
        feed(a, 60)
        assert a.info().scratch_bytes == before
        a.trim(0, 0)
        a.forward([7] * 60, [0] * 60, range(60), [True] * 60, keep=True)
        assert a.info().scratch_bytes == before + 60 * 50 * 4  # the kept logits


def test_info_says_where_it_runs(path: Path, tmp_path: Path) -> None:
    with Engine(path, threads=3) as engine:
        info = engine.info()
        assert (info.device, info.threads, info.max_seq_len) == ("cpu", 3, 300)
        assert info.kv_kind == "f32" and info.isa in isa_names()
        assert 10_000 < info.scratch_bytes < 2**27
    with Engine(small_models.of_kind(tmp_path, SHAPE, Kind.Q4)) as engine:
        assert engine.info().kv_kind == "f16" and engine.config.dtype == "q4"
        assert engine.info().threads >= 1


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < measure_bandwidth(threads=1) < 1e13
    rate = ffi.new("double *")
    for size in (2**62, 2**64 - 1):
        assert lib.llama_measure_bandwidth(1, size, rate) == -1
        assert f"buffer of {size} bytes" in ffi.string(lib.llama_error()).decode()


# --- the model by itself


def test_rows_and_quantize_check_their_places(path: Path) -> None:
    with Model(path) as model:
        whole = model.rows(0)
        assert whole.shape == (50, 24) and np.array_equal(model.rows(0, 17, 20), whole[17:37])
        assert model.rows(0, 50).shape == (0, 24)
        for first, n in ((51, None), (-1, 1), (0, 51), (49, 2), (0, -1), (2**40, 1)):
            with says("rows?"):
                model.rows(0, first, n)
        for index in (-1, len(model.tensors), 2**40):
            with says("tensor"):
                model.rows(index)
            with says("tensor"):
                model.verify(index)
        with says("is a vector: only matrices are quantised"):
            model.quantize(1, 0, 24, Kind.Q8, 544)
        for first, n in ((8, 16), (0, 8), (0, 51), (48, 3)):
            with says("do not make whole strips of 16"):
                model.quantize(0, first, n, Kind.Q8, 544)
        with says("543 bytes given for 16 rows, 544 needed"):
            model.quantize(0, 0, 16, Kind.Q8, 543)
        with says("threads is 5000"):
            model.quantize(0, 0, 16, Kind.Q8, 544, threads=5000)
        blocks, loss = model.quantize(0, 48, 2, Kind.F32, 16 * 24 * 4)
        assert loss.max_error == 0 and len(blocks) == 16 * 24 * 4


def test_quantising_does_not_depend_on_threads(tmp_path: Path) -> None:
    shape = small_models.config(vocab_size=333, dim=70)
    with Model(small_models.of_kind(tmp_path, shape, Kind.F32)) as model:
        for kind in (kind for kind in Kind if not kind.rotated):
            n = matrix_bytes(kind, 333, 70)
            one = model.quantize(0, 0, 333, kind, n, threads=1)
            assert model.quantize(0, 0, 333, kind, n, threads=3) == one
            parts = [
                model.quantize(0, first, min(160, 333 - first), kind, n // 21 * strips)[0]
                for first, strips in ((0, 10), (160, 10), (320, 1))
            ]
            assert b"".join(parts) == one[0]


def test_quantising_names_the_weight_it_cannot_hold(tmp_path: Path) -> None:
    path = small_models.of_kind(tmp_path, SHAPE, Kind.F32)
    offset = read(path).records["tok_embeddings.weight"].offset
    for value in (np.nan, np.inf, 1e30):
        data = bytearray(path.read_bytes())
        at = offset + 4 * (16 * 24 * 2 + 16 * 5 + 3)  # row 35, column 5
        data[at : at + 4] = np.float32(value).tobytes()
        path.write_bytes(data)
        with Model(path) as model, says(r"tok_embeddings.weight: weight \(35, 5\) is .*q8 cannot"):
            model.quantize(0, 0, 50, Kind.Q8, 544 * 4)
