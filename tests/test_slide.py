"""A sequence that slides: the engine against the same procedure in model.py, against transformers
where a fresh run can be its equal, and against itself in any company.

In a network of one layer a key depends on its own token and position alone. So there, and only
there, what follows a slide has the very logits of a fresh run on the text that is left.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from numpy.typing import NDArray
from test_logits import Coded

from llama.config import Config, Rope
from llama.engine import Engine, isa_names
from llama.errors import LlamaError
from llama.model import Cache, Transformer
from llama.quant import Kind

F32 = NDArray[np.float32]
ROPES: dict[str, tuple[float, ...]] = {
    "plain": (), "linear": (4.0,), "llama3": (8.0, 1.0, 4.0, 64.0),
    "yarn": (4.0, 40.0, 8.0, 1.0, 1.25, 1.0), "dynamic": (2.0, 200.0),
}  # fmt: skip
SIZE = 200


def shape_of(rope: str, seed: int, **changes: Any) -> Config:
    rng = np.random.default_rng(seed)
    n_kv_heads = int(rng.integers(1, 4))
    settings: dict[str, Any] = {
        "vocab_size": 61, "dim": int(rng.integers(20, 60)), "hidden_dim": int(rng.integers(20, 60)),
        "head_dim": 2 * int(rng.integers(2, 45)), "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * int(rng.integers(1, 4)), "n_layers": int(rng.integers(2, 4)),
        "max_seq_len": SIZE, "rope_theta": float(rng.choice([100.0, 1e4, 5e5])),
        "rope_scaling": Rope[rope.upper()], "rope_numbers": ROPES[rope],
    }  # fmt: skip
    return small_models.config(**(settings | changes))


def feed(engine: Engine, tokens: list[int], sequence: int = 0) -> F32:
    start, n = engine.length(sequence), len(tokens)
    got = engine.forward(tokens, [sequence] * n, range(start, start + n), [True] * n)
    assert got is not None
    return got


def far(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def tokens_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, n).tolist()  # type: ignore[no-any-return]


class Half(Transformer):
    """model.py with keys and values rounded to 16 bits as they are stored, and moved."""

    def store(self, cache: Cache, layer: int, k: Any, v: Any) -> Any:
        return super().store(cache, layer, k.half().to(k.dtype), v.half().to(v.dtype))

    def slide(self, cache: Cache, first: int, count: int) -> None:
        super().slide(cache, first, count)
        for keys in cache.keys:
            keys[first:] = [key.half().to(key.dtype) for key in keys[first:]]


# --- against model.py


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rope", list(ROPES))
def test_slides_are_model_pys(tmp_path: Path, rope: str, seed: int) -> None:
    """One slide and several, by odd numbers, each followed by tokens that look at what moved."""
    shape = shape_of(rope, seed)
    path = small_models.write_bin(tmp_path / "model.bin", shape, seed)
    rng = np.random.default_rng(seed)
    for kv, judge, bound in (
        ("f32", Transformer(path), 1e-5), ("f16", Half(path), 1e-3),
        ("f16", Transformer(path), 5e-3),
        ("q8", Coded(path), 1e-2), ("q8", Transformer(path), 1e-1),
    ):  # fmt: skip
        cache = Cache(shape.n_layers)
        with Engine(path, kv=kv) as engine:
            for _ in range(4):
                fresh = tokens_of(seed, int(rng.integers(1, SIZE - cache.length + 1)))
                right = judge.forward(fresh, cache).numpy()
                assert far(feed(engine, fresh), right) <= bound
                keep = int(rng.integers(0, cache.length))
                count = int(rng.integers(1, cache.length - keep + 1))
                judge.slide(cache, keep, count)
                engine.slide(0, keep, count)
                assert engine.length(0) == cache.length


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rope", list(ROPES))
def test_one_layer_after_a_slide_is_transformers_on_what_is_left(
    tmp_path: Path, rope: str, seed: int
) -> None:
    pytest.importorskip("transformers")
    from llama import checkpoints

    shape = shape_of(rope, seed, n_layers=1)
    theirs = small_models.transformers_llama(shape, seed=seed)
    theirs.save_pretrained(tmp_path / "hf")
    checkpoints.export(tmp_path / "hf", tmp_path / "model.bin", say=lambda _: None)
    with Engine(tmp_path / "model.bin") as engine:
        text = tokens_of(seed, 150)
        feed(engine, text)
        for keep, count in ((5, 37), (0, 1), (33, 50), (4, 31)):
            engine.slide(0, keep, count)
            del text[keep : keep + count]
            text += tokens_of(seed + 1, 30)
            with torch.inference_mode():
                right = theirs(torch.tensor([text])).logits[0, -30:].numpy()
            assert far(feed(engine, text[-30:]), right) <= 1e-4


# --- to the last bit


def replayed(path: Path, kv: str, history: list[Any]) -> tuple[F32, bytes]:
    """The last logits and all keys and values of a sequence that went through HISTORY alone."""
    with Engine(path, kv=kv, isa="scalar", threads=1) as engine:
        for what, *numbers in history:
            if what == "feed":
                got = feed(engine, numbers[0])
            elif what == "slide":
                engine.slide(0, *numbers)
            else:
                engine.trim(0, *numbers)
        got = feed(engine, [7])
        return got[-1], bytes(engine.read_kv(0, 0, engine.length(0)))


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("seed", range(6))
def test_in_any_company_on_any_isa(tmp_path: Path, seed: int, kv: str) -> None:
    """Sequences that are fed, forked, trimmed and slid share pages, and none hurts another; bits
    are those of each alone, on one thread, in plain C."""
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("llama3", seed), seed)
    rng = np.random.default_rng(seed)
    histories: list[list[Any]] = [[] for _ in range(4)]
    isa = isa_names()[seed % len(isa_names())]
    with Engine(path, kv=kv, isa=isa, threads=1 + seed % 3) as engine:
        for step in range(40):
            s, other = (int(i) for i in rng.choice(4, 2, replace=False))
            length = engine.length(s)
            what = rng.choice(["feed", "fork", "slide", "slide", "trim"])
            if what == "feed" or length == 0:
                tokens = tokens_of(step, int(rng.integers(1, 70)))[: SIZE - 1 - length]
                if tokens:
                    feed(engine, tokens, s)
                    histories[s].append(("feed", tokens))
            elif what == "fork":
                n = int(rng.integers(0, length + 1))
                engine.fork(s, other, n)
                histories[other] = [*histories[s], ("trim", n)]
            elif what == "slide":
                first = int(rng.integers(0, length + 1))
                count = int(rng.integers(0, length - first + 1))
                engine.slide(s, first, count)
                histories[s].append(("slide", first, count))
            elif step % 4 == 0:
                n = int(rng.integers(0, length + 1))
                engine.trim(s, n)
                histories[s].append(("trim", n))
        for s, history in enumerate(histories):
            logits, kv_bytes = replayed(path, kv, history)
            assert np.array_equal(feed(engine, [7], s)[-1], logits), s
            assert bytes(engine.read_kv(s, 0, engine.length(s))) == kv_bytes


def test_pages_held_alone_are_used_again_and_shared_ones_copied(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("plain", 0))
    with Engine(path) as engine:
        page = engine.info().kv_bytes_per_position * 32

        def pages() -> int:
            return engine.info().kv_bytes // page

        feed(engine, tokens_of(0, 5 * 32))
        engine.slide(0, 40, 50)
        assert (engine.length(0), pages()) == (110, 5)
        engine.fork(0, 1, 110)
        engine.slide(0, 40, 7)  # page 0 stays shared; of the other three each gets its own
        assert (engine.length(0), engine.length(1), pages()) == (103, 110, 4 + 3)
        feed(engine, tokens_of(1, 32), 2)  # nothing was lost on the way
        assert pages() == 8


# --- what cannot be


def test_bad_slides_change_nothing(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("plain", 1))
    with Engine(path) as engine:
        feed(engine, tokens_of(0, 50))
        before = bytes(engine.read_kv(0, 0, 50))
        for first, count in ((0, 51), (51, 0), (50, 1), (2**31 - 1, 2**31 - 1)):
            with pytest.raises(LlamaError, match="cannot drop .* of sequence 0: it has 50"):
                engine.slide(0, first, count)
        for numbers in ((0, -1, 1), (0, 1, -1), (256, 0, 0), (-1, 0, 0), (0, 0, 2**31)):
            with pytest.raises(LlamaError, match="expected 0 to"):
                engine.slide(*numbers)
        engine.slide(0, 3, 0)
        assert bytes(engine.read_kv(0, 0, 50)) == before
        engine.slide(0, 3, 47)
        assert bytes(engine.read_kv(0, 0, 3)) == before[: len(before) // 50 * 3]


def test_dynamic_scaling_slides_only_within_the_original_length(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("dynamic", 0))
    with Engine(path, max_seq_len=201) as engine:
        feed(engine, tokens_of(0, 50))
        with pytest.raises(LlamaError, match="a context of 201 tokens cannot slide.* beyond 200"):
            engine.slide(0, 3, 5)
        assert engine.length(0) == 50
    with Engine(path, max_seq_len=200) as engine:
        feed(engine, tokens_of(0, 50))
        engine.slide(0, 3, 5)
        assert engine.length(0) == 45


@pytest.mark.limits_memory
def test_no_memory_for_a_page_leaves_the_sequence(tmp_path: Path) -> None:
    """A slide that must copy 200 shared pages of 512 KB, with room for some of them."""
    shape = small_models.config(dim=64, head_dim=64, n_heads=8, n_kv_heads=8, n_layers=4,
                                max_seq_len=30000)  # fmt: skip
    path = small_models.of_kind(tmp_path, shape, Kind.F32)
    program = """if True:
        import resource, sys
        import numpy as np
        from llama.engine import Engine
        from llama.errors import LlamaError
        with Engine(sys.argv[1], threads=2) as engine:
            step = engine.info().kv_bytes_per_position
            engine.forward([7] * 40, [0] * 40, range(40))
            some = engine.read_kv(0, 0, 40)
            for start in range(40, 6400, 40):
                engine.write_kv(0, start, 40, some)
            engine.fork(0, 1, 6400)
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (40 << 20), -1))
            before, pages = bytes(engine.read_kv(1, 6390, 10)), engine.info().kv_bytes
            try:
                engine.slide(1, 5, 3)
            except LlamaError as error:
                print(error)
            assert engine.length(0) == engine.length(1) == 6400
            assert bytes(engine.read_kv(1, 6390, 10)) == before
            taken = engine.info().kv_bytes - pages  # free again
            engine.trim(1, 40)
            engine.slide(1, 5, 3)
            assert engine.info().kv_bytes == pages + taken and taken > 0
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm to know where to set the limit")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program, path], cwd=root, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out of memory for a KV page of 524288 bytes\n"


# --- the plain layout


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_the_plain_layout_is_what_model_py_holds(tmp_path: Path, kv: str) -> None:
    shape = shape_of("yarn", 3)
    path = small_models.write_bin(tmp_path / "model.bin", shape, 3)
    model, cache = Coded(path) if kv == "q8" else Transformer(path), Cache(shape.n_layers)
    tokens = tokens_of(3, 70)
    model.forward(tokens, cache)
    right = np.stack([
        np.stack([torch.stack(keys).numpy(), torch.stack(values).numpy()], 1)
        for keys, values in zip(cache.keys, cache.values, strict=True)
    ], 1)  # fmt: skip
    with Engine(path, kv=kv) as engine:
        feed(engine, tokens)
        how = {"f32": "f4", "f16": "f2", "q8": f"({shape.head_dim},)i1, f4"}[kv]
        got = np.frombuffer(engine.read_kv(0, 0, 70), how)
        ours = got["f0"] * got["f1"][:, None] if kv == "q8" else got.astype(np.float32)
        ours = ours.reshape(70, shape.n_layers, 2, shape.n_kv_heads, shape.head_dim)
        if kv == "q8":
            size = shape.head_dim & -shape.head_dim
            keys = Coded(path).turned(torch.from_numpy(ours[:, :, 0].astype(np.float32))) / size
            ours = np.stack([keys.numpy(), ours[:, :, 1]], 2)
        assert far(ours, right) <= {"f32": 1e-5, "f16": 1e-3, "q8": 1e-2}[kv]
        middle = np.frombuffer(engine.read_kv(0, 31, 3), got.dtype)
        assert np.array_equal(middle.reshape(3, -1), got.reshape(70, -1)[31:34])


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_what_is_written_is_as_computed(tmp_path: Path, kv: str) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("plain", 2), 2)
    with Engine(path, kv=kv) as engine, Engine(path, kv=kv, isa="scalar", threads=1) as other:
        feed(engine, tokens_of(0, 100))
        engine.slide(0, 7, 20)
        for start, n in ((0, 1), (1, 40), (41, 0), (41, 39)):
            other.write_kv(5, start, n, engine.read_kv(0, start, n))
        assert other.length(5) == 80
        more = tokens_of(1, 50)
        assert np.array_equal(feed(other, more, 5), feed(engine, more))


def test_bad_reads_and_writes_change_nothing(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape_of("plain", 1))
    with Engine(path, max_seq_len=60) as engine:
        feed(engine, tokens_of(0, 50))
        kv = engine.read_kv(0, 0, 50)
        size = len(kv) // 50
        for message, function, numbers in (
            ("positions 40 to 51 of sequence 0, expected at most 50", engine.read_kv, (0, 40, 11)),
            ("positions 0 to 1 of sequence 1, expected at most 0", engine.read_kv, (1, 0, 1)),
            ("count 61, expected 0 to 60", engine.read_kv, (0, 0, 61)),
            ("position 49 of sequence 0, expected 50", engine.write_kv, (0, 49, 1, kv[:size])),
            ("positions 50 to 61 .*most 60", engine.write_kv, (0, 50, 11, kv[: 11 * size])),
            (f"{size - 1} bytes .* expected {size}", engine.write_kv, (0, 50, 1, kv[: size - 1])),
            ("positions 50 to 2147483697", engine.write_kv, (0, 50, 2**31 - 1, b"")),
            ("0 bytes of keys", engine.write_kv, (0, 50, 3, b"")),
        ):  # fmt: skip
            with pytest.raises(LlamaError, match=message):
                function(*numbers)
            assert engine.length(0) == 50 and engine.read_kv(0, 0, 50) == kv
