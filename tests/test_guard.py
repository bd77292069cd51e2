"""A model's file that is cut short while it is open: an error, in whichever thread and call, and
nobody else's SIGBUS is touched. Each case is a process of its own, which could die of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = """
import faulthandler, mmap, os, shutil, signal, sys, threading
from llama.engine import Engine, Model
from llama.errors import LlamaError

def said(work):
    try:
        work()
    except LlamaError as error:
        return str(error)

def step(engine, n=0):
    return engine.forward([1, 2, 3], [n] * 3, [0, 1, 2], [False, False, True])

def broken(path):
    return f"{path}: was cut short, or cannot be read any more, while it was open"

path = sys.argv[1]
"""
# a page of a stranger's file is gone
FOREIGN = """
with open(path + ".other", "wb+") as file:
    file.truncate(mmap.PAGESIZE)
    other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.truncate(0)
"""


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "m.bin"
    path.write_bytes(tiny.read_bytes())
    return path


def child(code: str, model: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + code, str(model)], capture_output=True, text=True,
        cwd=ROOT, timeout=120, check=False, **options,
    )  # fmt: skip


def good(code: str, model: Path) -> None:
    done = child(code, model)
    assert (done.returncode, done.stdout, done.stderr[-2000:]) == (0, "", "")


def test_every_call_that_reads_the_file_says_so(model: Path) -> None:
    good("""
engine, idle = Engine(path, threads=2), Model(path)
logits = step(engine)
tensor = next(i for i, t in enumerate(idle.tensors) if len(t.shape) == 2)
os.truncate(path, 8192)
for work in (
    lambda: engine.forward([1], [0], [3], [True]),
    lambda: idle.rows(tensor),
    lambda: idle.verify(tensor),
    lambda: engine.model.rows(tensor),
    lambda: Engine(path),
):
    found = said(work)
    assert found == broken(path) or found.startswith(f"{path}: cut short: its header says"), found
assert engine.length(0) == 3, "what failed leaves no trace in the cache"
assert said(lambda: idle.tensors) == broken(path)
engine.close(), idle.close()
""", model)


@pytest.mark.parametrize("left", [0, 1, 100_000])
def test_wherever_it_is_cut(model: Path, left: int) -> None:
    """Also the header, whose texts Python reads by itself."""
    good(f"""
engine = Engine(path, threads=3)
header = engine.model.tokenizer, engine.model.meta
os.truncate(path, {left})
assert said(lambda: step(engine)) == broken(path)
for work in (lambda: engine.model.tokenizer, lambda: engine.model.meta, lambda: engine.model.config,
             lambda: engine.model.fingerprint):
    assert said(work) == broken(path)
engine.close()
""", model)


def test_others_go_on(model: Path) -> None:
    """One of several models, used by several threads, and a new file of the same name."""
    good("""
shutil.copy(path, path + ".2")
first, second = Engine(path, threads=2), Engine(path + ".2", threads=2)
right = step(second)
os.truncate(path, 4096)
found = []
def use(engine, n):
    for _ in range(5):
        found.append((engine, said(lambda: step(engine, n))))
        engine.trim(n, 0)
second.trim(0, 0)
threads = [threading.Thread(target=use, args=(e, n)) for e in (first, second) for n in (1, 2, 3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 30
for engine, error in found:
    assert error == (broken(path) if engine is first else None), error
first.close()
os.unlink(path)
shutil.copy(path + ".2", path)
third = Engine(path)
assert (step(third) == right).all() and (step(second) == right).all()
""", model)


def test_in_a_fork(model: Path) -> None:
    good("""
model = Model(path)
pid = os.fork()
if not pid:
    os.truncate(path, 4096)
    os._exit(0 if said(lambda: model.rows(0)) == broken(path) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert said(lambda: model.rows(0)) == broken(path)
""", model)


@pytest.mark.parametrize("how", ["other[0]", "os.kill(os.getpid(), signal.SIGBUS)"])
@pytest.mark.parametrize("handler", ["", "faulthandler.enable()"])
def test_what_is_not_ours_kills_as_before(model: Path, how: str, handler: str) -> None:
    done = child(f"{handler}\nmodel = Model(path)\n{FOREIGN}\n{how}\nprint('still here')", model)
    assert done.returncode == -signal.SIGBUS and done.stdout == ""
    assert done.stderr.startswith("Fatal Python error: Bus error") == bool(handler)


def test_handlers_of_others(model: Path) -> None:
    """One set before hears what is not ours; one set later has the first word, and ours still
    works beneath faulthandler's, as it does where that has been disabled."""
    good("""
heard = []
signal.signal(signal.SIGBUS, lambda *_: heard.append(1))
model = Model(path)
signal.raise_signal(signal.SIGBUS)
assert heard == [1]
os.truncate(path, 4096)
assert said(lambda: model.rows(0)) == broken(path) and heard == [1]
""", model)


def test_a_handler_that_faulthandler_took_away_comes_back(model: Path) -> None:
    good("""
faulthandler.enable()
shutil.copy(path, path + ".2")
first = Model(path)
faulthandler.disable()  # which puts back what it had found
second = Model(path + ".2")
for model in (first, second):
    os.truncate(model.path, 4096)
    assert said(lambda: model.rows(0)) == broken(model.path)
""", model)


def test_faulthandler_on_top_says_where(model: Path) -> None:
    """It has the first word and the last, but the process does not go without one."""
    done = child("model = Model(path)\nfaulthandler.enable()\nos.truncate(path, 4096)\n"
                 "model.rows(0)\n", model)  # fmt: skip
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr and "in rows" in done.stderr


def test_a_thousand_models_one_after_another(model: Path) -> None:
    good("""
for _ in range(1000):
    with Model(path):
        pass
models = [Model(path) for _ in range(50)]
os.truncate(path, 4096)
assert {said(lambda: model.rows(0)) for model in models} == {broken(path)}
""", model)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="for Linux")
def test_run_says_one_line(model: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--bin", str(model), "--max_tokens=100000",
               "--max-seq-len=100000", "Hello"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        os.truncate(model, 4096)
        process.stdout.read()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert errors.splitlines()[-1] == (
        f"run.py: {model}: was cut short, or cannot be read any more, while it was open"
    )
