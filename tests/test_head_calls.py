"""What models with heads are asked in Python and by the scripts: classes, rewards, answers and tags
of texts, as transformers' pipelines give them; the wrong call; damaged entries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import head_models
import numpy as np
import pytest
import small_models
import tokenizers
import torch
from head_models import FRAMES, HEADS, TEXTS, far, opened, text_model
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama, checkpoints
from llama.config import Head
from llama.distance import Deviation, measure, page
from llama.engine import Engine
from llama.errors import LlamaError
from llama.heads import Answer, best_span, token_spans
from llama.shrink import shrink

transformers = head_models.transformers
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("frame", ["", *list(FRAMES)[:2]])
@pytest.mark.parametrize(
    "problem, n_labels",
    [(None, 3), ("single_label_classification", 4), ("multi_label_classification", 3),
     ("regression", 2), ("regression", 1), (None, 1)],
)  # fmt: skip
def test_classes_are_the_pipelines(
    tmp_path: Path, problem: str | None, n_labels: int, frame: str
) -> None:
    names = {n: f"is {n}" for n in range(n_labels)}
    model, tokenizer = text_model(
        tmp_path / "hf", Head.SEQUENCE, n_labels, FRAMES.get(frame, ""), problem_type=problem,
        id2label=names, label2id={name: n for n, name in names.items()},
    )  # fmt: skip
    tokenizer.split_special_tokens = True  # what a text says is never a control token
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    with opened(tmp_path / "hf") as llm:
        together = llm.classify(TEXTS)
        for text, found in zip(TEXTS, together, strict=True):
            right = {entry["label"]: entry["score"] for entry in pipe(text, top_k=None)}
            assert found.scores == pytest.approx(right, rel=1e-4, abs=1e-6)
            assert found.label == max(right, key=lambda label: right[label])
            assert found.score == found.scores[found.label]
            assert list(found.scores) == list(names.values()) == llm.labels
            ids = tokenizer(text).input_ids
            assert llm.text_ids(text) == ids
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].numpy()
            assert far(np.array(found.logits), logits) <= 1e-4
            assert llm.classify(text) == llm.classify(ids) == found
            if n_labels == 1:
                assert llm.score(text) == found.logits[0]
        if n_labels == 1:
            assert llm.score(TEXTS) == [found.logits[0] for found in together]
        else:
            with pytest.raises(LlamaError, match=rf"score\(\) needs .* by {n_labels} labels"):
                llm.score("a")
        assert llm.classify([]) == []


def test_padding_at_the_end_is_not_the_text(tmp_path: Path) -> None:
    """transformers takes the last token that is not pad_token_id, even where it is the text's."""
    model, tokenizer = text_model(tmp_path / "hf", Head.SEQUENCE, 3, FRAMES["both"], pad_token_id=2)
    with opened(tmp_path / "hf") as llm:
        for ids in ([5, 6, 2, 2], [2, 2], [2, 9], [9, 2, 4, 2], tokenizer("hi").input_ids):
            with torch.inference_mode():
                right = model(torch.tensor([ids])).logits[0].numpy()
            assert far(np.array(llm.classify(ids).logits), right) <= 1e-4
            assert llm.classify([[3, 3], ids])[1] == llm.classify(ids)


def test_rewards_of_dialogs(tmp_path: Path) -> None:
    model, tokenizer = text_model(tmp_path / "hf", Head.SEQUENCE, 1)
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "hf" / "chat_template.jinja").write_text(jinja)
    tokenizer.chat_template = jinja
    question = {"role": "user", "content": "How many legs has a spider, and why is it so?"}
    dialogs = [
        [question, {"role": "assistant", "content": answer}] for answer in ("Eight.", "Six", "9")
    ]
    with opened(tmp_path / "hf") as llm:
        rewards = llm.score(dialogs)
        for dialog, reward in zip(dialogs, rewards, strict=True):
            text = tokenizer.apply_chat_template(dialog, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert llm.text_ids(dialog) == ids
            with torch.inference_mode():
                right = float(model(torch.tensor([ids])).logits[0, 0])
            assert reward == pytest.approx(right, rel=1e-4) and llm.score(dialog) == reward
        assert llm.classify(dialogs[0]).logits == (rewards[0],)
        whole = sum(len(llm.text_ids(dialog)) for dialog in dialogs)
        # the question was read once
        assert llm.computed_tokens < whole + 3


@pytest.mark.parametrize("frame", ["", *FRAMES])
def test_answers_are_a_plain_search(tmp_path: Path, frame: str) -> None:
    model, tokenizer = text_model(tmp_path / "hf", Head.ANSWER, frame=FRAMES.get(frame, ""))
    tokenizer.split_special_tokens = True
    with opened(tmp_path / "hf") as llm:
        for number, context in enumerate([" It is  tall.\n", "é", "a 😀 b", "word " * 30, " "]):
            question = f"{number}?"
            pair = tokenizer(question, context, return_offsets_mapping=True)
            with torch.inference_mode():
                out = model(torch.tensor([pair.input_ids]))
            inside = [i for i, of in enumerate(pair.sequence_ids()) if of == 1]
            p, q = (torch.softmax(x[0, inside].double(), 0).tolist()
                    for x in (out.start_logits, out.end_logits))  # fmt: skip
            for longest in (15, 1, 4):
                score, first, last = max(
                    (p[i] * q[j], i, j) for i in range(len(p))
                    for j in range(i, min(i + longest, len(p)))
                )  # fmt: skip
                places = [pair.offset_mapping[inside[i]] for i in (first, last)]
                text = context[places[0][0] : places[1][1]]
                found = llm.answer(question, context, longest)
                assert found.score == pytest.approx(score, rel=1e-4)
                assert found.text == text.strip() == context[found.start : found.end]
                assert places[0][0] <= found.start <= found.end <= places[1][1]
        assert isinstance(llm.answer("?", "x"), Answer)
        for arguments, message in [
            (("a", ""), "needs a context"), (("a", "b" * 300), "expected 1 to 256"),
            (("a", "b", 0), "max_tokens must be 1 or more, found 0"),
            (("a", "b", True), "max_tokens"), ((1, "b"), "text must be a str"),
        ]:  # fmt: skip
            with pytest.raises(LlamaError, match=message):
                llm.answer(*arguments)  # type: ignore[arg-type]


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_the_best_span_is_the_best(n: int, longest: int, seed: int) -> None:
    starts, ends = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32) * 3
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (starts, ends))
    scores = [(p[i] * q[j], i, j) for i in range(n) for j in range(i, n) if j - i < longest]
    first, last, score = best_span(starts, ends, longest)
    best = max(scores)
    assert (first, last) == best[1:] and score == pytest.approx(best[0])


@pytest.mark.parametrize("frame", ["", *list(FRAMES)[:2]])
def test_tags_are_every_tokens(tmp_path: Path, frame: str) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    model, tokenizer = text_model(
        tmp_path / "hf", Head.TOKEN, 3, FRAMES.get(frame, ""), id2label=names,
        label2id={name: n for n, name in names.items()},
    )  # fmt: skip
    tokenizer.split_special_tokens = True
    with opened(tmp_path / "hf") as llm:
        together = llm.tag([*TEXTS, "longer " * 25])
        for text, tags in zip([*TEXTS, "longer " * 25], together, strict=True):
            given = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
            with torch.inference_mode():
                shares = model(torch.tensor([given.input_ids])).logits[0].double().softmax(-1)
            inside = [i for i, of in enumerate(given.sequence_ids()) if of == 0]
            assert [tag.token_id for tag in tags] == [given.input_ids[i] for i in inside]
            places = [given.offset_mapping[i] for i in inside]
            assert [(tag.start, tag.end) for tag in tags] == places
            assert [tag.label for tag in tags] == [names[int(shares[i].argmax())] for i in inside]
            best = [float(shares[i].max()) for i in inside]
            assert [tag.score for tag in tags] == pytest.approx(best, rel=1e-4)
            assert llm.tag(text) == tags
        if not frame:
            with pytest.raises(LlamaError, match=r"0 tokens, expected 1 to 256"):
                llm.tag("")
        else:
            assert llm.tag("") == []
        with pytest.raises(LlamaError, match=r"tag\(\) takes a str or a list of str, found int"):
            llm.tag(5)  # type: ignore[call-overload]


def test_pairs_are_the_sources_own(data: Path, tmp_path: Path) -> None:
    """Llama 2's tokenizer in both its forms, and Llama 3's, with what their configs may say."""
    files = data / "tokenizers"
    question, context = "Who is it?", "It is  a\ncafé 😀, ＮＢ: don't."
    begin_end = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama3 = json.loads((files / "hf_llama3_tokenizer_config.json").read_text())
    for source, said, ends in [
        ("hf_llama2", begin_end | {"tokenizer_class": "LlamaTokenizer"}, False),
        ("hf_llama2", begin_end | {"tokenizer_class": "LlamaTokenizer"}, True),
        ("hf_llama3", llama3, False),
    ]:  # fmt: skip
        folder = tmp_path / "hf"
        size = 128256 if source == "hf_llama3" else 32000
        shape = small_models.config(vocab_size=size, dim=4, hidden_dim=8, head_dim=2, n_layers=1,
                                    head=Head.ANSWER, n_labels=2, output_bias=True)  # fmt: skip
        small_models.transformers_llama(shape).save_pretrained(folder)
        shutil.copy(files / f"{source}_tokenizer.json", folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        if ends:  # both are saved in tokenizer.json then
            theirs.add_bos_token, theirs.add_eos_token = True, True
            theirs.save_pretrained(folder)
        pair = theirs(question, context, return_offsets_mapping=True)
        places = [place for place, of in zip(pair.offset_mapping, pair.sequence_ids(), strict=True)
                  if of == 1]  # fmt: skip
        with opened(folder) as llm:
            assert llm.text_ids(context) == theirs(context).input_ids
            inner = llm.tokenizer.encode(context)
            ids, first = llm._framed("pair", llm.tokenizer.encode(question), inner)
            assert ids == pair.input_ids and ids[first : first + len(inner)] == inner
            assert token_spans(llm.tokenizer, context, inner) == places
        if source == "hf_llama2":  # the same vocabulary in its first form
            shutil.copy(files / "llama2_tokenizer.model", folder / "tokenizer.model")
            flags = {"add_bos_token": True, "add_eos_token": ends}
            (folder / "tokenizer_config.json").write_text(json.dumps(begin_end | flags))
            for beside in (True, False):
                if not beside:
                    (folder / "tokenizer.json").unlink()
                with opened(folder) as llm:
                    assert llm.tokenizer.kind == "sentencepiece"
                    assert llm._framed("pair", llm.tokenizer.encode(question), inner)[0] == ids
                    assert llm.text_ids(context) == theirs(context).input_ids
                    assert token_spans(llm.tokenizer, context, inner) == places
        shutil.rmtree(folder)


def test_what_a_tokenizer_cuts_and_fills_is_not_its_frame(tmp_path: Path) -> None:
    """transformers pads and truncates only where it is asked to, whatever tokenizer.json says."""
    text_model(tmp_path / "hf", Head.ANSWER, frame=FRAMES["both"])
    file = tmp_path / "hf" / "tokenizer.json"
    right = checkpoints.load(tmp_path / "hf").meta["tokenizer.frame"]
    assert json.loads(str(right)) == {"single": [1, "A", 2], "pair": [1, "A", 2, "B", 2]}
    library = tokenizers.Tokenizer.from_file(str(file))
    library.enable_padding(length=16)
    library.save(str(file))
    assert checkpoints.load(tmp_path / "hf").meta["tokenizer.frame"] == right
    library.enable_truncation(3)
    library.save(str(file))
    assert checkpoints.load(tmp_path / "hf").meta["tokenizer.frame"] == right
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab", "c").input_ids == [1, 100, 101, 2, 102, 2]


# --- the wrong call, and damaged entries


CALLS: dict[str, Any] = {
    "generate": lambda llm: llm.generate("a"), "stream": lambda llm: llm.stream("a"),
    "each": lambda llm: list(llm.each(["a"])), "logits": lambda llm: llm.logits([1]),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}]),
    "stream_chat": lambda llm: llm.stream_chat([{"role": "user", "content": "a"}]),
    "classify": lambda llm: llm.classify("a"), "score": lambda llm: llm.score("a"),
    "answer": lambda llm: llm.answer("a", "b"), "tag": lambda llm: llm.tag("a"),
    "embed": lambda llm: llm.embed("a"),
}  # fmt: skip
FITS = {
    Head.LM: {"generate", "stream", "each", "logits", "chat", "stream_chat", "embed"},
    Head.NONE: {"embed"}, Head.SEQUENCE: {"classify", "score", "embed"},
    Head.ANSWER: {"answer", "embed"}, Head.TOKEN: {"tag", "embed"},
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name.lower())
def test_the_wrong_call_names_the_right_one(tmp_path: Path, head: Head) -> None:
    text_model(tmp_path / "hf", head, 1)
    with opened(tmp_path / "hf", template="chatml", max_seq_len=64) as llm:
        for name, call in CALLS.items():
            if name in FITS[head]:
                call(llm)
                continue
            with pytest.raises(LlamaError) as caught:
                call(llm)
            said = str(caught.value)
            right = {Head.LM: "generate() or chat()", Head.NONE: "embed()", Head.ANSWER: "answer()",
                     Head.SEQUENCE: "score()", Head.TOKEN: "tag()"}[head]  # fmt: skip
            assert said.endswith(f": use {right}") and "needs a model that" in said, said
            assert "\n" not in said
    with pytest.raises(LlamaError, match="closed"):
        llm.embed("a")


def test_damaged_entries_are_one_line(tmp_path: Path) -> None:
    shape = small_models.config(head=Head.SEQUENCE, n_labels=2)
    for n, (key, value, message) in enumerate([
        ("head.labels", "{", "head.labels must be a JSON list of 2 different names"),
        ("head.labels", '["a"]', "list of 2 different"),
        ("head.labels", '["a", "a"]', "list of 2 different"),
        ("head.labels", '["a", 5]', "list of 2 different"),
        ("head.labels", 7, "list of 2 different"),
        ("tokenizer.frame", "{", "tokenizer.frame must be JSON"),
        ("tokenizer.frame", '{"single": 5}', "tokenizer.frame must be JSON"),
        ("tokenizer.frame", '{"single": ["A", "A"]}', "tokenizer.frame must be JSON"),
        ("tokenizer.frame", '{"single": ["B"]}', "tokenizer.frame must be JSON"),
        ("tokenizer.frame", '{"single": ["A", 99]}', "token id must be 0 to 43, found 99"),
    ]):  # fmt: skip
        path = small_models.write_bin(tmp_path / f"{n}.bin", shape, meta={key: value})
        with Llama(path) as llm, pytest.raises(LlamaError, match=message):
            if key == "tokenizer.frame":
                llm._framed("single", [1])
            else:
                llm.classify([1, 2])


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    text_model(tmp_path / "hf", Head.SEQUENCE)
    with opened(tmp_path / "hf") as llm:
        for wrong, message in [
            (5, "a text must be a str, .* found int"), (b"a", "found bytes"),
            ("", "0 tokens, expected 1 to 256"), (["a", ""], "text 1: 0 tokens"),
            (["a", "b" * 257], r"text 1: 257 tokens, expected 1 to 256 \(the context\)"),
            ([[1], [259]], "text 1: token id must be 0 to 258, found 259"),
            (["a", []], "text 1: expected a str, token ids or messages, found an empty list"),
            (["a", None], "text 1: expected a str, .* found NoneType"),
            ([{"role": "user", "content": "x"}], "base model: its file names no chat template"),
            ("\ud800", "surrogate"),
        ]:  # fmt: skip
            with pytest.raises(LlamaError, match=message):
                llm.classify(wrong)  # type: ignore[call-overload]
        assert llm.computed_tokens == 0


# --- the scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A .bin with each head."""
    folder = tmp_path_factory.mktemp("files")
    wanted = {"none": (Head.NONE, 3), "reward": (Head.SEQUENCE, 1), "classes": (Head.SEQUENCE, 3),
              "answer": (Head.ANSWER, 2), "tags": (Head.TOKEN, 3), "lm": (Head.LM, 0)}  # fmt: skip
    for name, (head, n_labels) in wanted.items():
        text_model(folder / name, head, n_labels)
        opened(folder / name).close()
    return {name: folder / f"{name}.bin" for name in wanted}


def script(name: str, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    module = name.startswith("llama.")
    what = ["-m", name] if module else [str(ROOT / name)]
    return subprocess.run([sys.executable, *what, *map(str, words)], input=stdin, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip


def test_run_prints_what_the_model_says(files: dict[str, Path]) -> None:
    text = "Hello, you"
    out = {}
    for name in ("none", "reward", "classes", "tags"):
        done = script("run.py", f"--bin={files[name]}", text)
        assert done.returncode == 0 and done.stderr.startswith("prompt 10 tok at "), done.stderr
        out[name] = done.stdout
    with Llama(files["none"]) as llm:
        found = np.array(json.loads(out["none"]), np.float32)
        assert np.array_equal(found, llm.embed(text)) and out["none"].count("\n") == 1
    with Llama(files["reward"]) as llm:
        assert float(out["reward"]) == pytest.approx(llm.score(text), rel=1e-5)
    with Llama(files["classes"]) as llm:
        best = llm.classify(text)
        assert out["classes"] == f"{best.label}\t{best.score:.4f}\n"
    with Llama(files["tags"]) as llm:
        tags = [f"{tag.piece!r}\t{tag.label}\t{tag.score:.4f}" for tag in llm.tag(text)]
        assert out["tags"].splitlines() == tags and tags[5].startswith("','\tLABEL_")


@pytest.mark.parametrize(
    "program, name, words, says",
    [
        ("run.py", "answer", ["a"], "run.py: this model answers questions about a text: "
         "Llama.answer(question, context) in Python"),
        ("run.py", "tags", ["--ids=5"], "give it in place of --ids"),
        ("run.py", "classes", ["a", "--n=2"], "run.py: --n needs a model that writes text; this "
         "one classifies texts: use classify()"),
        ("run.py", "none", ["a", "--best-of=2"], "--best-of needs a model that writes text"),
        ("run.py", "none", ["a", "--echo"], "--echo needs a model that writes text"),
        ("run.py", "none", ["a", "--logprobs=0"], "--logprobs needs a model that writes text"),
        ("run.py", "none", [f"--prefix={__file__}", f"--suffix={__file__}"],
         "--prefix needs a model that writes text"),
        ("run.py", "reward", ["--prompts=-"], "--prompts needs a model that writes text"),
        ("chat.py", "classes", [], "chat.py: a chat needs a model that writes text; this one "
         "classifies texts: use classify()"),
        ("llama.eval", "classes", ["--text=README.md"], "classes.bin: is no language model"),
    ],
)  # fmt: skip
def test_scripts_refuse_in_one_line(
    files: dict[str, Path], program: str, name: str, words: list[str], says: str
) -> None:
    done = script(program, f"--bin={files[name]}", *words)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert says in done.stderr


def test_distance_and_bench(files: dict[str, Path], tmp_path: Path) -> None:
    for one, other in (("none", "lm"), ("classes", "tags")):
        with pytest.raises(LlamaError, match="of the same head and number of outputs"):
            measure(files[one], files[other])
    for name in ("none", "tags"):
        same = measure(files[name], files[name])
        assert same == Deviation(256, 0.0)
        shrink(files[name], tmp_path / f"{name}.bin", 8)
        other = measure(files[name], tmp_path / f"{name}.bin")
        assert isinstance(other, Deviation)
        both: list[Any] = []
        for path in (files[name], tmp_path / f"{name}.bin"):
            with Engine(path) as engine:
                both.append(engine.forward(page(engine), [0] * 256, range(256), [True] * 256))
        right = np.sqrt(np.mean(np.square(both[1] - both[0])) / np.mean(np.square(both[0])))
        assert other.relative_error == pytest.approx(right, rel=1e-3)
        assert 1e-4 < right < 0.1
    done = script("llama.bench", f"--bin={files['classes']}", "--prompt=8", "--tokens=4",
                  "--json=-")  # fmt: skip
    rows = json.loads(done.stdout)["models"][0]["rows"]
    assert [row["rate"] > 0 and row["share"] > 0 for row in rows] == [True, True]
