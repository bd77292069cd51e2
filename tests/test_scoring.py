"""Logprobs of the prompt's own tokens, with echo, against transformers' log_softmax; and what a
line of --prompts may say for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.batch import MAX_ACTIVE
from llama.checkpoints import export
from llama.completion import Result
from llama.errors import LlamaError
from llama.generate import Llama
from llama.request import Request
from llama.sampling import SamplingParams

SHAPE = small_models.config(max_seq_len=64)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Llama, Any]]:
    """A random model here and in transformers."""
    folder = tmp_path_factory.mktemp("pair")
    theirs = small_models.transformers_llama(SHAPE)
    theirs.save_pretrained(folder / "hf")
    export(folder / "hf", folder / "a.bin", dtype="f32", say=lambda line: None)
    with Llama(folder / "a.bin") as llm:
        yield llm, theirs


@pytest.fixture(scope="module")
def real(stories: Path) -> Iterator[Llama]:
    with Llama(stories) as llm:
        yield llm


def test_they_are_transformers(pair: tuple[Llama, Any]) -> None:
    llm, theirs = pair
    rng = np.random.default_rng(1)
    for length in (1, 2, 17, 40, 60):
        ids = [int(i) for i in rng.integers(0, SHAPE.vocab_size, length)]
        result = llm.generate(ids, GREEDY, echo=True)
        assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
        assert len(result.prompt_logprobs) == length == result.prompt_tokens
        with torch.no_grad():
            table = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].double(), -1)
        for at, token in enumerate(result.prompt_logprobs[1:], 1):
            assert token is not None and token.token_id == ids[at]
            assert abs(token.logprob - float(table[at - 1, ids[at]])) < 1e-4
            best = torch.topk(table[at - 1], 2)
            assert list(token.top) == best.indices.tolist()
            assert np.allclose(list(token.top.values()), best.values, atol=1e-4)


def test_echo_or_logprobs_alone_score_nothing(real: Llama) -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=3)
    assert real.generate("One day", GREEDY).prompt_logprobs is None
    assert real.generate("One day", plain, echo=True).prompt_logprobs is None
    # best_of looks at logprobs by itself: nobody asked for the prompt's
    assert real.generate("One day", plain, best_of=2, echo=True).prompt_logprobs is None


def test_kept_prompts_and_company_change_nothing(real: Llama) -> None:
    """Though everything is in the cache already, and others read the same beginning."""
    story = "Once upon a time there was a little girl. She had a cat."
    first = real.generate(story, GREEDY, echo=True)
    assert real.generate(story, GREEDY, echo=True).prompt_logprobs == first.prompt_logprobs
    prompts = [story, story, story[:30], story]
    for result, prompt in zip(real.generate(prompts, GREEDY, echo=True), prompts, strict=True):
        assert result.prompt_logprobs == real.generate(prompt, GREEDY, echo=True).prompt_logprobs
        assert result.text.startswith(prompt)
    several = real.generate(story, GREEDY, n=MAX_ACTIVE + 2, echo=True)
    assert all(one.prompt_logprobs == first.prompt_logprobs for one in several)
    stream = real.stream(story, GREEDY, echo=True)
    assert "".join(stream) == first.text
    assert stream.result is not None and stream.result.prompt_logprobs == first.prompt_logprobs


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=40), st.integers(1, 3), st.booleans()),
        min_size=1, max_size=6,
    ),
    st.integers(2, 64),
)  # fmt: skip
def test_any_mixture_in_any_chunks(asked: list[tuple[str, int, bool]], chunk: int) -> None:
    """Each row's logprob is of the token that follows it, whatever else is in the pass."""
    fake = FakeEngine(128)
    llm = Llama.on(fake)  # type: ignore[arg-type]
    llm._batches._chunk = chunk
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=4, logprobs=0)
    requests = [Request(text, params, n=n, echo=echo) for text, n, echo in asked]
    for index, results in llm.each_of(requests):
        text, n, echo = asked[index]
        ids = llm.prompt_ids(text)
        assert len(results) == n
        for result in results:
            if not echo:
                assert result.prompt_logprobs is None
                continue
            assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(ids)
            for at, token in enumerate(result.prompt_logprobs):
                assert (token is None) == (at == 0)
                if token is not None:
                    fake.kept = [fake.logits_of(ids[:at])]
                    assert token.logprob == fake.logprobs(0, ids[at], 0)[0]
    assert not llm._batches.slots._busy


def test_a_prompt_that_fills_the_context() -> None:
    llm = Llama.on(FakeEngine(4))  # type: ignore[arg-type]
    with pytest.raises(LlamaError, match="has 4 tokens and fills the context; its logprobs need"):
        llm.generate("abcd", GREEDY, echo=True)
    assert llm.generate("abc", GREEDY, echo=True).prompt_logprobs is not None
    plain = SamplingParams(temperature=0.0)
    assert len(llm.generate("abcd", plain, n=2, best_of=3, echo=True)) == 2


# --- run.py


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, str(root / "run.py"), *map(str, words)], input=stdin, text=True,
        capture_output=True, timeout=120, cwd=root,
    )  # fmt: skip


def test_run_scores_the_prompt(stories: Path, real: Llama) -> None:
    flags = ["--bin", stories, "--type=greedy", "--max_tokens=3", "--logprobs=2", "--echo"]
    expect = real.generate("One day", GREEDY, echo=True)
    assert expect.prompt_logprobs is not None and expect.logprobs is not None
    done = run(*flags, "One day")
    assert done.stdout == expect.text + "\n"
    tokens = [*expect.prompt_logprobs[1:], *expect.logprobs]
    lines = done.stderr.splitlines()[: len(tokens)]
    assert [line.split()[0] for line in lines] == [f"{t.logprob:.4f}" for t in tokens if t]
    assert run(*flags, "--n=1", "One day").stdout == done.stdout
    ids = run(*flags, "--ids=1,385,328")
    assert ids.stdout.endswith(done.stdout[-4:])
    line = json.loads(run(*flags, "--prompts=-", stdin='"One day"\n').stdout)
    assert line["prompt"] == "One day" and line["prompt_logprobs"][0] is None
    assert [t["logprob"] for t in line["prompt_logprobs"][1:]] == [
        t.logprob for t in expect.prompt_logprobs[1:] if t
    ]


def test_a_line_says_its_own(stories: Path, real: Llama) -> None:
    lines: list[Any] = [
        "One day", {"prompt": "The cat", "n": 2}, {"prompt": "x", "best_of": 3, "echo": True},
        {"prompt": "Lily", "n": 1, "best_of": 2, "seed": 9}, {"prompt": "One day", "echo": False},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines))
    done = run("--bin", stories, "--seed=4", "--max_tokens=5", "--prompts=-", stdin=text)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    params = SamplingParams(seed=4, max_tokens=5)
    two: list[Result] = real.generate("The cat", params, n=2)
    assert [one["text"] for one in found[1]["completions"]] == [r.text for r in two]
    best = real.generate("x", params, best_of=3, echo=True)
    assert found[2]["prompt"] == "x" and "x" + found[2]["text"] == best.text
    assert len(found[3]["completions"]) == 1 and found[3]["completions"][0]["seed"] == 9
    assert found[0] == found[4] and "prompt" not in found[0]
    every = run("--bin", stories, "--seed=4", "--max_tokens=5", "--n=2", "--prompts=-", stdin=text)
    counts = [len(json.loads(line)["completions"]) for line in every.stdout.splitlines()]
    assert counts == [2, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a", "n": 0}', "line 1: n must be 1 to 1024, found 0"),
        ('{"prompt": "a", "n": 3, "best_of": 2}', "line 1: best_of must be 3 to 1024, found 2"),
        ('{"prompt": "a", "echo": 1}', "line 1: echo must be true or false, found 1"),
        ('{"prefix": "a"}', 'line 1: expected "text", {"prompt": "text", ...} or {"prefix"'),
        ('{"prompt": "a", "suffix": "b"}', "line 1: expected"),
        ('{"prefix": 1, "suffix": "b"}', "line 1: prefix must be a str, found int"),
        ('{"prefix": "a", "suffix": "b", "order": "x"}', "order must be psm or spm, found 'x'"),
        ('{"prefix": "a", "suffix": "b"}', "line 1: this model does not infill"),
    ],
)
def test_bad_lines(stories: Path, line: str, what: str) -> None:
    done = run("--bin", stories, "--prompts=-", stdin=line)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert what in done.stderr
