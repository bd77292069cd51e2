"""When the context is full: stop, error, slide; and a context beyond what was trained.

The fake engine gives tokens that moved other numbers, as their other history does in a real one,
so a slid sequence taken for a fresh one shows at once as another text.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tiny_chat
from fake_engine import FakeEngine, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.config import Rope
from llama.errors import LlamaError
from llama.format import TokenizerKind
from llama.generate import Llama
from llama.sampling import SamplingParams
from llama.talk import Talk

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = SamplingParams(temperature=0.0, max_tokens=200)


def llama(size: int, overflow: str = "slide", keep: int | None = None) -> tuple[Llama, FakeEngine]:
    fake = FakeEngine(size)
    return Llama.on(fake, overflow=overflow, keep=keep), fake  # type: ignore[arg-type]


def slid(fake: FakeEngine, prompt: list[int], n: int, keep: int = 4) -> list[int]:
    """The N greedy tokens after PROMPT, by the procedure itself: what moved counts as moved."""
    size, held, out = fake.max_seq_len, list(prompt), []
    while len(held) > size:
        del held[keep : keep + (len(held) - keep + 1) // 2]
    while True:
        out.append(int(np.argmax(fake.logits_of(held))))
        if len(out) == n:
            return out
        if len(held) == size:
            held[keep:] = [t + 1_000_000 for t in held[keep + (size - keep + 1) // 2 :]]
        held.append(out[-1])


def noted(fake: FakeEngine) -> list[tuple[int, int]]:
    """(first, count) of every slide from now on."""
    slides: list[tuple[int, int]] = []
    right = fake.slide

    def slide(sequence: int, first: int, count: int) -> None:
        slides.append((first, count))
        right(sequence, first, count)

    fake.slide = slide  # type: ignore[method-assign]
    return slides


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


# --- sliding


@pytest.mark.parametrize("size, keep", [(64, None), (17, 3), (40, 0), (64, 32), (9, 4), (2, 1)])
def test_a_text_slides_on(size: int, keep: int | None) -> None:
    llm, fake = llama(size, keep=keep)
    kept = min(4, size // 2) if keep is None else keep
    slides = noted(fake)
    result = llm.generate("x", ENDLESS)
    assert result.token_ids == slid(fake, ids_of("x"), 200, kept)
    assert result.finish_reason == "length" and len(result.text) == 200
    assert result.dropped_tokens == sum(count for _, count in slides)
    assert all(first == kept for first, _ in slides) and len(slides) > 3


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=60), st.integers(1, 120)),
        min_size=1, max_size=24,
    ),
    st.integers(20, 48), st.booleans(),
)  # fmt: skip
def test_slid_texts_are_never_taken_for_fresh_ones(
    asked: list[tuple[str, int]], size: int, together: bool
) -> None:
    llm, fake = llama(size)
    prompts = [text for text, _ in asked]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for _, n in asked]
    if together:
        results = llm.generate(prompts, params)
    else:
        results = [llm.generate(text, one) for text, one in zip(prompts, params, strict=True)]
    for (text, n), result in zip(asked, results, strict=True):
        assert result.token_ids == slid(fake, ids_of(text), n)


def test_what_a_slid_sequence_held_is_a_fresh_prompt_to_others() -> None:
    llm, fake = llama(32)
    stream = llm.stream("some prompt", ENDLESS)
    for _ in range(50):
        next(stream)
    (held,) = [tokens for tokens in fake.sequences if tokens]
    same = [token % 1_000_000 for token in held]
    assert max(held) > 1_000_000
    assert llm.generate(same, ENDLESS).token_ids == slid(fake, same, 200)  # while it runs
    stream.close()
    result = llm.generate(same, ENDLESS)  # and after
    assert result.token_ids == slid(fake, same, 200)
    assert llm.generate("some prompt", ENDLESS).token_ids == slid(fake, ids_of("some prompt"), 200)


def test_the_kept_beginning_is_used_again() -> None:
    llm, fake = llama(32, keep=10)
    llm.generate("a beginning, and more of it", ENDLESS)
    result = llm.generate("a beginning that goes on", ENDLESS)
    assert result.cached_tokens == 10
    assert result.token_ids == slid(fake, ids_of("a beginning that goes on"), 200, 10)


def test_completions_of_one_prompt_slide_each_for_itself() -> None:
    llm, fake = llama(24)
    results = llm.generate("abc" * 5, ENDLESS, n=20)
    assert all(r.token_ids == slid(fake, ids_of("abc" * 5), 200) for r in results)
    assert all(r.dropped_tokens == results[0].dropped_tokens > 0 for r in results)


@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_slide_leaves_the_engine_usable(done: bool) -> None:
    llm, fake = llama(24)
    right = fake.slide

    def interrupted(*numbers: int) -> None:
        fake.slide = right  # type: ignore[method-assign]
        if done:
            right(*numbers)
        raise KeyboardInterrupt

    fake.slide = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("abc", ENDLESS)
    held = ids_of("abc") + slid(fake, ids_of("abc"), 21)  # just before it slid
    assert llm.generate(held, ENDLESS).token_ids == slid(fake, held, 200)


def test_a_prompt_too_long_loses_what_would_have_slid_out() -> None:
    llm, fake = llama(32)
    text = "".join(chr(97 + n % 26) for n in range(33))
    result = llm.generate(text, SamplingParams(temperature=0.0, max_tokens=3))
    left = text[:4] + text[4 + 15 :]
    assert result.token_ids == slid(fake, ids_of(left), 3)
    assert (result.prompt_tokens, result.dropped_tokens) == (len(left), 15)
    assert llm.generate("y" * 32, ENDLESS).dropped_tokens > 0
    assert 4 + 14 <= llm.generate("z" * 5000, ENDLESS).prompt_tokens <= 32


def test_without_max_tokens_it_ends_only_where_the_model_does() -> None:
    fake = FakeEngine(24, script=b"x" * 22 + b"\xff")
    llm = Llama.on(fake, overflow="slide")  # type: ignore[arg-type]
    stream = llm.stream("abc", SamplingParams(temperature=0.0))
    assert "".join(next(stream) for _ in range(19)) == "x" * 19
    assert llm.generate("abc", SamplingParams(temperature=0.0)).finish_reason == "eos"


# --- error and stop


def test_error() -> None:
    llm, fake = llama(32, "error")
    full = "the context of 32 tokens is full: max_seq_len .* stop .* slide"
    with pytest.raises(LlamaError, match=full):
        llm.generate("abc", ENDLESS)
    with pytest.raises(LlamaError, match=full):
        llm.generate("abc", SamplingParams(temperature=0.0))
    with pytest.raises(LlamaError, match=full):
        llm.generate("x" * 32, ENDLESS)
    with pytest.raises(LlamaError, match="33 tokens and the context holds 32: max_seq_len"):
        llm.generate("x" * 33, ENDLESS)
    enough = llm.generate("abc", replace(ENDLESS, max_tokens=29))  # as asked for
    assert (len(enough.token_ids), enough.finish_reason) == (29, "length")
    stream, text = llm.stream("abc", ENDLESS), ""
    with pytest.raises(LlamaError, match=full):
        for piece in stream:
            text += piece
    assert len(text) == 28 and stream.result is None
    assert llm.generate("abc", replace(ENDLESS, max_tokens=3)).token_ids == slid(
        fake, ids_of("abc"), 3)  # fmt: skip


def test_stop_is_the_default() -> None:
    llm = Llama.on(FakeEngine(32))  # type: ignore[arg-type]
    result = llm.generate("abc", ENDLESS)
    assert (len(result.token_ids), result.finish_reason, result.dropped_tokens) == (29, "length", 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overflow": "roll"}, "overflow must be stop, slide, error, found 'roll'"),
        ({"overflow": None}, "overflow must be .* found None"),
        ({"overflow": "slide", "keep": -1}, "keep must be 0 to 16, found -1"),
        ({"overflow": "slide", "keep": 17}, "keep must be 0 to 16, found 17"),
        ({"overflow": "slide", "keep": 2.5}, "keep must be a whole number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    fake = FakeEngine(32)
    with pytest.raises(LlamaError, match=message):
        Llama.on(fake, **options)  # type: ignore[arg-type]
    assert fake.closed


def test_dynamic_scaling_beyond_its_original_length_does_not_slide(tmp_path: Path) -> None:
    shape = small_models.config(rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 32.0))
    path = small_models.write_bin(tmp_path / "model.bin", shape)
    with pytest.raises(LlamaError, match="'slide' takes .* at most 32 tokens, found 33: .*dynamic"):
        Llama(path, max_seq_len=33, overflow="slide")
    with Llama(path, overflow="slide") as llm:
        assert len(llm.generate([1, 2, 3], replace(ENDLESS, max_tokens=50)).token_ids) == 50


# --- a dialog


def test_a_dialog_slides_to_the_beginning_of_a_turn() -> None:
    """The system message stays, and then whole turns, while that frees enough."""
    llm, fake = llama(470)
    slides = noted(fake)
    messages = [{"role": "system", "content": "Be brief."}]
    for n in range(3):
        messages += [{"role": "user", "content": f"question {n}, " + "w" * 60},
                     {"role": "assistant", "content": "an answer, " + "v" * 20}]  # fmt: skip
    messages += [{"role": "user", "content": "the last question"}]
    ids = llm.template.encode(messages)
    text = llm.tokenizer.decode(ids)
    assert len(ids) < 470
    result = llm.chat(messages, replace(ENDLESS, max_tokens=1000))
    assert len(result.token_ids) == 1000 and len(slides) > 2
    keep, count = slides[0]
    system = llm.template.encode(messages[:2])
    assert ids[:keep] == system[:keep] and text.index("question 0") < keep < len(system)
    after = llm.tokenizer.decode(ids[keep + count :])
    assert after.startswith("question 2, www")  # half or more, by whole turns
    # the next one drops all other turns, and when there are none, half of what is left
    assert slides[1][0] == keep
    assert llm.tokenizer.decode(ids[keep + count + slides[1][1] :]).startswith("the last question")
    assert slides[2] == (keep, (470 - keep + 1) // 2)


def test_keep_overrules_the_system_message() -> None:
    llm, fake = llama(100, keep=7)
    slides = noted(fake)
    llm.chat([{"role": "user", "content": "Hello"}], ENDLESS)
    assert {first for first, _ in slides} == {7}


@pytest.mark.parametrize("overflow", ["stop", "error"])
def test_a_full_dialog_that_may_not_slide(
    overflow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, _ = llama(128, overflow)
    talk = Talk(llm, SamplingParams(temperature=0.0))
    talk.line("Hello")
    said = capsys.readouterr().err
    if overflow == "stop":
        assert "(the context is full: /reset, or --overflow slide)" in said and len(talk.turns) == 2
        talk.line("more")
        assert "tokens and the context holds 128: max_seq_len" in capsys.readouterr().err
        assert len(talk.turns) == 2
    else:
        assert "the context of 128 tokens is full: max_seq_len" in said and talk.turns == []
    assert talk.failed is True


def test_a_question_that_fills_the_context_is_not_remembered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm, _ = llama(64, "stop")
    frame = len(llm.template.encode([{"role": "user", "content": ""}]))
    talk = Talk(llm, SamplingParams(temperature=0.0))
    talk.line("x" * (64 - frame))
    assert "(the context is full: /reset, or --overflow slide)" in capsys.readouterr().err
    assert talk.turns == []


def test_a_dialog_of_a_model_that_cannot_slide_forgets_between_answers(tmp_path: Path) -> None:
    scaling = {"rope_scaling": Rope.DYNAMIC, "rope_numbers": (4.0, 100.0)}
    shape = replace(tiny_chat.CONFIG, **scaling)
    path = small_models.write_bin(
        tmp_path / "model.bin", shape, tokenizer=(TokenizerKind.JSON, byte_tokenizer()),
        meta={"template.family": "chatml"},
    )  # fmt: skip
    flags = ["--bin", path, "--max-seq-len=120", "--type=greedy", "--max_tokens=300"]
    done = program("chat.py", *flags, stdin="Hi there\nmore\n")
    forgotten = "(the context is full: the oldest 1 turn forgotten)"
    assert done.returncode == 0 and f"(the context is full)\n{forgotten}" in done.stderr
    refused = program("chat.py", *flags, "--overflow=slide", stdin="Hi\n")
    assert refused.returncode == 1 and "at most 100 tokens, found 120" in refused.stderr


def test_a_dialog_says_what_it_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = llama(128)
    talk = Talk(llm, ENDLESS)
    talk.line("Hello")
    assert "(the context was full: " in capsys.readouterr().err and not talk.failed
    talk.line("Hello")
    assert "(the context is full: the oldest 1 turn forgotten)" in capsys.readouterr().err


# --- beyond what was trained


def scaled(kind: Rope, *numbers: float) -> Any:
    return small_models.config(rope_scaling=kind, rope_numbers=numbers)  # max_seq_len 32


@pytest.mark.parametrize(
    "shape, enough, beyond, message",
    [
        (small_models.config(), 32, 33, "beyond 32 were never trained .* no rope scaling"),
        (scaled(Rope.LINEAR, 4.0), 32, 128, r"linear rope scaling \(factor 4\) applies"),
        (scaled(Rope.LINEAR, 4.0), 32, 129, "never trained .* linear rope scaling .* no further"),
        (scaled(Rope.LLAMA3, 8.0, 1.0, 4.0, 16.0), 128, 129, "beyond 128 .* llama3 .* no further"),
        (scaled(Rope.YARN, 4.0, 32.0, 8.0, 1.0, 1.0, 1.0), 128, 129, "beyond 128 .* yarn"),
        (scaled(Rope.DYNAMIC, 2.0, 32.0), 2**20, None, ""),
    ],
)
def test_what_is_said_of_a_longer_context(
    shape: Any, enough: int, beyond: int | None, message: str, tmp_path: Path
) -> None:
    path = small_models.write_bin(tmp_path / "model.bin", shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama(path, max_seq_len=enough).close()
    if beyond is not None:
        with pytest.warns(UserWarning, match=message) as caught:
            Llama(path, max_seq_len=beyond).close()
        assert len(caught) == 1 and caught[0].filename == __file__


def program(name: str, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, words)], input=stdin, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_programs(tiny: Path) -> None:
    run = ["--bin", tiny, "--type=greedy", "--max_tokens=90", "--max-seq-len=64"]
    stopped, moved = (program("run.py", *run, *more, "abc") for more in ([], ["--overflow=slide"]))
    assert moved.stdout.startswith(stopped.stdout[:40]) and stopped.returncode == 0
    assert "(the context of 64 tokens was full: 30 tokens were dropped on the way)" in moved.stderr
    assert "dropped" not in stopped.stderr
    failed = program("run.py", *run, "--overflow=error", "abc")
    assert failed.returncode == 1
    assert "run.py: the context of 64 tokens is full: max_seq_len" in failed.stderr
    lines = program("run.py", *run, "--overflow=slide", "--prompts=-", stdin='"abc"\n"d"\n')
    assert lines.stdout.count('"dropped_tokens": 30') == 2
    far = program("run.py", "--bin", tiny, "--max-seq-len=5000", "--max_tokens=2", "abc")
    note = "note: positions beyond 4096 were never trained (the context is 5000), and this model "
    assert far.returncode == 0 and far.stderr.startswith(note) and "Warning" not in far.stderr
    said = program("chat.py", "--bin", tiny, "--max-seq-len=5000", "--max_tokens=2", stdin="Hi\n")
    assert note in said.stderr
