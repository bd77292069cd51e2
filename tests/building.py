"""What tests have CMake build besides the library."""

import subprocess
from pathlib import Path

from llama import _lib


def build(*targets: str, folder: Path = _lib.BUILD, options: tuple[str, ...] = ()) -> Path:
    """FOLDER, where CMake has built TARGETS with OPTIONS; one process at a time builds in it."""
    with _lib.alone_in(folder):
        for command in (
            ["-S", str(_lib.ROOT), "-B", str(folder), *options],
            ["--build", str(folder), "--parallel", "2", "--target", *targets],
        ):
            done = subprocess.run([_lib.find_cmake(), *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder
