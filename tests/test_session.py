"""Sessions: what is restored goes on as if it had never been away, to the last bit, and a file
that is damaged, hostile or another model's is refused in one line and changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_chat
from fake_engine import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import session
from llama.config import Config, Rope
from llama.engine import Model
from llama.errors import LlamaError
from llama.format import TokenizerKind
from llama.generate import Llama
from llama.quant import Kind
from llama.sampling import SamplingParams
from llama.talk import Talk

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3)
SEEDED = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=3)
Messages = list[dict[str, str]]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def begun(llm: Llama, params: SamplingParams = GREEDY, turns: int = 2) -> Messages:
    """A dialog of TURNS turns that LLM has answered."""
    messages = [said("system", "Be brief.")]
    for n in range(turns):
        messages.append(said("user", f"question {n}: é, 🙂?"))
        messages.append(said("assistant", llm.chat(messages, params).text))
    return messages


def one_line(message: str = "") -> Any:
    return pytest.raises(LlamaError, match=f"^[^\n]*{message}[^\n]*$")


@pytest.fixture
def llm(tiny: Path) -> Iterator[Llama]:
    with Llama(tiny, threads=1) as made:
        yield made


@pytest.fixture
def saved(llm: Llama, tmp_path: Path) -> Path:
    """A session of LLM's, with keys and values."""
    path = tmp_path / "a.session"
    assert llm.save_session(path, begun(llm)) > 50
    return path


# --- the next token is the same


def small_chat(folder: Path, **changes: Any) -> Path:
    """tiny_chat's model in another shape."""
    shape = replace(tiny_chat.CONFIG, **changes)
    more = {"tokenizer": (TokenizerKind.JSON, byte_tokenizer()),
            "meta": {"template.family": "chatml"}}  # fmt: skip
    return small_models.write_bin(folder / "model.bin", shape, **more)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_next_answer_is_the_same_to_the_last_bit(
    tiny: Path, tmp_path: Path, kv: str, params: SamplingParams
) -> None:
    path = tmp_path / "a.session"
    with Llama(tiny, kv=kv, threads=2) as llm:
        messages = begun(llm, params)
        tokens = llm.save_session(path, messages)
        asked = [*messages, said("user", "and now?")]
        right = llm.chat(asked, params)
        assert right.cached_tokens == tokens > 80
    with Llama(tiny, kv=kv, threads=1, isa="scalar") as llm:
        restored, came_back = llm.load_session(path)
        assert restored == messages and came_back == tokens and llm.computed_tokens == 0
        again = tmp_path / "b.session"  # and once more from there
        llm.save_session(again, messages)
        assert again.read_bytes() == path.read_bytes()
        result = llm.chat(asked, params)
        assert result.cached_tokens == tokens
        assert result.logprobs == right.logprobs and result.token_ids == right.token_ids


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_over_a_slide(tiny: Path, tmp_path: Path, params: SamplingParams) -> None:
    path = tmp_path / "a.session"
    options: dict[str, Any] = {"max_seq_len": 128, "overflow": "slide"}
    messages = [said("user", "Hello")]
    with Llama(tiny, **options) as llm:
        answer = llm.chat(messages, replace(params, max_tokens=150))
        assert answer.dropped_tokens > 60
        messages.append(said("assistant", answer.text[:60]))
        llm.save_session(path, messages)
        asked = [*messages, said("user", "and now?")]
        right = llm.chat(asked, params)
    with Llama(tiny, **options) as llm:
        assert llm.load_session(path)[0] == messages
        result = llm.chat(asked, params)
        assert (result.logprobs, result.cached_tokens) == (right.logprobs, right.cached_tokens)
    with Llama(tiny, **options) as llm:  # nothing of the slid state is in either
        assert llm.chat(asked, params).logprobs == right.logprobs


def test_dynamic_scaling(tmp_path: Path) -> None:
    """Beyond the original length keys belong to a prompt's length: they are computed again."""
    model = small_chat(tmp_path, rope_scaling=Rope.DYNAMIC, rope_numbers=(4.0, 100.0))
    path = tmp_path / "a.session"
    for turns, kept in ((1, True), (3, False)):
        with Llama(model) as llm:
            messages = begun(llm, turns=turns)
            assert (llm.save_session(path, messages) > 0) is kept
            asked = [*messages, said("user", "?")]
            right = llm.chat(asked, GREEDY)
        with Llama(model) as llm:
            llm.load_session(path)
            result = llm.chat(asked, GREEDY)
            assert (result.logprobs, result.cached_tokens) == (right.logprobs, right.cached_tokens)


def test_a_shorter_context_takes_what_it_holds(saved: Path, tiny: Path) -> None:
    with Llama(tiny, max_seq_len=60) as llm:
        messages, tokens = llm.load_session(saved)
        assert tokens == 60 and len(messages) == 5
        asked = [said("system", "Be brief."), said("user", "?")]
        assert 20 < llm.chat(asked, GREEDY).cached_tokens < 60


def test_words_alone(llm: Llama, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    messages = begun(llm)
    assert llm.save_session(path, messages, words_only=True) == 0
    assert path.stat().st_size < 1000
    with Llama(tiny) as other:
        assert other.load_session(path) == (messages, 0)
        asked = [*messages, said("user", "?")]
        assert other.chat(asked, GREEDY).logprobs == llm.chat(asked, GREEDY).logprobs


@pytest.mark.parametrize("messages", [[], [said("system", "Be brief.")]])
def test_before_the_first_question(llm: Llama, tmp_path: Path, messages: Messages) -> None:
    assert llm.save_session(tmp_path / "a", messages) == 0
    assert llm.load_session(tmp_path / "a") == (messages, 0)


@settings(max_examples=20)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_any_text_comes_back(texts: list[str]) -> None:
    messages = [said(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    assert session.check(messages) == messages
    with one_line("surrogate"):
        session.check([said("user", "\ud800")])


# --- whose it is


def test_other_models_kinds_and_widths_are_refused(saved: Path, tiny: Path, tmp_path: Path) -> None:
    other = small_chat(tmp_path)
    with Llama(other) as llm, one_line("a.session: this session is another model's"):
        llm.load_session(saved)
    with Llama(tiny, kv="f16") as llm, one_line("keys and values are f32, expected f16: --kv"):
        llm.load_session(saved)
    with Llama(tiny, activations=8) as llm, one_line("16-bit activations, expected 8"):
        llm.load_session(saved)
    copy = Path(shutil.copy(tiny, tmp_path / "copy.bin"))
    with Llama(copy) as llm:
        assert llm.load_session(saved)[1] > 50


def test_fingerprints(tmp_path: Path) -> None:
    shape: Config = tiny_chat.CONFIG
    prints = set()
    for seed, kind in ((0, Kind.F32), (1, Kind.F32), (0, Kind.F16)):
        path = small_models.write_bin(tmp_path / f"{seed}{kind}.bin", shape, seed, kind)
        with Model(path) as model, Model(path) as same:
            assert model.fingerprint == same.fingerprint and len(model.fingerprint) == 32
            prints.add(model.fingerprint)
    assert len(prints) == 3


# --- what is no session


def refused(llm: Llama, data: bytes, path: Path, message: str = "") -> None:
    path.write_bytes(data)
    with one_line(message):
        llm.load_session(path)
    assert [llm._engine.length(s) for s in range(8)] == [0] * 8


def test_every_damage_is_found(saved: Path, tiny: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "b.session"
    places = {*range(0, 100), *range(100, len(data), len(data) // 100), len(data) - 1}
    with Llama(tiny, threads=1) as llm:
        for place in places:
            broken = bytearray(data)
            broken[place] ^= 1 << place % 8
            refused(llm, bytes(broken), path)
        for length in (0, 1, 79, 80, 81, 200, len(data) // 2, len(data) - 4, len(data) - 1):
            refused(llm, data[:length], path, "not a session|cut short")
        refused(llm, data + b"\0", path, "too long")
        refused(llm, b"LlamaBin" + data[8:], path, "not a session: expected LlamaSes")
        path.write_bytes(data)
        assert llm.load_session(path)[1] > 50  # the engine is as good as ever


FIELDS = ("magic", "version", "kind", "model", "activations", "rope", "tokens", "text_bytes",
          "position", "total")  # fmt: skip


def forged(data: bytes, text: bytes | None = None, ids: list[int] | None = None,
           **fields: Any) -> bytes:  # fmt: skip
    """The session in DATA with other parts, its lengths and checksum made to fit."""
    head = dict(zip(FIELDS, session.HEADER.unpack_from(data), strict=True))
    at = session.HEADER.size
    parts = [data[at : at + head["text_bytes"]], data[at + head["text_bytes"] : -4]]
    if text is not None:
        parts[0], head["text_bytes"] = text, len(text)
    if ids is not None:
        parts[1] = struct.pack(f"<{len(ids)}i", *ids) + parts[1][4 * head["tokens"] :]
    head["total"] = at + len(parts[0]) + len(parts[1]) + 4
    head |= fields
    body = session.HEADER.pack(*(head[name] for name in FIELDS)) + b"".join(parts)
    return body + struct.pack("<I", zlib.crc32(body))


def test_hostile_files(saved: Path, tiny: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "b.session"
    n = session.HEADER.unpack_from(data)[6]
    with Llama(tiny, threads=1) as llm:
        path.write_bytes(forged(data))
        assert llm.load_session(path)[1] == n  # the forger knows his trade
    with Llama(tiny, threads=1) as llm:
        for fields in (
            {"version": 2}, {"kind": 2}, {"kind": 9}, {"tokens": 2**32 - 1}, {"tokens": 0},
            {"tokens": n + 1}, {"text_bytes": 2**32 - 1}, {"text_bytes": 0}, {"position": 0},
            {"position": 2**63}, {"position": 1}, {"total": 2**63}, {"total": 0},
            {"activations": 0},
        ):  # fmt: skip
            refused(llm, forged(data, **fields), path)
        for ids in ([-1] * n, [259] * n, [0] * (n - 1) + [2**31 - 1]):
            refused(llm, forged(data, ids=ids), path, "damaged")
        for text in (
            b"", b"{", b"[]", b"{}", b"null", b'{"messages": {}}', b'{"messages": [1]}', b"\xff",
            b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": "root", "content": ""}]}',
            b'{"messages": [{"role": "user", "content": 1}]}', b"[" * 200_000,
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"1" * 5000,
            b'{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}',
            b'{"messages": [{"role": "user", "content": "", "x": "\\u001b[2J"}]}',
            b'{"messages": [{"role": "\\u001b[2J\\n", "content": ""}]}',
        ):  # fmt: skip
            refused(llm, forged(data, text=text), path)
        (tmp_path / "sparse").touch()
        os.truncate(tmp_path / "sparse", 1 << 36)
        with one_line("not a session"):
            llm.load_session(tmp_path / "sparse")


def field_places() -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of each field of the header."""
    parts = re.findall(r"\d*[sIQ]", session.HEADER.format.lstrip("<"))
    sizes = [struct.calcsize("<" + part) for part in parts]
    return [(name, sum(sizes[:i]), sizes[i]) for i, name in enumerate(FIELDS)]


def test_each_field_damaged(saved: Path, tiny: Path, tmp_path: Path) -> None:
    """Cut at each, set to edges and turned bit by bit, its checksum right and not: one line, or a
    dialog that goes on. Only the rope's length may be any number in a good file."""
    data, path = saved.read_bytes(), tmp_path / "b.session"
    head = session.HEADER.unpack_from(data)
    ids = session.HEADER.size + head[7]
    places = [("text", 80, 1), ("ids", ids, 4), ("kv", ids + 4 * head[6], 4),
              ("crc", len(data) - 4, 4)]  # fmt: skip
    accepted = set()
    with Llama(tiny, threads=1) as llm, Llama(tiny, threads=1) as other:
        for name, at, size in [*field_places(), *places]:
            for length in (at, at + size - 1):
                refused(other, data[:length], path)
            old = int.from_bytes(data[at : at + size], "little")
            edges = [0, 1, old - 1, old + 1, 2**15, 2**31, 2 ** (8 * size - 1) - 1, -1]
            for value in {*edges, *(old ^ 1 << bit for bit in range(8 * size))} - {old}:
                raw = (value % 256**size).to_bytes(size, "little")
                broken = data[:at] + raw + data[at + size :]
                refused(other, broken, path)
                if name == "crc":
                    continue
                path.write_bytes(broken[:-4] + struct.pack("<I", zlib.crc32(broken[:-4])))
                try:
                    messages, _ = llm.load_session(path)
                    accepted.add(name)
                    llm.chat([*messages, said("user", "?")], replace(GREEDY, max_tokens=1))
                except LlamaError as error:
                    assert "\n" not in str(error)
    assert {"rope", "kv"} <= accepted <= {"rope", "kv", "ids", "text"}


def test_values_that_are_no_numbers_are_an_error_and_no_crash(saved: Path, tiny: Path) -> None:
    data = saved.read_bytes()
    head = session.HEADER.unpack_from(data)
    start = session.HEADER.size + head[7] + 4 * head[6]
    nothing = data[:start] + b"\xff" * (len(data) - 4 - start)
    saved.write_bytes(nothing + struct.pack("<I", zlib.crc32(nothing)))
    with Llama(tiny) as llm:
        messages, _ = llm.load_session(saved)
        with one_line("layer 0 gives numbers that are not finite"):
            llm.chat([*messages, said("user", "?")], GREEDY)


@pytest.mark.parametrize("name", ["missing", "folder", "no/such/place", "pipe"])
def test_places_that_cannot_be(llm: Llama, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    if name == "pipe":
        os.mkfifo(path)
    with one_line(f"{name}: (cannot open|is not a regular file)"):
        llm.load_session(path)
    if name != "missing":
        with one_line(f"{name}: (cannot write|is not a regular file)"):
            llm.save_session(path, [])


# --- how it is written


def test_a_file_is_replaced_whole_or_not_at_all(
    llm: Llama, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, engine = saved.read_bytes(), llm._engine
    assert saved.stat().st_mode & 0o777 == 0o600
    messages = begun(llm, turns=3)

    def fails(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "read_kv", fails)
        with one_line("a.session: cannot write: No space left on device"):
            llm.save_session(saved, messages)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    link = saved.with_name("link")
    link.symlink_to(saved)
    llm.save_session(link, messages)
    assert link.is_symlink() and llm.load_session(saved)[0] == messages
    with one_line("messages"):
        llm.save_session(saved, [said("user", "a"), said("system", "b")])
    with one_line("messages"):
        llm.save_session(saved, "abc")  # type: ignore[arg-type]
    assert llm.load_session(saved)[0] == messages


# --- chat.py


def tokens_in(path: Path) -> int:
    return int(session.HEADER.unpack_from(path.read_bytes())[6])


def test_the_words_are_kept_after_each_line_and_the_rest_at_the_end(
    llm: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.session"
    talk = Talk(llm, GREEDY, system="Be brief.", session=path)
    assert path.exists()  # a place that cannot be written to would have been refused by now
    for line in ("Hello", "/stats", "more"):
        talk.line(line)
        assert llm.load_session(path) == (talk.messages(), 0)
    talk.close()
    assert llm.load_session(path)[0] == talk.messages() and tokens_in(path) > 50
    capsys.readouterr()
    again = Talk(llm, GREEDY, session=path)
    assert again.messages() == talk.messages()
    err = capsys.readouterr().err
    assert f"2 turns restored, {tokens_in(path)} tokens of it computed)" in err
    before = path.stat().st_mtime_ns
    again.close()
    assert path.stat().st_mtime_ns == before  # nothing is new
    again.line("/reset")
    assert llm.load_session(path) == ([said("system", "Be brief.")], 0)
    llm.save_session(path, [said("user", "a"), said("user", "b")])
    with one_line("expected questions and their answers, by turns"):
        Talk(llm, GREEDY, session=path)


def test_a_place_lost_on_the_way_is_said_and_the_talk_goes_on(
    llm: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    talk = Talk(llm, GREEDY, session=folder / "a")
    shutil.rmtree(folder)
    talk.line("Hello")
    talk.close()
    err = capsys.readouterr().err
    assert err.count("a: cannot write: No such file or directory") == 2
    assert talk.failed and len(talk.turns) == 2


def chat(*words: object, stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "chat.py", *map(str, words)], input=stdin, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("more", [["--type=greedy"], ["--seed=3", "--max-seq-len=200"]])
def test_two_sittings_are_as_one(tiny: Path, tmp_path: Path, more: list[str]) -> None:
    flags = ["--bin", tiny, "--max_tokens=60", *more]
    whole = chat(*flags, stdin="Hello\nand more\nand again\n")
    path = tmp_path / "a.session"
    first = chat(*flags, "--session", path, stdin="Hello\nand more\n")
    second = chat(*flags, "--session", path, stdin="and again\n/quit\n")
    assert first.stdout + second.stdout == whole.stdout
    assert "restored, " in second.stderr and tokens_in(path) > 20


def test_refusals(tiny: Path, saved: Path) -> None:
    for flags, message in (
        (["--system=Pirate"], "it was begun with another system message, or none; leave --system"),
        (["--kv=f16"], "its keys and values are f32, expected f16"),
        (["--session=/no/such/place"], "/no/such/place: cannot write: No such file or directory"),
        (["--session", tiny], "not a session"),
    ):
        done = chat("--bin", tiny, "--session", saved, *flags, stdin="Hello\n")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("chat.py: ") and message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_lost(tiny: Path, tmp_path: Path, sign: signal.Signals) -> None:
    """Ctrl-C between two lines keeps everything; a power cut keeps the words."""
    path = tmp_path / "a.session"
    command = [sys.executable, ROOT / "chat.py", "--bin", tiny, "--seed=3", "--max_tokens=9",
               "--session", path]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("Hello\n")
        process.stdin.flush()
        said_so = process.stdout.readline()
        end = time.monotonic() + 60
        while path.stat().st_size < 150 and time.monotonic() < end:  # the file follows the answer
            time.sleep(0.02)
        process.send_signal(sign)
        process.wait(60)
        said_so += process.stdout.read()
    with Llama(tiny) as llm:
        messages, tokens = llm.load_session(path)
    assert [m["content"] for m in messages] == ["Hello", said_so.removesuffix("\n")]
    assert (tokens > 0) == (sign == signal.SIGINT)
    assert json.dumps(messages) and list(tmp_path.iterdir()) == [path]
