"""Infilling: ids against Meta's procedure done with sentencepiece alone and against transformers'
Code Llama tokenizer, who may infill, and what run.py makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import code_llama
import pytest
import random_texts
import small_models
import test_gguf
from code_llama import EOT, MID, PRE, SUF
from fake_engine import FakeEngine
from sentencepiece import SentencePieceProcessor

from llama.checkpoints import Options, export, load
from llama.checkpoints.infill import _refusal
from llama.errors import LlamaError
from llama.generate import Llama
from llama.infill import Gap, Infiller
from llama.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SHAPE = small_models.config(vocab_size=32016)
# The two sides of a gap, and the ids of Meta's own code for them (ggml-org/llama.cpp, issue 3503)
BEFORE = 'def remove_non_ascii(s: str) -> str:\n    """ '
AFTER = "\n    return result\n"
METAS = [
    1, 32007, 822, 3349, 29918, 5464, 29918, 294, 18869, 29898, 29879, 29901, 851, 29897, 1599, 851,
    29901, 13, 1678, 9995, 29871, 32008, 13, 1678, 736, 1121, 13, 32009,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in each form that Code Llama was published in."""
    root = tmp_path_factory.mktemp("code")
    weights = small_models.weights(SHAPE)
    meta = small_models.write_meta(root / "CodeLlama-7b", SHAPE, weights)
    (meta / "tokenizer.model").write_bytes(code_llama.model(data))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    both = small_models.write_hf(root / "CodeLlama-7b-hf", SHAPE, weights, **ids)
    (both / "tokenizer.model").write_bytes(code_llama.model(data))
    only = small_models.write_hf(root / "CodeLlama-7b-json", SHAPE, weights, **ids)
    (only / "tokenizer.json").write_text(json.dumps(code_llama.document(data)), "utf-8")
    first = small_models.write_hf(root / "CodeLlama-7b-first", SHAPE, weights, **ids)
    document = code_llama.document(data)  # as transformers 5 writes it
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    (first / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    named = {"prefix": PRE, "suffix": SUF, "middle": MID, "eot": EOT}
    gguf = root / "codellama-7b.gguf"
    test_gguf.write_gguf(gguf, SHAPE, more=lambda w: code_llama.gguf_lists(data, w, named))
    bare = root / "codellama-bare.gguf"
    test_gguf.write_gguf(bare, SHAPE, more=lambda w: code_llama.gguf_lists(data, w, {}))
    return {"Meta": meta, "HF": both, "json": only, "first": first, "GGUF": gguf, "bare": bare}


@pytest.fixture(scope="module", params=["Meta", "HF", "json", "first", "GGUF", "bare"])
def llm(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: Any
) -> Iterator[Llama]:
    out = tmp_path_factory.mktemp("bin") / f"{request.param}.bin"
    export(folders[request.param], out, say=lambda line: None)
    with Llama(out) as found:
        yield found


@pytest.fixture(scope="module")
def original(data: Path) -> Any:
    return SentencePieceProcessor(model_proto=code_llama.model(data))


def metas(original: Any, prefix: str, suffix: str, order: str) -> list[int]:
    """infilling_prompt_tokens of codellama/llama/generation.py, in other words."""
    after = original.encode("☺" + suffix)[2:]  # the space and the face
    before = original.encode(prefix)
    if order == "spm":
        return [1, PRE, SUF, *after, MID, *before]
    return [1, PRE, *before, SUF, *after, MID]


def test_the_published_example(llm: Llama, original: Any) -> None:
    assert metas(original, BEFORE, AFTER, "psm") == METAS
    assert llm.infiller.encode(Gap(BEFORE, AFTER)) == METAS
    at = METAS.index(SUF)
    turned = [1, PRE, *METAS[at:], *METAS[2:at]]
    assert llm.infiller.encode(Gap(BEFORE, AFTER, "spm")) == turned
    assert llm.infiller.stop_ids >= {EOT, 2}


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Random texts for the two sides; none that spells one of the four tokens."""
    texts = random_texts.texts(4 * n, seed)
    kept = [text for text in texts if not any(name in text for name in ("PRE", "MID", "EOT"))]
    return [("", ""), ("", "a"), (" a", ""), *zip(kept[::2], kept[1::2], strict=False)][:n]


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_ids_are_metas(llm: Llama, original: Any, order: Any) -> None:
    for prefix, suffix in pairs(500, 1):
        expect = metas(original, prefix, suffix, order)
        assert llm.infiller.encode(Gap(prefix, suffix, order)) == expect, (prefix, suffix)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_ids_are_transformers(data: Path, llm: Llama, order: str) -> None:
    """add_prefix_space=False: else the class of version 5 puts a space before the suffix, which
    the paper, Meta's code and version 4 do not."""
    from transformers import CodeLlamaTokenizer

    described = code_llama.document(data)["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in described["merges"]]
    theirs = CodeLlamaTokenizer(vocab=described["vocab"], merges=merges, add_prefix_space=False)
    for prefix, suffix in pairs(300, 2):
        # it takes an empty side for a plain text, and parses what spells a control token
        spelled = [mark for mark in theirs.all_special_tokens if mark in prefix + suffix]
        if prefix and suffix and not spelled:
            expect = theirs(prefix, suffix=suffix, suffix_first=order == "spm")["input_ids"]
            assert llm.infiller.encode(Gap(prefix, suffix, order)) == expect, (prefix, suffix)


def test_text_that_spells_the_tokens_stays_text(llm: Llama, original: Any) -> None:
    assert PRE in original.encode("a <PRE> b")  # so the published vocabulary would have it
    bricks = ["<PRE>", " <PRE>", "▁<PRE>", " <SUF>", "<MID>", " <EOT>", "<EOT", ">", " ", "a"]
    for seed, text in enumerate(random_texts.texts(200, 3)):
        marks = bricks[seed % len(bricks)] + bricks[seed * 7 % len(bricks)]
        prefix, suffix = text + marks, marks + text
        ids = llm.infiller.encode(Gap(prefix, suffix))
        assert [i for i in ids if i in (1, 2, PRE, SUF, MID, EOT)] == [1, PRE, SUF, MID]
        at = ids.index(SUF)
        if "▁" not in prefix:
            assert llm.tokenizer.decode(ids[2:at]) == prefix
            assert llm.tokenizer.decode([29874, *ids[at + 1 : -1]]) == "a" + suffix
    assert llm.tokenizer.encode("▁<PRE>", parse_special=True) == [PRE]


def test_the_middle_ends_at_its_token_and_keeps_its_space() -> None:
    """A scripted model: what it says between the two sides, byte by byte."""
    fake = FakeEngine(64, script=b"?" * 9 + b" mid\xff" + b"?" * 50)
    fake.meta["infill.tokens"] = json.dumps({"prefix": 1, "suffix": 2, "middle": 130, "end": 131})
    llm = Llama.on(fake)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=9)
    result = llm.infill("ab", "cde", params)
    assert llm.infiller.encode(Gap("ab", "cde"))[0] == 1  # no begin token here
    assert (result.text, result.finish_reason) == (" mid", "eos")
    stream = llm.stream(Gap("ab", "cde", "spm"), params)
    assert "".join(stream) == " mid"
    fake.script = b"?" * 9 + b" mi\x80" + b"?" * 51  # 131 is byte 128
    assert llm.infill("ab", "cde", params).text == " mi"
    several = llm.infill("ab", "cde", SamplingParams(temperature=1.0, max_tokens=2), n=3)
    assert [r.completion for r in several] == [0, 1, 2]


def test_infill_is_its_ids_completed(llm: Llama) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6)
    for order in ("psm", "spm"):
        ids = llm.infiller.encode(Gap(BEFORE, AFTER, order))  # type: ignore[arg-type]
        result = llm.infill(BEFORE, AFTER, params, order=order)  # type: ignore[call-overload]
        again = llm.generate(ids, params)
        assert result.token_ids[:4] == again.token_ids[:4] and result.prompt_tokens == len(ids)
    with pytest.raises(LlamaError, match="order must be psm or spm, found 'msp'"):
        llm.infill("a", "b", order="msp")  # type: ignore[call-overload]


def test_gaps_stand_in_lists(llm: Llama) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3)
    alone = [llm.generate(prompt, params).text for prompt in (Gap("a", "b"), "c", [1, 5])]
    together = llm.generate([Gap("a", "b"), "c", [1, 5]], params)
    assert [result.text for result in together] == alone


def test_a_gap_does_not_slide() -> None:
    """The tokens that mark it would be among the first to go."""
    fake = FakeEngine(16, script=b"x")
    fake.meta["infill.tokens"] = json.dumps({"prefix": 1, "suffix": 2, "middle": 130, "end": 131})
    llm = Llama.on(fake, overflow="slide")  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=50)
    result = llm.infill("abc", "def", params)
    assert (result.text, result.finish_reason, result.dropped_tokens) == ("x" * 6, "length", 0)
    with pytest.raises(LlamaError) as told:
        llm.infill("abcdef" * 3, "def", params)
    expected = "the prompt has 25 tokens and the context holds 16: max_seq_len makes it longer"
    assert str(told.value) == expected
    assert llm.generate("abc", params).dropped_tokens > 0


# --- who may


def test_who_was_trained_for_it() -> None:
    """By name and shape; the shapes of 34B and 70B are told to the rule alone."""
    b7 = replace(SHAPE, dim=4096, n_layers=32, rope_theta=1e6)
    b34 = replace(SHAPE, dim=8192, n_layers=48, rope_theta=1e6)
    b70 = replace(SHAPE, dim=8192, n_layers=80, rope_theta=1e6)
    small = replace(b70, rope_theta=1e4)
    for config, name, steps, refused in (
        (b7, "CodeLlama-7b", False, None), (b7, "CodeLlama-7b-Instruct-hf", False, None),
        (b7, "CodeLlama-13b-Python", False, "the Python variants"), (b34, "x", False, "34B"),
        (b70, "CodeLlama-70b", False, None), (b70, "x", False, None),
        (small, "CodeLlama-70b-Python-hf", False, "the Python variants"),
        (small, "CodeLlama-70b-Instruct", False, None), (small, "x", True, None),
        (small, "x", False, "70B Python's as well as Instruct's"),
    ):  # fmt: skip
        found = _refusal(config, name, steps)
        assert (found is None) == (refused is None) and (refused or "") in (found or "")


def test_the_flag_and_the_notes(data: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    found = load(folders["Meta"])
    assert any("infilling: inferred from the vocabulary" in note for note in found.notes)
    assert json.loads(str(found.meta["infill.tokens"])) == {
        "prefix": PRE, "suffix": SUF, "middle": MID, "end": EOT,
    }  # fmt: skip
    python = small_models.write_meta(tmp_path / "CodeLlama-70b-Python", SHAPE,
                                     small_models.weights(SHAPE))  # fmt: skip
    (python / "tokenizer.model").write_bytes(code_llama.model(data))
    refused = load(python)
    assert "infill.tokens" not in refused.meta
    assert any(note.startswith("no infilling: the Python variants") for note in refused.notes)
    assert "infill.tokens" in load(python, Options(infill=True)).meta
    off = load(folders["Meta"], Options(infill=False)).meta
    assert off["infill.refused"] == "switched off when it was exported"
    (python / "tokenizer.model").write_bytes(
        (data / "tokenizers" / "llama2_tokenizer.model").read_bytes()
    )
    assert not [key for key in load(python).meta if key.startswith("infill")]
    with pytest.raises(LlamaError, match="--infill yes: the vocabulary lacks ▁<PRE>"):
        load(python, Options(infill=True))
    other = tmp_path / "other.gguf"
    wrong = {"fim_pre": 5, "fim_suf": 6, "fim_mid": 7}
    test_gguf.write_gguf(other, SHAPE, more=lambda w: code_llama.gguf_lists(data, w, wrong))
    assert load(other).meta["infill.refused"] == "its infilling tokens are not Code Llama's"


def test_models_that_cannot(stories: Path) -> None:
    with Llama(stories) as llm, pytest.raises(LlamaError, match="its vocabulary lacks the tokens"):
        llm.infill("a", "b")
    fake = FakeEngine(64)
    fake.meta["infill.refused"] = "it is a cat"
    with pytest.raises(LlamaError, match="this model does not infill: it is a cat"):
        Llama.on(fake).infill("a", "b")  # type: ignore[arg-type]
    for bad in ("[]", "{", '{"prefix": 1}', '{"prefix": 1, "suffix": 2, "middle": 3, "end": 999}'):
        with pytest.raises(LlamaError, match=r"infill\.tokens must be JSON"):
            Infiller(Llama.on(FakeEngine(64)).tokenizer, {"infill.tokens": bad})  # type: ignore[arg-type]


# --- run.py


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, words)], input=stdin, text=True,
        capture_output=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


def test_run(folders: dict[str, Path], tmp_path: Path, stories: Path) -> None:
    out = tmp_path / "code.bin"
    export(folders["Meta"], out, say=lambda line: None)
    (tmp_path / "before.py").write_text(BEFORE)
    (tmp_path / "after.py").write_text(AFTER)
    sides = ["--prefix", tmp_path / "before.py", "--suffix", tmp_path / "after.py"]
    flags = ["--bin", out, "--type=greedy", "--max_tokens=5"]
    with Llama(out) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=5)
        psm = llm.infill(BEFORE, AFTER, params)
        spm = llm.infill(BEFORE, AFTER, params, order="spm")
        drawn = SamplingParams(seed=3, max_tokens=5)
        three = [r.text for r in llm.infill(BEFORE, AFTER, drawn, n=3)]
    done = run(*flags, *sides)
    assert (done.returncode, done.stdout) == (0, psm.text + "\n"), done.stderr
    assert run(*flags, *sides, "--infill-order=spm").stdout == spm.text + "\n"
    assert run(*flags, *sides, "--echo").stdout == BEFORE + psm.text + AFTER
    piped = run(*flags, "--prefix=-", *sides[2:], stdin=BEFORE)
    assert piped.stdout == psm.text + "\n"
    several = run("--bin", out, "--seed=3", "--max_tokens=5", *sides, "--n=3")
    assert several.stdout == "".join(text + "\n" for text in three)
    shown = run(*flags, *sides, "--show-prompt").stderr.splitlines()
    assert [line.split()[0] for line in shown[1 : len(METAS) + 1]] == list(map(str, METAS))
    (tmp_path / "bad").write_bytes(b"\xff")
    for words, what in (
        (["--prefix=a"], "give both --prefix and --suffix"),
        (["--prefix=-", "--suffix=-"], "only one of --prefix and --suffix can be stdin"),
        (["--prefix", "no such", *sides[2:]], "no such: cannot read: No such file"),
        (["--prefix", tmp_path / "bad", *sides[2:]], "bad: byte 0 is not UTF-8"),
        ([*sides, "a prompt"], "give one of PROMPT, --ids, --prompts and --prefix"),
        (["a", "--infill-order=spm"], "--infill-order needs --prefix and --suffix"),
        ([*sides, "--infill-order=x"], "argument --infill-order: invalid choice"),
        ([*sides, "--bin", stories], "this model does not infill: its vocabulary lacks"),
    ):
        done = run(*flags, *words)
        assert done.returncode == 1 and done.stdout == "", done
        assert done.stderr.startswith("run.py: ") and done.stderr.count("\n") == 1, done.stderr
        assert what in done.stderr, done.stderr
