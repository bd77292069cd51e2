"""python3 -m llama.bench: figures that agree with each other, and bad flags in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama.bench", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_its_figures(tiny: Path) -> None:
    few = ["--prompt=8", "--tokens=4", "--repeats=2"]
    done = bench("--bin", tiny, *few, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["prompt_tokens"], found["decode_tokens"]) == (tiny.name, 8, 4)
    assert found["prompt_rate"] > 0 and found["bandwidth"] > 0
    share = found["decode_rate"] * found["bytes_per_token"] / found["bandwidth"]
    assert found["bandwidth_share"] == pytest.approx(share)
    table = bench("--bin", tiny, "--bin", tiny, *few).stdout.splitlines()
    assert len(table) == 5 and {line.count("|") for line in table[1:]} == {8}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt=0"], "--prompt must be 1 or more, found 0"),
        (["--repeats=-1"], "--repeats must be 1 or more, found -1"),
        (["--tokens=9999999"], "--tokens 9999999 and a prompt do not fit its context"),
        (["--threads=0"], "threads is 0, expected 1 to 1024"),
        (["--reps=1"], "there is no --reps, but --repeats"),
    ],
)
def test_bad_flags_are_one_line(tiny: Path, words: list[str], says: str) -> None:
    done = bench("--bin", tiny, *words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("llama.bench: ") and says in done.stderr
