"""This machine's memory bandwidth, measured once and remembered for each CPU.

Decoding reads every weight for every token, so bytes a second is the limit it is held against.
The rate is kept as JSON in the user's cache folder; where that cannot be written, it is measured
again next time and nothing else happens.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's caches belong; it may not exist yet."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "llama-engine"


def cpu_name() -> str:
    """The CPU's model, as its maker writes it where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            facts: dict[str, str] = {}
            for line in file:
                key, _, value = line.partition(":")
                facts[key.strip()] = value.strip()
        for key in ("model name", "Model", "CPU part"):
            if facts.get(key):
                return facts[key]
    except OSError:
        pass
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            return found.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return platform.processor() or platform.machine() or "unknown CPU"


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """This machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def revision() -> str:
    """Which version of this engine runs: its git commit, "+" behind it if files were changed."""
    folder = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        if (folder / ".git").exists():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"


def bandwidth(threads: int, reached: float = 0.0) -> float:
    """Bytes a second that THREADS threads read, measured now or by an earlier run.

    A busy machine measures low, so the best rate measured counts; a program that has REACHED
    more shows that it is time to measure again.
    """
    file = cache_folder() / "bandwidth.json"
    key = f"{cpu_name()}, {threads} threads"
    known = _read(file)
    if key not in known or known[key] < reached:
        from llama.engine import measure_bandwidth

        known[key] = max(known.get(key, 0.0), measure_bandwidth(threads))
        _write(file, known)
    return known[key]


def _read(file: Path) -> dict[str, float]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {str(k): float(v) for k, v in known.items() if float(v) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, known: dict[str, float]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # under its own name first: another run may read at this moment
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=".bandwidth-", delete=False
        ) as out:
            try:
                json.dump(known, out, indent=1)
                out.close()
                os.replace(out.name, file)
            except BaseException:
                os.unlink(out.name)
                raise
    except OSError:
        pass
