"""best_of by a reward model: its scores are transformers' of the same ids, the best is the argmax,
and what cannot judge is refused in a line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from fake_engine import byte_tokenizer

from llama import Llama, LlamaError, SamplingParams, format, reward
from llama.completion import Result
from llama.config import Config, Head
from llama.format import TokenizerKind

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Config(
    vocab_size=259, dim=24, hidden_dim=40, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=2,
    max_seq_len=96, norm_eps=1e-5, rope_theta=1e4, tied=True, eos_ids=(2,),
)  # fmt: skip
JUDGE = replace(
    SHAPE, dim=32, n_heads=4, head_dim=8, tied=False, head=Head.SEQUENCE, n_labels=1, eos_ids=()
)
BYTES = (TokenizerKind.JSON, byte_tokenizer())
DRAWN = SamplingParams(temperature=1.5, max_tokens=12, seed=1)


def write(path: Path, shape: Config, seed: int = 0, **more: Any) -> Path:
    more = {"tokenizer": BYTES, "meta": {"template.family": "chatml"}, **more}
    return small_models.write_bin(path, shape, seed, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    write(folder / "m.bin", SHAPE)
    write(folder / "reward.bin", JUDGE, 1)
    return folder


@pytest.fixture
def llm(folder: Path) -> Iterator[Llama]:
    with Llama(folder / "m.bin", threads=1) as llm:
        yield llm


@pytest.fixture
def judge(folder: Path) -> Iterator[Llama]:
    with Llama(folder / "reward.bin", threads=1) as judge:
        yield judge


def theirs(path: Path) -> Any:
    """transformers' reward model of the same weights: ids -> reward."""
    import transformers

    bin = format.read(path)
    settings = small_models.hf_settings(bin.config, pad_token_id=None, num_labels=1)
    del settings["rope_scaling"], settings["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": bin.config.rope_theta}
    config = transformers.LlamaConfig(**settings, rope_parameters=rope)
    model = transformers.LlamaForSequenceClassification(config).eval()
    tensors = {name: torch.tensor(tensor) for name, tensor in bin.tensors.items()}
    state = small_models.to_hf(tensors, bin.config)
    state["score.weight"] = state.pop("lm_head.weight")
    model.load_state_dict(state)

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    return score


def ids_of(llm: Llama, prompt: str, result: Result) -> list[int]:
    return [*llm.tokenizer.encode(prompt, bos=True), *result.token_ids]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_is_the_argmax_of_transformers_scores(seed: int, tmp_path: Path) -> None:
    groups = [(4, 4), (4, 2), (4, 1)][seed % 3]
    shape = replace(JUDGE, n_heads=groups[0], n_kv_heads=groups[1], n_layers=1 + seed % 3)
    path = write(tmp_path / "reward.bin", shape, seed)
    reference = theirs(path)
    prompt = "Once upon a time"
    params = replace(DRAWN, seed=seed)
    with Llama(write(tmp_path / "m.bin", SHAPE, seed)) as llm, Llama(path) as judge:
        ranked = llm.generate(prompt, params, n=8, best_of=8, reward=judge)
        plain = llm.generate(prompt, params, n=8)
        best = llm.generate(prompt, params, best_of=8, reward=judge)
        two = llm.generate([prompt, "Hi"], params, n=2, best_of=8, reward=judge)[0]
    expected = [reference(ids_of(llm, prompt, result)) for result in plain]
    largest = max(map(abs, expected))
    for result in ranked:
        assert result.token_ids == plain[result.completion].token_ids
        assert result.reward == pytest.approx(expected[result.completion], abs=1e-4 * largest)
    order = list(np.argsort(-np.array(expected), kind="stable"))
    assert len(set(np.round(expected, 5))) == 8  # no ties, which the last bits would decide
    assert [result.completion for result in ranked] == order
    assert (best.completion, best.reward) == (order[0], ranked[0].reward)
    assert [result.completion for result in two] == order[:2]
    assert ranked[0].logprobs is None and plain[0].reward is None


def test_a_dialog_is_judged_as_it_was_rendered(llm: Llama, judge: Llama, folder: Path) -> None:
    """The template's own tokens and the answer's end token included."""
    hi = [{"role": "user", "content": "Hi"}]
    params = replace(DRAWN, max_tokens=30, logit_bias={2: 4.0})
    ranked = llm.chat(hi, params, n=6, best_of=6, reward=judge)
    reference = theirs(folder / "reward.bin")
    prompt = llm.template.encode(hi)
    assert [result.finish_reason for result in ranked].count("eos") > 2
    for result in ranked:
        expected = reference([*prompt, *result.token_ids])
        assert result.reward == pytest.approx(expected, rel=1e-4, abs=1e-4)
    rewards = [result.reward or 0.0 for result in ranked]
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 6


@pytest.mark.parametrize("echo", [False, True])
def test_a_stop_string_is_not_judged(echo: bool, llm: Llama, judge: Llama, folder: Path) -> None:
    """Nor is it in the text that the person gets."""
    letters = {token + 3: 50.0 for token in range(ord("a"), ord("z") + 1)}
    free = replace(DRAWN, max_tokens=20, seed=3, logit_bias=letters)
    ids = llm.generate("Once", free).token_ids
    params = replace(free, stop=(llm.tokenizer.decode(ids[6:8]),))
    found = llm.generate("Once", params, best_of=1, reward=judge, echo=echo)
    assert found.finish_reason == "stop" and len(found.token_ids) == 8
    expected = theirs(folder / "reward.bin")([*llm.tokenizer.encode("Once"), *ids[:6]])
    assert found.reward == pytest.approx(expected, rel=1e-4, abs=1e-4)
    params = replace(params, stop=(llm.tokenizer.decode(ids[:2]),))
    found = llm.generate("Once", params, best_of=1, reward=judge, echo=echo)
    assert found.text == ("Once" if echo else "")
    expected = theirs(folder / "reward.bin")(llm.tokenizer.encode("Once"))
    assert found.reward == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_prompt_is_read_once(llm: Llama, judge: Llama) -> None:
    prompt = "Once upon a time there was a little girl"
    results = llm.generate(prompt, DRAWN, n=8, best_of=8, reward=judge)
    written = sum(len(result.token_ids) for result in results)
    assert judge.computed_tokens <= len(prompt) + written
    again = llm.generate(prompt, DRAWN, n=8, best_of=8, reward=judge)
    assert [r.reward for r in again] == [r.reward for r in results]


def test_one_judge_serves_any_chunks_and_company(llm: Llama, folder: Path) -> None:
    """Bit by bit the same, for a text longer than a chunk of a forward pass."""
    shape = replace(JUDGE, max_seq_len=600)
    ids = [3 + (7 * i * i) % 256 for i in range(500)]
    path = write(folder / "long.bin", shape, 5)
    with Llama(path) as judge:
        whole = reward.scores(judge._batches, [ids])
        reward.scores(judge._batches, [ids[:300]])
        assert reward.scores(judge._batches, [ids, ids[:300]])[0] == whole[0]
    assert whole[0] == pytest.approx(theirs(path)(ids), rel=1e-3, abs=1e-4)


def test_completions_end_where_the_judges_context_does(llm: Llama, tmp_path: Path) -> None:
    path = write(tmp_path / "short.bin", replace(JUDGE, max_seq_len=10))
    with Llama(path) as judge:
        found = llm.generate("Once", DRAWN, n=3, best_of=3, reward=judge)
        assert {(len(r.token_ids), r.finish_reason) for r in found} == {(6, "length")}
        message = "the prompt has 15 tokens and the reward model's context holds 10"
        for prompt in ("x" * 15, ["ok", "x" * 15]):
            with pytest.raises(LlamaError, match=message):
                llm.generate(prompt, DRAWN, best_of=3, reward=judge)


def tokenizer(**changes: Any) -> bytes:
    entry = json.loads(byte_tokenizer())
    vocab = entry["model"]["vocab"]
    if "swap" in changes:
        a, b = changes["swap"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
    if "added" in changes:
        entry["added_tokens"].append({**entry["added_tokens"][-1], **changes["added"]})
    if "plain" in changes:
        entry["added_tokens"] = [
            token for token in entry["added_tokens"] if token["content"] != changes["plain"]
        ]
    return json.dumps(entry).encode()


@pytest.mark.parametrize(
    "shape, data, message", [
        (SHAPE, tokenizer(), "one label, found the head lm"),
        (replace(JUDGE, n_labels=2), tokenizer(), "one label, found the head sequence with 2 labe"),
        (replace(JUDGE, head=Head.NONE, n_labels=0), tokenizer(), "one label, found the head none"),
        (JUDGE, b"", "another vocabulary: expected a tokenizer of kind json, found none"),
        (JUDGE, tokenizer(swap=("T", "a")), "vocabulary: token 87: expected 'T', found 'a'"),
        (replace(JUDGE, vocab_size=260), tokenizer(added={"id": 259, "content": "[PAD]"}),
         "another vocabulary: expected 259 tokens, found 260"),
        (JUDGE, tokenizer(plain="<|im_end|>"), "'<|im_end|>' is a control token of one and not"),
    ],
)  # fmt: skip
def test_what_cannot_judge_is_refused(
    shape: Config, data: bytes, message: str, llm: Llama, tmp_path: Path
) -> None:
    kind = (TokenizerKind.JSON if data else TokenizerKind.NONE, data)
    path = write(tmp_path / "reward.bin", shape, tokenizer=kind)
    with Llama(path) as other:
        for call in (
            lambda: llm.generate("Once", DRAWN, best_of=2, reward=other),
            lambda: llm.generate(["Once"], DRAWN, best_of=2, reward=other),
            lambda: list(llm.each(["Once"], DRAWN, best_of=2, reward=other)),
            lambda: llm.chat([{"role": "user", "content": "Hi"}], best_of=2, reward=other),
        ):
            with pytest.raises(LlamaError) as caught:
                call()
            assert message in str(caught.value) and "\n" not in str(caught.value)
    assert llm.computed_tokens == 0
    words = ["--bin", str(llm._engine.model.path), "--best-of=2", "--reward-bin", str(path), "Once"]
    done = run(*words)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run.py: the reward model ") and message in done.stderr


def test_the_same_vocabulary_in_another_dress_may_judge(llm: Llama, tmp_path: Path) -> None:
    """Other bytes, other end tokens, rows of padding: the ids still mean the same texts."""
    data = json.dumps(json.loads(byte_tokenizer()), indent=1).encode()
    shape = replace(JUDGE, vocab_size=264, eos_ids=(1,), bos_id=0)
    path = write(tmp_path / "reward.bin", shape, tokenizer=(TokenizerKind.JSON, data))
    with Llama(path) as judge:
        assert llm.generate("Once", DRAWN, best_of=2, reward=judge).reward is not None


def test_real_vocabularies_are_told_apart(data: Path, tmp_path: Path) -> None:
    from llama.tokenizer import open_tokenizer

    llama2 = (data / "tokenizers" / "llama2_tokenizer.model").read_bytes()
    json2 = (data / "tokenizers" / "hf_llama2_tokenizer.json").read_bytes()
    one = open_tokenizer("sentencepiece", llama2, 32000, 1, (2,), {})
    same = open_tokenizer("sentencepiece", llama2, 32001, 1, (), {})
    other = open_tokenizer("json", json2, 32000, 1, (2,), {})
    assert reward.vocabularies_differ(one, same) is None
    assert reward.vocabularies_differ(one, other) == (
        "expected a tokenizer of kind sentencepiece, found json"
    )


def test_wrong_calls(llm: Llama, judge: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlamaError, match="best_of says how many"):
        llm.generate("Once", reward=judge)
    with pytest.raises(LlamaError, match="reward must be a Llama, found str"):
        llm.generate("Once", best_of=2, reward="reward.bin")  # type: ignore[call-overload]
    with monkeypatch.context() as patch:
        patch.setattr(reward, "scores", lambda batches, texts: [math.nan] * len(texts))
        with pytest.raises(LlamaError, match="the reward of completion 0 is nan"):
            llm.generate("Once", DRAWN, best_of=2, reward=judge)
    judge.close()
    with pytest.raises(LlamaError, match="closed"):
        llm.generate("Once", DRAWN, best_of=2, reward=judge)
    assert llm.generate("Once", DRAWN).text


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_run(folder: Path, llm: Llama, judge: Llama, tmp_path: Path) -> None:
    flags = [
        "--bin", str(folder / "m.bin"), "--best-of=4", "--reward-bin", str(folder / "reward.bin"),
        "--seed=5", "--temperature=1.5", "--max-tokens=9", "--type=temperature",
    ]  # fmt: skip
    params = SamplingParams(temperature=1.5, top_p=1.0, max_tokens=9, seed=5)
    found = llm.generate("Once", params, n=2, best_of=4, reward=judge)
    done = run(*flags, "--n=2", "Once")
    assert done.returncode == 0 and done.stdout == "".join(r.text + "\n" for r in found)
    assert done.stderr.splitlines()[:2] == [
        f"completion {r.completion}, reward {r.reward:.4f}" for r in found
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Once"\n')
    line = json.loads(run(*flags, "--prompts", str(prompts)).stdout)
    assert (line["text"], line["reward"]) == (found[0].text, found[0].reward)
    done = run("--bin", str(folder / "m.bin"), "--reward-bin", str(folder / "reward.bin"), "Once")
    assert done.returncode == 1 and done.stderr.startswith("run.py: --reward-bin needs --best-of")
    done = run(*flags[:2], "--best-of=2", "--reward-bin=/none.bin", "Once")
    assert done.returncode == 1 and "/none.bin" in done.stderr and done.stderr.count("\n") == 1
