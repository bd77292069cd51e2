"""run.py as a user meets it: what goes to stdout and what to stderr, and how it fails."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

from llama import cli, engine, machine
from llama.errors import LlamaError
from llama.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of its own with a bandwidth in it, so that nothing is measured here. The
    C library is built by the import below, before anybody counts lines."""
    assert engine.isa_names()
    folder = tmp_path_factory.mktemp("cache")
    known = {f"{machine.cpu_name()}, {n} threads": 1e10 for n in range(1, 257)}
    (folder / "llama-engine").mkdir()
    (folder / "llama-engine" / "bandwidth.json").write_text(json.dumps(known))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


def run(
    *words: object, stdin: str | bytes | None = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    data = stdin if isinstance(stdin, bytes) or stdin is None else stdin.encode()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, words)], input=data,
        capture_output=True, timeout=120, cwd=ROOT, **options,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def fails(done: subprocess.CompletedProcess[str], what: str) -> None:
    """One line on stderr that begins with the program's name, nothing on stdout, status 1."""
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("run.py: ") and done.stderr.count("\n") == 1, done.stderr
    assert what in done.stderr, done.stderr


def test_only_the_text_goes_to_stdout(stories: Path, data: Path) -> None:
    known = json.loads((data / "reference" / "stories260K_greedy.json").read_text())
    done = run("--bin", stories, "--type", "greedy", "--max_tokens", known["steps"], "")
    assert (done.returncode, done.stdout) == (0, known["text"] + "\n")
    assert done.stderr.startswith("prompt 1 tok at ") and done.stderr.count("\n") == 1
    assert ", decode 199 tok at " in done.stderr
    assert done.stderr.endswith("% of this machine's 10.0 GB/s\n")


def test_the_prompt_may_come_through_a_pipe(stories: Path) -> None:
    flags = ["--bin", stories, "--type=greedy", "--max-tokens=8"]
    by_word = run(*flags, "One day")
    assert by_word.stdout == run(*flags, stdin="One day\n").stdout
    assert by_word.stdout == run(*flags, stdin="One day\r\n").stdout
    echoed = run(*flags, "--echo", "One day")
    assert echoed.stdout == "One day" + by_word.stdout
    ids = run(*flags, "--ids", "1,385, 328")
    assert ids.stdout == by_word.stdout
    assert run(*flags, "--echo", "Ünïcode 🙂").stdout.startswith("Ünïcode 🙂")
    assert run(*flags, stdin=b"caf\xff ").returncode == 0


def test_methods_and_flags(stories: Path) -> None:
    flags = ["--bin", stories, "--max_tokens", 30, "--threads", 1, "One day"]
    texts = {}
    for method in ("greedy", "temperature", "top_k", "top_p"):
        done = run(
            *flags, "--type", method, "--seed", 7, "--temperature", 0 if method == "greedy" else 1.4
        )
        assert done.returncode == 0
        texts[method] = done.stdout
    assert texts["temperature"] != texts["greedy"]
    again = run(*flags, "--type=top_p", "--seed=7", "--temperature=1.4")
    assert again.stdout == texts["top_p"]
    assert run(*flags, "--temperature=0").stdout == texts["greedy"]
    assert run(*flags, "--type=top_k", "--top-k=1", "--seed=3").stdout == texts["greedy"]
    idle = run(*flags, "--type=greedy", "--top_k=3")
    assert idle.stdout == texts["greedy"] and "makes --top_k idle" in idle.stderr
    stopped = run(*flags, "--type=greedy", "--stop", "little", "--stop=zzz")
    assert stopped.stdout == texts["greedy"].split("little")[0] + "\n"


def test_many_prompts(stories: Path, tmp_path: Path) -> None:
    lines: list[Any] = [
        "One day", {"prompt": "The cat", "max_tokens": 3}, {"prompt": [1, 403], "stop": ["girl"]},
        {"prompt": "", "temperature": 1.0, "seed": 5}, "One day",
    ]  # fmt: skip
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    flags = ["--bin", stories, "--type=greedy", "--max_tokens=25"]
    done = run(*flags, "--prompts", file)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    assert found[0]["text"] + "\n" == run(*flags, "One day").stdout
    assert found[0] == found[4]
    assert run(*flags, "--prompts", "-", stdin=file.read_text()).stdout == done.stdout
    assert found[1]["completion_tokens"] == 3
    assert found[2]["finish_reason"] == "stop" and "girl" not in found[2]["text"]
    seeded = run(
        "--bin", stories, "--max_tokens=25", "--temperature=1.0", "--seed=5", "--top_p=0.9", ""
    )
    assert found[3]["text"] + "\n" == seeded.stdout
    assert "prompt " in done.stderr and "decode " in done.stderr


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('"a"\n{"prompt": ', "line 2: no JSON"), ("5\n", "line 1: expected"),
        ('{"text": "a"}\n', "line 1: expected"),
        ('{"prompt": "a", "top_q": 1}\n', "line 1: unknown sampling parameter 'top_q'"),
        ('{"prompt": "a", "top_k": -1}\n', "line 1: top_k must be 0 to"),
        ('{"prompt": ["a"]}\n', "a prompt must be a str or a list of token ids"),
        ('"a"\n\n{"prompt": [999]}\n', "prompts.jsonl line 3: token id must be 0 to 511, found"),
        (b"\xff\xfe", "is not UTF-8"), (None, "cannot read: No such file"),
    ],
)  # fmt: skip
def test_bad_prompt_files(stories: Path, tmp_path: Path, content: Any, what: str) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(run("--bin", stories, "--prompts", file), what)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--bogus"], "there is no --bogus ("), (["a", "b"], "arguments: b"),
        (["--temp=0", "a"], "there is no --temp, but --temperature ("),
        (["--top_k", "x", "a"], "argument --top_k: invalid int value: 'x'"),
        (["--top-p", "2", "a"], "top_p must be above 0 and at most 1, found 2.0"),
        (["--temperature=nan", "a"], "temperature must be 0 or more, found nan"),
        (["--max_tokens=0", "a"], "max_tokens must be 1 to"),
        (["--seed=-1", "a"], "seed must be 0 to"),
        (["--type=magic", "a"], "argument --type: invalid choice: 'magic'"),
        (["--stop=", "a"], "stop must hold strings that are not empty"),
        (["--ids=1,x"], "--ids must be whole numbers"), (["--ids="], "--ids must be whole num"),
        (["--ids=1,512"], "token id must be 0 to 511, found 512"),
        (["--ids=1", "a"], "give one of PROMPT, --ids, --prompts and --prefix"),
        (["--threads=-2", "a"], "threads is -2, expected 1 to 1024"),
        (["--threads=0", "a"], "threads is 0, expected 1 to 1024"),
        (["--device=abacus", "a"], "abacus"), (["--kv=f8", "a"], "f8"),
        (["--max-seq-len=-1", "a"], "max_seq_len is -1, expected 1 to"),
        (["--max-seq-len=99999999", "a"], "max_seq_len is 99999999, expected 1 to 16777216"),
        (["word " * 600], "tokens and the context holds 512"),
        (["--n=0", "a"], "n must be 1 to 1024, found 0"),
        (["--keep=3", "a"], "--keep needs --overflow slide"),
        (["--date=x", "a"], "there is no --date ("),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(stories: Path, words: list[str], what: str) -> None:
    fails(run("--bin", stories, *words), what)


def test_bad_files_are_one_line(stories: Path, tmp_path: Path) -> None:
    fails(run("--bin", tmp_path / "none.bin", "a"), "none.bin")
    fails(run("--bin", tmp_path, "a"), str(tmp_path))
    empty = tmp_path / "empty.bin"
    empty.write_bytes(b"")
    fails(run("--bin", empty, "a"), "empty.bin")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(stories.read_bytes()[:-100])
    fails(run("--bin", cut, "a"), "cut.bin")
    fails(run("--bin", ROOT / "run.py", "a"), "run.py")


def test_without_a_tokenizer(tmp_path: Path) -> None:
    path = tiny_chat.write(tmp_path / "ids.bin", tokenizer=False)
    fails(run("--bin", path, "a"), "holds no tokenizer; give token ids")
    done = run("--bin", path, "--ids", "5 6 7", "--max_tokens=4", "--type=greedy")
    assert done.returncode == 0 and len(done.stdout.split()) == 4
    assert all(word.isdigit() for word in done.stdout.split())


def test_show_prompt(stories: Path) -> None:
    done = run("--bin", stories, "--show-prompt", "--max_tokens=1", "One day")
    lines = done.stderr.splitlines()
    assert lines[0] == "prompt: 3 tokens"
    assert [line.split()[0] for line in lines[1:4]] == ["1", "385", "328"]
    assert lines[1].endswith("'<s>'  control") and "control" not in lines[2]
    twice = run("--bin", stories, "--show-prompt", "--max_tokens=1", "--ids=1,1,385")
    assert "warning: the prompt begins with two begin tokens" in twice.stderr


def test_a_full_disk(stories: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", "--bin", stories, "--max_tokens=3", "a"],
            stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == b"run.py: standard output: No space left on device\n"


def test_a_reader_that_leaves(stories: Path) -> None:
    with subprocess.Popen(
        [sys.executable, ROOT / "run.py", "--bin", stories, "--max_tokens=400", "One day"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        said = process.stderr.read()
        assert said == b"" or b"tok/s" in said  # where it was done before
        assert process.wait(60) == 0


def test_ctrl_c(tiny: Path) -> None:
    with subprocess.Popen(
        [sys.executable, ROOT / "run.py", "--bin", tiny, *tiny_chat.WITHOUT_END, "abc"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.stderr.read() == b""
        assert process.wait(60) == 130


def test_no_prompt_at_a_terminal() -> None:
    keyboard, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, ROOT / "run.py"], stdin=terminal, capture_output=True, check=False
    )
    os.close(keyboard)
    os.close(terminal)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"run.py: give a prompt: ") and done.stderr.count(b"\n") == 1


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--type", "--top_p", "--seed", "--stop", "--max-seq-len", "--prompts"):
        assert flag in done.stdout


def test_closed_streams_and_missing_packages(stories: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} run.py --bin {stories} --max_tokens=2 --type=greedy"
    for redirect, status in (("a <&-", 0), ("<&-", 1), ("a >&-", 0), ("a 2>&-", 0)):
        done = subprocess.run(
            ["sh", "-c", f"{command} {redirect}"], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == status and b"Traceback" not in done.stderr, done
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('no', name='numpy')")
    fails(
        run("--bin", stories, "a", env=os.environ | {"PYTHONPATH": str(tmp_path)}),
        "numpy is missing; pip install -r requirements.txt",
    )


# --- flags, in this process


def flags(*words: str) -> SamplingParams:
    parser = cli.Parser(prog="run.py")
    cli.add_sampling_flags(parser, max_tokens=9)
    return cli.params_of(parser.parse_args(words))


def test_what_the_methods_mean() -> None:
    assert flags() == SamplingParams(max_tokens=9)
    assert flags("--type=greedy").temperature == 0
    assert flags("--type=temperature") == SamplingParams(top_p=1.0, max_tokens=9)
    assert flags("--type=top_k") == SamplingParams(top_k=40, top_p=1.0, max_tokens=9)
    assert flags("--type=top_k", "--top-k=5", "--top_p=0.5").top_p == 0.5
    assert flags("--min-p", "0.1", "--repetition-penalty=1.1").min_p == 0.1
    mixed = flags("--presence-penalty=0.5", "--frequency_penalty", "-1", "--logit-bias", "5=-inf",
                  "--logit_bias=7=1.5", "--typical-p=0.9")  # fmt: skip
    assert mixed == SamplingParams(
        presence_penalty=0.5, frequency_penalty=-1, logit_bias={5: float("-inf"), 7: 1.5},
        typical_p=0.9, max_tokens=9, top_p=0.9, top_k=0,
    )  # fmt: skip
    assert flags("--mirostat", "5").mirostat_tau == 5 and flags("--mirostat=5").mirostat_eta == 0.1
    assert flags("--mirostat=4,0.3").mirostat_eta == 0.3
    assert flags("--stop=--x_y").stop == ("--x_y",)
    with pytest.raises(LlamaError, match="top_p"):
        flags("--type=greedy", "--top_p=5")


# --- bandwidth


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def measure(threads: int) -> float:
        calls.append(threads)
        return 5e9 + threads

    monkeypatch.setattr(engine, "measure_bandwidth", measure)
    return calls


def test_bandwidth_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep" / "cache"))
    if sys.platform == "darwin":
        monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.bandwidth(2) == machine.bandwidth(2) == 5e9 + 2
    assert machine.bandwidth(1) == 5e9 + 1 and measured == [2, 1]
    assert machine.bandwidth(1, reached=4e9) == 5e9 + 1 and measured == [2, 1]
    assert machine.bandwidth(1, reached=6e9) == 5e9 + 1 and measured == [2, 1, 1]
    file = machine.cache_folder() / "bandwidth.json"
    assert len(json.loads(file.read_text())) == 2
    assert list(file.parent.iterdir()) == [file]
    for broken in ("", "[]", '{"x": "y"}', "\0", '{"a": -1}'):
        file.write_text(broken)
        assert machine.bandwidth(2) == 5e9 + 2
    assert measured == [2, 1, 1] + [2] * 5


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    assert machine.bandwidth(2) == machine.bandwidth(2) == 5e9 + 2
    assert measured == [2, 2]


def test_the_cpu_has_a_name() -> None:
    assert machine.cpu_name() and "\n" not in machine.cpu_name()


def test_importing_is_lazy() -> None:
    code = (
        "import sys, llama, llama.checkpoints, llama.errors\n"
        "bad = {'cffi', 'llama._lib', 'llama.engine', 'torch'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "assert llama.LlamaError is llama.errors.LlamaError and llama.SamplingParams\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert time.monotonic() - began < 30
