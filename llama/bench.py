"""python3 -m llama.bench: how fast a model runs here, as a share of what the machine allows.

Decoding reads every weight once a token, so its limit is the memory's bandwidth, measured in the
same run. Reading a prompt reuses each weight for many tokens and is told in tokens a second.
Medians of a few repeats; the spread is (largest - smallest) / median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.cli import Parser, default_bin, run
from llama.errors import LlamaError


def arguments() -> argparse.Namespace:
    parser = Parser(prog="llama.bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--bin", type=Path, action="append", metavar="FILE",
        help="a model; may be given several times (default: bin/chat-llama.bin)",
    )  # fmt: skip
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens of prompt")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--activations", type=int, metavar="BITS", help="8 or 16 (default: 16)")
    parser.add_argument("--isa", metavar="NAME", help="the CPU kernels (default: the best)")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")
    given = parser.parse_args()
    for name in ("prompt", "tokens", "repeats"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be 1 or more, found {getattr(given, name)}")
    return given


def timed(work: Callable[[], object]) -> float:
    """Seconds that WORK takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One model's figures; rates in tokens a second, bandwidth in bytes a second."""
    from llama.engine import Engine, measure_bandwidth

    opened = time.perf_counter()
    with Engine(
        path, threads=given.threads, activations=given.activations, isa=given.isa
    ) as engine:
        open_seconds = time.perf_counter() - opened
        config, info = engine.config, engine.info()
        n, m = given.prompt, given.tokens
        n = min(n, engine.max_seq_len - m)
        if n < 1:
            raise LlamaError(f"{path}: --tokens {m} and a prompt do not fit its context")
        ids = [(7 * i + i * i) % config.vocab_size for i in range(n + m)]
        prompt, decode, bandwidth = [], [], []

        def read_prompt() -> None:
            engine.forward(ids[:n], [0] * n, range(n), [False] * (n - 1) + [True])

        def read_tokens() -> None:
            for at in range(n, n + m):
                engine.forward(ids[at : at + 1], [0], [at], [True])

        read_prompt()  # maps the file's pages and fills the caches
        for _ in range(given.repeats):
            engine.trim(0, 0)
            prompt.append(n / timed(read_prompt))
            decode.append(m / timed(read_tokens))
            bandwidth.append(measure_bandwidth(info.threads))
    # each step reads the weights, and the keys and values of the positions before it
    per_token = config.step_bytes + (n + m / 2) * info.kv_bytes_per_position
    rate, limit = statistics.median(decode), max(bandwidth)
    return {
        "model": path.name, "dtype": config.dtype, "weight_bytes": config.weight_bytes,
        "isa": info.isa, "threads": info.threads, "prompt_tokens": n, "decode_tokens": m,
        "prompt_rate": statistics.median(prompt), "prompt_spread": spread(prompt),
        "decode_rate": rate, "decode_spread": spread(decode), "bytes_per_token": per_token,
        "bandwidth": limit, "bandwidth_share": rate * per_token / limit,
        "open_seconds": open_seconds,
    }  # fmt: skip


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def main() -> int:
    given = arguments()
    from llama.machine import cpu_name

    if not given.json:
        print(f"{cpu_name()}; prompt {given.prompt}, decode {given.tokens}, medians of "
              f"{given.repeats} (spread)")  # fmt: skip
        print("| model | weights | kernels | threads | prompt tok/s | decode tok/s | "
              "decode, share of bandwidth |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
    for path in given.bin or [default_bin()]:
        r = measure(path, given)
        if given.json:
            print(json.dumps(r), flush=True)
            continue
        print(
            f"| {r['model']} | {r['dtype']}, {r['weight_bytes'] / 1e6:.0f} MB | {r['isa']} "
            f"| {r['threads']} | {r['prompt_rate']:.0f} ({r['prompt_spread']:.0%}) "
            f"| {r['decode_rate']:.1f} ({r['decode_spread']:.0%}) "
            f"| {r['bandwidth_share']:.0%} of {r['bandwidth'] / 1e9:.1f} GB/s |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.bench", main))
