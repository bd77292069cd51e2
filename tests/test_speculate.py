"""Speculative decoding: whatever is drafted, the text and its logprobs are those without drafts.

Judged against the same engine without a proposer, on the fake engine, which catches every token
left behind in a cache, with proposers that guess well, badly and maliciously.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine, told
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.completion import Job, Result
from llama.errors import LlamaError
from llama.generate import Llama
from llama.sampling import SamplingParams
from llama.speculate import LONGEST, PLACES, SHORTEST, Pace, Repeats, worth

# --- any proposer, on the fake engine


class Oracle:
    """Knows what comes, from an earlier run, and spoils its drafts as it is told."""

    name, bytes_read = "oracle", 0

    def __init__(self, known: Sequence[Result], spoil: Sequence[str]) -> None:
        self._known = {(result.completion, result.seed): result.token_ids for result in known}
        self._spoil, self._n = spoil, 0
        self.asked: list[int] = []

    def propose(self, asked: Sequence[tuple[Job, int]]) -> list[list[int]]:
        return [self._draft(job, most) for job, most in asked]

    def _draft(self, job: Job, most: int) -> list[int]:
        assert job.result is None and most >= 0
        self.asked.append(most)
        seed = job.params.seed if job.params.temperature else None
        coming = self._known[job.completion, seed][len(job.ids) - job.n_prompt :]
        self._n += 1
        how = self._spoil[self._n % len(self._spoil)]
        right = coming[:most]
        if how == "right":
            return right
        if how == "beyond":
            return [*coming, *[40] * 300]
        if how == "wrong":
            return [(token + 1) % 260 for token in right]
        if how == "middle":
            return [*right[: most // 2], 41, *right[most // 2 :]]
        return [*right[: most // 2], {"huge": 2**40, "negative": -1, "next": 260}[how], *right]

    def release(self, job: Job) -> None:
        pass


SPOILED = ["right", "beyond", "wrong", "middle", "huge", "negative", "next", "right"]


@settings(max_examples=50)
@given(
    st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=5, unique=True),
    st.lists(st.sampled_from(SPOILED), min_size=1, max_size=6),
    st.lists(st.integers(1, 60), min_size=5, max_size=5),
    st.sampled_from(["stop", "slide"]), st.booleans(), st.integers(1, 4),
    st.sampled_from([1, 2, 16, 40, 64]), st.sampled_from([(), ("a", "zq"), ("!", "7")]),
    st.sampled_from([32, 40, 200]),
)  # fmt: skip
def test_no_proposer_changes_a_text(
    prompts: list[str], spoil: list[str], lengths: list[int], overflow: str, greedy: bool, n: int,
    chunk: int, stop: tuple[str, ...], size: int,
) -> None:  # fmt: skip
    params = [
        SamplingParams(temperature=0.0 if greedy else 1.0, seed=7 + i, max_tokens=length,
                       stop=stop, logprobs=2)
        for i, (length, _) in enumerate(zip(lengths, prompts, strict=False))
    ]  # fmt: skip
    for prompt, one in zip(prompts, params, strict=True):
        plain = Llama.on(FakeEngine(size), overflow=overflow)  # type: ignore[arg-type]
        right = plain.generate(prompt, one, n=n)
        fake = FakeEngine(size)
        llm = Llama.on(fake, overflow=overflow)  # type: ignore[arg-type]
        llm._batches._chunk = chunk
        llm._batches.proposer = Oracle(right, spoil)
        found = llm.generate(prompt, one, n=n)
        assert told(found) == told(right)
        assert max(fake.calls) <= max(chunk, 64)
        c = llm.counters
        assert c.accepted_tokens <= c.drafted_tokens
        # all that was sampled is a decoded token, but for the first ones, which the prompt gave
        assert c.decode_tokens <= sum(len(r.token_ids) for r in found)
        idle = llm._batches.slots._idle
        assert not llm._batches.slots._busy
        assert all(fake.length(slot.number) >= len(slot.tokens) for slot in idle)
        # what stays is as good as ever
        for again in (prompt, prompt + "a"):
            assert told(llm_plainly(llm, again, one)) == told(plain.generate(again, one))


def llm_plainly(llm: Llama, prompt: str, params: SamplingParams) -> Result:
    kept, llm._batches.proposer = llm._batches.proposer, None
    try:
        return llm.generate(prompt, params)
    finally:
        llm._batches.proposer = kept


def test_an_oracle_saves_steps_and_is_never_asked_for_too_much() -> None:
    plain, fake = Llama.on(FakeEngine(100)), FakeEngine(100)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=70)
    right = plain.generate("hello", params)
    llm = Llama.on(fake)  # type: ignore[arg-type]
    llm._batches.proposer = oracle = Oracle([right], ["right"])
    assert told(llm.generate("hello", params)) == told(right)
    # the first token is the prompt's; 63 drafted ones and one more; the last 5 and one more
    assert fake.calls == [5, 64, 5] and oracle.asked == [63, 4]
    assert (llm.counters.drafted_tokens, llm.counters.accepted_tokens) == (67, 67)
    assert (llm.counters.decode_tokens, llm.counters.decode_steps) == (69, 2)
    # the context's end in place of max_tokens
    fake.calls.clear()
    params = SamplingParams(temperature=0.0)
    oracle._known[0, None] = plain.generate("hello", params).token_ids
    assert told(llm.generate("hello", params)) == told(plain.generate("hello", params))
    assert len(fake.sequences[llm._batches.slots._idle[0].number]) <= 100


def test_nothing_is_drafted_while_a_prompt_is_read() -> None:
    fake = FakeEngine(600)
    plain = Llama.on(FakeEngine(600))  # type: ignore[arg-type]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (40, 5)]
    prompts = ["short", "x" * 400]
    right = plain.generate(prompts, params)
    llm = Llama.on(fake)  # type: ignore[arg-type]
    llm._batches.proposer = oracle = Oracle(right, ["right"])
    steps: list[int] = []
    draft = oracle._draft

    def noted(job: Job, most: int) -> list[int]:
        steps.append(len(fake.calls))
        return draft(job, most) if job.n_prompt == 5 else [77] * most

    oracle._known = {(0, None): right[0].token_ids}
    oracle._draft = noted  # type: ignore[method-assign]
    assert told(llm.generate(prompts, params)) == told(right)
    assert sum(fake.calls[:3]) == 5 + 400 + 2 and steps[0] == 3


def test_a_stream_cancelled_midway_is_what_was_read_of_it() -> None:
    plain = Llama.on(FakeEngine(200))  # type: ignore[arg-type]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=90)
    right = plain.generate("hello", params)
    for stop_at in range(1, 6):
        llm = Llama.on(FakeEngine(200))  # type: ignore[arg-type]
        llm._batches.proposer = Oracle([right], ["right", "middle"])
        llm._batches._chunk = 12
        stream, text = llm.stream("hello", params), ""
        for _ in range(stop_at):
            text += next(stream)
        stream.cancel()
        text += "".join(stream)
        assert stream.result is not None
        assert stream.result.finish_reason == "cancelled"
        assert text == stream.result.text == right.text[: len(text)]
        assert stream.result.token_ids == right.token_ids[: len(text)] and len(text) >= stop_at
        assert len(text) > stop_at or stop_at == 1
        assert told(llm.generate("hello", params)) == told(right)


def test_text_before_an_error_is_not_lost() -> None:
    """Where the context's end is an error, a stream gives all that was certain before it."""
    texts = []
    right = Llama.on(FakeEngine(64)).generate("hello", SamplingParams(temperature=0.0))  # type: ignore[arg-type]
    for proposer in (None, Oracle([right], ["right"])):
        llm = Llama.on(FakeEngine(64), overflow="error")  # type: ignore[arg-type]
        llm._batches.proposer = proposer
        text = ""
        with pytest.raises(LlamaError, match="the context of 64 tokens is full"):
            for piece in llm.stream("hello", SamplingParams(temperature=0.0)):
                text += piece
        texts.append(text)
        assert not llm._batches.slots._busy
    assert texts[0] == texts[1] and len(texts[0]) == 58


def test_a_failure_midway_comes_after_the_text_before_it() -> None:
    """Of two texts in one step the second fails at its third token, which a draft foresaw."""
    params = SamplingParams(temperature=0.0, max_tokens=30)
    right = Llama.on(FakeEngine(64)).generate("hello", params)  # type: ignore[arg-type]
    for proposer in (None, Oracle([right], ["right"])):
        fake = FakeEngine(64)
        llm = Llama.on(fake)  # type: ignore[arg-type]
        llm._batches.proposer = proposer
        sample = fake.sample

        def failing(row: int, params: Any, seen: Any, completion: int, position: int,
                    *rest: Any, sample: Any = sample) -> int:  # fmt: skip
            if position == 7:
                raise LlamaError("no logits here")
            return int(sample(row, params, seen, completion, position, *rest))

        fake.sample = failing  # type: ignore[method-assign]
        stream, text = llm.stream("hello", params), ""
        with pytest.raises(LlamaError, match="no logits here"):
            for piece in stream:
                text += piece
        assert text == right.text[:2] and not llm._batches.slots._busy
        fake.sample = sample  # type: ignore[method-assign]
        assert told(llm.generate("hello", params)) == told(right)


# --- lookup's own


def plain_search(ids: list[int], most: int) -> list[int]:
    """The MOST tokens behind the place that shares most with the end, by looking everywhere."""
    best = (SHORTEST - 1, -1)
    places = [p for p in range(SHORTEST, len(ids)) if ids[p - SHORTEST : p] == ids[-SHORTEST:]]
    for place in places[-PLACES:]:
        shared = 0
        while shared < min(place, LONGEST) and ids[place - shared - 1] == ids[-shared - 1]:
            shared += 1
        best = max(best, (shared, place))
    if best[1] < 0:
        return []
    text = list(ids)
    for i in range(most):
        text.append(text[best[1] + i])
    return text[len(ids) :]


@given(
    st.lists(st.integers(0, 2), max_size=120), st.lists(st.integers(1, 9), max_size=30),
    st.integers(1, 9),
)  # fmt: skip
def test_lookup_finds_the_longest_repetition(text: list[int], steps: list[int], most: int) -> None:
    repeats, ids = Repeats(), []
    for step in steps:
        ids += text[len(ids) : len(ids) + step]
        assert repeats.draft(ids, most, worth=0.0) == plain_search(ids, most)


def test_lookup_drafts_a_repeated_text_and_gives_up_on_noise() -> None:
    said = b"to be or not to be, that is the question. "
    fake = FakeEngine(4000, script=said * 100)
    llm = Llama.on(fake, lookup=8)  # type: ignore[arg-type]
    plain = Llama.on(FakeEngine(4000, script=said * 100))  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=800)
    assert told(llm.generate("x", params)) == told(plain.generate("x", params))
    c = llm.counters
    assert c.decode_tokens == 799 and c.decode_steps < 799 / 6
    assert c.accepted_tokens > 0.97 * c.drafted_tokens
    babble = Llama.on(FakeEngine(4000), lookup=8)  # type: ignore[arg-type]
    babble.generate("x", SamplingParams(temperature=1.0, seed=1, max_tokens=3000))
    assert babble.counters.drafted_tokens < 100
    assert not babble._batches.proposer._texts  # type: ignore[union-attr]


def test_pace() -> None:
    pace = Pace(0.5)
    for _ in range(40):
        pace.learn([1, 2, 3], [1, 2, 3, 4])
    assert pace.length(worth(1), 8) == 8 and pace.chance < 1
    for _ in range(40):
        pace.learn([1, 2, 3], [2])
    assert pace.length(worth(1), 8) == 0 and pace.chance > 0
    before = pace.chance
    pace.learn([1, 2], [])  # nothing came: nothing is known
    pace.learn([], [1, 2])
    assert pace.chance == before
    # company makes a step's other rows cheaper than a draft that may be wrong
    assert [round(worth(n), 2) for n in (1, 16)] == [0.13, 0.71]
