"""Builds and runs tests/kernels.c: every ISA x every entry x awkward sizes against scalar.c."""

import re
import subprocess
from pathlib import Path

from llama import _lib


def test_kernels(tmp_path: Path) -> None:
    cmake = _lib.find_cmake()
    for command in (
        [cmake, "-S", str(_lib.ROOT), "-B", str(_lib.BUILD)],
        [cmake, "--build", str(_lib.BUILD), "--target", "kernels", "--parallel"],
    ):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    ran = subprocess.run([_lib.BUILD / "kernels"], capture_output=True, text=True)
    print(ran.stdout)
    last = re.search(r"(\d+) passed, (\d+) failed\n$", ran.stdout)
    assert ran.returncode == 0 and last, ran.stdout[-4000:] + ran.stderr
    assert int(last[1]) > 1000 and last[2] == "0"
