"""The C library, as cffi sees it: found, built with CMake when missing or stale, and loaded.

lib/llama.h is the one description of the library; its prototypes are read from there. Everything
that can fail goes through check(), which turns the library's sentence into a LlamaError.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import cffi

from llama.errors import LlamaError

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LIBRARY = BUILD / ("libllama.dylib" if sys.platform == "darwin" else "libllama.so")

ffi = cffi.FFI()
Progress: TypeAlias = Callable[[int, int], object]  # how much is done, of how much


def _stale() -> bool:
    """Whether the library is missing or older than any of its sources."""
    if not LIBRARY.exists():
        return True
    built = LIBRARY.stat().st_mtime
    sources = [ROOT / "CMakeLists.txt"]
    for pattern in ("*.c", "*.h", "*.cu", "*.cuh"):
        sources += (ROOT / "lib").rglob(pattern)
    return any(source.stat().st_mtime > built for source in sources)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process works in FOLDER at a time; the others wait, and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:
            pass  # no such locks on this system: two builds may race
        yield


def find_cmake() -> str:
    """pip's cmake or the system's; LlamaError if there is neither."""
    beside = Path(sys.executable).with_name("cmake")  # in a venv that is not activated
    found = str(beside) if beside.exists() else shutil.which("cmake")
    if not found:
        raise LlamaError(
            "the C library is not built and cmake is not there to build it: "
            "pip install -r requirements.txt"
        )
    return found


def _build() -> None:
    cmake = find_cmake()
    print("Building the C library with CMake (once, under a minute) ...", file=sys.stderr)
    jobs = str(os.cpu_count() or 1)
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(BUILD)],
        [cmake, "--build", str(BUILD), "--parallel", jobs],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise LlamaError(
                f"the C library could not be built: {' '.join(command)} failed "
                f"(to start over: rm -rf {BUILD})"
            )
    if _stale():  # cmake found nothing to do, e.g. a header that nothing includes was touched
        LIBRARY.touch()


def _load() -> Any:
    override = os.environ.get("LLAMA_LIBRARY")  # another build, e.g. one with sanitizers
    if not override and _stale():
        try:
            with alone_in(BUILD):
                if _stale():
                    _build()
        except OSError as error:
            raise LlamaError(f"the C library cannot be built in {BUILD}: {error}") from None
    header = (ROOT / "lib" / "llama.h").read_text()
    ffi.cdef("\n".join(line for line in header.splitlines() if not line.startswith("#")))
    try:
        return ffi.dlopen(override or str(LIBRARY))
    except OSError as error:
        raise LlamaError(f"the C library cannot be loaded: {error}") from None


lib = _load()


def check(status: int) -> None:
    """Raises what the library said if STATUS is a failure."""
    if status:
        raise LlamaError(ffi.string(lib.llama_error()).decode("utf-8", "replace"))


def as_callback(progress: Progress | None) -> tuple[Any, list[BaseException]]:
    """What the library calls for PROGRESS, as long as this is held, and what that raised: from
    then on the library is told to stop."""
    raised: list[BaseException] = []
    if progress is None:
        return ffi.NULL, raised

    def told(_: Any, done: int, total: int) -> int:
        progress(done, total)
        return 0

    def failed(kind: Any, error: BaseException, trace: Any) -> None:
        raised.append(error)

    return ffi.callback("int(void *, uint64_t, uint64_t)", told, 1, failed), raised
