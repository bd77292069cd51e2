"""python3 -m llama.eval: perplexity as transformers' loss has it, KL divergence as numpy has it
from float64 logits, each convention's windows by its own definition, and bad words in one line."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from fake_engine import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from llama import checkpoints, distance, eval, format
from llama.config import Config
from llama.engine import Engine
from llama.errors import LlamaError
from llama.eval import Window, enough, windows
from llama.format import Record, TokenizerKind, Writer
from llama.model import Transformer
from llama.quant import Kind
from llama.shrink import shrink

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=259, dim=64, hidden_dim=96, head_dim=16, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=96, norm_eps=1e-5, rope_theta=1e4, bos_id=1, eos_ids=(2,),
)  # fmt: skip
TEXT = "The keeper's lamp was lit at 7; nobody saw it. " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.bin, its 8-bit form and what that decodes to, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    bytes_ = (TokenizerKind.JSON, byte_tokenizer())
    small_models.write_bin(folder / "m.bin", SHAPE, 0, tokenizer=bytes_)
    shrink(folder / "m.bin", folder / "m-q8.bin", 8)
    shrink(folder / "m-q8.bin", folder / "m-q8-f32.bin", 32)
    (folder / "text").write_text(TEXT)
    return folder


def command(*words: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama.eval", *map(str, words)], cwd=ROOT, input=text,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def measured(*words: object, text: str | None = None) -> dict[str, Any]:
    done = command(*words, "--json=-", text=text)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- windows


def test_windows_of_llama_cpp() -> None:
    ids = [1, *range(10, 30)]  # 21: two windows of 8 and a rest
    assert list(windows("llama.cpp", ids, 8, 1)) == [
        Window([1, *range(10, 17)], 4), Window([1, *range(18, 25)], 4),
    ]  # fmt: skip
    found = list(windows("llama.cpp", ids[1:], 8, None))
    assert found[1] == Window(list(range(18, 26)), 4)
    assert [w.scored for w in found] == [3, 3]  # N - 1 - N / 2


def test_windows_of_the_papers() -> None:
    ids = [1, *range(10, 30)]
    found = list(windows("papers", ids, 8, 1))
    assert found == [Window(ids[:8], 0), Window(ids[8:16], 0)] and found[1].scored == 7


@given(st.integers(2, 60), st.integers(3, 20), st.data())
def test_strided_windows(n: int, context: int, data: st.DataObject) -> None:
    """Against the labels that transformers' documentation makes: all but a window's new tokens
    are -100, and so is what has no token before it."""
    stride = data.draw(st.integers(1, context))
    expected, before = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        labels = np.arange(begin, end)
        labels[: -(end - before)] = -100
        if (labels[1:] >= 0).any():
            expected.append((begin, end, [int(i) for i in labels[1:] if i >= 0]))
        before = end
        if end == n:
            break
    found = [(w.ids[0], w.ids[-1] + 1, w.ids[w.first + 1 :])
             for w in windows("strided", range(n), context, None, stride)]  # fmt: skip
    assert found == expected


def test_enough_windows() -> None:
    found = list(windows("papers", range(80), 8, None))
    assert len(enough(iter(found), None)) == 10
    assert [len(enough(iter(found), n)) for n in (1, 7, 8, 999)] == [1, 1, 2, 10]


# --- perplexity


def theirs(path: Path, found: list[Window]) -> float:
    """transformers' f32 loss over the windows FOUND, what is not scored labelled -100."""
    bin = format.read(path)
    tensors = {name: torch.tensor(tensor) for name, tensor in bin.tensors.items()}
    model = small_models.transformers_llama(bin.config)
    state = small_models.to_hf(tensors, bin.config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    total, n = 0.0, 0
    for window in found:
        labels = torch.tensor([window.ids])
        labels[:, : window.first + 1] = -100
        with torch.no_grad():
            loss = model(torch.tensor([window.ids]), labels=labels).loss
        total, n = total + float(loss) * window.scored, n + window.scored
    return math.exp(total / n)


def ids_of(path: Path, text: str) -> list[int]:
    with Engine(path) as engine:
        return eval.check_pair([engine]).encode(text, bos=True)


def test_perplexity_is_that_of_transformers(folder: Path) -> None:
    path, ids = folder / "m.bin", ids_of(folder / "m.bin", TEXT)
    few = ["--convention=llama.cpp", "--convention=papers", "--convention=strided"]
    found = measured("--bin", path, "--text", folder / "text", "--context=96", "--context=33", *few)
    assert found["text"]["tokens"] == len(ids) == len(TEXT) + 1
    assert [(r["convention"], r["context"], r["stride"]) for r in found["results"]] == [
        (name, n, n // 2 if name == "strided" else None)
        for name in ("llama.cpp", "papers", "strided") for n in (96, 33)
    ]  # fmt: skip
    for result in found["results"]:
        expected = list(windows(result["convention"], ids, result["context"], 1,
                                result["context"] // 2))  # fmt: skip
        assert result["scored"] == sum(w.scored for w in expected)
        assert result["windows"] == len(expected)
        assert result["perplexity"]["value"] == pytest.approx(theirs(path, expected), rel=1e-5)


def test_a_real_model(data: Path, tmp_path: Path) -> None:
    """stories15M, on text that it was not made for and that has its 32,000 tokens' rare ones."""
    path = tmp_path / "stories15M.bin"
    options = checkpoints.Options(tokenizer=data / "tokenizers" / "llama2_tokenizer.model")
    checkpoints.export(data / "weights" / "stories15M.bin", path, options=options)
    text = (data / "text" / "war-and-peace.txt").read_text()[:9000]
    found = measured("--bin", path, "--text=-", "--tokens=200", text=text)
    ids = ids_of(path, text)
    for result, convention in zip(found["results"], ("llama.cpp", "papers"), strict=True):
        expected = enough(windows(convention, ids, 256, 1), 200)
        assert result["scored"] == sum(w.scored for w in expected) >= 200
        assert result["perplexity"]["value"] == pytest.approx(theirs(path, expected), rel=1e-5)


def test_errors_of_figures() -> None:
    """The delta method's, against how perplexities of many such texts are spread."""
    rng = np.random.default_rng(0)
    ours, reference = rng.gamma(2, 1, (2, 400, 2000))
    ours = reference + 0.01 * ours
    found = [eval.perplexity(row) for row in reference]
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.15)
    assert found[0].value == pytest.approx(math.exp(reference[0].mean()), rel=1e-12)
    differences: list[eval.Estimate] = []
    for pair in zip(ours, reference, strict=True):
        totals = eval.Totals(2000, 2)
        totals.surprise[:], totals.kl, totals.same = pair, np.zeros(2000), np.ones(2000, bool)
        differences += filter(None, [totals.comparison().difference])
    spread = np.std([one.value for one in differences])
    assert np.mean([one.error for one in differences]) == pytest.approx(spread, rel=0.15)


# --- against a reference


def test_divergence_is_that_of_float64(folder: Path) -> None:
    """The same windows through model.py in float64, and every figure from its definition. The
    engine's f32 logits are 1e-7 off, and so are the figures."""
    ids = ids_of(folder / "m.bin", TEXT)
    found = measured("--bin", folder / "m-q8-f32.bin", "--against", folder / "m.bin", "--text",
                     folder / "text", "--context=96", "--convention=llama.cpp")  # fmt: skip
    p, q, came = [], [], []
    ours, reference = (
        Transformer(folder / name, torch.float64) for name in ("m-q8-f32.bin", "m.bin")
    )
    for window in windows("llama.cpp", ids, 96, 1):
        for model, out in ((reference, p), (ours, q)):
            out.append(model.forward(window.ids).log_softmax(-1)[window.first : -1].numpy())
        came += window.ids[window.first + 1 :]
    logp, logq = np.concatenate(p), np.concatenate(q)
    kl = (np.exp(logp) * (logp - logq)).sum(axis=1)
    against = found["results"][0]["against"]
    assert against["kl"]["value"] == pytest.approx(kl.mean(), rel=1e-4)
    assert against["kl"]["error"] == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-3)
    # between the two values around rank 0.99 (n - 1), counted from 0
    n, rank = len(kl), 0.99 * (len(kl) - 1)
    low, high = np.sort(kl)[math.floor(rank)], np.sort(kl)[math.ceil(rank)]
    assert against["kl_99"] == pytest.approx(low + (rank % 1) * (high - low), rel=1e-3)
    assert against["kl_max"] == pytest.approx(kl.max(), rel=1e-3)
    assert against["same_token"]["value"] == (logp.argmax(1) == logq.argmax(1)).mean()
    values = [math.exp(-x[range(n), came].mean()) for x in (logq, logp)]
    assert against["reference"]["value"] == pytest.approx(values[1], rel=1e-6)
    assert against["difference"]["value"] == pytest.approx(values[0] - values[1], rel=1e-3)


def test_a_file_against_itself(folder: Path) -> None:
    path = folder / "m-q8.bin"
    found = measured("--bin", path, "--against", path, "--text", folder / "text")
    for result in found["results"]:
        against = result["against"]
        assert against["kl"] == {"value": 0, "error": 0} and against["kl_max"] == 0
        assert against["same_token"]["value"] == 1
        assert against["difference"] == {"value": 0, "error": 0}


def test_the_engines_own_rounding(folder: Path) -> None:
    """An 8-bit file against the floats that it decodes to, with each width of activations, and
    against itself: what differs is the rounding that the options name."""

    def kl(*words: object) -> float:
        found = measured("--bin", folder / "m-q8.bin", *words)
        assert found["results"][0]["perplexity"] is None and found["text"] is None
        return float(found["results"][0]["against"]["kl"]["value"])

    exact = ["--against", folder / "m-q8-f32.bin", "--kv=f32"]
    eight, sixteen = kl(*exact, "--activations=8"), kl(*exact, "--activations=16")
    assert 0 < sixteen < 1e-6 < 1e-4 < eight < 1e-1
    itself = kl("--against", folder / "m-q8.bin", "--activations=8", "--against-activations=16")
    assert itself == pytest.approx(eight, rel=0.1)
    alike = ["--activations=16", "--against-activations=16"]
    kv = ["--against", folder / "m-q8.bin", *alike, "--kv=f16", "--against-kv"]
    assert kl(*kv, "f16") == 0 < kl(*kv, "f32") < 1e-5


def test_decoded_weights_are_the_same_weights(folder: Path) -> None:
    before, after = (format.read(folder / name) for name in ("m-q8.bin", "m-q8-f32.bin"))
    assert {record.kind for record in after.records.values()} == {Kind.F32}
    for name, tensor in before.tensors.items():
        assert np.array_equal(tensor, after.tensors[name])
    with pytest.raises(LlamaError, match=r"m.bin: is in f32 already$"):
        shrink(folder / "m.bin", folder / "no.bin", 32)


def test_page_of_the_receipt(folder: Path) -> None:
    """quantize.py's receipt and llama.eval without a text are one measurement."""
    told = distance.measure(folder / "m.bin", folder / "m-q8.bin")
    assert isinstance(told, distance.Distance)
    found = measured("--bin", folder / "m-q8.bin", "--against", folder / "m.bin")["results"][0]
    assert found["scored"] == told.n == 96
    assert found["against"]["kl"]["value"] == pytest.approx(told.mean_kl, rel=1e-12)
    assert found["against"]["same_token"]["value"] == pytest.approx(told.same_token)


@pytest.mark.parametrize("logits", [1, 3 * 259, 1 << 24])
def test_parts_do_not_matter(folder: Path, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows go through at once, and however few become float64."""
    ids = ids_of(folder / "m.bin", TEXT)[:80]
    with Engine(folder / "m.bin") as engine:
        whole = engine.forward(ids, [0] * 80, range(80), [True] * 80)
        assert whole is not None
        monkeypatch.setattr(distance, "PASS_LOGITS", 4 * logits)
        monkeypatch.setattr(distance, "BLOCK_LOGITS", logits)
        for first, end in ((0, 80), (37, 79), (79, 80)):
            found = list(distance.outputs([engine], ids, first, end))
            assert found[0][0] == first
            rows = np.concatenate([logits[0] for _, logits in found])
            assert np.array_equal(rows, whole[first:end])


def test_extreme_logits() -> None:
    """Where exp() of the logits is 0 or infinite in float64, the figures are still right."""
    p = distance.log_softmax(np.array([[1e4, 0, -1e4]], np.float32))
    q = distance.log_softmax(np.array([[0, 1e4, 3e38]], np.float32))
    assert p[0].tolist() == [0, -1e4, -2e4]
    assert distance.divergence(p, q)[0] == pytest.approx(3e38, rel=1e-6)
    assert distance.divergence(p, p)[0] == 0 and not distance.same_token(p, q)[0]


# --- the command


def test_what_a_person_reads(folder: Path) -> None:
    out = folder / "out.json"
    done = command("--bin", folder / "m-q8.bin", "--against", folder / "m.bin", "--text",
                   folder / "text", "--json", out, "--activations=8")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for told in ("m-q8.bin: q8r, ", "activations 8, kv f16", f"text: {len(TEXT) + 1} tokens",
                 'convention "llama.cpp": 4 windows', 'convention "papers"', "perplexity",
                 "the reference's", "99th percentile", "same next token", " ± "):  # fmt: skip
        assert told in done.stdout
    found = json.loads(out.read_text())
    assert found["command"][0] == "llama.eval" and "--activations=8" in found["command"]
    model = found["model"]
    assert (model["activations"], model["kv"], model["dtype"]) == (8, "f16", "q8r")
    assert found["against"]["activations"] == 16 and model["isa"] and found["cpu"]
    for entry, name in ((model, "m-q8.bin"), (found["text"], "text")):
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_one_scored_token_has_no_error(folder: Path) -> None:
    found = measured("--bin", folder / "m.bin", "--text=-", "--context=3", "--tokens=1",
                     "--convention=llama.cpp", text=TEXT)  # fmt: skip
    assert found["results"][0]["scored"] == 1
    assert found["results"][0]["perplexity"]["error"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--text FILE says on what"),
        (("--text=-", "--context=2"), "--context must be 3 or more, found 2"),
        (("--text=-", "--context=97"), "expected at most the model's own 96"),
        (("--text=-", "--context=96", "--tokens=0"), "--tokens must be 1 or more, found 0"),
        (("--text=-", "--stride=4"), "--stride is of --convention strided"),
        (("--text=-", "--convention=strided", "--stride=97"), "would skip tokens"),
        (("--text=-", "--convention=mine"), "invalid choice: 'mine'"),
        (("--text=-", "--against-kv=f32"), "--against-kv is of the reference"),
        (("--against=m.bin", "--context=9"), "--text FILE says on what"),
        (("--text=-", "--activations=4"), "activations is 4, expected 8 or 16"),
        (("--text=-", "--kv=q9"), "kv is 'q9', expected"),
        (("--text=no.txt",), "no.txt: No such file"),
        (("--text=-", "--against=no.bin"), "no.bin: No such file"),
        (("--text=-", "--json=no/where.json"), "no/where.json: No such file"),
    ],
)
def test_bad_words_are_one_line(folder: Path, words: tuple[str, ...], says: str) -> None:
    done = command("--bin", folder / "m.bin", *words, text=TEXT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("llama.eval: ") and says in done.stderr


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "holds no text"), (b"caf\xe9", r"is no UTF-8 text \(byte 3\)")],
)
def test_bad_texts(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(LlamaError, match=says):
        eval.read_text(str(tmp_path / "t"))


def test_a_text_too_short(folder: Path) -> None:
    done = command("--bin", folder / "m.bin", "--text=-", text="short")
    assert done.stderr == "llama.eval: the text has 6 tokens and a window takes 96\n"


def test_other_vocabularies_are_refused(folder: Path, tmp_path: Path) -> None:
    other = Config(**{**SHAPE.__dict__, "vocab_size": 300})
    kinds: dict[str, tuple[Config, Any]] = {
        "more": (other, (TokenizerKind.JSON, byte_tokenizer())),
        "none": (SHAPE, (TokenizerKind.NONE, b"")),
        "begin": (Config(**{**SHAPE.__dict__, "bos_id": None}),
                  (TokenizerKind.JSON, byte_tokenizer())),
    }  # fmt: skip
    for name, says in (("more", "expected 259 logits, found 300"), ("none", "kind json"),
                       ("begin", "expected the begin token 1, found None")):  # fmt: skip
        shape, tokenizer = kinds[name]
        path = small_models.write_bin(tmp_path / f"{name}.bin", shape, 0, tokenizer=tokenizer)
        done = command("--bin", folder / "m.bin", "--against", path, "--text=-", text=TEXT)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "has another vocabulary" in done.stderr and says in done.stderr


def test_logits_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    bin = format.read(folder / "m.bin")
    norm = np.full(SHAPE.dim, 3e38, np.float32)
    path = tmp_path / "big.bin"
    records = [Record(name, Kind.F32, record.shape) for name, record in bin.records.items()]
    with Writer(path, bin.config, records) as writer:
        for record in records:
            values = norm if record.name == "norm.weight" else bin.tensors[record.name]
            writer.write(record.name, values)
    message = "big.bin: the head gives numbers that"
    with Engine(path) as engine, pytest.raises(LlamaError, match=message):
        list(distance.outputs([engine], [5, 6], 0, 2))
