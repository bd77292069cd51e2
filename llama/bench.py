"""python3 -m llama.bench: how fast a model runs here, as a share of what the machine allows.

Decoding reads every weight, and the keys and values of all positions, once a token: its limit is
the memory's bandwidth. Reading a prompt uses each weight for many tokens: its limit is the peak of
multiply-adds. Both are measured in the same run. Each engine works in a process of its own
(trial.py); with --against, ours and the peer take turns, so that what else the machine does
strikes both. Rates are medians of all repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama import report
from llama.cli import Parser, default_bin, run, say
from llama.errors import LlamaError
from llama.shapes import BITS, SHAPES, random_model
from llama.trial import Job

GREEDY = 64  # tokens that two engines choose, to be compared
MOST = 1 << 24  # positions of a sequence


def counts(least: int) -> Any:
    """The type of a flag that takes numbers of LEAST or more, separated by commas."""

    def convert(text: str) -> list[int]:
        try:
            found = [int(word) for word in text.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < least or max(found) > MOST:
            raise argparse.ArgumentTypeError(
                f"must be {least} or more, numbers separated by commas, found {text!r}"
            )
        return found

    return convert


def arguments() -> argparse.Namespace:
    parser = Parser(prog="llama.bench", description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--bin", type=Path, action="append", default=[], metavar="FILE",
        help="a model; may be given several times (default: bin/chat-llama.bin)",
    )  # fmt: skip
    what.add_argument(
        "--shape", choices=list(SHAPES),
        help="a model of random weights, as large as Llama 2 7B, TinyLlama 1.1B or SmolLM2 135M",
    )  # fmt: skip
    what.add_argument("--bits", type=int, choices=list(BITS), help="of --shape (default: 4)")
    what.add_argument(
        "--shape-dir", type=Path, metavar="DIR",
        help="where random models, and files for --against, are kept (default: the user's cache)",
    )  # fmt: skip
    what.add_argument("--prompt", type=counts(1), default=[512], metavar="N,...",
                      help="tokens of prompt (default: 512)")  # fmt: skip
    what.add_argument("--depth", type=counts(0), default=[0], metavar="N,...",
                      help="positions before decoding begins (default: 0)")  # fmt: skip
    what.add_argument("--batch", type=counts(1), default=[1], metavar="N,...",
                      help="sequences decoded together (default: 1)")  # fmt: skip
    what.add_argument("--tokens", type=int, default=32, metavar="N",
                      help="tokens that each of them decodes (default: 32)")  # fmt: skip
    what.add_argument("--repeats", type=int, default=5, metavar="N", help="in each turn (5)")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    how.add_argument("--activations", type=int, metavar="BITS",
                     help="8 or 16 (default: the file's)")  # fmt: skip
    how.add_argument("--isa", metavar="NAME", help="the CPU kernels (default: the best)")
    how.add_argument("--kv", metavar="KIND", help="f32, f16 or q8 (default: f16; for f32 files "
                     "f32, but f16 with --against)")  # fmt: skip
    how.add_argument("--against", choices=["llama.cpp", "openvino"],
                     help="another engine, from PyPI, on the same weights")  # fmt: skip
    how.add_argument("--turns", type=int, default=2, metavar="N",
                     help="of each engine with --against (default: 2)")  # fmt: skip
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="keep everything ('-': print it)")
    out.add_argument("--plot", type=Path, metavar="FILE.png",
                     help="draw tokens/s over depth and batch, with the limits")  # fmt: skip
    out.add_argument("--table", type=Path, metavar="FILE", action="append",
                     help="measure nothing: print the README's rows of a --json file, or with "
                     "--plot draw it; may be given several times")  # fmt: skip
    given = parser.parse_args()
    for name in ("tokens", "repeats", "turns"):
        if not 1 <= getattr(given, name) <= MOST:
            parser.error(f"--{name} must be 1 or more, found {getattr(given, name)}")
    if given.bits and not given.shape:
        parser.error("--bits goes with --shape")
    measuring = given.bin or given.shape or given.json or given.against
    if given.table and measuring:
        parser.error("--table measures nothing; it goes with --plot only")
    if max(given.batch) > 256:
        parser.error(f"--batch must be 256 or less, found {max(given.batch)}")
    return given


def check_output(path: Path | None, flag: str) -> None:
    """Refuses at once what could not be written after all the work."""
    if path is None or str(path) == "-":
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise LlamaError(f"{flag} {path}: expected a file in a folder that is there")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise LlamaError(f"{flag} {path}: cannot write there")


def start_trial(job: Job) -> dict[str, Any]:
    """A trial.Result, as a dictionary, from a process of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "llama.trial"], input=json.dumps(asdict(job)), text=True,
        capture_output=True, errors="replace", env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    if done.returncode < 0:
        raise LlamaError(f"{job.engine} was ended by signal {-done.returncode} (9: no memory left)")
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise LlamaError(lines[-1].removeprefix("llama.bench: "))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(path: Path, shape: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """One model of the report."""
    from llama.engine import Model
    from llama.machine import cores

    with Model(path) as model:
        config = model.config
    threads = cores() if given.threads is None else given.threads
    if not 1 <= threads <= 1024:
        raise LlamaError(f"threads is {threads}, expected 1 to 1024")
    turns = given.turns if given.against else 1
    kv = given.kv or ("f16" if given.against else None)
    compared = bool(given.against) and config.dtype == "f16" and shape is None
    job = Job(
        "llama", str(path), threads, given.prompt, given.depth, given.batch, given.tokens,
        given.repeats, config.vocab_size,
        given.activations, given.isa, kv,
        GREEDY if compared else 0,
    )  # fmt: skip
    if job.positions > MOST:
        raise LlamaError(f"{job.positions} positions are asked for, at most {MOST} are possible")
    peer_job = job
    if given.against:
        from llama.peers import gguf_of

        kept = gguf_of(path, given.against, folder(given), shape is not None)
        peer_job = replace(job, engine=given.against, path=str(kept))
    results: dict[str, list[dict[str, Any]]] = {}
    for turn in range(turns):
        for each in [job, peer_job][: 2 if given.against else 1]:
            note = f", turn {turn + 1} of {turns}" * (turns > 1)
            say(f"measuring {path.name} with {each.engine}{note}")
            results.setdefault(each.engine, []).append(start_trial(each))
    model_report = {"file": path.name, "shape": shape, **report.ours(results["llama"])}
    model_report["against"] = None
    if given.against:
        peer = report.against(model_report, results[given.against], compared)
        model_report["against"] = {"file": Path(peer_job.path).name, **peer}
    return model_report


def folder(given: argparse.Namespace) -> Path:
    """Where files that are made for measuring are kept."""
    from llama.machine import cache_folder

    return given.shape_dir or cache_folder() / "bench"


def machine() -> dict[str, Any]:
    """Where it ran."""
    from llama.machine import cores, cpu_name, memory_bytes

    return {"cpu": cpu_name(), "cores": cores(), "memory_bytes": memory_bytes(),
            "system": platform.platform(), "python": platform.python_version()}  # fmt: skip


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The report of a run; each model's table is printed as it is done."""
    from llama.engine import Model
    from llama.machine import revision

    found: dict[str, Any] = {"machine": machine(), "revision": revision(), "models": []}
    if given.against:
        from llama.peers import find

        find(given.against)  # what is wrong is said before any work
    files: list[tuple[Path, str | None]] = [(path, None) for path in given.bin]
    if not given.bin and not given.shape:
        files = [(default_bin(), None)]
    for path, _ in files:
        Model(path).close()
    if given.shape:
        made = random_model(given.shape, given.bits or 4, folder(given))
        files.append((made, f"{given.shape} shape"))
    told = str(given.json) != "-"
    if told:
        print(f"{found['machine']['cpu']}; medians of {given.repeats} repeats (spread)", flush=True)
    for path, shape in files:
        found["models"].append(measure(path, shape, given))
        if told:
            print("\n" + "\n".join(report.table(found["models"][-1])), flush=True)
    return found


def main() -> int:
    given = arguments()
    check_output(given.json, "--json")
    check_output(given.plot, "--plot")
    if given.plot:
        from llama.plot import find_matplotlib

        find_matplotlib()  # says so now if it is missing
    if given.table:
        found: dict[str, Any] = {"models": []}
        for path in given.table:
            found["models"] += report.read(path)["models"]
        if not given.plot:
            print("\n".join([*report.README, *report.readme_rows(found)]))
    else:
        found = measured(given)
        if given.json:
            text = json.dumps(found, indent=1)
            if str(given.json) == "-":
                print(text)
            else:
                given.json.write_text(text + "\n", encoding="utf-8")
    if given.plot:
        from llama.plot import draw

        draw(found, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.bench", main))
