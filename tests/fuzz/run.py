#!/usr/bin/env python3
"""Runs every fuzz target for a time, two at once, from the seeds and the findings of the past:
`run.py [--time SECONDS] [TARGET ...]`, which is `make fuzz TIME=600`. Exit status 1 and the input's
path where one is found that breaks a target.

bin and sampler are C, under AddressSanitizer and UndefinedBehaviorSanitizer (build/fuzz, by
clang); the others are readers.py's. What a run learns stays in build/fuzz/corpus/TARGET.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD, CORPUS = ROOT / "build" / "fuzz", ROOT / "tests" / "corpus"
NATIVE = ("bin", "sampler")
READERS = ("gguf", "pth", "safetensors", "config", "tokenizer", "template", "llama2c", "session")
MEMORY = 2048  # MB that a target may take, sanitizers and Python included
SECONDS = 30  # that an input may take: sanitizers and tracing slow everything


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import seeds

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=int, default=60, help="seconds for each target")
    parser.add_argument("--seed", type=int, default=0, help="where chance begins (0: anywhere)")
    parser.add_argument("targets", nargs="*", default=[*NATIVE, *READERS])
    args = parser.parse_args()
    for target in args.targets:
        folder = BUILD / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for data in seeds.of(target):
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda target: run(target, args.time, args.seed), args.targets)
        return 0 if all(list(found)) else 1


def run(target: str, seconds: int, seed: int) -> bool:
    """Fuzzes one target and prints a line; whether nothing was found."""
    found = BUILD / "found" / target
    found.mkdir(parents=True, exist_ok=True)
    command = [str(BUILD / f"fuzz_{target}")] if target in NATIVE else [
        sys.executable, str(ROOT / "tests" / "fuzz" / "readers.py"), target]  # fmt: skip
    flags = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", f"-timeout={SECONDS}",
             f"-seed={seed}", f"-artifact_prefix={found}/", "-print_final_stats=1",
             "-verbosity=1"]  # fmt: skip
    if target == "bin":
        flags += ["-max_len=24576", "-malloc_limit_mb=256"]
    folders = [str(BUILD / "corpus" / target), str(CORPUS / target)]
    done = subprocess.run([*command, *flags, *(f for f in folders if Path(f).is_dir())],
                          cwd=ROOT, capture_output=True, text=True, errors="replace")  # fmt: skip
    runs = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)\s", done.stderr, re.MULTILINE)
    count = max((int(a or b) for a, b in runs), default=0)
    print(f"{target:<12} {count:>9,} inputs in {seconds} s: "
          f"{'nothing found' if done.returncode == 0 else 'FAILED'}", flush=True)  # fmt: skip
    if done.returncode:
        print(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
