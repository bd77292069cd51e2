"""Heads: classification, rewards, question answering, token labels, against transformers.

transformers makes the model and writes the directory; the export under test reads it, as
transformers 4 and 5 write it, whole, sharded and as pytorch_model.bin. Differences are the largest
|a - b| as a share of the largest |b|.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import head_models
import numpy as np
import pytest
import small_models
import torch
from head_models import HEADS, LENGTH, far, random_shape
from safetensors.torch import load_file, save_file

from llama import checkpoints
from llama.checkpoints.checkpoint import Checkpoint
from llama.config import Head
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import read
from llama.model import Transformer
from llama.quant import Kind
from llama.shrink import shrink

transformers = head_models.transformers
pytestmark = pytest.mark.usefixtures("one_thread")


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
