"""Whole models on a GPU, as tests/cuda_on_device.sh calls it.

    cuda_on_device.py tokens FOLDER [small]   greedy tokens are the CPU's
    cuda_on_device.py times FOLDER [small]    a 7B model of random 4-bit weights against the limits
                                              that cuda_bench measured, as a table
    cuda_on_device.py first FILE KV POSITIONS opens it and says one token: how long that takes from
                                              the process's start is one of the times
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from llama.engine import Engine, measure_bandwidth
from llama.format import Config, Record, Writer, expected_tensors
from llama.quant import Kind
from llama.sampling import SamplingParams

SMALL = Config(
    vocab_size=500, dim=256, hidden_dim=352, head_dim=64, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=256, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
SEVEN = Config(
    vocab_size=32000, dim=4096, hidden_dim=11008, head_dim=128, n_layers=32, n_heads=32,
    n_kv_heads=32, max_seq_len=4096, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)


def blocks(kind: Kind, rows: int, columns: int, rng: np.random.Generator) -> Any:
    """Random codes under scales that keep a product its input's size, shifts 0."""
    n = -(-rows // 16) * -(-columns // 32)
    wide = kind in (Kind.Q8, Kind.Q8R)
    code, codes = (512, 73.0) if wide else (256, 68.0)  # bytes a block; their rms
    scale = rng.uniform(0.5, 1.5, (n, 16)) / codes / columns**0.5
    half = (scale * (1 if wide else 64)).astype(np.float16).view(np.uint16)
    out = np.empty((n, 32 + code), np.uint8)
    out[:, :32] = (half if wide else (half & 0xFFC0) | 32).view(np.uint8)
    out[:, 32:] = np.frombuffer(rng.bytes(n * code), np.uint8).reshape(n, code)
    return out.reshape(-1).tobytes()


def random_model(path: Path, shape: Config, kind: Kind) -> Path:
    rng = np.random.default_rng(1)
    whole = {Kind.Q8R: Kind.Q8, Kind.Q4R: Kind.Q4}.get(kind, kind)  # outside of layers
    records = [
        Record(name, Kind.F32 if len(size) == 1 else kind if "layers." in name else whole, size)
        for name, size in expected_tensors(shape).items()
    ]
    with Writer(path, shape, records, force=True) as writer:
        for record in records:
            if len(record.shape) == 1:
                values: Any = rng.uniform(0.8, 1.2, record.shape).astype(np.float32)
            elif whole in (Kind.Q8, Kind.Q4, Kind.Q4E):
                values = blocks(record.kind, *record.shape, rng)
            else:
                values = rng.standard_normal(record.shape, np.float32) / record.shape[1] ** 0.5
            writer.write(record.name, values)
    return path


def forward(e: Engine, tokens: list[int], sequence: int = 0) -> int:
    """Reads TOKENS and chooses the next."""
    n, start = len(tokens), e.length(sequence)
    e.forward(tokens, [sequence] * n, range(start, start + n), [False] * (n - 1) + [True], True)
    return e.sample(0, GREEDY, [], 0, 0)


def greedy(e: Engine, prompt: list[int], n: int) -> list[int]:
    said = [forward(e, prompt)]
    while len(said) < n:
        said.append(forward(e, said[-1:]))
    return said


NEAR = 2e-3  # of the largest logit: a choice between two tokens this near may fall on either


def agree(cpu: Engine, gpu: Engine, prompt: list[int], n: int, what: str, exact: bool) -> None:
    """Greedy tokens along the CPU's text; if EXACT, any other must be as likely to the CPU."""

    def row(e: Engine, tokens: list[int]) -> Any:
        size, start = len(tokens), e.length(0)
        last = [False] * (size - 1) + [True]
        logits = e.forward(tokens, [0] * size, range(start, start + size), last)
        assert logits is not None
        return logits[0]

    same, behind, tokens = 0, 0.0, prompt
    for _ in range(n):
        theirs, ours = row(cpu, tokens), row(gpu, tokens)
        tokens = [int(theirs.argmax())]
        same += int(ours.argmax()) == tokens[0]
        behind = max(behind, (theirs.max() - theirs[ours.argmax()]) / np.abs(theirs).max())
    print(f"{what}: {same} of {n} greedy tokens equal, others at most {behind:.0e} behind")
    if exact and behind > NEAR:
        raise SystemExit("tokens differ from the CPU's")


def compare(folder: Path, n: int) -> None:
    """Tokens against the CPU's, for each kind of weights and of keys and values."""
    prompt = [(7 * i + i * i) % 500 for i in range(40)]
    for kind in Kind:
        path = random_model(folder / f"small-{kind.label}.bin", SMALL, kind)
        for kv in ("f32", "f16", "q8"):
            with (
                Engine(path, kv=kv, activations=16) as cpu,
                Engine(path, kv=kv, device="cuda") as gpu,
            ):
                what = f"{kind.label} weights, {kv} keys and values"
                agree(cpu, gpu, prompt, n, what, kv == "f32")


def compare_split(folder: Path, n: int) -> None:
    """The same of a model in two halves, with each number of layers on the GPU."""
    shape, prompt = replace(SMALL, n_layers=4), [(7 * i + i * i) % 500 for i in range(40)]
    path = random_model(folder / "small-split.bin", shape, Kind.Q4)
    for layers in range(shape.n_layers + 1):
        with (
            Engine(path, kv="f32") as cpu,
            Engine(path, kv="f32", device="cuda", gpu_layers=layers) as both,
        ):
            agree(cpu, both, prompt, n, f"{layers} of {shape.n_layers} layers on the GPU", True)


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bytes_in_use() -> int:
    """Of the GPU's memory, by whomever: CUDA's own context is among them."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library: Any = ctypes.CDLL(os.environ["LLAMA_LIBRARY"])
    ask = getattr(library, "cudaMemGetInfo", None)  # the emulator's
    if ask is None:
        driver: Any = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        for error in (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), 0),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            driver.cuCtxSetCurrent(context),
        ):
            assert not error, f"the CUDA driver returns {error}"
        ask = driver.cuMemGetInfo_v2
    assert not ask(ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


def first_token(path: Path, kv: str, positions: int) -> float:
    """Seconds from a process's start to its first token; the file is in the page cache."""
    command = [sys.executable, __file__, "first", str(path), kv, str(positions)]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True))


def measure(path: Path, shape: Config, kv: str, limits: tuple[float, float]) -> None:
    bandwidth, rate = limits
    steps, context = min(64, shape.max_seq_len // 8), shape.max_seq_len
    first_token(path, kv, context)
    first = first_token(path, kv, context)
    before = bytes_in_use()
    with Engine(path, kv=kv, device="cuda", max_seq_len=context + 2 * steps) as e:
        weights, per = e.config.step_bytes, e.info().kv_bytes_per_position
        greedy(e, [2], 3)  # every graph is recorded
        short = steps / timed(lambda: greedy(e, [3], steps))
        e.trim(0, 0)
        ids = [(7 * i + i * i) % shape.vocab_size for i in range(context)]
        chunk = min(512, context // 2)
        forward(e, ids[:chunk])
        e.trim(0, 0)
        prompt = chunk / timed(lambda: forward(e, ids[:chunk]))
        for at in range(chunk, context, chunk):
            forward(e, ids[at : at + chunk])
        greedy(e, [3], 3)
        middle = e.length(0) + steps / 2
        long = steps / timed(lambda: greedy(e, [3], steps))
        held = bytes_in_use() - before
        e.trim(0, 0)

        def together(n: int) -> None:
            for _ in range(n):
                at = [e.length(s) for s in range(16)]
                e.forward([5] * 16, range(16), at, [True] * 16, True)
                [e.sample(row, GREEDY, [], 0, 0) for row in range(16)]

        together(3)
        batch = 16 * steps / timed(lambda: together(steps))
    params = (weights * 8 / 4.5 if shape is SEVEN else weights)  # of the layers and the head
    per_long = weights + middle * per
    aim = 0.6 if bandwidth > 1e12 else 0.8
    print(f"\n| {shape.n_layers} layers of {shape.dim}, 4-bit, {kv} keys and values | measured "
          f"| share | target |\n|---|---|---|---|")  # fmt: skip
    print(f"| decode, tok/s | {short:.1f} | {short * weights / bandwidth:.0%} of "
          f"{bandwidth / 1e9:.0f} GB/s | {aim:.0%} |")  # fmt: skip
    kept = long * per_long / (short * weights)
    print(f"| decode behind {context}, tok/s | {long:.1f} | {long * per_long / bandwidth:.0%}; "
          f"{kept:.2f} of what the KV bytes allow | 0.90 |")  # fmt: skip
    print(f"| decode, 16 together, tok/s | {batch:.1f} | {batch / short:.1f} times one | 10 |")
    print(f"| prompt of {chunk}, tok/s | {prompt:.0f} | {2 * prompt * params / rate:.0%} of "
          f"{rate / 1e12:.1f} TFLOP/s | 25% |")  # fmt: skip
    most = 6.0 if kv == "f16" else 5.0
    print(f"| memory that {context} positions take | {held / 2**30:.2f} GiB | beside "
          f"{before / 2**30:.2f}, CUDA's context | {most} GiB |")  # fmt: skip
    print(f"| from a process's start to its first token | {first:.2f} s | | 1.5 s |")


def measure_split(path: Path, shape: Config, limits: tuple[float, float]) -> None:
    """Half of the layers on either side, against what both memories' bandwidths allow."""
    half, steps = shape.n_layers // 2, 16
    with Engine(path, kv="f16", device="cuda", gpu_layers=half, max_seq_len=64) as e:
        greedy(e, [1], 4)
        rate = steps / timed(lambda: greedy(e, [3], steps))
        there = {t.name: t.bytes for t in e.model.tensors}
    host = sum(n for name, n in there.items() if name.startswith("layers.")) * half / shape.n_layers
    head = there["output.weight"]
    least = host / measure_bandwidth() + (host + head) / limits[0]
    print(f"| decode, {half} layers on the GPU, tok/s | {rate:.1f} | {rate * least:.0%} of what "
          "both memories allow | |")  # fmt: skip


def times(folder: Path, small: bool) -> None:
    found = re.search(r"limits: (\S+) B/s, (\S+) FLOP/s", (folder / "bench.log").read_text())
    assert found, "bench.log has no limits"
    limits = float(found[1]), float(found[2])
    shape = replace(SMALL, max_seq_len=64) if small else SEVEN
    path = random_model(folder / "timed.bin", shape, Kind.Q4)
    for kv in ("f16", "q8"):
        measure(path, shape, kv, limits)
    measure_split(path, shape, limits)
    path.unlink()


def main() -> None:
    work, path, small = sys.argv[1], Path(sys.argv[2]), "small" in sys.argv[3:]
    if work == "first":
        with Engine(path, kv=sys.argv[3], device="cuda", max_seq_len=int(sys.argv[4])) as e:
            print(forward(e, [1]))
    elif work == "tokens":
        compare(path, 12 if small else 100)
        compare_split(path, 12 if small else 100)
    else:
        times(path, small)


if __name__ == "__main__":
    main()
