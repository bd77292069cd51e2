"""llama.harness: what lm-evaluation-harness asks of a model, against plain float64 logits and its
own "hf" model of the same weights; the latter where the package lm-eval is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from fake_engine import SPECIAL, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, LlamaError, SamplingParams, format
from llama.config import Config, Rope
from llama.format import TokenizerKind
from llama.harness import Adapter, register
from llama.model import Transformer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=259, dim=64, hidden_dim=96, head_dim=16, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=48, norm_eps=1e-5, rope_theta=1e4, eos_ids=(0,),
)  # fmt: skip
BYTES = (TokenizerKind.JSON, byte_tokenizer())
CHATML = {"template.family": "chatml"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one token a byte, without a begin token."""
    path = tmp_path_factory.mktemp("harness") / "m.bin"
    return small_models.write_bin(path, SHAPE, tokenizer=BYTES, meta=CHATML)


@pytest.fixture
def adapter(path: Path) -> Iterator[Adapter]:
    adapter = Adapter(str(path))
    with adapter.llm:
        yield adapter


def asked(*args: object) -> Any:
    return SimpleNamespace(args=args)


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def plain(path: Path, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """By float64 logits of this one text."""
    ids = [*context, *continuation][:-1]
    logits = small_models.forward(format.read(path), ids)[len(context) - 1 :]
    logp = logits - logits.max(1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    n = range(len(continuation))
    return logp[n, continuation].sum(), bool((logits.argmax(1) == list(continuation)).all())


def near(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5)


# --- how texts become tokens


def test_boundaries_of_bytes(adapter: Adapter) -> None:
    assert adapter.pair("one", " two") == (ids_of("one"), ids_of(" two"))
    assert adapter.pair("one \n", "two") == (ids_of("one"), ids_of(" \ntwo"))
    assert adapter.pair("", "two") == ([0], ids_of("two"))  # no begin token: the end token
    assert adapter.pair("  ", "two") == ([0], ids_of("  two"))
    assert adapter.pair("a<|im_end|>", "b") == ([*ids_of("a"), 2], ids_of("b"))


def test_boundaries_of_sentencepiece(stories: Path, data: Path) -> None:
    """The whole is encoded together and cut by the number of tokens of the context alone."""
    from sentencepiece import SentencePieceProcessor

    adapter = Adapter(str(stories))
    with adapter.llm:
        kind, proto = adapter.llm._engine.tokenizer
        sp = SentencePieceProcessor(model_proto=proto)
        assert kind == "sentencepiece"
        for context, continuation, bare in [
            ("Once upon a", " time", "Once upon a"), ("Once upon a ", "time", "Once upon a"),
            ("Once upon a ti", "me there was", "Once upon a ti"),
        ]:  # fmt: skip
            whole = [1, *sp.EncodeAsIds(context + continuation)]
            n = 1 + len(sp.EncodeAsIds(bare))
            found = adapter.pair(context, continuation)
            assert found == ([1, *sp.EncodeAsIds(bare)], whole[n:])
        assert adapter.pair("", "time") == ([1], sp.EncodeAsIds("time"))
        assert adapter.tok_encode("<s>time") == [1, *sp.EncodeAsIds("time")]
        assert adapter.tok_encode("time", add_special_tokens=False) == sp.EncodeAsIds("time")
    bare_adapter = Adapter(str(stories), add_bos_token=False, prefix_token_id=2)
    with bare_adapter.llm:
        assert bare_adapter.tok_encode("time") == sp.EncodeAsIds("time")
        assert bare_adapter.pair("", "time")[0] == [2]


def test_windows_of_the_harness_s_own_example(adapter: Adapter) -> None:
    """Ten tokens through a context of four (lm_eval.api.model.LM.loglikelihood_rolling), each
    window's context without what it shares with what is predicted."""
    adapter.max_length = 4
    t = ids_of("0123456789")
    assert list(adapter.windows("0123456789")) == [
        ([0], t[:4]), ([t[3]], t[4:8]), ([t[5], t[6], t[7]], t[8:]),
    ]  # fmt: skip
    assert list(adapter.windows("")) == []


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 12))
def test_windows_cover_a_text(n: int, size: int) -> None:
    text = "".join(chr(65 + i) for i in range(n))
    bare = Adapter.__new__(Adapter)
    bare.prefix_token_id, bare.max_length = 0, size
    bare.tok_encode = ids_of  # type: ignore[method-assign,assignment]
    found = list(bare.windows(text))
    assert [token for _, scored in found for token in scored] == ids_of(text)
    whole = [0, *ids_of(text)]
    for context, scored in found:
        assert len(context) + len(scored) - 1 <= size and context
        joined = [*context, *scored]
        assert any(whole[i : i + len(joined)] == joined for i in range(len(whole)))
    if len(found) > 1:
        assert len(found[-1][0]) + len(found[-1][1]) - 1 == size


# --- what it answers


def test_loglikelihood(path: Path, adapter: Adapter) -> None:
    """Choices of one context, of one token and several, shared beginnings, the same twice, a
    greedy one, and a context too long."""
    question = "Which is it, one or the other? "
    ids = ids_of(question.rstrip())
    greedy = adapter.llm.generate(ids, SamplingParams(temperature=0, max_tokens=3)).token_ids
    words = [(question, x) for x in ("a", "b", "abc", "abd", "b")]
    words += [(question[:-4], "a"), ("Which is", " what"), ("", "x"), ("x" * 60, " yes")]
    found = adapter.loglikelihood([asked(*pair) for pair in words], disable_tqdm=True)
    expected = []
    for context, continuation in words:
        bare = context.rstrip()
        tail = ids_of(context[len(bare) :] + continuation)
        expected.append(plain(path, (ids_of(bare) or [0])[-(49 - len(tail)) :], tail))
    near(found, expected)
    pairs = [(ids, greedy[:n]) for n in (1, 2, 3)] + [(ids, [*greedy[:2], 7])]
    said = dict(adapter.llm.likelihoods(pairs))
    near([said[i] for i in range(4)], [plain(path, *pair) for pair in pairs])
    assert [said[i].greedy for i in range(3)] == [True] * 3


def test_company_does_not_matter(path: Path) -> None:
    """Many random pairs together are, to the last bit, each alone; what they share is computed
    once."""
    rng = np.random.default_rng(0)
    base = rng.integers(3, 259, 30).tolist()
    pairs = []
    for _ in range(40):
        context = base[: rng.integers(1, 31)] + rng.integers(3, 259, rng.integers(0, 4)).tolist()
        for _ in range(rng.integers(1, 4)):
            pairs.append((context, rng.integers(3, 259, rng.integers(1, 5)).tolist()))
    pairs += [(base, rng.integers(3, 259, 2).tolist()) for _ in range(40)]
    with Llama(path) as llm:
        found = dict(llm.likelihoods(pairs))
        assert len(found) == len(pairs)
        asked_for = sum(len(context) + len(rest) - 1 for context, rest in pairs)
        assert llm.computed_tokens < asked_for / 3
        again = dict(llm.likelihoods(pairs[::-1]))
        assert again == {len(pairs) - 1 - i: one for i, one in found.items()}
    for i in range(0, len(pairs), 7):
        with Llama(path) as llm:
            assert dict(llm.likelihoods([pairs[i]])) == {0: found[i]}
    near([found[i] for i in range(8)], [plain(path, *pair) for pair in pairs[:8]])


def test_dynamic_rope_shares_nothing(tmp_path: Path) -> None:
    """There a text's keys depend on its length: each is as it is alone, by model.py."""
    shape = replace(SHAPE, rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 12.0))
    path = small_models.write_bin(tmp_path / "m.bin", shape)
    context = [(5 * i) % 259 for i in range(14)]
    pairs = [(context, rest) for rest in ([9], [9, 8, 7], [1, 2], [9, 8, 7, 6])]
    with Llama(path) as llm:
        found = dict(llm.likelihoods(pairs))
    model = Transformer(path, torch.float64)
    for i, (context, rest) in enumerate(pairs):
        logits = model.forward([*context, *rest[:-1]])[len(context) - 1 :]
        logp = logits.log_softmax(-1)[range(len(rest)), rest].sum()
        assert found[i].logprob == pytest.approx(float(logp), rel=1e-5)


def test_rolling(path: Path, adapter: Adapter) -> None:
    texts = ["short", "A text that is longer than the context of forty-eight tokens, by far: " * 2]
    found = adapter.loglikelihood_rolling([asked(text) for text in texts], disable_tqdm=True)
    expected = []
    for text in texts:
        ids, total = [0, *ids_of(text)], 0.0
        for end in range(49, len(ids), 48):  # whole windows: each token behind all before it there
            total += plain(path, ids[end - 49 : end - 48], ids[end - 48 : end])[0]
        rest = (len(ids) - 1) % 48
        total += plain(path, ids[-49:-rest], ids[-rest:])[0]
        expected.append(total)
    assert found == pytest.approx(expected, rel=1e-5)
    assert adapter.loglikelihood_rolling([asked("")], disable_tqdm=True) == [0]


def test_generate_until(adapter: Adapter) -> None:
    def texts(*requests: tuple[str, dict[str, Any]]) -> list[str]:
        return adapter.generate_until([asked(*r) for r in requests], disable_tqdm=True)

    greedy = SamplingParams(temperature=0, max_tokens=20)
    whole = adapter.llm.tokenizer.decode(adapter.llm.generate(ids_of("Q: "), greedy).token_ids)
    stop = whole[4:6]
    found = texts(
        ("Q: ", {"until": [stop, "never"], "max_gen_toks": 20}), ("Q: ", {"max_gen_toks": 20}),
        ("Q: ", {"until": stop, "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
        ("x" * 50 + "Q: ", {"until": [], "max_gen_toks": 5}),
    )  # fmt: skip
    cut = whole[: whole.index(stop)]
    assert found[:3] == [cut, whole, cut]
    params = replace(greedy, max_tokens=5)
    ids = adapter.llm.generate(ids_of(("x" * 50 + "Q: ")[-43:]), params).token_ids
    assert found[3] == adapter.llm.tokenizer.decode(ids)
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "seed": 3, "max_gen_toks": 8}
    params = SamplingParams(temperature=0.7, top_p=0.5, seed=3, max_tokens=8)
    assert adapter.params(sampled) == params
    assert adapter.params({"temperature": 0.7}).temperature == 0.7
    assert adapter.params({"temperature": 0.7, "do_sample": False}).temperature == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gen_toks": 48}, "max_gen_toks is 48, expected less than the context of 48"),
        ({"num_return_sequences": 2}, "generation option 'num_return_sequences' is not known"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be 0 or more"),
    ],
)
def test_bad_options(adapter: Adapter, options: dict[str, Any], says: str) -> None:
    with pytest.raises(LlamaError, match=says):
        adapter.generate_until([asked("a", options)], disable_tqdm=True)


def test_bad_requests(path: Path, adapter: Adapter) -> None:
    with pytest.raises(LlamaError, match="request 1: the continuation has 0 tokens, expected 1"):
        adapter.loglikelihood([asked("a", "b"), asked("a", "")], disable_tqdm=True)
    with pytest.raises(LlamaError, match="request 0: the continuation has 49 tokens"):
        adapter.loglikelihood([asked("a", "b" * 49)], disable_tqdm=True)
    for pair, says in (
        (([], [1]), "pair 0: the context is empty"), (([1], []), "continuation is empty"),
        (([1], [259]), "token ids must be 0 to 258"), (([1] * 40, [1] * 10), "40 and 10 tokens"),
    ):  # fmt: skip
        with pytest.raises(LlamaError, match=says):
            list(adapter.llm.likelihoods([pair]))
    with pytest.raises(LlamaError, match="add_bos_token: this model has no begin token"):
        Adapter(str(path), add_bos_token=True)
    with pytest.raises(LlamaError, match="model_args: there is no file; expected bin, threads"):
        Adapter(file=str(path))
    adapter.llm.close()
    with pytest.raises(LlamaError, match="closed"):
        adapter.loglikelihood([asked("a", "b")], disable_tqdm=True)


def test_chat(adapter: Adapter) -> None:
    """The string encodes to what the engine's own chat does."""
    dialog = [{"role": "user", "content": "Hi"}]
    text = adapter.apply_chat_template(dialog)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert adapter.tok_encode(text) == adapter.llm.template.encode(dialog)
    begun = [*dialog, {"role": "assistant", "content": "The answer is "}]
    text = adapter.apply_chat_template(begun, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nThe answer is")
    assert adapter.chat_template() == "" and adapter.chat_template(True) == "chatml"


# --- with the harness


@pytest.fixture(scope="module")
def model() -> Any:
    """The adapter as the harness knows it."""
    pytest.importorskip("lm_eval", reason="no lm-eval")
    return register("llama-test")


def test_windows_are_the_harness_s(model: Any) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    bare = Adapter.__new__(Adapter)
    bare.prefix_token_id = 0
    bare.tok_encode = ids_of  # type: ignore[method-assign,assignment]
    for n in range(1, 40):
        for size in range(1, 12):
            bare.max_length, text = size, "".join(chr(65 + i) for i in range(n))
            theirs = get_rolling_token_windows(ids_of(text), 0, size, 1)
            assert list(bare.windows(text)) == list(map(make_disjoint_window, theirs))


def theirs(path: Path, begin: str | None) -> Any:
    """The harness's "hf" model of the same weights and vocabulary."""
    import tokenizers
    import transformers
    from lm_eval.models.huggingface import HFLM

    bin = format.read(path)
    network = small_models.transformers_llama(bin.config)
    tensors = {name: torch.tensor(tensor) for name, tensor in bin.tensors.items()}
    network.load_state_dict(small_models.to_hf(tensors, bin.config))
    network.generation_config.eos_token_id = 0  # LlamaConfig's own default is 2
    words = tokenizers.Tokenizer.from_str(byte_tokenizer().decode())
    if begin:
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, SPECIAL.index(begin))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=SPECIAL[0], pad_token=SPECIAL[0], bos_token=begin
    )
    return HFLM(pretrained=network, tokenizer=fast, max_length=SHAPE.max_seq_len, device="cpu")


@pytest.mark.parametrize("begin", [None, "<|im_start|>"])
def test_answers_are_those_of_its_hf_model(model: Any, tmp_path: Path, begin: str | None) -> None:
    from lm_eval.api.instance import Instance

    shape = replace(SHAPE, bos_id=SPECIAL.index(begin) if begin else None)
    path = small_models.write_bin(tmp_path / "m.bin", shape, 1, tokenizer=BYTES)
    hf, ours = theirs(path, begin), model.create_from_arg_string(f"bin={path}", {"batch_size": 4})

    def instances(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, args, i) for i, args in enumerate(requests)]

    choices = [("Is it so? ", "yes"), ("Is it so?", " no"), ("Is it so? \n", "y"), ("", "A text"),
               ("Is it so?", " yes"), ("a" * 70, " b"), ("<|im_start|>hello", " you"),
               ("hello", "y" * 46)]  # fmt: skip
    requests = instances("loglikelihood", choices)
    near(ours.loglikelihood(requests, True), hf.loglikelihood(requests, True))
    texts = [("short",), ("a longer text, that takes more than one window of this model. " * 3,)]
    requests = instances("loglikelihood_rolling", texts)
    assert ours.loglikelihood_rolling(requests, True) == pytest.approx(
        hf.loglikelihood_rolling(requests, True), rel=1e-5
    )
    options = [{"until": ["e"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 20}]
    requests = instances("generate_until", [
        ("Is it so? ", options[0]), ("Is it so? ", options[1]), ("b" * 60, options[1]),
    ])  # fmt: skip
    assert ours.generate_until(requests, True) == hf.generate_until(requests, True)


def test_the_command(model: Any, path: Path, tmp_path: Path) -> None:
    """The harness's own command line, on tasks of ours: one of each kind of request."""
    docs: list[dict[str, Any]] = [
        {"q": f"{i} or {i + 1}?", "of": [str(i), str(i + 1)], "label": i % 2} for i in range(5)
    ]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'docs.json'}}}\n" \
           "test_split: train\n"  # fmt: skip
    tasks = {
        "choices": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: of\ndoc_to_target: label\nmetric_list: [{metric: acc}]",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list: [{metric: word_perplexity}]",
        "answers": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{q}}'\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]",
    }
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}\n")
    done = subprocess.run(
        [sys.executable, "-m", "llama.harness", "--model", "llama", "--model_args", f"bin={path}",
         "--tasks", "choices,rolling,answers", "--include_path", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row[1]: row for line in done.stdout.splitlines()
            if len(row := [cell.strip() for cell in line.split("|")]) > 7}  # fmt: skip
    for name in tasks:
        assert name in rows, done.stdout
    with Llama(path) as llm:
        right = 0
        for doc in docs:
            pairs = [(ids_of(doc["q"]), ids_of(" " + choice)) for choice in doc["of"]]
            found = dict(llm.likelihoods(pairs))
            right += (found[1] > found[0]) == doc["label"]
    assert float(rows["choices"][7]) == pytest.approx(right / 5)


def test_without_the_package(path: Path) -> None:
    code = "import sys; sys.modules['lm_eval'] = None\nfrom llama import harness\n" \
           "from llama.cli import run\nsys.exit(run('llama.harness', harness.main))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("llama.harness: the harness is missing (")
    assert done.stderr.endswith("): pip install lm-eval\n")
