"""Builds and runs tests/kernels.c: every ISA x every entry x awkward sizes against scalar.c."""

import re
import subprocess

from building import build


def test_kernels() -> None:
    ran = subprocess.run([build("kernels") / "kernels"], capture_output=True, text=True)
    print(ran.stdout)
    last = re.search(r"(\d+) passed, (\d+) failed\n$", ran.stdout)
    assert ran.returncode == 0 and last, ran.stdout[-4000:] + ran.stderr
    assert int(last[1]) > 1000 and last[2] == "0"
