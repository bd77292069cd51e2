"""n completions of one prompt, best_of and echo: the prompt is computed once, and each completion
is the one its number says, in any company."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import engine
from llama.batch import MAX_ACTIVE
from llama.errors import LlamaError
from llama.generate import Llama
from llama.sampling import SamplingParams

DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=6)


def llama(max_seq_len: int = 128, **options: Any) -> tuple[Llama, FakeEngine]:
    fake = FakeEngine(max_seq_len, **options)
    return Llama.on(fake), fake  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(stories: Path) -> Iterator[Llama]:
    with Llama(stories) as llm:
        yield llm


@pytest.mark.parametrize("length", [1, 2, 15, 16, 70])
@pytest.mark.parametrize("n", [1, 2, 5, MAX_ACTIVE])
def test_the_prompt_is_computed_once(length: int, n: int) -> None:
    llm, fake = llama()
    llm._batches._chunk = 32
    results = llm.generate("p" * length, DRAWN, n=n)
    # the last token of each is not computed: nothing follows it
    assert llm.computed_tokens == sum(fake.calls) == length + n * (DRAWN.max_tokens - 1)  # type: ignore[operator]
    assert [r.cached_tokens for r in results] == [0] + [length] * (n - 1)
    assert [r.completion for r in results] == list(range(n))
    assert len({r.text for r in results}) == n and {r.seed for r in results} == {5}
    assert not llm._batches.slots._busy


def test_more_than_run_together() -> None:
    llm, _ = llama()
    n = 2 * MAX_ACTIVE + 3
    results = llm.generate("a prompt of some length", DRAWN, n=n)
    assert [r.completion for r in results] == list(range(n))
    # those that found no place compute the prompt's last token again, for its logits
    assert llm.computed_tokens == 23 + n * 5 + n - MAX_ACTIVE
    first = llama()[0].generate("a prompt of some length", DRAWN, n=4)
    assert [r.text for r in first] == [r.text for r in results[:4]]


@settings(max_examples=30)
@given(
    st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=12), st.integers(1, 6),
    st.integers(1, 64),
)  # fmt: skip
def test_a_batch_of_several_is_as_each_alone(prompts: list[str], n: int, chunk: int) -> None:
    llm, _ = llama()
    llm._batches._chunk = chunk
    together = llm.generate(prompts, DRAWN, n=n)
    for prompt, results in zip(prompts, together, strict=True):
        alone = llama()[0].generate(prompt, DRAWN, n=6)
        assert [r.token_ids for r in results] == [r.token_ids for r in alone[:n]]
    assert not llm._batches.slots._busy
    each = dict(llm.each(prompts, DRAWN, n=n))
    assert [[r.text for r in each[k]] for k in range(len(prompts))] == [
        [r.text for r in results] for results in together
    ]


def test_the_number_keys_the_chance(real: Llama) -> None:
    """Completion k is what the sampler alone draws with the key (seed, k, position)."""
    params = SamplingParams(temperature=1.2, seed=3, max_tokens=10, mirostat_tau=4.0,
                            frequency_penalty=0.5)  # fmt: skip
    prompt = real.prompt_ids("One day")
    before = real.computed_tokens
    results = real.generate(prompt, params, n=4)
    assert real.computed_tokens - before <= len(prompt) + 4 * 9
    assert len({r.text for r in results}) == 4
    assert real.generate(prompt, params).token_ids == results[0].token_ids
    for k, result in enumerate(results):
        mu = engine.array("d", [8.0])
        for n, token in enumerate(result.token_ids):
            ids = prompt + result.token_ids[:n]
            logits = real.logits(ids)[-1]
            assert engine.sample_logits(logits, params, ids, k, len(ids), n, mu) == token


def test_best_of_takes_the_largest_sum(real: Llama) -> None:
    params = SamplingParams(temperature=1.3, seed=8, max_tokens=12)
    every = real.generate("The cat", SamplingParams(**{**vars(params), "logprobs": 0}), n=8)
    sums = [r.cumulative_logprob or 0 for r in every]
    assert sums == [sum(t.logprob for t in r.logprobs or []) for r in every]
    order = sorted(range(8), key=lambda k: -sums[k])
    assert order != list(range(8))
    best = real.generate("The cat", params, n=3, best_of=8)
    assert [r.completion for r in best] == order[:3]
    assert [r.text for r in best] == [every[k].text for k in order[:3]]
    assert real.generate("The cat", params, best_of=8).completion == order[0]
    assert real.generate(["x", "The cat"], params, best_of=8)[1].completion == order[0]


def test_greedy_ones_are_alike() -> None:
    llm, _ = llama()
    results = llm.generate("x", SamplingParams(temperature=0.0, max_tokens=5), n=3)
    assert len(results) == 3 and len({r.text for r in results}) == 1


def test_echo(real: Llama) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5)
    plain = real.generate("One day", params)
    echoed = real.generate("One day", params, echo=True)
    assert echoed.text == "One day" + plain.text and echoed.token_ids == plain.token_ids
    stream = real.stream("One day", params, echo=True)
    assert "".join(stream) == stream.text == echoed.text
    ids = real.prompt_ids("One day")
    assert real.generate(ids, params, echo=True).text == echoed.text
    both = real.generate(["One day", "x"], params, n=2, echo=True)
    assert [[r.text.startswith(p) for r in rs] for p, rs in zip(["One day", "x"], both, strict=True)
            ] == [[True] * 2] * 2  # fmt: skip
    # a stop string is looked for in the completion alone
    stop = SamplingParams(temperature=0.0, max_tokens=5, stop=("One", plain.text[-3:]))
    assert real.generate("One day", stop, echo=True).text.startswith("One day")
    # also where nothing comes: the context is full
    llm, _ = llama(4)
    full = llm.generate("abcd", params, echo=True)
    assert (full.text, full.finish_reason) == ("abcd", "length")


def test_a_chat_may_have_several_answers(tiny: Path) -> None:
    with Llama(tiny) as llm:
        hi = [{"role": "user", "content": "Hi"}]
        answers = llm.chat(hi, DRAWN, n=3)
        assert answers[0].text == llm.chat(hi, DRAWN).text
        assert len({r.text for r in answers}) == 3
        best = llm.chat(hi, DRAWN, best_of=3)
        assert best.cumulative_logprob == max(
            r.cumulative_logprob or 0 for r in llm.chat(hi, DRAWN, n=3, best_of=3)
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n": 0}, "n must be 1 to 1024, found 0"),
        ({"n": 1.5}, "n must be a whole number, found 1.5"),
        ({"n": True}, "n must be a whole"),
        ({"n": 2000}, "n must be 1 to 1024, found 2000"),
        ({"n": 4, "best_of": 2}, "best_of must be 4 to 1024, found 2"),
        ({"best_of": "3"}, "best_of must be a whole number, found '3'"),
    ],
)
def test_impossible_numbers(knobs: dict[str, Any], message: str) -> None:
    llm, _ = llama()
    with pytest.raises(LlamaError, match=message):
        llm.generate("x", DRAWN, **knobs)


def test_failure_and_close_leave_nothing_behind() -> None:
    llm, fake = llama()
    fake.fail_at = 2
    with pytest.raises(LlamaError, match="fake engine fails"):
        llm.generate("hello", DRAWN, n=4)
    assert not llm._batches.slots._busy
    assert [r.text for r in llm.generate("hello", DRAWN, n=4)] == [
        r.text for r in llama()[0].generate("hello", DRAWN, n=4)
    ]
    steps = llm.each(["a", "b"], DRAWN, n=3)
    assert len(next(steps)[1]) == 3
    steps.close()  # type: ignore[attr-defined]
    assert not llm._batches.slots._busy


# --- run.py


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, str(root / "run.py"), *map(str, words)], input=stdin, text=True,
        capture_output=True, timeout=120, cwd=root,
    )  # fmt: skip


def test_run_prints_several(stories: Path, real: Llama) -> None:
    flags = ["--bin", stories, "--max_tokens=6", "--seed=4", "--stop", "\n"]
    params = SamplingParams(seed=4, max_tokens=6, stop="\n")
    done = run(*flags, "--n=3", "--echo", "One day")
    texts = [r.text for r in real.generate("One day", params, n=3, echo=True)]
    assert (done.returncode, done.stdout.splitlines()) == (0, texts), done.stderr
    assert done.stderr.splitlines()[:3] == [f"completion {k}" for k in range(3)]
    best = real.generate("One day", params, n=2, best_of=5)
    done = run(*flags, "--n=2", "--best-of=5", "One day")
    assert done.stdout.splitlines() == [r.text for r in best], done.stderr
    assert f"completion {best[0].completion}, logprob {best[0].cumulative_logprob:.4f}" in (
        done.stderr.splitlines()
    )
    wrong = run(*flags, "--n=2", "--best_of=1", "One day")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr == "run.py: best_of must be 2 to 1024, found 1\n"


def test_run_tells_logprobs(stories: Path, real: Llama) -> None:
    flags = ["--bin", stories, "--max_tokens=3", "--type=greedy", "--logprobs=2"]
    expect = real.generate("One day", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))
    assert expect.logprobs is not None
    done = run(*flags, "One day")
    assert done.stdout == expect.text + "\n"
    lines = done.stderr.splitlines()
    for line, token in zip(lines[:3], expect.logprobs, strict=True):
        assert line.split()[0] == f"{token.logprob:.4f}" and " of '" in line
    done = run(*flags, "--prompts=-", "--n=2", stdin='"One day"\n{"prompt": "x", "logprobs": 0}\n')
    first, second = [json.loads(line)["completions"] for line in done.stdout.splitlines()]
    assert len(first) == len(second) == 2
    assert first[0]["cumulative_logprob"] == expect.cumulative_logprob
    assert [t["token_id"] for t in first[1]["logprobs"]] == expect.token_ids
    assert [[o["token_id"] for o in t["top"]] for t in first[1]["logprobs"]] == [
        list(t.top) for t in expect.logprobs
    ]
    assert [t["top"] for t in second[0]["logprobs"]] == [[]] * 3
    wrong = run(*flags[:-1], "--logprobs=-1", "One day")
    assert wrong.stderr == "run.py: logprobs must be 0 to 2147483647, found -1\n"
