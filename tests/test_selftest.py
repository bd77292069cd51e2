"""run.py --selftest: a good file passes, a damage is found and its place named, and nothing that a
file says can break it."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from fake_engine import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import format, golden, selftest
from llama.config import Config, Head
from llama.engine import Engine, isa_names
from llama.errors import LlamaError
from llama.format import Record, TokenizerKind, Writer
from llama.quant import Kind
from llama.shrink import shrink

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=260, dim=40, hidden_dim=51, head_dim=6, n_layers=4, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "m.bin"
    return small_models.write_bin(
        path, SHAPE, golden=True, tokenizer=(TokenizerKind.JSON, byte_tokenizer())
    )


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy.bin").write_bytes(model.read_bytes())
    return tmp_path / "copy.bin"


def stored(path: Path) -> golden.Golden:
    with Engine(path, max_seq_len=1) as engine:
        found = golden.load(engine.meta, engine.config)
    assert found is not None
    return found


def lines(path: Path, capsys: pytest.CaptureFixture[str], good: bool) -> list[str]:
    """What the self-test prints, after a look at whether it counts right."""
    capsys.readouterr()
    assert selftest.selftest(path, threads=1) == good
    out = capsys.readouterr().out.splitlines()
    marks = [line.split()[0] for line in out[:-1]]
    assert set(marks) <= {"ok", "FAILED", "-"}
    n, bad = sum(mark != "-" for mark in marks), marks.count("FAILED")
    told = f"{bad} of {n} checks FAILED" if bad else f"all {n} checks passed"
    assert out[-1] == f"selftest: {told}"
    return out


def failures(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in lines(path, capsys, good=False)[:-1] if line.startswith("FAILED")]


def flip(
    path: Path, name: str, row: int = 0, column: int = 0, bit: int = 22, fix: bool = True
) -> None:
    """Turns a bit of an f32 weight over; FIX: and makes the checksums right again."""
    record = format.read(path).records[name]
    data = bytearray(path.read_bytes())
    at = row if len(record.shape) == 1 else \
        16 * record.columns * (row // 16) + 16 * column + row % 16  # fmt: skip
    data[record.offset + 4 * at + bit // 8] ^= 1 << bit % 8
    if fix:
        tensor = data[record.offset : record.offset + record.n_bytes]
        fix_crc(data, list(format.read(path).records).index(name), zlib.crc32(tensor))
    path.write_bytes(data)


def fix_crc(data: bytearray, record: int, crc: int) -> None:
    struct.pack_into("<I", data, 256 + 128 * record + 104, crc)
    struct.pack_into("<I", data, 12, 0)
    header_bytes = struct.unpack_from("<Q", data, 16)[0]
    struct.pack_into("<I", data, 12, zlib.crc32(data[:header_bytes]))


def rewrite(path: Path, out: Path, text: str | None = None, **more: Any) -> Path:
    """PATH again with other golden answers, or another tokenizer."""
    old = format.read(path)
    records = [Record(r.name, r.kind, r.shape) for r in old.records.values()]
    meta = dict(old.meta) if text is None else {**old.meta, golden.KEY: text}
    more = {"tokenizer": old.tokenizer, "force": True, **more}
    with Writer(out, old.config, records, meta=meta, **more) as writer:
        for name in old.records:
            writer.write(name, old.tensors[name])
    return out


# --- every file


@pytest.mark.parametrize(
    "changes", [
        {"tied": True, "attention_bias": True, "mlp_bias": True}, {"max_seq_len": 3},
        {"head": Head.SEQUENCE, "n_labels": 1}, {"head": Head.TOKEN, "n_labels": 50},
        {"head": Head.ANSWER, "n_labels": 2, "output_bias": True}, {"head": Head.NONE},
    ],
)  # fmt: skip
def test_every_shape_and_head(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a tokenizer, too."""
    shape = replace(SHAPE, n_layers=1, **changes)
    path = small_models.write_bin(tmp_path / "m.bin", shape, golden=True)
    found = lines(path, capsys, good=True)
    assert "ok      cpu scalar: 1 layer and the head as stored, to the last bit" in found
    assert stored(path).text is None and len(stored(path).top) == min(32, shape.n_outputs)
    shrink(path, tmp_path / "q.bin", 8)
    found = lines(tmp_path / "q.bin", capsys, good=True)
    unit = "KL divergence" if shape.head == Head.LM else "outputs off by"
    assert f"the self-test's text: {unit}" in found[-2]


def test_numbers_that_are_not_finite_are_not_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [Record(n, Kind.F32, s) for n, s in format.expected_tensors(SHAPE).items()]
    said: list[str] = []
    with Writer(
        tmp_path / "m.bin", SHAPE, records, meta={golden.KEY: golden.room(SHAPE)}
    ) as writer:
        for r in records:
            value = 1e38 if r.name == "layers.2.feed_forward.w2.weight" else 1.0
            writer.write(r.name, np.full(r.shape, value, np.float32))
        golden.store(writer, say=said.append)
    assert len(said) == 1 and "--selftest: layer 2 gives numbers that are not finite" in said[0]
    found = failures(tmp_path / "m.bin", capsys)
    assert found == ["FAILED  cpu scalar: layer 2 gives numbers that are not finite"]


# --- what is found


def test_a_good_file(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--selftest", "--bin", str(model)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.splitlines() == [
        "ok      checksums of 39 tensors, 0.3 MB",
        f"ok      tokenizer: the {len(golden.PROMPT.encode())} ids of a text, as stored",
        "ok      cpu scalar: 4 layers and the head as stored, to the last bit",
        *[f"ok      cpu {isa}: 4 layers and the head as cpu scalar, to the last bit"
          for isa in reversed(isa_names()) if isa != "scalar"],
        '-       cuda: not tested: device "cuda": this library was built without CUDA; use device '
        '"cpu"',
        f"selftest: all {2 + len(isa_names())} checks passed",
    ]  # fmt: skip


def test_a_flipped_bit_is_found_by_its_checksum(copy: Path) -> None:
    flip(copy, "layers.2.attention.wk.weight", bit=0, fix=False)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--selftest", "--bin", str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "", done
    first = done.stdout.splitlines()[0]
    assert first.startswith("FAILED  checksums: layers.2.attention.wk.weight is damaged: "), first
    assert "FAILED  cpu scalar: layer 2 differs first: " in done.stdout


def test_many_damaged_tensors_are_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in range(4):
        for name in ("wk", "wv"):
            flip(copy, f"layers.{layer}.attention.{name}.weight", bit=0, fix=False)
    first = lines(copy, capsys, good=False)[0]
    assert first.startswith("FAILED  checksums: layers.0.attention.wk.weight is damaged: ")
    assert first.count(" is damaged") == 5 and first.endswith(" (and 3 tensors more)")


@pytest.mark.parametrize(
    "name", [
        "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_change_behind_right_checksums_is_found_in_its_layer(
    name: str, layer: int, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In layers after the first down to the lowest bits: what is left of a change in the last
    one of a weight may round to nothing."""
    flip(copy, f"layers.{layer}.{name}.weight", row=5, column=7, bit=31 if layer == 0 else 8)
    found = failures(copy, capsys)
    assert len(found) == 1, found
    by = " by more than 1e-04" if layer == 0 else ""
    assert f"FAILED  cpu scalar: layer {layer} differs first{by}: expected " in found[0]


def test_changes_outside_the_layers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, whole = stored(copy), copy.read_bytes()
    outside = next(i for i in range(SHAPE.vocab_size) if i not in answers.top)
    largest = next(iter(answers.top))
    for name, row, expected in (
        ("tok_embeddings.weight", answers.ids[0], "the embedding differs first: expected rms"),
        ("tok_embeddings.weight", answers.ids[golden.POSITIONS - 1],
         "the embedding differs first: expected rms"),
        ("norm.weight", 0, "the head differs first: output "),
        ("output.weight", largest, f"the head differs first: output {largest}: expected "),
        ("output.weight", outside, "the head differs first, in none of the largest outputs"),
    ):  # fmt: skip
        copy.write_bytes(whole)
        flip(copy, name, row=row, bit=18)
        found = failures(copy, capsys)
        assert len(found) == 1 and f"cpu scalar: {expected}" in found[0], found


def test_another_tokenizer_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same size and pieces, two of them under each other's ids: "T" and "a"."""
    entry = json.loads(byte_tokenizer())
    vocab = entry["model"]["vocab"]
    vocab["T"], vocab["a"] = vocab["a"], vocab["T"]
    swapped = (TokenizerKind.JSON, json.dumps(entry).encode())
    found = failures(rewrite(model, tmp_path / "m.bin", tokenizer=swapped), capsys)
    assert found == ["FAILED  tokenizer: id 0 of a text: expected 87 'a', found 100 'T'"]
    entry["normalizer"] = {"type": "Replace", "pattern": {"String": "len(x)"}, "content": ""}
    shorter = (TokenizerKind.JSON, json.dumps(entry).encode())
    vocab["T"], vocab["a"] = vocab["a"], vocab["T"]
    shorter = (TokenizerKind.JSON, json.dumps(entry).encode())
    found = failures(rewrite(model, tmp_path / "m.bin", tokenizer=shorter), capsys)
    place = len(golden.PROMPT.encode()) - len("len(x)")
    expected = f"FAILED  tokenizer: id {place} of a text: expected 111 'l', found the end"
    assert found == [expected]


def test_a_broken_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where answers are stored, and where none are."""
    for stored in (True, False):
        path = small_models.write_bin(
            tmp_path / f"{stored}.bin", SHAPE, golden=stored, tokenizer=(TokenizerKind.JSON, b"{")
        )
        found = failures(path, capsys)
        assert len(found) == 1
        assert found[0].startswith("FAILED  tokenizer: tokenizer.json cannot be read: ")


# --- what machines do


def wrong(monkeypatch: pytest.MonkeyPatch, at: int, size: float, isas: set[str]) -> None:
    """An engine whose ISAS are off by SIZE, relatively, from Golden.layers[AT] on."""

    class Wrong(Engine):
        def trace(self, tokens: Any, sequences: Any, positions: Any, want: Any) -> Any:
            stream, outputs = super().trace(tokens, sequences, positions, want)
            if self.info().isa in isas:
                shape = (len(stream), golden.MOST_POSITIONS, stream.shape[2])
                noise = np.random.default_rng(1).standard_normal(shape)[:, list(positions)]
                stream[at:] += (stream * noise * size)[at:]
                outputs = outputs * np.float32(1 + size)
            return stream, outputs

    monkeypatch.setattr(golden, "Engine", Wrong)


@pytest.mark.parametrize("isa", [isa for isa in isa_names() if isa != "scalar"])
def test_wrong_kernels_are_named(
    isa: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong(monkeypatch, 3, 1e-6, {isa})
    found = failures(model, capsys)
    assert len(found) == 1
    assert found[0].startswith(f"FAILED  cpu {isa}: layer 2 differs first: expected rms ")


@pytest.mark.parametrize("rows", [1, golden.POSITIONS - 1])
def test_both_a_prompts_and_a_tokens_kernels_are_tried(
    rows: int, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(Engine):
        def trace(self, tokens: Any, *args: Any) -> Any:
            stream, outputs = super().trace(tokens, *args)
            stream[3] += np.float32(1e-3) * (len(tokens) == rows)
            return stream, outputs

    monkeypatch.setattr(golden, "Engine", Wrong)
    found = failures(model, capsys)
    assert len(found) == len(isa_names()) - 1
    assert all(": layer 2 differs first: " in line for line in found)


def test_what_another_c_library_may_change(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last bits of cosines and sines, so in all layers or none, and for all kernels alike."""
    everyone = set(isa_names())
    wrong(monkeypatch, 1, 1e-6, everyone)
    told = lines(model, capsys, good=True)[2]
    far = told.removeprefix("ok      cpu scalar: 4 layers and the head as stored, within ")
    assert float(far) == pytest.approx(1e-6, rel=0.5)
    for at, size, name in (
        (1, 1e-2, "layer 0 differs first by more than 1e-04"),
        (2, 1e-6, "layer 1 differs first"), (0, 1e-6, "the embedding differs first"),
    ):  # fmt: skip
        wrong(monkeypatch, at, size, everyone)
        found = failures(model, capsys)
        assert len(found) == 1 and f"cpu scalar: {name}: " in found[0]


def test_another_device_is_held_to_the_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cuda(Engine):
        off = 0.0

        def __init__(self, path: Any, *, device: str = "cpu", **more: Any) -> None:
            self.other = device != "cpu"
            super().__init__(path, **more)

        def trace(self, *args: Any) -> Any:
            stream, outputs = super().trace(*args)
            if self.other:
                stream[2:] *= np.float32(1 + Cuda.off)
            return stream, outputs

    monkeypatch.setattr(golden, "Engine", Cuda)
    Cuda.off = 1e-3
    assert "ok      cuda: 4 layers and the head as stored, within 1" in "\n".join(
        lines(model, capsys, good=True)
    )
    Cuda.off = 0.1
    found = failures(model, capsys)
    assert len(found) == 1 and "cuda: layer 1 differs first by more than 1e-02: " in found[0]


# --- quantised files


def test_a_quantised_file_keeps_its_sources_answers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(model, tmp_path / "q.bin", 4, threads=1)
    source, own = stored(model), stored(tmp_path / "q.bin")
    assert own.source == source.top and own.layers != source.layers and not source.source
    found = lines(tmp_path / "q.bin", capsys, good=True)
    receipt = json.loads(str(format.read(tmp_path / "q.bin").meta["quantize.receipt"]))
    told = receipt["distance"]["mean_kl"]
    assert f"from its source, m.bin, when quantised: mean KL divergence {told:.2e}" in found[-3]
    ids = list(source.ids[: golden.POSITIONS])
    rows = []
    for path in (model, tmp_path / "q.bin"):
        with Engine(path, kv="f32") as engine:
            want = [True] * len(ids)
            row = engine.forward(ids, [0] * len(ids), range(len(ids)), want)
        rows.append(row[-1][list(source.top)].astype(float))
    p, q = (np.exp(row) / np.exp(row).sum() for row in rows)
    kl = re.search(r"KL divergence (\S+) nats over the source's 32", found[-2])
    assert kl is not None and float(kl[1]) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-2)
    # a source from before, that says nothing of itself, is asked
    plain = rewrite(model, tmp_path / "plain.bin", text=" ")
    shrink(plain, tmp_path / "q.bin", 4, threads=1, force=True)
    assert stored(tmp_path / "q.bin").source == source.top
    assert "holds no answers" in lines(plain, capsys, good=True)[1]


# --- files from anyone


def broken(entry: dict[str, Any]) -> list[tuple[Any, str]]:
    top, layers = entry["top"], entry["layers"]
    huge = [[1, "x", *layers[0][2:]], *layers[1:]]
    return [
        ("{", "no JSON"), ("[" * 100_000, "no JSON"), ("[]", "expected a JSON object, found list"),
        ("9" * 5000, "no JSON"), (" " * (golden.MAX_BYTES + 1), "expected at most"),
        ({"text": 5}, "text"), ({"text": "x" * 5000}, "text"), ({"text": ""}, "text"),
        ({"ids": []}, "ids: expected a list of 1 to 192"), ({"ids": [260]}, "below 260"),
        ({"ids": [True]}, "ids"), ({"ids": [1.0]}, "ids"), ({"ids": list(range(200))}, "ids"),
        ({"positions": 0}, "positions"), ({"positions": 65}, "positions"),
        ({"positions": 9, "ids": [1] * 8}, "positions: expected 1 to 8, found 9"),
        ({"layers": layers[:-1]}, "expected a list of 5 to 5"), ({"layers": None}, "layers"),
        ({"layers": huge}, "expected float32 numbers"), ({"layers": [[]] * 5}, "of 10 numbers"),
        ({"layers": [[2**32, *layers[0][1:]]] * 5}, "layers"), ({"outputs": -1}, "outputs"),
        ({"top": []}, "top"), ({"top": [[260, 1.0]]}, "below 260"), ({"top": [[1]]}, "pairs"),
        ({"top": [[1, 1e39]]}, "float32"), ({"top": [[1, math.nan]]}, "float32"),
        ({"source": top * 2}, "source"), ({"source": [[0, -math.inf]]}, "float32"),
    ]  # fmt: skip


def test_impossible_answers_are_refused_in_a_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(format.read(model).meta[golden.KEY])
    path = tmp_path / "m.bin"
    for bad, message in broken(json.loads(text)):
        changed = bad if isinstance(bad, str) else json.dumps(json.loads(text) | bad)
        with pytest.raises(LlamaError, match=re.escape(message)) as caught:
            golden.load({golden.KEY: changed}, SHAPE)
        assert len(str(caught.value)) < 400
    with pytest.raises(LlamaError, match="expected at most"):
        golden.load({golden.KEY: b"{}"}, SHAPE)
    found = failures(rewrite(model, path, text='{"ids": [1,'), capsys)
    assert len(found) == 1 and "the file's stored answers cannot be read: " in found[0]
    shrink(path, tmp_path / "q.bin", 8)  # which asks the file itself
    assert stored(tmp_path / "q.bin").source == stored(model).top


@given(st.data())
@settings(max_examples=150)
def test_no_answer_can_break_it(model: Path, data: st.DataObject) -> None:
    """Any part of the JSON replaced by anything: read as it is, or a LlamaError."""
    entry = json.loads(str(format.read(model).meta[golden.KEY]))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    value = data.draw(st.recursive(scalars, lambda x: st.lists(x, max_size=3)))
    at: Any = entry
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = value
    try:
        found = golden.load({golden.KEY: json.dumps(entry)}, SHAPE)
    except LlamaError as error:
        assert len(str(error)) < 400
        return
    assert found is not None
    computed = replace(golden.load({golden.KEY: json.dumps(entry)}, SHAPE) or found)
    computed = replace(computed, last=np.zeros(SHAPE.vocab_size, np.float32))
    selftest.difference(found, computed, 1e-4)
    if found.source:
        selftest.source_distance(found.source, computed, Head.LM)


def test_a_hostile_text_is_shown_as_its_escapes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = json.loads(str(format.read(model).meta[golden.KEY]))
    path = rewrite(model, tmp_path / "m.bin", text=json.dumps(entry | {"text": "\x1b[2J\n\ud800"}))
    out = "".join(failures(path, capsys))
    assert "FAILED  tokenizer: " in out and "\x1b" not in out


# --- the programs


def export(
    tmp_path: Path, *words: str, **more: Any
) -> tuple[subprocess.CompletedProcess[str], Path]:
    shape = small_models.config()
    folder = small_models.write_hf(tmp_path / "hf", shape, small_models.weights(shape))
    (tmp_path / "out").mkdir(exist_ok=True)
    out = tmp_path / "out" / "m.bin"
    words = words or (str(ROOT / "export.py"),)
    command = [sys.executable, *words, str(folder), "--out", str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, **more
    ), out  # fmt: skip


def test_export_stores_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, out = export(tmp_path)
    assert done.returncode == 0 and stored(out).text is None
    lines(out, capsys, good=True)


def test_export_without_the_c_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, out = export(tmp_path, env=os.environ | {"LLAMA_LIBRARY": str(tmp_path / "none.so")})
    assert done.returncode == 0
    assert "  nothing is stored for run.py --selftest: the C library cannot be" in done.stderr
    assert golden.KEY not in format.read(out).meta
    lines(out, capsys, good=True)


def test_an_interrupt_while_they_are_computed_leaves_nothing(tmp_path: Path) -> None:
    """C code that is busy hears nothing; the program ends at once all the same."""
    program = (
        "import os, signal, sys, time\n"
        "sys.argv = ['export.py', *sys.argv[1:]]\n"
        "import export\nfrom llama import golden\n"
        "def compute(path, **more):\n"
        "    assert path.stat().st_size > 1000\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
        "golden.compute = compute\n"
        "sys.exit(export.main())"
    )
    done, out = export(tmp_path, "-c", program, timeout=120)
    assert done.returncode == 130 and not any(out.parent.iterdir())
    assert done.stderr.splitlines()[-1] == "export.py: interrupted, nothing was written"


@pytest.mark.parametrize(
    "words, message", [
        (["--selftest", "Once"], "--selftest takes no prompt"),
        (["--selftest", "--ids", "1"], "--selftest takes no prompt"),
        (["--selftest", "--bin", "/none.bin"], "/none.bin"),
        (["--selftest", "--threads", "0"], "threads is 0, expected 1 to 1024"),
    ],
)  # fmt: skip
def test_bad_flags(words: list[str], message: str, model: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--bin", str(model), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
