"""run.py --info: what it tells is what the file holds, and no file can make it crash or speak to a
terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
from fake_engine import byte_tokenizer

from llama import golden
from llama.config import Config, Head, Rope
from llama.errors import LlamaError
from llama.format import TokenizerKind
from llama.info import WIDTH, describe
from llama.receipt import read_receipt
from llama.shrink import shrink

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=260, dim=40, hidden_dim=51, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=64, norm_eps=1e-5, rope_theta=1e4, eos_ids=(0, 2),
)  # fmt: skip
BYTES = (TokenizerKind.JSON, byte_tokenizer())


def facts(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in describe(path):
        name = line[:12].strip()
        found[name or f"line {len(found)}"] = line[12:]
    return found


def test_what_it_tells(tmp_path: Path) -> None:
    meta = {
        "general.name": "A Name", "general.license": "mit", "template.family": "chatml",
        "template.jinja": "{{ x }}", "other.key": 5,
    }  # fmt: skip
    path = small_models.write_bin(
        tmp_path / "m.bin", SHAPE, golden=True, tokenizer=BYTES, meta=meta
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--info", "--bin", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    # the last is the memory's, of which some may have become free meanwhile
    assert lines[:-1] == list(describe(path))[:-1] and lines[-1].startswith("memory      weights ")
    found = facts(path)
    size = path.stat().st_size / 1e6
    assert found["file"] == f"{path}: {size:.1f} MB, 21 tensors, most of it f32"
    assert found["name"] == "A Name" and found["licence"] == "mit"
    assert found["shape"] == (
        "2 layers, dim 40, hidden_dim 51, 4 heads (2 kv), head_dim 6, vocab 260, context 64"
    )
    assert found["head"] == "language model" and found["rope"] == "theta 10000"
    assert found["tokenizer"] == (
        "json, 259 tokens, begin none, end 0 '<|endoftext|>', 2 '<|im_end|>'"
    )
    assert found["template"] == "chatml, its own in Jinja" and found["also holds"] == "other.key"
    n = len(golden.PROMPT.encode())
    assert found["selftest"] == f"answers to {n} ids; run.py --selftest compares"

    receipt = shrink(path, tmp_path / "q.bin", 8)
    found = facts(tmp_path / "q.bin")
    assert found["quantised"] == "from m.bin to 8 bits" and " of its source's" in found["selftest"]
    assert [text for name, text in found.items() if name.startswith("line ")] == [
        line[: WIDTH - 12] for line in receipt.lines()
    ]


def test_other_shapes(tmp_path: Path) -> None:
    shape = replace(
        SHAPE, head=Head.SEQUENCE, n_labels=1, output_bias=True, mlp_bias=True, n_kv_heads=4,
        rope_scaling=Rope.LINEAR, rope_numbers=(4.0,), n_layers=1,
    )  # fmt: skip
    found = facts(small_models.write_bin(tmp_path / "m.bin", shape))
    assert found["head"] == "sequence classification, one label: a reward model"
    assert found["rope"] == "theta 10000, linear scaling 4"
    assert found["shape"].startswith("1 layer, dim 40, hidden_dim 51, 4 heads, head_dim 6")
    assert found["shape"].endswith("context 64, mlp_bias, output_bias")
    assert found["tokenizer"] == "none: token ids only" and found["selftest"] == "none stored"
    assert found["template"] == "none" and "infilling" not in found


@pytest.mark.parametrize(
    "head, n, head_meta, told", [
        (Head.ANSWER, 2, {}, "question answering"),
        (Head.TOKEN, 1, {}, "token classification, 1 label"),
        (Head.SEQUENCE, 2, {"head.labels": '["a", "b"]'},
         'sequence classification, 2 labels: ["a", "b"]'),
        (Head.NONE, 0, {}, "none: hidden states"),
    ],
)  # fmt: skip
def test_heads(tmp_path: Path, head: Head, n: int, head_meta: dict[str, Any], told: str) -> None:
    shape = replace(SHAPE, head=head, n_labels=n, output_bias=head == Head.ANSWER, eos_ids=())
    found = facts(small_models.write_bin(tmp_path / "m.bin", shape, meta=head_meta))
    assert found["head"] == told and "also holds" not in found


def test_infilling(tmp_path: Path) -> None:
    for number, (meta, told) in enumerate((
        ({"infill.tokens": "{}"}, "yes"), ({"infill.refused": "too small"}, "no: too small"),
    )):  # fmt: skip
        found = facts(small_models.write_bin(tmp_path / f"{number}.bin", SHAPE, meta=meta))
        assert found["infilling"] == told and "also holds" not in found
        assert found["template"] == "none: a base model"


@pytest.mark.parametrize(
    "key, value", [
        ("general.name", "a\nb\x1b[2J\x07" + "x" * 9999), ("general.name", b"\0\xff"),
        ("general.name", 2**60), ("template.family", "\x1b]0;x\x07"), ("template.jinja", 1.5),
        ("quantize.receipt", "{"), ("quantize.receipt", "[]"), ("quantize.receipt", "[" * 99999),
        ("quantize.receipt", 7), ("quantize.receipt", '{"source": 1}'), (golden.KEY, "{}"),
        (golden.KEY, 3), ("\x7e", "x"),
    ],
)  # fmt: skip
def test_what_a_file_may_hold(key: str, value: Any, tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "m.bin", SHAPE, meta={key: value})
    for line in describe(path):
        assert line.isprintable() and len(line) <= WIDTH


def test_receipts_of_anyone() -> None:
    good = {
        "source": "m.bin", "bits": 8, "bytes_before": 2, "bytes_after": 1, "bits_per_weight": 8.5,
        "errors": {"output.weight": 0.5}, "distance": {"n": 1, "mean_kl": 0.1, "same_token": 1.0},
    }  # fmt: skip
    assert read_receipt(json.dumps(good)).bits == 8
    assert read_receipt(json.dumps(good | {"later": 1})).bits == 8
    for bad in (
        {"bytes_after": 0}, {"bytes_before": "x"}, {"errors": 5}, {"errors": {"a": "b"}},
        {"errors": {"a": None}}, {"distance": 5}, {"distance": {"n": 1}},
        {"distance": {"n": 1, "mean_kl": 10**400, "same_token": 1.0}}, {"bits_per_weight": []},
    ):  # fmt: skip
        with pytest.raises(LlamaError, match="quantize.receipt cannot be read"):
            read_receipt(json.dumps(good | bad))


@pytest.mark.parametrize(
    "words, message", [
        (["--info", "Once"], "--info takes no prompt"),
        (["--info", "--selftest"], "not allowed with"),
        (["--info", "--bin", str(ROOT / "README.md")], "is not a model of this program"),
    ],
)  # fmt: skip
def test_bad_calls(words: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run.py: ") and message in done.stderr
