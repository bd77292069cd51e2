"""python3 -m llama.bench: figures that agree with each other and with arithmetic done here, the
report's form, tables and picture from a file, and bad flags in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama import bench as command
from llama import report, trial
from llama.engine import Model
from llama.errors import LlamaError
from llama.limits import Limits, Load, load_of, measure_peaks

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--prompt=8,20", "--depth=0,30", "--batch=1,3", "--tokens=4", "--repeats=2"]
# every key of a report and the type of its value
MODEL = {
    "file": str, "shape": (str, type(None)), "isa": str, "threads": int, "activations": int,
    "kv": str, "dtype": str, "weight_bytes": int, "limits": dict, "load": dict,
    "open_seconds": float, "first_token_prompt": int, "first_token_seconds": float,
    "opening_seconds": float, "opening_steps": float, "memory": dict, "rows": list,
    "greedy": list, "against": (dict, type(None)),
}  # fmt: skip
ROW = {
    "work": str, "n": int, "depth": int, "batch": int, "rates": list, "rate": float,
    "spread": float, "bandwidth": float, "limit": str, "limit_rate": float, "share": float,
}  # fmt: skip


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llama.bench", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report's file, and what was printed when it was made."""
    file = tmp_path_factory.mktemp("bench") / "report.json"
    done = bench("--bin", tiny, *FEW, "--threads=1", "--json", file)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


def is_of(found: dict[str, Any], form: dict[str, Any]) -> None:
    assert found.keys() == form.keys()
    for name, type_ in form.items():
        assert isinstance(found[name], type_), name


def test_the_reports_form(tiny: Path, kept: tuple[Path, str]) -> None:
    found = json.loads(kept[0].read_text())
    assert found.keys() == {"machine", "revision", "models"}
    assert found["machine"].keys() == {"cpu", "cores", "memory_bytes", "system", "python"}
    (model,) = found["models"]
    is_of(model, MODEL)
    assert (model["file"], model["threads"], model["dtype"]) == (tiny.name, 1, "f32")
    assert model["limits"].keys() == {"bandwidth", "f32", "int8"}
    shapes = [(row["work"], row["n"], row["depth"], row["batch"]) for row in model["rows"]]
    assert shapes == [
        ("prompt", 8, 0, 1), ("prompt", 20, 0, 1), ("decode", 4, 0, 1), ("decode", 4, 30, 1),
        ("decode", 4, 0, 3), ("decode", 4, 30, 3),
    ]  # fmt: skip
    for row in model["rows"]:
        is_of(row, ROW)
        assert len(row["rates"]) == 2 and row["rate"] == statistics.median(row["rates"])
        assert row["share"] == pytest.approx(row["rate"] / row["limit_rate"])


def test_shares_are_of_what_a_step_reads_and_adds(tiny: Path, kept: tuple[Path, str]) -> None:
    """Counted here from the model's shape: tiny_chat.CONFIG, f32 weights and cache."""
    model = json.loads(kept[0].read_text())["models"][0]
    limits = model["limits"]
    rows = {(r["work"], r["n"], r["depth"], r["batch"]): r for r in model["rows"]}
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # multiply-adds of a token
    weights = model["weight_bytes"]
    for (work, n, depth, batch), row in rows.items():
        adding = (2 * layer * (n if work == "prompt" else batch)
                  + 259 * 32 * (1 if work == "prompt" else batch)) / limits["f32"]  # fmt: skip
        if work == "prompt":
            assert row["limit"] == "f32" and row["limit_rate"] == pytest.approx(n / adding)
            continue
        positions = sum(depth + i + 1 for i in range(n)) / n
        reading = (weights + batch * positions * 2 * 2 * 16 * 4) / row["bandwidth"]
        assert 0 < row["bandwidth"] <= limits["bandwidth"]
        assert row["limit"] == ("f32" if adding > reading else "bandwidth")
        assert row["limit_rate"] == pytest.approx(batch / max(adding, reading))
    held = model["memory"]
    if "anonymous" in held:
        assert 0 < held["kv"] < held["anonymous"] < 64e6 and held["file"] > 0
    assert 0 < model["open_seconds"] < model["first_token_seconds"]
    assert model["opening_steps"] == pytest.approx(
        model["opening_seconds"] * rows["decode", 4, 0, 1]["rate"]
    )


def test_integer_kinds_count_their_passes(tmp_path: Path) -> None:
    from llama.config import Config
    from llama.shapes import write

    shape = Config(
        vocab_size=64, dim=64, hidden_dim=96, head_dim=16, n_layers=3, n_heads=4, n_kv_heads=2,
        max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    write(tmp_path / "q4.bin", shape, 4)
    layer = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96
    with Model(tmp_path / "q4.bin") as model:
        load = {bits: load_of(model.config, model.tensors, 768, bits) for bits in (8, 16)}
        stored = {t.name: t.bytes for t in model.tensors}
    assert load[8].token == (0, 3 * layer) and load[16].token == (0, 6 * layer)
    assert load[8].row == (0, 64 * 64) and load[16].row == (0, 2 * 64 * 64)
    assert load[8].peak == "int8"
    # the embedding table gives a row only
    assert load[8].step_bytes <= sum(stored.values()) - stored["tok_embeddings.weight"] + 4096
    limits = Limits(bandwidth=1e9, f32=1e9, int8=2e9)
    assert load[8].prompt_seconds(10, limits) == (10 * 3 * layer + 64 * 64) / 2e9


def test_which_limit_binds() -> None:
    """One sequence waits for memory; so many that arithmetic takes longer wait for that."""
    load = Load(step_bytes=1000, kv_bytes=10, token=(0, 100), row=(50, 0))
    limits = Limits(bandwidth=100, f32=50, int8=25)
    assert load.step_seconds(0, 1, limits) == (10.0, "bandwidth")
    assert load.step_seconds(20, 1, limits) == (12.0, "bandwidth")
    assert load.step_seconds(0, 4, limits) == (4 * 100 / 25 + 4 * 50 / 50, "int8")
    assert Limits(1, 5, 3).best(Limits(2, 4, 3)) == Limits(2, 5, 3)


def test_peaks_are_plausible() -> None:
    from llama.engine import isa_names

    f32, int8 = measure_peaks(1)
    assert 1e8 < f32 < 1e13 and 1e8 < int8 < 1e13
    plain = measure_peaks(1, "scalar")
    assert min(plain) > 1e7
    # 16 lanes fused against 4 apart; on a busy machine it may take a few looks to see it
    tries = (measure_peaks(1) for _ in range(20))
    wide = isa_names()[0].startswith("avx512")
    assert not wide or any(f > 1.5 * plain[0] and i > 1.5 * plain[1] for f, i in tries)
    for isa in isa_names():
        assert 1e7 < min(measure_peaks(1, isa)) < 1e13
    with pytest.raises(LlamaError, match='isa "best" is not among the kernels'):
        measure_peaks(1, "best")


def test_turns_become_one() -> None:
    row = {"n": 5, "rates": [4, 8], "bandwidths": [1, 2]}
    turn = {"open_seconds": 1.0, "first_token_seconds": 3.0, "rows": [row]}
    other = turn | {"open_seconds": 2.0, "rows": [row | {"rates": [6, 10], "bandwidths": [3]}]}
    found = report.merged([turn, other])
    assert found["open_seconds"] == 1.5
    numbers = {"rates": [4, 8, 6, 10], "bandwidths": [1, 2, 3]}
    assert found["rows"] == [{"n": 5, **numbers, "rate": 7, "spread": 6 / 7}]
    assert report.agreement([1, 2, 3], [1, 2, 4]) == {"tokens": 3, "same": 2}
    assert report.agreement([1, 2], [1, 2]) == {"tokens": 2, "same": 2}


def test_readme_rows_come_from_a_file(kept: tuple[Path, str]) -> None:
    done = bench("--table", kept[0], "--table", kept[0])
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 and lines[2] == lines[3]
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(lines[:2]) + "\n" in readme, "README's table has other columns"
    row = r"\| tiny \| f32, 0 MB \| \w+ \| 1 \| \d+ \(\d+%\), \d+% of f32 \| [\d.]+ \(\d+%\) "
    assert re.fullmatch(row + r"\| \d+% of [\d.]+ GB/s \|  \|", lines[2]), lines[2]
    # people's table: a row for each measurement
    assert len(re.findall(r"^\| (?:prompt|decode) ", kept[1], re.MULTILINE)) == 6
    assert "decode 4 after 30, 3 together" in kept[1]


def test_figures_are_those_of_the_reports() -> None:
    """README's rows and docs/performance.md's tables are what was measured, not what was typed."""
    kept = sorted((ROOT / "docs" / "bench").glob("*.json"))
    assert kept
    readme = (ROOT / "README.md").read_text()
    told = (ROOT / "docs" / "performance.md").read_text()
    for path in kept:
        found = report.read(path)
        for row, model in zip(report.readme_rows(found), found["models"], strict=True):
            assert row in readme, f"{path.name}: not in README.md: {row}"
            table = "\n".join(report.table(model))
            assert table in told, f"{path.name}: not in docs/performance.md: {table}"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")
def test_the_picture(kept: tuple[Path, str], tmp_path: Path) -> None:
    done = bench("--table", kept[0], "--plot", tmp_path / "a.png")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = bench("--table", kept[0], "--plot", tmp_path / "a.flac")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama import plot

    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlamaError, match="--plot needs matplotlib; pip install matplotlib"):
        plot.find_matplotlib()


def test_json_to_standard_output_is_all_there_is(tiny: Path) -> None:
    done = bench("--bin", tiny, "--prompt=4", "--tokens=1", "--repeats=1", "--json=-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][0]["rows"][1]["depth"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt=0"], "--prompt: must be 1 or more, numbers separated by commas, found '0'"),
        (["--depth=1,x"], "--depth: must be 0 or more, numbers separated by commas, found '1,x'"),
        (["--batch=300"], "--batch must be 256 or less, found 300"),
        (["--repeats=-1"], "--repeats must be 1 or more, found -1"),
        (["--depth=16777216"], "positions are asked for, at most 16777216 are possible"),
        (["--threads=0"], "threads is 0, expected 1 to 1024"),
        (["--reps=1"], "there is no --reps, but --repeats"),
        (["--bits=4"], "--bits goes with --shape"),
        (["--shape=8b"], "invalid choice: '8b'"),
        (["--isa=mmx"], 'isa "mmx" is not among the kernels'),
        (["--kv=q4"], "kv is 'q4', expected"),
        (["--activations=4"], "activations is 4, expected 8 or 16"),
        (["--activations=0"], "activations is 0, expected 8 or 16"),
        (["--json=no/such/file"], "--json no/such/file: expected a file in a folder that is there"),
        (["--plot=."], "--plot .: expected a file in a folder that is there"),
        (["--table=README.md"], "--table measures nothing"),
        (["--bin=no.bin"], "no.bin: No such file"),
        (["--bin=README.md"], "README.md: is not a model"),
    ],
)
def test_bad_flags_are_one_line(tiny: Path, words: list[str], says: str) -> None:
    done = bench("--bin", tiny, *words)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("measuring ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("llama.bench: ") and says in lines[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"models": [{}]}', '{"models": 5}', "\0"])
def test_files_that_are_no_reports(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    done = bench("--table", tmp_path / "x.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "not a report of llama.bench --json" in done.stderr
    missing = bench("--table", tmp_path / "y.json")
    assert missing.returncode == 1 and "y.json: cannot open: No such file" in missing.stderr


def test_a_trial_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    job = trial.Job("llama", "no/such.bin", 1, [1], [0], [1], 1, 1, 10)
    with pytest.raises(LlamaError, match=r"no/such.bin"):
        command.start_trial(job)
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: killed)
    with pytest.raises(LlamaError, match="llama was ended by signal 9"):
        command.start_trial(job)


def test_ctrl_c_ends_it_at_once(tiny: Path) -> None:
    line = [sys.executable, "-m", "llama.bench", "--bin", str(tiny), "--repeats=9999"]
    running = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    assert running.stderr.readline().startswith("measuring tiny.bin")
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (130, ""), err
