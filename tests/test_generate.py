"""Completions: batching, kept prefixes, streaming and stop strings, on a fake engine that catches
every mixed-up sequence."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.batch import MAX_ACTIVE, MAX_IDLE, Turns, common_prefix
from llama.completion import StopStrings
from llama.errors import LlamaError
from llama.generate import Llama
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def llama(max_seq_len: int = 64, **options: Any) -> tuple[Llama, FakeEngine]:
    fake = FakeEngine(max_seq_len, **options)
    return Llama.on(fake), fake  # type: ignore[arg-type]


def expected(fake: FakeEngine, prompt: str, n: int) -> list[int]:
    """The greedy continuation, computed without any of the machinery."""
    ids = [byte + 3 for byte in prompt.encode()]
    for _ in range(n):
        ids.append(int(np.argmax(fake.logits_of(ids))))
    return ids[-n:]


def test_greedy_is_the_models_own() -> None:
    llm, fake = llama()
    result = llm.generate("hello", GREEDY)
    assert result.token_ids == expected(fake, "hello", 8)
    assert result.text == bytes(t - 3 for t in result.token_ids).decode()
    assert (result.finish_reason, result.prompt_tokens, result.cached_tokens) == ("length", 5, 0)


@settings(max_examples=40)
@given(
    st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=40),
    st.lists(st.integers(1, 20), min_size=40, max_size=40),
    st.booleans(),
    st.integers(1, 64),
)
def test_together_is_as_alone(
    prompts: list[str], lengths: list[int], greedy: bool, chunk: int
) -> None:
    """Prompts over two letters share beginnings often, so sequences are forked all the time."""
    llm, _ = llama()
    llm._batches._chunk = chunk
    params = [
        SamplingParams(temperature=0.0 if greedy else 1.0, seed=5, max_tokens=n)
        for n in lengths[: len(prompts)]
    ]
    together = llm.generate(prompts, params)
    for prompt, one, result in zip(prompts, params, together, strict=True):
        alone, _ = llama()
        expect = alone.generate(prompt, one)
        assert (result.text, result.token_ids) == (expect.text, expect.token_ids)
    assert not llm._batches.slots._busy


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["open", "step", "drop", "close", "batch"]), st.integers(0, 30)),
        max_size=60,
    )
)
def test_streams_interleave_as_they_like(moves: list[tuple[str, int]]) -> None:
    """Streams that start, pause, end and are abandoned in any order each tell their own text."""
    llm, fake = llama(48)
    live: list[tuple[str, Any, str]] = []  # prompt, stream, text so far
    params = SamplingParams(temperature=0.0, max_tokens=9)
    for move, n in moves:
        prompt = "abcab"[: n % 5 + 1] * (n % 3 + 1)
        if move == "open":
            live.append((prompt, llm.stream(prompt, params), ""))
        elif move == "batch":
            prompts = [prompt, prompt + "c", "b"]
            for one, result in zip(prompts, llm.generate(prompts, params), strict=True):
                assert result.token_ids == expected(fake, one, 9)
        elif live:
            prompt, stream, text = live.pop(n % len(live))
            if move == "step":
                text += next(stream, "")
                live.append((prompt, stream, text))
            elif move == "close":
                stream.close()
            del stream
        idle = llm._batches.slots._idle
        assert len(idle) <= 1 or sum(len(slot.tokens) for slot in idle) <= 48
        assert [len(s.tokens) for s in idle] == [fake.length(s.number) for s in idle]
    for prompt, stream, text in live:
        text += "".join(stream)
        assert text == bytes(t - 3 for t in expected(fake, prompt, 9)).decode()
    live.clear()
    stream = None
    gc.collect()
    assert not llm._batches.slots._busy


def test_a_long_list_runs_in_few_steps() -> None:
    llm, fake = llama()
    prompts = [f"{n:02d} prompt" for n in range(3 * MAX_ACTIVE)]
    results = llm.generate(prompts, GREEDY)
    assert [r.token_ids for r in results] == [expected(fake, p, 8) for p in prompts]
    assert len(fake.calls) < 60  # 48 alone would take 8 each


def test_a_running_text_goes_on_while_a_long_prompt_is_read() -> None:
    llm, fake = llama(2000)
    stream = llm.stream("short", SamplingParams(temperature=0.0, max_tokens=300))
    next(stream)
    batch = llm.each(["a", "b" * 1000], SamplingParams(temperature=0.0, max_tokens=20))
    first = next(batch)
    assert first[0] == 0  # done before the long prompt has been read
    assert fake.calls[-1] > 1
    assert [index for index, _ in batch] == [1]
    assert max(fake.calls) <= 256


# --- what is computed


def test_a_repeated_prompt_computes_one_token() -> None:
    llm, _ = llama()
    first = llm.generate("once upon a time", GREEDY)
    assert llm.computed_tokens == 16 + 7  # the last token is sampled and never fed
    again = llm.generate("once upon a time", GREEDY)
    assert again.text == first.text and again.cached_tokens == 15
    assert llm.computed_tokens == 16 + 7 + 1 + 7


def test_a_chats_next_turn_computes_what_follows_the_common_prefix() -> None:
    llm, fake = llama(512)
    messages = [{"role": "user", "content": "Hello there"}]
    before: list[int] = []
    for turn in range(4):
        ids = llm.template.encode(messages)
        done = llm.computed_tokens
        common = max((common_prefix(s, ids, len(ids) - 1) for s in fake.sequences), default=0)
        assert turn == 0 or common >= len(before)
        result = llm.chat(messages, GREEDY)
        assert llm.computed_tokens - done == len(ids) - common + 7
        assert result.cached_tokens == common
        before = ids
        messages += [
            {"role": "assistant", "content": result.text},
            {"role": "user", "content": f"and {turn}"},
        ]


def test_a_fork_keeps_the_longer_sequence() -> None:
    llm, _ = llama()
    llm.generate("one two three", GREEDY)
    llm.generate("one two four", GREEDY)
    done = llm.computed_tokens
    for prompt in ("one two three", "one two four"):
        assert llm.generate(prompt, GREEDY).cached_tokens == len(prompt) - 1
    assert llm.computed_tokens == done + 2 * 8


def test_prompts_of_a_list_share_a_beginning_that_is_being_read() -> None:
    llm, _ = llama(512)
    shared = "You are a helpful assistant who answers briefly. "
    llm.generate([shared + word for word in ("one", "two", "six", "ten")], GREEDY)
    assert llm.computed_tokens < len(shared) + 4 * (3 + 8)


def test_idle_sequences_are_bounded() -> None:
    llm, fake = llama(64)
    for n in range(3 * MAX_IDLE):
        llm.generate(f"{n:03d}", GREEDY)
    held = [s for s in fake.sequences if s]
    assert len(held) <= MAX_IDLE and sum(map(len, held)) <= 64
    llm, fake = llama(2048)
    for n in range(3 * MAX_IDLE):
        llm.generate(f"{n:03d}", GREEDY)
    assert len([s for s in fake.sequences if s]) == MAX_IDLE
    assert llm.generate(f"{n:03d}", GREEDY).cached_tokens == 2


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(-1, 12))
def test_common_prefix(a: list[int], b: list[int], limit: int) -> None:
    plain = 0
    while plain < min(len(a), len(b), limit) and a[plain] == b[plain]:
        plain += 1
    assert common_prefix(a, b, limit) == plain


# --- ends


def test_max_tokens_and_the_contexts_end() -> None:
    llm, _ = llama(32)
    result = llm.generate("x" * 20, SamplingParams(temperature=0.0))
    assert (result.finish_reason, len(result.token_ids)) == ("length", 12)
    assert len(llm.generate("x" * 31, GREEDY).token_ids) == 1
    result = llm.generate("x" * 32, GREEDY)
    assert (result.finish_reason, result.text, result.token_ids) == ("length", "", [])
    with pytest.raises(LlamaError, match="33 tokens and the context holds 32"):
        llm.generate("x" * 33, GREEDY)
    with pytest.raises(LlamaError, match=r"prompt 1: .*33 tokens"):
        llm.generate(["x", "x" * 33], GREEDY)


def test_the_end_token_ends_and_is_no_text() -> None:
    llm, _ = llama(script=b"......hello\xff" + b"!" * 60)
    result = llm.generate("prompt", SamplingParams(temperature=0.0))
    assert (result.text, result.finish_reason) == ("hello", "eos")
    assert result.token_ids[-1] == 0


def test_a_chat_stops_at_its_turn_end() -> None:
    llm, fake = llama(512)
    fake.logits_of = lambda tokens: np.eye(260, dtype=np.float32)[2]  # type: ignore
    result = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)
    assert (result.text, result.finish_reason, result.token_ids) == ("", "eos", [2])


def test_stop_strings_span_tokens_and_are_never_shown() -> None:
    llm, _ = llama(script=b"----abcabdabx" + b"!" * 60)
    pieces = list(llm.stream("----", SamplingParams(temperature=0.0, stop="abx")))
    assert "".join(pieces) == "abcabd"
    result = llm.generate("----", SamplingParams(temperature=0.0, stop=("abx", "zzz")))
    assert (result.text, result.finish_reason) == ("abcabd", "stop")
    assert len(result.token_ids) == 9
    # the end may not cut what only looked like one
    result = llm.generate("----", SamplingParams(temperature=0.0, stop="abc!", max_tokens=3))
    assert (result.text, result.finish_reason) == ("abc", "length")


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_let_through_exactly_what_stands_before(
    pieces: list[str], stops: list[str]
) -> None:
    watch = StopStrings(stops)
    shown = "".join([watch.feed(piece) for piece in pieces]) + watch.feed("", last=True)
    text = "".join(pieces)
    # the first moment at which a stop string is complete, and where it starts
    ends = [
        end for end in np.cumsum([len(p) for p in pieces]) if any(s in text[:end] for s in stops)
    ]
    if not ends:
        assert shown == text and not watch.hit
    else:
        assert shown == text[: min(text[: ends[0]].find(s) % (1 << 30) for s in stops)]
        assert watch.hit


def test_characters_are_never_halved() -> None:
    said = "né 🙂👩‍👩‍👧 שלום ñ"
    llm, _ = llama(script=b"p" + said.encode() + b"\xff")
    pieces = list(llm.stream("p", SamplingParams(temperature=0.0)))
    assert "".join(pieces) == said and all("\ufffd" not in piece for piece in pieces)
    cut = llm.generate("p", SamplingParams(temperature=0.0, max_tokens=5))
    assert cut.text == "né \ufffd"


def test_stream_is_generate() -> None:
    for seed in range(5):
        llm, _ = llama()
        params = SamplingParams(seed=seed, max_tokens=20, stop=("a", "qu"))
        stream = llm.stream("hello", params)
        pieces = list(stream)
        assert all(pieces)
        assert stream.result is not None
        assert "".join(pieces) == llm.generate("hello", params).text == stream.result.text


# --- seeds


def test_seeds() -> None:
    llm, _ = llama(512)
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=3)
    same = llm.generate(["x", "x", "y"], params)
    assert same[0].text == same[1].text == llm.generate("x", params).text
    free = SamplingParams(temperature=1.0, max_tokens=40)
    drawn = [llm.generate("x", free) for _ in range(2)]
    assert drawn[0].text != drawn[1].text
    again = SamplingParams(temperature=1.0, max_tokens=40, seed=drawn[0].seed)
    assert llm.generate("x", again).text == drawn[0].text


# --- when things go wrong


def test_an_abandoned_stream_leaves_the_engine_usable() -> None:
    llm, fake = llama(512)
    want = expected(fake, "hello", 8)
    for _ in range(300):  # more than there are sequences
        stream = llm.stream("hello")
        next(stream)
        del stream
    gc.collect()
    assert llm.generate("hello", GREEDY).token_ids == want
    assert not llm._batches.slots._busy


def test_streams_held_open_run_out_with_a_clear_line() -> None:
    llm, _ = llama(512)
    streams = [llm.stream(f"{n}") for n in range(257)]
    with pytest.raises(LlamaError, match="all 256 sequences are in use"):
        for stream in streams:
            next(stream)
    for stream in streams:
        stream.close()
    assert llm.generate("x", GREEDY).text


@pytest.mark.parametrize("error", [KeyboardInterrupt, LlamaError])
def test_an_interrupted_completion_leaves_the_engine_usable(error: type[BaseException]) -> None:
    llm, fake = llama()
    want = expected(fake, "hello", 8)

    def fail() -> None:
        if len(fake.calls) == 3:
            fake.calls.append(0)
            raise error("now")

    fake.before_forward = fail
    with pytest.raises(error):
        llm.generate("hello", GREEDY)
    assert llm.generate("hello", GREEDY).token_ids == want


def test_an_interrupt_between_computing_and_noting_it() -> None:
    llm, fake = llama()
    want = expected(fake, "hello", 8)
    real = fake.forward

    def forward(*args: Any, **options: Any) -> None:
        real(*args, **options)
        if len(fake.calls) == 3:
            raise KeyboardInterrupt

    fake.forward = forward  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("hello", GREEDY)
    fake.forward = real  # type: ignore[method-assign]
    noted = "hello" + chr(want[0] - 3)  # the sequence holds one token more than is noted
    other = noted + "?"
    assert llm.generate(other, GREEDY).token_ids == expected(fake, other, 8)
    assert llm.generate("hello", GREEDY).token_ids == want


def test_cancel() -> None:
    llm, _ = llama()
    stream = llm.stream("hello")
    first = next(stream)
    stream.cancel()
    assert list(stream) == []
    assert stream.result is not None
    assert (stream.result.text, stream.result.finish_reason) == (first, "cancelled")


def test_threads_share_one_llama() -> None:
    llm, fake = llama(256)
    results: dict[int, Any] = {}

    def work(n: int) -> None:
        results[n] = llm.generate(
            [f"{n} a", f"{n} b"], SamplingParams(temperature=0.0, max_tokens=30)
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(8):
        assert results[n][0].token_ids == expected(fake, f"{n} a", 30)
        assert results[n][1].token_ids == expected(fake, f"{n} b", 30)


def test_turns_are_fair() -> None:
    """Who asked first is first, and who asks again is behind all that wait."""
    turns = Turns()
    order: list[int] = []

    def work(n: int) -> None:
        for _ in range(3):
            with turns:
                order.append(n)
                until(lambda: len(turns._line) == 4 or len(order) > 10)

    def until(true: Callable[[], bool]) -> None:
        while not true():
            time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    with turns:
        for n, thread in enumerate(threads):
            thread.start()
            until(lambda n=n: len(turns._line) == n + 1)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4] * 3


def test_use_after_close() -> None:
    llm, _ = llama()
    stream = llm.stream("hello")
    next(stream)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate("x"), lambda: llm.stream("x"), lambda: llm.logits([1]),
        lambda: llm.chat([{"role": "user", "content": "x"}]), lambda: next(stream), llm.info,
    ):  # fmt: skip
        with pytest.raises(LlamaError, match="this Llama is closed"):
            use()
    with Llama.on(FakeEngine()) as other:  # type: ignore[arg-type]
        pass
    with pytest.raises(LlamaError, match="closed"):
        other.generate("x")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"), ([260], "token id must be 0 to 259, found 260"), ([-1], "found -1"),
        ([1.5], "must be an int"), ([True], "found True"), (5, "must be a str"),
        (b"x", "must be a str"), (["a", 5], "prompt 1: a prompt must be"),
        (["a", ""], "prompt 1: .*empty"), ("a\ud800", "surrogate"), (None, "must be a str"),
        ({"a": 1}, "must be a str"),
    ],
)  # fmt: skip
def test_bad_prompts(prompt: Any, message: str) -> None:
    llm, _ = llama()
    with pytest.raises(LlamaError, match=message):
        llm.generate(prompt)


def test_bad_params() -> None:
    llm, _ = llama()
    with pytest.raises(LlamaError, match="params must be SamplingParams, found dict"):
        llm.generate("x", {"temperature": 0})  # type: ignore[call-overload]
    with pytest.raises(LlamaError, match="2 prompts need as many params, found 1"):
        llm.generate(["x", "y"], [GREEDY])
    assert llm.generate([]) == []


def test_without_a_tokenizer() -> None:
    fake = FakeEngine(64)
    fake.tokenizer = ("none", b"")
    llm = Llama.on(fake)  # type: ignore[arg-type]
    with pytest.raises(LlamaError, match="holds no tokenizer; give token ids"):
        llm.generate("text")
    result = llm.generate([5, 6, 7], GREEDY)
    assert result.text == "" and len(result.token_ids) == 8
    with pytest.raises(LlamaError, match="stop strings need a tokenizer"):
        llm.generate([5], SamplingParams(stop="x"))


def test_logits_of_every_token() -> None:
    llm, fake = llama(600)
    ids = [3 + n % 200 for n in range(520)]
    llm.generate(ids[:40], GREEDY)
    logits = llm.logits(ids)
    assert logits.shape == (520, 260) and logits.dtype == np.float32
    for n in (0, 255, 256, 519):
        assert np.array_equal(logits[n], fake.logits_of(ids[: n + 1]))
    for bad in ([], [5] * 601):
        with pytest.raises(LlamaError, match=f"1 to 600 token ids .*found {len(bad)}"):
            llm.logits(bad)
    with pytest.raises(LlamaError, match="token ids, found str"):
        llm.logits("text")  # type: ignore[arg-type]
