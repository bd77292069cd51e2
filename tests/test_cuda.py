"""The CUDA pass without a GPU: the same .cu files, run by tests/cuda_on_cpu, against the CPU.

Logits are held to those of plain C on the same weights as f32. Weights count exactly on both sides
and sums are f32, so a few rows agree within rounding in another order; the inputs of longer prompts
are rounded to halves, and keys and values in f16 or q8 round the other way now and then.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from emulator import (
    FEW,
    MANY,
    ROUNDED,
    SHAPE,
    WIDE,
    as_f32,
    built,
    distance,
    feed,
    free_bytes,
    run_out,
)  # fmt: skip

from llama import stages
from llama.config import Head, Rope
from llama.engine import Engine, Model, sample_logits
from llama.errors import LlamaError
from llama.quant import Kind, matrix_bytes
from llama.sampling import SamplingParams

pytestmark = pytest.mark.other_build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_models.write_bin(tmp_path / "model.bin", SHAPE)


# ---- kernels


def test_kernels() -> None:
    ran = subprocess.run([built("", "cuda_kernels") / "cuda_kernels"], capture_output=True,
                         text=True)  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.endswith(" passed, 0 failed\n"), ran.stdout
    assert int(ran.stdout.split()[0]) > 100


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_step_nowhere_they_should_not(sanitizer: str) -> None:
    ran = subprocess.run([built(sanitizer, "cuda_kernels", "faults") / "cuda_kernels", "few"],
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0 and "Sanitizer" not in ran.stderr, ran.stdout + ran.stderr[:4000]
    assert ran.stdout.endswith(" passed, 0 failed\n")


def test_order_of_threads_does_not_matter() -> None:
    program = built("", "cuda_kernels") / "cuda_kernels"
    ran = subprocess.run([program, "few"], capture_output=True, text=True,
                         env={"CUDA_ON_CPU_ORDER": "reverse"})  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.endswith(" passed, 0 failed\n"), ran.stdout


@pytest.mark.parametrize(
    "sanitizer, fault, found",
    [
        ("", "barrier", "waits for ever: 32 threads are at __syncthreads()"),
        ("", "lanes", "waits for a lane that has ended"),
        ("", "copy", "ends with copies that nobody waited for"),
        ("", "stream across", "reaches for memory across its own alignment"),
        ("", "taken", "refused: operation failed due to a previous error during capture"),
        ("", "waited", "refused: operation failed due to a previous error during capture"),
        ("", "copied", "refused: operation failed due to a previous error during capture"),
        ("", "late copy", "a copy took what was written after it was asked for"),
        ("", "tall", "refused: invalid configuration argument"),
        ("", "large", "refused: invalid configuration argument"),
        ("address", "across", "misaligned address"),
        ("address", "global", "AddressSanitizer: heap-buffer-overflow"),
        ("address", "shared", "AddressSanitizer: heap-buffer-overflow"),
        ("thread", "race", "ThreadSanitizer: data race"),
        ("thread", "warp", "ThreadSanitizer: data race"),
        ("thread", "copy race", "ThreadSanitizer: data race"),
        ("thread", "blocks", "ThreadSanitizer: data race"),
    ],
)
def test_planted_faults_are_found(sanitizer: str, fault: str, found: str) -> None:
    program = built(sanitizer, "cuda_kernels", "faults") / "faults"
    sound = subprocess.run([program, "none"], capture_output=True, text=True)
    assert (sound.returncode, sound.stdout) == (0, "none: ended\n"), sound.stderr
    ran = subprocess.run([program, fault], capture_output=True, text=True)
    assert ran.returncode != 0 and found in ran.stderr


# ---- the whole pass

ROPES = {
    "linear": (Rope.LINEAR, (4.0,)), "llama3": (Rope.LLAMA3, (8.0, 1.0, 4.0, 16.0)),
    "yarn": (Rope.YARN, (4.0, 16.0, 32.0, 1.0, 1.2, 1.0)), "dynamic": (Rope.DYNAMIC, (2.0, 16.0)),
}  # fmt: skip
SHAPES = {
    "plain": SHAPE, "tied": replace(SHAPE, tied=True), "wide": WIDE,
    "biases": replace(SHAPE, attention_bias=True, mlp_bias=True),
    "128": replace(WIDE, head_dim=128, n_heads=2, n_kv_heads=1),
    **{name: replace(SHAPE, rope_scaling=kind, rope_numbers=numbers)
       for name, (kind, numbers) in ROPES.items()},
}  # fmt: skip
CASES = [
    *(("plain", kind, "f32") for kind in Kind),
    *((name, Kind.F32, "f32") for name in SHAPES if name != "plain"),
    *(("wide", kind, "f16") for kind in (Kind.F16, Kind.Q4, Kind.Q4E)), ("128", Kind.Q8, "f16"),
    ("plain", Kind.F32, "f16"), ("wide", Kind.Q4, "q8"), ("128", Kind.F16, "q8"),
    ("plain", Kind.Q8, "q8"), ("wide", Kind.Q4R, "q8"),
]  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name, kind, kv", CASES)
def test_logits(tmp_path: Path, name: str, kind: Kind, kv: str) -> None:
    path = small_models.of_kind(tmp_path, SHAPES[name], kind)
    rng = np.random.default_rng(7)
    with (
        Engine(as_f32(path), isa="scalar", kv=kv) as cpu,
        Engine(path, device="cuda", kv=kv) as gpu,
    ):
        assert gpu.info().device == "cuda" and gpu.info().kv_kind == kv
        for n in (1, 1, 3, 16, 1, 1, 1, 40, 2, 2, 2, 70):  # thrice the same: a recorded graph
            tokens = rng.integers(0, gpu.config.vocab_size, n)
            theirs, ours = feed(cpu, tokens), feed(gpu, tokens)
            bound = (FEW if n <= 4 and kv == "f32" and gpu.length(0) < 6 else MANY) + ROUNDED[kv]
            assert distance(ours, theirs) < bound


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_sequences_in_one_batch(tmp_path: Path, kv: str) -> None:
    path = small_models.of_kind(tmp_path, WIDE, Kind.Q8)
    rng = np.random.default_rng(3)
    with Engine(as_f32(path), kv=kv) as cpu, Engine(path, device="cuda", kv=kv) as gpu:
        for e in (cpu, gpu):
            feed(e, np.arange(40))
            e.fork(0, 1, 37)  # a shared page, copied when one writes in it
            e.fork(0, 2, 32)
            e.trim(0, 35)
        for count in (1, 1, 1, 5):
            sequences = np.repeat([2, 0, 1, 0 + 3], count)
            tokens = rng.integers(0, 53, 4 * count)
            positions = np.concatenate([gpu.length(s) + np.arange(count) for s in (2, 0, 1, 3)])
            want = rng.integers(0, 2, 4 * count).astype(bool) | (positions == 0)
            theirs, ours = (e.forward(tokens, sequences, positions, want) for e in (cpu, gpu))
            assert distance(ours, theirs) < MANY + ROUNDED[kv]


@pytest.mark.usefixtures("cuda")
def test_dynamic_lengths(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "d.bin", SHAPES["dynamic"])
    tokens = np.arange(60)
    with Engine(path) as cpu, Engine(path, device="cuda") as gpu:
        for lengths in ([60] * 60, [0] * 60, list(range(40, 100))):
            both = []
            for e in (cpu, gpu):
                e.trim(0, 0)
                both.append(e.forward(tokens, [0] * 60, range(60), [True] * 60, False, lengths))
            assert distance(both[1], both[0]) < FEW


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("head", list(Head))
def test_heads_hidden_states_and_the_stream(tmp_path: Path, head: Head) -> None:
    labels = {Head.SEQUENCE: 3, Head.ANSWER: 2, Head.TOKEN: 5}.get(head, 0)
    shape = replace(SHAPE, head=head, n_labels=labels, output_bias=head == Head.TOKEN)
    path = small_models.write_bin(tmp_path / "head.bin", shape)
    with Engine(path) as cpu, Engine(path, device="cuda") as gpu:
        assert distance(feed(gpu, range(75)), feed(cpu, range(75))) < FEW
        assert distance(feed(gpu, [5], hidden=True), feed(cpu, [5], hidden=True)) < FEW
        want = [True, False, True]
        ours, theirs = (e.trace([1, 2, 3], [1] * 3, range(3), want) for e in (gpu, cpu))
        assert np.array_equal(ours[0][0], theirs[0][0])  # the embedding, to the last bit
        assert distance(ours[0], theirs[0]) < FEW and distance(ours[1], theirs[1]) < FEW


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kind, kv", [(None, "f32"), (Kind.F16, "f16"), (Kind.Q8, "q8")])
def test_greedy_tokens_of_a_real_model(
    stories: Path, tmp_path: Path, kind: Kind | None, kv: str
) -> None:
    """Along the CPU's own text. With 8-bit keys, some of whose codes fall on the other side of a
    half, the two passes may choose differently where two tokens are as likely: one step in 120."""
    path = stories if kind is None else small_models.quantized(stories, tmp_path / "m.bin", kind)
    token, others = 1, 0
    with Engine(path, isa="scalar", kv=kv) as cpu, Engine(path, device="cuda", kv=kv) as gpu:
        for _ in range(120):
            theirs, ours = feed(cpu, [token])[0], feed(gpu, [token])[0]
            token = int(theirs.argmax())
            others += int(ours.argmax()) != token
            assert distance(ours, theirs) <= FEW + ROUNDED[kv]
    assert others <= (2 if kv == "q8" else 0)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("n", [3, 40])
def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated: Any, n: int) -> None:
    """A layer for calibration, stage by stage, with matrices of other kinds in its place."""
    monkeypatch.setattr(stages, "lib", emulated)
    shape = replace(WIDE, attention_bias=True, mlp_bias=True)
    path = small_models.write_bin(tmp_path / "m.bin", shape)
    blocks = {}
    with Model(path) as m:
        for place, name in enumerate(["wq", "wk", "wv", "wo", "w1", "w3", "w2"]):
            i = next(i for i, t in enumerate(m.tensors) if f"layers.1.{KINDS[name]}" in t.name)
            rows, columns = m.tensors[i].shape
            kind = (Kind.F32, Kind.Q8R, Kind.BF16, Kind.Q8, Kind.Q4R, Kind.Q4E, Kind.Q4)[place]
            data = stages.aligned(matrix_bytes(kind, rows, columns))
            data[:] = np.frombuffer(m.quantize(i, 0, rows, kind, len(data))[0], np.uint8)
            blocks[place] = (kind, data)
    x = np.random.default_rng(1).standard_normal((n, shape.dim)).astype(np.float32)
    with Engine(path, kv="f32") as cpu, Engine(path, kv="f32", device="cuda") as gpu:
        streams, given = [x.copy(), x.copy()], [x, x]
        for stage in range(6):
            given = [stages.run_stage(e, 1, stage, s, g, {} if stage < 3 else blocks)
                     for e, s, g in zip((gpu, cpu), streams, given, strict=True)]  # fmt: skip
            assert distance(*streams) < MANY
            assert stage == stages.END or distance(*given) < MANY


KINDS = {name: f"{part}.{name}." for part, names in
         (("attention", ("wq", "wk", "wv", "wo")), ("feed_forward", ("w1", "w2", "w3")))
         for name in names}  # fmt: skip


# ---- pages


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["any", "wide"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_keys_and_values_move_between_devices(tmp_path: Path, shape: Any, kv: str) -> None:
    path = small_models.write_bin(tmp_path / "m.bin", shape)
    with Engine(path, kv=kv) as cpu, Engine(path, device="cuda", kv=kv) as gpu:
        feed(cpu, range(50)), feed(gpu, range(50))
        ours, theirs = gpu.read_kv(0, 3, 45), cpu.read_kv(0, 3, 45)
        assert len(ours) == len(theirs)
        if kv == "f32":
            assert distance(np.frombuffer(ours, "f4"), np.frombuffer(theirs, "f4")) < FEW
        whole = cpu.read_kv(0, 0, 50)
        gpu.write_kv(1, 0, 50, whole)
        assert gpu.read_kv(1, 0, 50) == whole
        assert distance(feed(gpu, [7], 1), feed(cpu, [7])) < FEW


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_slides(tmp_path: Path, kv: str) -> None:
    path = small_models.write_bin(tmp_path / "m.bin", WIDE)
    with Engine(path, kv=kv) as cpu, Engine(path, device="cuda", kv=kv) as gpu:
        for e in (cpu, gpu):
            feed(e, np.arange(150) % 53)
            e.fork(0, 1, 149)
            e.slide(0, 4, 61)
        bound = FEW + ROUNDED[kv]
        assert distance(feed(gpu, [7]), feed(cpu, [7])) < bound
        assert distance(feed(gpu, [7], 1), feed(cpu, [7], 1)) < bound  # it kept its pages


# ---- sampling

CHOICES: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6}, {"temperature": 1.0, "top_p": 0.9, "top_k": 7},
    {"temperature": 1.0, "min_p": 0.2}, {"temperature": 2.0, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.7}, {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "repetition_penalty": 0.8, "presence_penalty": 1.5, "top_p": 0.8,
     "frequency_penalty": -0.7, "logit_bias": {3: 2.5, 9: -np.inf, 4: -1.0}},
    {"temperature": 1.0, "typical_p": 0.5}, {"temperature": 1.0, "top_p": 1e-6},
]  # fmt: skip


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("knobs", CHOICES, ids=str)
def test_the_device_chooses_the_same_tokens(model: Path, knobs: dict[str, Any]) -> None:
    params = SamplingParams(seed=5, **knobs)
    seen = np.random.default_rng(1).integers(0, 101, 60)
    with Engine(model, device="cuda") as gpu:
        logits = feed(gpu, [4])
        gpu.trim(0, 0)
        gpu.forward([4], [0], [0], [True], keep=True)
        for position in range(40):
            ours = gpu.sample(0, params, seen, 3, position, said=25)
            assert ours == sample_logits(logits[0], params, seen, 3, position, said=25)


@pytest.mark.usefixtures("cuda")
def test_logits_stay_in_order_where_a_batch_takes_several_parts(model: Path) -> None:
    """A short context makes parts short; the last one is a step of few rows, a graph by its third
    time."""
    with Engine(model, device="cuda", max_seq_len=24) as gpu:
        sequences, positions = np.repeat([0, 1, 2], [20, 20, 13]), [*range(20)] * 2 + [*range(13)]
        tokens = np.random.default_rng(5).integers(0, 101, 53)
        want = np.isin(np.arange(53), [3, 19, 39, 50, 52])
        rows = gpu.forward(tokens, sequences, positions, want)
        for _ in range(3):
            for sequence in range(3):
                gpu.trim(sequence, 0)
            gpu.forward(tokens, sequences, positions, want, keep=True)
            greedy = SamplingParams(temperature=0.0)
            chosen = [gpu.sample(row, greedy, [], 0, 0) for row in range(5)]
            assert chosen == rows.argmax(1).tolist()


@pytest.mark.usefixtures("cuda")
def test_ties_and_broken_logits(tmp_path: Path) -> None:
    """A model whose logits come in equal groups: which of them stay is the smaller ids."""
    path = small_models.write_bin(tmp_path / "m.bin", SHAPE)
    ties, broken = tmp_path / "ties.bin", tmp_path / "broken.bin"

    def same_rows(name: str, values: Any) -> Any:
        return values[np.arange(101) % 7] if name == "output.weight" else values

    rewrite(path, ties, same_rows)
    rewrite(path, broken, lambda name, v: v * np.float32(np.nan) if name == "norm.weight" else v)
    with Engine(ties, device="cuda") as gpu:
        logits = feed(gpu, [1])
        gpu.trim(0, 0)
        gpu.forward([1], [0], [0], [True], keep=True)
        assert len(set(logits[0].tolist())) == 7
        for knobs in ({"top_k": 20}, {"top_p": 0.3}, {"top_p": 0.93, "top_k": 60}, {}):
            params = SamplingParams(temperature=1.0, seed=2, **knobs)
            for position in range(15):
                chosen = gpu.sample(0, params, [], 0, position)
                assert chosen == sample_logits(logits[0], params, [], 0, position)
        assert gpu.sample(0, SamplingParams(temperature=0.0), [], 0, 0) == int(logits[0].argmax())
        logprob, top = gpu.logprobs(0, 5, 3)
        gpu.forward([1] * 70, [1] * 70, range(70), [True] * 70, keep=True)  # too many to stay
        assert gpu.sample(69, SamplingParams(temperature=0.0), [], 0, 0) in range(101)
        whole = logits[0] - np.log(np.exp(logits[0].astype(float)).sum())
        assert abs(logprob - whole[5]) < 1e-5 and len(top) == 3
    with Engine(broken, device="cuda") as gpu:
        gpu.forward([1], [0], [0], [True], keep=True)
        with pytest.raises(LlamaError, match="the head gives numbers that are not finite"):
            gpu.sample(0, SamplingParams(temperature=0.0), [], 0, 0)


# ---- memory and machines


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(LlamaError) as caught:
        Engine(path, device="cuda", **options).close()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "device, message",
    [
        ("none", 'device "cuda": this machine has no NVIDIA driver'),
        ("old", 'device "cuda": the NVIDIA driver is for CUDA 12.4, expected 13.0 (driver 580)'),
        ("unready", 'device "cuda": looking for a GPU: system not yet initialized'),
        ("pascal", "has compute capability 6.1, expected 7.5 (Turing) or later"),
    ],
)
def test_other_machines_are_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", device)
    refused(model, message)


@pytest.mark.usefixtures("cuda")
def test_heads_too_large_for_shared_memory_are_one_line(tmp_path: Path) -> None:
    for dim in (4096, 4098):
        shape = replace(SHAPE, dim=32, head_dim=dim, n_heads=1, n_kv_heads=1, n_layers=1)
        path = small_models.write_bin(tmp_path / f"{dim}.bin", shape)
        if dim > 4096:
            refused(path, 'device "cuda": head_dim is 4098, expected at most 4096')
            continue
        with Engine(path) as cpu, Engine(path, device="cuda") as gpu:
            assert distance(feed(gpu, [1, 2]), feed(cpu, [1, 2])) < FEW


@pytest.mark.usefixtures("cuda")
def test_streams_may_run_early_or_late(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU is given runs when it is waited for, everywhere else in these tests."""
    found = []
    for when in ("late", "early"):
        monkeypatch.setenv("CUDA_ON_CPU_STREAMS", when)
        with Engine(model, device="cuda") as e:
            found.append([feed(e, range(n)) for n in (40, 2, 2, 2, 70)])
    assert all(np.array_equal(late, early) for late, early in zip(*found, strict=True))


def test_a_build_without_cuda_is_one_line(model: Path) -> None:
    line = 'device "cuda": this library was built without CUDA; use device "cpu"'
    refused(model, line)
    refused(model, line, gpu_layers=1)
    with Engine(model, device="auto", gpu_layers=1) as e:
        assert e.chosen == f"cpu, because {line}"


@pytest.mark.usefixtures("cuda")
def test_auto_says_what_it_took_and_why(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model, device="auto") as e:
        assert (e.info().device, e.chosen) == ("cuda", "cuda, emulated on the CPU, sm_80")
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "none")
    with Engine(model, device="auto") as e:
        assert e.info().device == "cpu"
        assert e.chosen == 'cpu, because device "cuda": this machine has no NVIDIA driver'
        feed(e, range(5))
    with pytest.raises(LlamaError, match="isa"):
        Engine(model, device="auto", isa="abacus")
    with Engine(model) as e:
        assert e.chosen is None


MIB = 1 << 20


@pytest.mark.usefixtures("cuda")
def test_memory_is_planned(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context that is named fits; twice as long a one does not."""
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY", str(90 * MIB))
    with pytest.raises(LlamaError, match="the longest context that fits is") as caught:
        Engine(model, device="cuda", max_seq_len=1 << 20)
    fits = int(str(caught.value).partition("that fits is ")[2].split(";")[0])
    Engine(model, device="cuda", max_seq_len=fits).close()
    refused(model, "the longest context that fits is", max_seq_len=2 * fits)
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY", str(MIB))
    refused(model, "and 1 are free: no context fits")


@pytest.mark.usefixtures("cuda")
def test_running_out_is_an_error_and_the_process_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, device="cuda") as e, Engine(model) as cpu:
        run_out(e, cpu, monkeypatch)


@pytest.mark.usefixtures("cuda")
def test_close_gives_everything_back(model: Path, tmp_path: Path) -> None:
    """Two models on one device; and one that could not be opened to the end."""
    other = small_models.write_bin(tmp_path / "other.bin", WIDE)
    before = free_bytes()
    with Engine(model, device="cuda") as a, Engine(other, device="cuda") as b:
        first = feed(a, range(30))
        feed(b, range(50))
        a.fork(0, 1, 30)
        a.slide(0, 3, 9)
        a.forward([2], [1], [30], [True], keep=True)
        a.sample(0, SamplingParams(temperature=1.0, repetition_penalty=2.0), [3, 3], 0, 0)
        taken = before - free_bytes()
        info = [e.info() for e in (a, b)]
        told = sum(i.kv_bytes + i.scratch_bytes for i in info)
        assert told < taken < told + a.config.weight_bytes + b.config.weight_bytes + MIB
        b.close()
        assert np.array_equal(feed(a, range(30), 2), first)
    assert free_bytes() == before


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("short", [1, 2000, 100_000, 400_000])
def test_a_session_that_fails_to_open_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    """Memory that another took between the plan and the taking."""
    before = free_bytes()
    with Engine(model, device="cuda"):
        needed = before - free_bytes()
    monkeypatch.setenv("CUDA_ON_CPU_TAKEN", str(before - needed + short))
    refused(model, "out of memory")
    assert free_bytes() == before


@pytest.mark.usefixtures("cuda")
def test_weights_of_a_bf16_file_may_be_large(tmp_path: Path) -> None:
    """Beyond what halves hold."""
    path = small_models.of_kind(tmp_path, SHAPE, Kind.BF16)
    with Model(path) as m:
        last = next(i for i, t in enumerate(m.tensors) if t.name == "output.weight")
        assert np.abs(m.rows(last)).max() < 65504
    large = tmp_path / "large.bin"

    def grow(name: str, values: Any) -> Any:
        return values * np.float32(2.0**20) if name == "output.weight" else values

    rewrite(path, large, grow)
    with Engine(as_f32(large), kv="f16") as cpu, Engine(large, device="cuda") as gpu:
        assert distance(feed(gpu, [1]), feed(cpu, [1])) < FEW + ROUNDED["f16"]


def rewrite(path: Path, out: Path, change: Callable[[str, Any], Any]) -> None:
    from llama.format import Config, Record, Writer

    with Model(path) as m:
        shape = Config(**{name: getattr(m.config, name) for name in Config.__match_args__})
        records = [Record(t.name, t.kind, t.shape) for t in m.tensors]
        with Writer(out, shape, records) as writer:
            for i, record in enumerate(records):
                writer.write(record.name, change(record.name, m.rows(i)))
