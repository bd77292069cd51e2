"""Heads: classification, rewards, question answering, token labels, against transformers.

transformers makes the model and writes the directory; the export under test reads it, as
transformers 4 and 5 write it, whole, sharded and as pytorch_model.bin. Differences are the largest
|a - b| as a share of the largest |b|.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tokenizers
import torch
from fake_engine import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama import Llama, checkpoints
from llama.checkpoints.checkpoint import Checkpoint
from llama.config import Config, Head, Rope
from llama.distance import Deviation, measure, page
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import read
from llama.heads import Answer, best_span, token_spans
from llama.model import Transformer
from llama.quant import Kind
from llama.shrink import shrink

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share among threads, which would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LENGTH, TRAINED = 40, 24  # tokens that are read, and positions that the models say they know
ROPES: dict[Rope, tuple[float, ...]] = {
    Rope.PLAIN: (), Rope.LINEAR: (4.0,), Rope.LLAMA3: (8.0, 1.0, 4.0, 16.0),
    Rope.YARN: (4.0, 20.0, 8.0, 1.0, 1.25, 1.0), Rope.DYNAMIC: (2.0, float(TRAINED)),
}  # fmt: skip
HEADS = [Head.SEQUENCE, Head.ANSWER, Head.TOKEN, Head.NONE, Head.LM]


def random_shape(head: Head, seed: int) -> Config:
    """Every rope scaling with and without biases, in turn; the rest is drawn."""
    rng = np.random.default_rng(100 * head + seed)
    n_kv, group = (int(n) for n in rng.integers(1, 4, 2))
    rope = list(ROPES)[seed % 5]
    return small_models.config(
        vocab_size=int(rng.integers(30, 100)), dim=n_kv * group * int(rng.integers(4, 9)),
        hidden_dim=int(rng.integers(8, 60)), head_dim=2 * int(rng.integers(2, 10)),
        n_layers=int(rng.integers(1, 4)), n_heads=n_kv * group, n_kv_heads=n_kv,
        max_seq_len=TRAINED, rope_theta=float(rng.choice([500.0, 1e4, 5e5])),
        rope_scaling=rope, rope_numbers=ROPES[rope], attention_bias=seed // 5 in (1, 3),
        mlp_bias=seed // 5 in (2, 3), head=head, n_labels=labels_of(head, rng),
        output_bias=head == Head.ANSWER or (head == Head.TOKEN and seed % 4 > 0),
    )  # fmt: skip


def labels_of(head: Head, rng: np.random.Generator) -> int:
    if head in (Head.SEQUENCE, Head.TOKEN):
        return int(rng.integers(1, 40))
    return 2 if head == Head.ANSWER else 0


def as_transformers_4(folder: Path) -> None:
    """config.json in the words of version 4."""
    said = json.loads((folder / "config.json").read_text())
    rope = said.pop("rope_parameters")
    said["rope_theta"] = rope.pop("rope_theta")
    said["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    said["transformers_version"] = "4.44.0"
    (folder / "config.json").write_text(json.dumps(said))


def save(model: Any, folder: Path, how: int) -> None:
    """As transformers writes it: whole or sharded safetensors, or as it once did, a .bin."""
    model.save_pretrained(folder, **({"max_shard_size": "2KB"} if how == 1 else {}))
    if how == 1:
        assert len(list(folder.glob("*.safetensors"))) > 1
    if how == 2:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def far(ours: Any, right: Any) -> float:
    return float(np.abs(ours - right).max() / np.abs(right).max())


class Theirs:
    """transformers' numbers for TOKENS: every token's hidden state, residual stream and head."""

    def __init__(self, model: Any, tokens: list[int], head: Head) -> None:
        base = model if head == Head.NONE else getattr(model, model.base_model_prefix)
        last: list[Any] = []
        hook = base.layers[-1].register_forward_hook(lambda m, x, y: last.append(y))
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), output_hidden_states=True)
            hidden = base(torch.tensor([tokens])).last_hidden_state
            hook.remove()
            self.hidden = hidden[0].numpy()
            end = last[0][0] if isinstance(last[0], tuple) else last[0]
            self.stream = torch.stack([*out.hidden_states[:-1], end])[:, 0].numpy()
            if head == Head.NONE:
                self.outputs = self.hidden
            elif head == Head.ANSWER:
                both = torch.stack([out.start_logits, out.end_logits], -1)
                self.outputs = both[0].numpy()
            elif head == Head.SEQUENCE:  # which gives the last token's only
                self.outputs = model.score(hidden)[0].numpy()
                assert np.allclose(self.outputs[-1], out.logits[0].numpy(), rtol=0, atol=1e-5)
            else:
                self.outputs = out.logits[0].numpy()


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name.lower())
def test_numbers_are_transformers(tmp_path: Path, head: Head) -> None:
    worst = dict.fromkeys(("outputs", "hidden", "stream", "model.py"), 0.0)
    for seed in range(20):
        shape = random_shape(head, seed)
        model = small_models.transformers_llama(  # tied says nothing about these heads
            shape, seed=seed, tie_word_embeddings=seed % 2 > 0,
            token_classification_bias=shape.output_bias,
        )  # fmt: skip
        folder, path = tmp_path / f"hf{seed}", tmp_path / f"{seed}.bin"
        save(model, folder, seed % 3)
        if seed % 2:
            as_transformers_4(folder)
        checkpoints.export(folder, path, say=lambda line: None)
        tokens = np.random.default_rng(seed).integers(0, shape.vocab_size, LENGTH).tolist()
        right = Theirs(model, tokens, head)
        with Engine(path, max_seq_len=LENGTH, threads=1) as engine:
            for name in ("head", "n_labels", "output_bias", "n_outputs", "rope_scaling"):
                assert getattr(engine.config, name) == getattr(shape, name), name
            rows: Any = (tokens, [0] * LENGTH, range(LENGTH), [True] * LENGTH)
            lengths = {"rope_lengths": [LENGTH] * LENGTH}
            stream, outputs = engine.trace(*rows, **lengths)
            engine.trim(0, 0)
            hidden = engine.forward(*rows, hidden=True, **lengths)
        found = {
            "outputs": far(outputs, right.outputs), "hidden": far(hidden, right.hidden),
            "stream": max(map(far, stream, right.stream)),
            "model.py": far(Transformer(path).forward(tokens).numpy(), right.outputs),
        }  # fmt: skip
        worst = {name: max(worst[name], value) for name, value in found.items()}
    print(head.name, {name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) <= 1e-4


def test_rows_that_are_wanted(tmp_path: Path) -> None:
    """Some rows of a batch longer than one pass of the scratch, as each of them alone."""
    shape = random_shape(Head.TOKEN, 15)
    path = small_models.write_bin(tmp_path / "a.bin", shape)
    n = 700
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, n).tolist()
    want = [i % 3 == 1 or i > 690 for i in range(n)]
    with Engine(path, max_seq_len=n) as engine:
        stream, outputs = engine.trace(tokens, [0] * n, range(n), want)
        hidden = engine.forward(tokens, [1] * n, range(n), want, hidden=True)
        norm = read(path).tensors["norm.weight"]
        size = np.sqrt(np.mean(np.square(stream[-1]), axis=-1, keepdims=True) + shape.norm_eps)
        assert far(stream[-1] / size * norm, hidden) <= 1e-6
        row = 0
        for at, wanted in enumerate(want):
            one, alone = engine.trace([tokens[at]], [2], [at], [True])
            if wanted:
                assert np.array_equal(one[:, 0], stream[:, row])
                assert np.array_equal(alone[0], outputs[row])
                row += 1
        assert row == stream.shape[1] == len(outputs)
        nothing, none = engine.trace(tokens[:5], [3] * 5, range(5), [False] * 5)
        assert nothing.shape == (shape.n_layers + 1, 0, shape.dim) and none.shape[0] == 0
        with pytest.raises(LlamaError, match="hidden states are not kept"):
            engine.forward([1], [4], [0], [True], keep=True, hidden=True)
        engine.forward([1], [4], [0], [True], keep=True)
        with pytest.raises(LlamaError, match="no language-model head"):
            engine.logprobs(0, 1, 1)


# --- what is exported


def exported(folder: Path) -> Checkpoint:
    return checkpoints.load(folder)


def written(folder: Path, head: Head, n_labels: int = 3, **changes: Any) -> Path:
    n = n_labels if head in (Head.SEQUENCE, Head.TOKEN) else 2 * (head == Head.ANSWER)
    shape = small_models.config(head=head, n_labels=n)
    small_models.transformers_llama(shape, **changes).save_pretrained(folder)
    return folder


def change(folder: Path, **changes: Any) -> Path:
    said = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_labels_and_the_like(tmp_path: Path) -> None:
    names = {2: "très bon", 0: "bad", 1: "so-so"}
    folder = written(
        tmp_path / "a", Head.SEQUENCE, id2label=names, label2id={v: k for k, v in names.items()},
        problem_type="multi_label_classification", pad_token_id=5,
    )  # fmt: skip
    found = exported(folder)
    assert json.loads(str(found.meta["head.labels"])) == ["bad", "so-so", "très bon"]
    assert found.meta["head.problem_type"] == "multi_label_classification"
    assert found.meta["head.pad_id"] == 5
    assert "sequence classification of 3 labels" in found.describe()
    for pad in (-1, None, 44):  # Llama 1's, none, and one that no text holds
        assert "head.pad_id" not in exported(change(folder, pad_token_id=pad)).meta
    doubled = exported(change(folder, id2label={"0": "x", "1": "x", "2": "y"}))
    assert json.loads(str(doubled.meta["head.labels"])) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert any("a name twice" in note for note in doubled.notes)
    # two labels are transformers' default, which it does not write
    two = exported(change(written(tmp_path / "b", Head.TOKEN, 2), id2label=None))
    assert json.loads(str(two.meta["head.labels"])) == ["LABEL_0", "LABEL_1"]
    answers = exported(written(tmp_path / "c", Head.ANSWER))
    assert not [key for key in answers.meta if key.startswith("head.")]
    assert answers.config.n_labels == 2 and answers.config.output_bias
    assert answers.describe().endswith(", question answering")


@pytest.mark.parametrize(
    "head, changes, message",
    [
        (Head.SEQUENCE, {"id2label": {"0": "a"}}, "score.weight: expected 1 x 24, found 3 x 24"),
        (Head.SEQUENCE, {"id2label": None}, "score.weight: expected 2 x 24, found 3 x 24"),
        (Head.SEQUENCE, {"id2label": {"1": "a", "2": "b", "3": "c"}}, "the labels 0 to 2, found 1"),
        (Head.SEQUENCE, {"id2label": {"a": "b"}}, "expected the labels 0 to 0, found a"),
        (Head.SEQUENCE, {"id2label": ["a"]}, "id2label: expected an object"),
        (Head.SEQUENCE, {"problem_type": "hard"}, "problem_type: expected .*, found 'hard'"),
        (Head.SEQUENCE, {"architectures": ["LlamaForTokenClassification"]}, "score.bias is miss"),
        (Head.SEQUENCE, {"architectures": ["LlamaForCausalLM"]},
         "config.json says LlamaForCausalLM, but there is score.weight, of another head"),
        (Head.SEQUENCE, {"architectures": None}, "LlamaForCausalLM, but there is score.weight"),
        (Head.SEQUENCE, {"architectures": ["LlamaForRewards"]}, "found .*LlamaForRewards"),
        (Head.SEQUENCE, {"architectures": ["LlamaModel"]}, "LlamaModel, but there is score"),
        (Head.TOKEN, {"architectures": ["LlamaForSequenceClassification"]},
         "score.bias: a tensor that a Llama of this shape does not have"),
        (Head.TOKEN, {"token_classification_bias": False}, "score.bias: a tensor that"),
        (Head.ANSWER, {"architectures": ["LlamaForSequenceClassification"]}, "qa_outputs"),
        (Head.LM, {"architectures": ["LlamaForQuestionAnswering"]},
         "LlamaForQuestionAnswering, but there is lm_head.weight"),
        (Head.LM, {"architectures": ["LlamaModel"]}, "LlamaModel, but there is lm_head.weight"),
        (Head.NONE, {"architectures": ["LlamaForCausalLM"]}, "a plain Llama does not have"),
        (Head.NONE, {"architectures": ["LlamaForSequenceClassification"]}, "does not have"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, head: Head, changes: dict[str, Any], message: str
) -> None:
    folder = change(written(tmp_path / "hf", head), **changes)
    with pytest.raises(LlamaError, match=message) as caught:
        exported(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "head, prefix", [(Head.NONE, "model."), (Head.ANSWER, "model."), (Head.SEQUENCE, "other.")]
)
def test_prefixes(tmp_path: Path, head: Head, prefix: str) -> None:
    folder = written(tmp_path / "hf", head)
    right = exported(folder)
    own = {Head.NONE: "", Head.ANSWER: "transformer.", Head.SEQUENCE: "model."}[head]
    tensors = {
        name if name.startswith(("score", "qa_")) else prefix + name.removeprefix(own): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    if prefix == "other.":
        with pytest.raises(LlamaError, match="other.*a tensor that a plain Llama does not have"):
            exported(folder)
        return
    found = exported(folder)
    assert found.config == right.config and found.tensors.keys() == right.tensors.keys()
    for name, tensor in found.tensors.items():
        n = tensor.shape[0]
        assert np.array_equal(tensor.rows(0, n), right.tensors[name].rows(0, n)), name
    del tensors[f"{prefix}norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LlamaError, match=f"{prefix}norm.weight is missing"):
        exported(folder)


# --- the head stays f32, everything else becomes smaller


@pytest.mark.parametrize("head", [Head.SEQUENCE, Head.ANSWER, Head.TOKEN, Head.NONE])
def test_smaller_kinds(tmp_path: Path, head: Head) -> None:
    shape = random_shape(head, 15)
    model = small_models.transformers_llama(shape, token_classification_bias=shape.output_bias)
    model.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 20).tolist()
    right = Theirs(model, tokens, head).outputs
    bounds = {"f16": 3e-3, "bf16": 3e-2, "q8": 5e-2, "q4": 0.6}
    for dtype, bound in bounds.items():
        path = tmp_path / f"{dtype}.bin"
        if dtype.startswith("q"):
            receipt = shrink(tmp_path / "f16.bin", path, int(dtype[1:]))
            assert "output.weight" not in receipt.errors or receipt.errors["output.weight"] == 0
            said = [line for line in receipt.lines() if "relative error of the outputs" in line]
            assert len(said) == 2 and said[0].startswith("from the source: ")
            assert "the engine's own rounding alone: " in said[1]
            assert json.loads(receipt.text())["distance"]["relative_error"] > 0
        else:
            checkpoints.export(tmp_path / "hf", path, dtype=dtype, say=lambda line: None)
        records = read(path).records
        assert ("output.weight" in records) == (head != Head.NONE)
        if head != Head.NONE:
            assert records["output.weight"].kind == Kind.F32
            theirs = model.qa_outputs if head == Head.ANSWER else model.score
            assert np.array_equal(read(path).tensors["output.weight"], theirs.weight.detach())
        assert records["layers.0.feed_forward.w1.weight"].kind == Kind[dtype.upper()]
        with Engine(path) as engine:
            ours = engine.forward(tokens, [0] * 20, range(20), [True] * 20)
            assert 1e-6 < far(ours, right) <= bound, dtype


# --- asked in Python, of texts


def text_model(folder: Path, head: Head, n_labels: int = 3, frame: str = "", **changes: Any) -> Any:
    """transformers' model and tokenizer, saved in FOLDER; a token a byte."""
    n = n_labels if head in (Head.SEQUENCE, Head.TOKEN) else 2 * (head == Head.ANSWER)
    shape = small_models.config(
        vocab_size=259, dim=32, max_seq_len=256, head=head, n_labels=n, attention_bias=True
    )
    model = small_models.transformers_llama(shape, **changes)
    model.save_pretrained(folder)
    library = tokenizers.Tokenizer.from_str(byte_tokenizer().decode())
    if frame:
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        single, pair = frame.split(",")
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=special
        )
    library.save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return model, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def opened(folder: Path, **options: Any) -> Llama:
    path = folder.with_suffix(".bin")
    checkpoints.export(folder, path, force=True, say=lambda line: None)
    return Llama(path, **{"threads": 1, **options})


FRAMES = {
    "begin": "<|im_start|> $A,<|im_start|> $A <|im_start|>:1 $B:1",
    "both": "<|im_start|> $A <|im_end|>,<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
    "twice": "<|im_end|> <|im_end|> $A,$B:1 <|im_end|> $A",
}
TEXTS = ["Hello", "a 😀 and <|im_end|> é\n", " x", "the first", "the first too", "the first of all"]


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


@settings(deadline=None)
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
    right = exported(tmp_path / "hf").meta["tokenizer.frame"]
    assert json.loads(str(right)) == {"single": [1, "A", 2], "pair": [1, "A", 2, "B", 2]}
    library = tokenizers.Tokenizer.from_file(str(file))
    library.enable_padding(length=16)
    library.save(str(file))
    assert exported(tmp_path / "hf").meta["tokenizer.frame"] == right
    library.enable_truncation(3)
    library.save(str(file))
    assert exported(tmp_path / "hf").meta["tokenizer.frame"] == right
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
