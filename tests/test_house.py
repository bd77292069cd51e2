"""The rules of the house that a program can check: who may know whom, and what files look like."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_FILES = sorted([*(ROOT / "lib").rglob("*.[ch]"), *(ROOT / "lib").rglob("*.cu*")])
PY_FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "llama").rglob("*.py")])
PROSE = r"^(/\*|//|#|\"\"\"|r?\"\"\")"

# A file of lib/ and the headers of lib/ it may include; llama.c sees all.
ISA = {"cpu/kernels.h", "cpu/blocks.h", "cpu/exp.h", "fit.h", "quant.h"}
INSIDE = {"llama.h", "error.h", "quant.h"}
MAY_INCLUDE = {
    "llama": set(),
    "quant": INSIDE | {"fit.h"},
    "fit": {"quant.h"},
    "crc32": INSIDE | {"format.h"},
    "guard": set(),
    "format": INSIDE | {"format.h", "guard.h"},
    "model": INSIDE | {"format.h", "model.h"},
    "rope": {"rope.h", "llama.h"},
    "cache": INSIDE | {"cache.h"},
    "sampler": {"sampler.h", "llama.h", "error.h"},
    "encode": INSIDE | {"encode.h", "format.h", "cpu/kernels.h", "cpu/pool.h"},
    "moments": {"moments.h", "error.h", "cpu/kernels.h", "cpu/pool.h"},
    "products": {"products.h", "format.h", "error.h", "cpu/kernels.h", "cpu/pool.h"},
    "backend": {"cache.h", "model.h"},
    "handles": {"model.h"},
    "session": {"backend.h", "error.h", "handles.h", "llama.h", "rope.h", "sampler.h"},
    "split": {"backend.h", "error.h"},
    "error": set(),
    "cpu/forward": {"backend.h", "error.h", "rope.h", "cpu/attention.h", "cpu/kernels.h",
                    "cpu/matmul.h", "cpu/memory.h", "cpu/pages.h", "cpu/pool.h"},
    "cpu/attention": {"cache.h", "cpu/pages.h"},
    "cpu/memory": set(),
    "cpu/pages": {"llama.h", "cpu/kernels.h", "cpu/pool.h"},
    "cpu/matmul": {"model.h", "cpu/kernels.h", "cpu/matmul.h", "cpu/pool.h"},
    "cpu/pool": {"error.h", "cpu/pool.h"},
    "cpu/limits": {"error.h", "cpu/limits.h", "cpu/pool.h"},
    "cuda/none": {"backend.h", "error.h"},
    "cuda/forward": {"cuda/session.h"},
    "cuda/session": {"backend.h", "rope.h", "cuda/memory.h"},
    "cuda/memory": {"error.h", "model.h", "cuda/kernels.h"},
    "cuda/kernels": {"quant.h"},
    "cuda/device": {"cuda/ptx_on_cpu.h"},  # by the emulator's include path
    "cuda/tiles": {"llama.h", "quant.h", "cuda/device.cuh"},
    "cuda/kv": {"llama.h", "quant.h", "cuda/device.cuh", "cuda/kernels.h"},
    "cuda/gemv": {"cuda/kernels.h", "cuda/tiles.cuh"},
    "cuda/gemm": {"cuda/kernels.h", "cuda/tiles.cuh"},
    "cuda/attention": {"cuda/kv.cuh"},
    "cuda/pages": {"cuda/kv.cuh"},
    "cuda/ops": {"llama.h", "quant.h", "cuda/device.cuh", "cuda/kernels.h"},
    "cuda/sampler": {"cuda/device.cuh", "cuda/kernels.h"},
}
# A module of llama/ and the modules it may import; the export wing may not see the run wing,
# but for golden, which runs a file that is written.
ANYONE = {"facts", "errors", "temporary"}
MAY_IMPORT = {
    "errors": set(),
    "temporary": set(),
    "config": set(),
    "quant": set(),
    "reading": set(),
    "format": {"config", "quant", "reading"},
    "model": {"config", "format", "quant"},
    "checkpoints": {"checkpoints", "config", "format", "quant", "golden", "reading"},
    "sampling": set(),
    "tokenizer": set(),
    "sandbox": set(),
    "templates": {"sandbox", "tokenizer"},
    "_lib": set(),
    "memory": set(),
    "engine": {"_lib", "config", "facts", "memory", "quant", "sampling"},
    "facts": {"config", "quant"},
    "overflow": {"config", "sampling"},
    "completion": {"batch", "overflow", "sampling", "tokenizer"},
    "turns": set(),
    "batch": {"completion", "engine", "sampling", "speculate", "turns"},
    "speculate": {"batch", "completion", "config", "engine", "reward", "sampling", "tokenizer"},
    "infill": {"tokenizer"},
    "reward": {"batch", "completion", "config", "tokenizer"},
    "likelihood": {"batch"},
    "request": {"completion", "generate", "infill", "reward", "sampling"},
    "heads": {"batch", "config", "engine", "templates", "tokenizer"},
    "session": {"engine", "quant", "templates"},
    "stream": {"batch", "completion"},
    "generate": {"batch", "completion", "config", "engine", "heads", "infill", "likelihood",
                 "overflow", "request", "reward", "sampling", "session", "speculate", "stream",
                 "templates", "tokenizer"},
    "machine": {"engine"},
    "cli": {"config", "generate", "machine", "overflow", "sampling", "checkpoints"},
    "complete": {"cli", "completion", "config", "generate", "infill", "machine", "request",
                 "sampling", "tokenizer"},
    "talk": {"cli", "completion", "config", "generate", "machine", "overflow", "sampling",
             "stream"},
    "limits": {"_lib", "engine", "quant"},
    "trial": {"cli", "ours", "peers"},
    "ours": {"engine", "limits", "machine", "trial"},
    "peers": {"engine", "quant", "to_gguf", "trial"},
    "shapes": {"config", "format", "quant"},
    "to_gguf": {"config", "engine", "quant", "shapes"},
    "report": {"limits"},
    "plot": set(),
    "bench": {"cli", "engine", "machine", "peers", "plot", "report", "shapes", "trial"},
    "distance": {"config", "engine", "tokenizer"},
    "eval": {"cli", "config", "distance", "engine", "machine", "reward", "tokenizer"},
    "harness": {"cli", "generate", "sampling"},
    "golden": {"config", "engine", "format", "tokenizer"},
    "selftest": {"config", "distance", "engine", "golden", "quant", "receipt"},
    "stages": {"_lib", "engine", "quant"},
    "calibrate": {"config", "engine", "quant", "sampling", "stages", "tokenizer"},
    "plan": {"quant"},
    "sensitivity": {"calibrate", "config", "engine", "stages"},
    "exact": {"calibrate", "distance", "engine", "quant", "sensitivity", "stages"},
    "receipt": {"distance", "plan", "quant"},
    "variants": {"engine", "format", "quant"},
    "info": {"config", "engine", "golden", "receipt", "tokenizer"},
    "shrink": {"calibrate", "cli", "distance", "engine", "exact", "format", "golden", "plan",
               "quant", "receipt", "stages", "variants"},
    "mixed": {"calibrate", "cli", "config", "distance", "engine", "format", "plan", "quant",
              "receipt", "sensitivity", "shrink", "stages", "variants"},
    "__init__": {"generate", "infill", "request", "sampling"},
}


def inside(path: Path) -> str:
    return path.relative_to(ROOT / "lib").with_suffix("").as_posix()


@pytest.mark.parametrize("path", C_FILES, ids=inside)
def test_c_includes(path: Path) -> None:
    if path.name == "llama.c":
        return
    allowed = MAY_INCLUDE.get(inside(path), ISA if path.parent.name == "cpu" else None)
    assert allowed is not None, "a new file: say here whom it may know"
    for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
        target = (path.parent / name).resolve().relative_to(ROOT / "lib").as_posix()
        assert target in allowed | {inside(path) + ".h"}, f"{path.name} may not include {target}"


@pytest.mark.parametrize("path", C_FILES, ids=inside)
def test_c_keeps_quiet(path: Path) -> None:
    """The library never prints, never exits and reads no environment."""
    banned = r"\b(printf|fprintf|puts|perror|exit|abort|getenv|setenv|system|gets|strcpy|sprintf)\("
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
    assert not re.findall(banned, code)


def modules(path: Path) -> tuple[str, set[str]]:
    """A Python file's module, and the modules of llama/ that it imports, also inside functions."""
    package = path.relative_to(ROOT / "llama").parts[0].removesuffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llama":
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "llama" and len(name) > 1}
    return package, found


@pytest.mark.parametrize("path", sorted((ROOT / "llama").rglob("*.py")), ids=lambda p: p.stem)
def test_python_imports(path: Path) -> None:
    package, found = modules(path)
    assert package in MAY_IMPORT, "a new module: say here whom it may know"
    assert found <= MAY_IMPORT[package] | ANYONE, f"{package} may not import {sorted(found)}"


@pytest.mark.parametrize("path", C_FILES + PY_FILES, ids=lambda p: p.name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("#!", "#if ", "#ifdef "))]
    assert re.match(PROSE, lines[0]), f"{path.name} opens with code"


@pytest.mark.parametrize("path", C_FILES + PY_FILES, ids=lambda p: p.name)
def test_size(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 520, f"{path.name} has {len(lines)} lines: is it still one room?"
    assert [line for line in lines if len(line) > 100] == []


def test_no_rooms_for_odds_and_ends() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [path for path in C_FILES + PY_FILES if path.stem in banned]


def test_only_the_door_exports_symbols() -> None:
    from llama._lib import LIBRARY

    done = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"nm cannot read this library: {done.stderr.strip()}")
    names = {line.split()[-1] for line in done.stdout.splitlines() if " T " in line}
    header = (ROOT / "lib" / "llama.h").read_text()
    prototypes = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    assert names == set(re.findall(r"\b(llama_\w+)\(", prototypes))
