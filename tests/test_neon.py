"""arm64: the library, cross-compiled and run by qemu-user, computes what it computes here.

On a CPU that has sdot and on one that has not: every kernel against scalar.c, the logits of a real
model in every kind, and quantize.py's blocks, all to the last bit. Skips where Debian's packages
gcc-aarch64-linux-gnu, libc6-dev-arm64-cross or qemu-user are missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_models
from building import build

from llama import _lib
from llama.engine import Engine, Model
from llama.quant import GROUP, LAYOUTS, TILE_ROWS, Kind

EMULATOR = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
COMPILER = "aarch64-linux-gnu-gcc"
LIBC = Path("/usr/aarch64-linux-gnu")
BUILD = _lib.BUILD / "arm64"
CPUS = {"neondot": "max", "neon": "cortex-a72"}  # the best kernels that each of these CPUs runs
TOKENS = np.random.default_rng(5).integers(0, 512, 40).tolist()
needed = [what for what, there in [(COMPILER, shutil.which(COMPILER)), ("qemu-aarch64", EMULATOR),
          (f"{LIBC}/lib", (LIBC / "lib").is_dir())] if not there]  # fmt: skip
pytestmark = [
    pytest.mark.skipif(bool(needed), reason=f"not here: {', '.join(needed)}"),
    pytest.mark.other_build,
]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    tool = f"-DCMAKE_TOOLCHAIN_FILE={_lib.ROOT / 'tests' / 'arm64.cmake'}"
    build("llama", "kernels", "computed", folder=BUILD, options=(tool,))


def on_each_cpu(program: str, *args: str | Path | int) -> dict[str, bytes]:
    """The best kernels of each CPU, and what PROGRAM prints there; "ISA" in ARGS is their name."""
    running = {}
    for isa, cpu in CPUS.items():
        command = [EMULATOR, "-cpu", cpu, "-L", LIBC, BUILD / program,
                   *(isa if arg == "ISA" else str(arg) for arg in args)]  # fmt: skip
        running[isa] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wrote = {isa: process.communicate()[0] for isa, process in running.items()}
    for isa, process in running.items():
        assert process.returncode == 0, (isa, wrote[isa][-4000:])
    return wrote


def test_every_kernel_is_scalar_to_the_last_bit() -> None:
    for isa, wrote in on_each_cpu("kernels", "--quick").items():
        lines = wrote.decode().splitlines()
        assert lines[0] == ("neondot, neon, scalar" if isa == "neondot" else "neon, scalar")
        found = re.fullmatch(r"(\d+) passed, 0 failed", lines[-1])
        assert found and int(found[1]) > 1000, lines[-1]


@pytest.mark.parametrize("kind", list(Kind))
def test_logits_are_those_of_this_machine(tmp_path: Path, stories: Path, kind: Kind) -> None:
    path = small_models.quantized(stories, tmp_path / "model.bin", kind)
    n, coded = len(TOKENS), LAYOUTS[kind].columns > 1
    for kv, bits in [(Kind.F32, 16), (Kind.F16, 8 if coded else 16), (Kind.Q8, 16)]:
        with Engine(path, kv=kv.label, activations=bits) as engine:
            here = engine.forward(TOKENS, [0] * n, range(n), [True] * n)
        assert here is not None
        wrote = on_each_cpu("computed", "logits", path, "ISA", int(kv), bits, *TOKENS)
        for isa in wrote:
            there = np.frombuffer(wrote[isa], np.float32).reshape(here.shape)
            assert np.array_equal(there, here), (isa, kv, bits)


@pytest.mark.parametrize("kind", [kind for kind in Kind if LAYOUTS[kind].columns > 1])
def test_blocks_are_those_of_this_machine(stories: Path, kind: Kind) -> None:
    size = LAYOUTS[kind].block_bytes
    with Model(stories) as model:
        here = b"".join(
            model.quantize(i, 0, tensor.shape[0], kind, size * -(-tensor.shape[0] // TILE_ROWS)
                           * -(-tensor.shape[1] // GROUP))[0]
            for i, tensor in enumerate(model.tensors)
            if len(tensor.shape) == 2 and not (kind.rotated and tensor.shape[1] % GROUP)
        )  # fmt: skip
    for isa, there in on_each_cpu("computed", "blocks", stories, int(kind), size).items():
        assert there == here, isa
