"""Drafts on real models, with every knob there is: by lookup, by a draft model that is the target,
near it or far from it. The text and its logprobs are those without drafts."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tiny_chat
from fake_engine import byte_tokenizer, told

from llama import cli
from llama.config import Config, Head, Rope
from llama.errors import LlamaError
from llama.format import Record, TokenizerKind, Writer
from llama.generate import Llama
from llama.quant import Kind
from llama.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
CHAT = tiny_chat.CONFIG
KNOBS = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "drawn": {"temperature": 1.0, "top_p": 1.0},
    "cold": {"temperature": 0.2, "min_p": 0.05},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "typical_p": 0.9},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 1.0,
                  "frequency_penalty": -0.5},
    "bias": {"temperature": 0.8, "logit_bias": {100: 3.0, 101: -np.inf, 102: 2.0}},
    "mirostat": {"temperature": 0.9, "mirostat_tau": 2.0, "mirostat_eta": 0.3},
    "mirostat, penalties": {"temperature": 1.2, "mirostat_tau": 3.0, "presence_penalty": 0.7},
    "stop": {"temperature": 0.5, "stop": ("e", "th", "\n")},
}  # fmt: skip


def write(path: Path, noise: float = 0.0, shape: Config = CHAT, seed: int = 3) -> Path:
    """tiny_chat's model at another SHAPE, or near it: NOISE is added to every matrix."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(9)
    from llama.config import expected_tensors

    records = [Record(name, Kind.F32, size) for name, size in expected_tensors(shape).items()]
    kind = (TokenizerKind.JSON, byte_tokenizer())
    meta = {"template.family": "chatml"}
    with Writer(path, shape, records, tokenizer=kind, meta=meta) as writer:
        for record in records:
            values = rng.normal(size=record.shape)
            values = values + noise * other.normal(size=record.shape)
            if "norm" in record.name:
                values = np.ones(record.shape)
            writer.write(record.name, values.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("speculate")
    near = dataclasses.replace(CHAT, max_seq_len=48)
    return {
        "target": write(folder / "target.bin"), "near": write(folder / "near.bin", 0.02),
        "short": write(folder / "short.bin", 0.02, near), "far": write(folder / "far.bin", seed=4),
    }  # fmt: skip


HOW: dict[str, dict[str, Any]] = {
    "lookup": {"lookup": 8}, "itself": {"draft": "target"}, "near": {"draft": "near"},
    "short": {"draft": "short"}, "far": {"draft": "far"},
}  # fmt: skip


def speculating(files: dict[str, Path], how: str, path: Path | None = None, **more: Any) -> Llama:
    options = {k: files[v] if k == "draft" else v for k, v in HOW[how].items()}
    return Llama(path or files["target"], threads=1, **options, **more)


@pytest.fixture(scope="module")
def open_models(files: dict[str, Path]) -> Iterator[dict[str, Llama]]:
    plain = Llama(files["target"], threads=1)
    found = {"plain": plain} | {how: speculating(files, how) for how in HOW}
    yield found
    for llm in found.values():
        llm.close()


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("how", HOW)
def test_texts_and_logprobs_are_those_without_drafts(
    open_models: dict[str, Llama], how: str, knobs: str
) -> None:
    plain, llm = open_models["plain"], open_models[how]
    for seed in range(4):
        params = SamplingParams(**KNOBS[knobs], seed=seed, max_tokens=60, logprobs=seed % 3)
        prompt = "abcabcabc " * (1 + 3 * seed)
        assert told(llm.generate(prompt, params)) == told(plain.generate(prompt, params))
        mixed = [params, dataclasses.replace(params, max_tokens=9, temperature=0.0), params]
        prompts: list[str] = [prompt, "zz", "another one, another one"]
        assert told(llm.generate(prompts, mixed, n=3)) == told(plain.generate(prompts, mixed, n=3))
        assert told(llm.generate("best", params, n=2, best_of=4, echo=True)) == told(
            plain.generate("best", params, n=2, best_of=4, echo=True))  # fmt: skip
    assert not llm._batches.slots._busy
    if llm._own_draft is not None:
        assert not llm._own_draft._batches.slots._busy


def test_drafts_are_accepted_and_rejected_there(open_models: dict[str, Llama]) -> None:
    """Else the test above would say little; it need not have run before."""
    params = SamplingParams(**KNOBS["penalties"], seed=1, max_tokens=200)
    for how in ("lookup", "itself", "near", "short"):
        llm = open_models[how]
        before = dataclasses.replace(llm.counters)
        llm.generate("abcabcabc", params)
        drafted = llm.counters.drafted_tokens - before.drafted_tokens
        accepted = llm.counters.accepted_tokens - before.accepted_tokens
        assert accepted > 10 and (how == "itself" or drafted > accepted), how


@pytest.mark.parametrize("knobs", [k for k in KNOBS if k != "stop"])
def test_a_draft_model_equal_to_the_target_is_always_right(
    open_models: dict[str, Llama], knobs: str
) -> None:
    """Penalties, mirostat and random numbers are the target's own at each drafted position."""
    llm = open_models["itself"]
    for prompt in ("x", "hello hello"):
        ends = SamplingParams(**KNOBS[knobs], seed=3, max_tokens=64)  # 0 to 2 are control tokens
        bans = {token: -np.inf for token in range(3)} | dict(ends.logit_bias)
        params = dataclasses.replace(ends, logit_bias=bans)
        before = dataclasses.replace(llm.counters)
        llm.generate(prompt, params)
        drafted = llm.counters.drafted_tokens - before.drafted_tokens
        assert llm.counters.accepted_tokens - before.accepted_tokens == drafted
        assert llm.counters.decode_steps - before.decode_steps <= 12 and drafted >= 50


@pytest.mark.parametrize("size", [40, 41, 64])
@pytest.mark.parametrize("overflow", ["stop", "slide"])
@pytest.mark.parametrize("how", HOW)
def test_near_the_contexts_end(
    files: dict[str, Path], how: str, overflow: str, size: int
) -> None:
    limit = 150 if overflow == "slide" else None
    options = {"max_seq_len": size, "overflow": overflow}
    with (
        Llama(files["target"], threads=1, **options) as plain,
        speculating(files, how, **options) as llm,
    ):
        for seed, knobs in enumerate(["greedy, penalties", "penalties", "mirostat"]):
            bans = {token: -np.inf for token in range(3)}
            params = SamplingParams(
                **KNOBS[knobs], seed=seed, max_tokens=limit, logit_bias=bans, logprobs=1
            )
            for prompt in ("ab" * 9, "ab" * (size // 2 - 1), "a" * size):
                found = llm.generate(prompt, params)
                assert told(found) == told(plain.generate(prompt, params))
            prompts = ["abc" * 5, "cde" * 5]
            assert told(llm.generate(prompts, params)) == told(plain.generate(prompts, params))
        assert (found.dropped_tokens > 0) == (overflow == "slide")


@pytest.mark.parametrize("how", ["lookup", "itself", "near"])
def test_dynamic_rope_scaling(files: dict[str, Path], tmp_path: Path, how: str) -> None:
    """Beyond the original length each position turns by a base of its own, drafted or not."""
    shape = dataclasses.replace(CHAT, rope_scaling=Rope.DYNAMIC, rope_numbers=(2.0, 30.0))
    target = write(tmp_path / "dynamic.bin", shape=shape)
    path = {"itself": target, "near": write(tmp_path / "near.bin", 0.02, shape)}.get(how)
    bans = {token: -np.inf for token in range(3)}
    with (
        Llama(target, threads=1) as plain,
        Llama(target, threads=1, draft=path, lookup=0 if path else 8) as llm,
    ):
        for knobs in ("greedy", "drawn", "penalties"):
            for n in (5, 10, 11, 40):  # around and beyond 30 tokens
                params = SamplingParams(
                    **KNOBS[knobs], seed=n, max_tokens=50, logprobs=3, logit_bias=bans
                )
                found = llm.generate("abc" * n, params, n=2)
                assert told(found) == told(plain.generate("abc" * n, params, n=2))
        assert how == "lookup" or llm.counters.accepted_tokens > 50


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_what_stays_in_the_cache_is_a_fresh_runs(files: dict[str, Path], kv: str) -> None:
    """Keys and values, to the last bit, also where a stream was cancelled midway."""
    with (
        Llama(files["target"], threads=1, kv=kv) as plain,
        speculating(files, "near", kv=kv) as llm,
    ):
        for seed in range(3):
            params = SamplingParams(temperature=0.8, seed=seed, max_tokens=90)
            stream = llm.stream("some words, some words", params)
            for _ in range(20 + seed):
                next(stream)
            stream.cancel()
            list(stream)
            assert stream.result is not None and stream.result.finish_reason == "cancelled"
            held = max(llm._batches.slots._idle, key=lambda slot: slot.used)
            assert len(held.tokens) >= 22 + 19 + seed
            assert held.tokens == [*llm.tokenizer.encode("some words, some words"),
                                   *stream.result.token_ids][: len(held.tokens)]  # fmt: skip
            plain._engine.trim(99, 0)
            n = len(held.tokens)
            plain._engine.forward(held.tokens, [99] * n, range(n))
            same = plain._engine.read_kv(99, 0, n)
            assert llm._engine.length(held.number) == n
            assert llm._engine.read_kv(held.number, 0, n) == same
            # and a prompt that goes on from there has a fresh run's text and logprobs
            onward = SamplingParams(temperature=0.8, seed=1, max_tokens=20, logprobs=4)
            assert told(llm.generate(held.tokens, onward)) == told(
                plain.generate(held.tokens, onward)
            )


def test_a_real_model_and_a_chat_with_a_session(stories: Path, tmp_path: Path) -> None:
    with Llama(stories) as plain, Llama(stories, lookup=6) as llm:
        for seed in range(8):
            params = SamplingParams(
                temperature=0.4 * (seed % 4), seed=seed, max_tokens=150, stop="friend", logprobs=1,
            )
            prompt = "Once upon a time, there was a little girl named Lily. " * (1 + seed % 2)
            assert told(llm.generate(prompt, params)) == told(plain.generate(prompt, params))
        assert llm.counters.accepted_tokens > 50
    path = tiny_chat.write(tmp_path / "chat.bin")
    answers = []
    for options in ({}, {"lookup": 8}, {"draft": path}):
        with Llama(path, **options) as llm:
            messages: list[dict[str, str]] = []
            for turn in range(3):
                messages.append({"role": "user", "content": f"turn {turn} turn {turn}"})
                said = llm.chat(messages, SamplingParams(seed=turn, max_tokens=40))
                messages.append({"role": "assistant", "content": said.text})
                session = tmp_path / "chat.session"
                kept = llm.save_session(session, messages)
                with Llama(path) as other:
                    again, tokens = other.load_session(session)
                    assert again == messages and tokens == kept > 20
                    more = [*messages, {"role": "user", "content": "and?"}]
                    going = other.chat(more, SamplingParams(seed=9, max_tokens=20, logprobs=2))
                    assert going.cached_tokens >= kept
            answers.append((messages, told(going)))
    assert answers[0] == answers[1] == answers[2]


def test_threads_share_both_models(files: dict[str, Path]) -> None:
    """The draft model is somebody's own, who uses it at the same time."""
    params = [SamplingParams(temperature=0.7, seed=n, max_tokens=60) for n in range(4)]
    prompts = ["one one", "two two", "one one one", "abc abc"]
    with Llama(files["near"], threads=1) as small, Llama(files["target"], threads=1) as plain:
        right = [plain.generate(p, one) for p, one in zip(prompts, params, strict=True)]
        alone = [small.generate(p, one) for p, one in zip(prompts, params, strict=True)]
        wrong: list[str] = []
        with Llama(files["target"], threads=1, draft=small) as llm:

            def work(n: int) -> None:
                for _ in range(5):
                    if told(llm.generate(prompts[n], params[n])) != told(right[n]):
                        wrong.append(f"target {n}")
                    if told(small.generate(prompts[n], params[n])) != told(alone[n]):
                        wrong.append(f"draft {n}")

            workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert not wrong and llm.counters.accepted_tokens > 0
            stream = llm.stream("one one", params[0])
            next(stream), next(stream)
            assert small._batches.slots._busy
            stream.close()
            assert not small._batches.slots._busy
        assert small.generate("still open", params[0]).text


def test_sampled_tokens_have_the_models_distribution(tmp_path: Path) -> None:
    """The second and the third token of 2,000 completions, of those that begin alike, by Pearson's
    chi-squared against the softmax."""
    shape = small_models.config(vocab_size=12, max_seq_len=16)
    paths = [small_models.write_bin(tmp_path / f"{n}.bin", shape, n) for n in range(2)]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=4)
    counts = []
    with Llama(paths[0], threads=1) as plain:
        for draft in (None, paths[1], paths[0]):
            with Llama(paths[0], threads=1, draft=draft) as llm:
                results = [r for k in range(2) for r in llm.generate(
                    [1, 2, 3], dataclasses.replace(params, seed=k), n=1000)]  # fmt: skip
                counts.append([tuple(r.token_ids) for r in results])
                assert draft is None or llm.counters.accepted_tokens > 100
        assert counts[0] == counts[1] == counts[2]
        for position in (1, 2):
            starts = [ids[:position] for ids in counts[1]]
            start = max(set(starts), key=starts.count)
            seen = [ids[position] for ids in counts[1] if ids[:position] == start]
            logits = plain.logits([1, 2, 3, *start])[-1].astype(float)
            expected = np.exp(logits - logits.max())
            expected *= len(seen) / expected.sum()
            common = expected >= 5
            found = np.bincount(seen, minlength=12)
            chi2 = ((found - expected)[common] ** 2 / expected[common]).sum()
            assert len(seen) > 100 and common.sum() >= 4
            assert chi2 < common.sum() + 4 * (2 * common.sum()) ** 0.5


# --- the draft model's own


def test_a_draft_that_does_not_pay_is_seldom_asked(files: dict[str, Path]) -> None:
    with speculating(files, "far") as llm:
        params = SamplingParams(temperature=1.0, top_p=1.0, seed=1, max_tokens=1500,
                                logit_bias={t: -np.inf for t in range(3)})  # fmt: skip
        llm.generate("x", params)
        assert 3 < llm.counters.drafted_tokens < 40


def test_a_draft_follows_the_text_and_begins_anew_where_its_context_ends(
    files: dict[str, Path],
) -> None:
    bans = {token: -np.inf for token in range(3)}
    with Llama(files["short"], threads=1) as small:
        passes: list[list[int]] = []  # the positions of each
        forward = small._engine.forward

        def noted(tokens: Any, sequences: Any, positions: Any, *rest: Any) -> Any:
            passes.append(list(positions))
            return forward(tokens, sequences, positions, *rest)

        small._engine.forward = noted  # type: ignore[method-assign, assignment]
        with Llama(files["near"], threads=1, draft=small) as llm:  # the same weights
            llm._batches.proposer._price = 0.0  # type: ignore[union-attr]
            llm.generate("x" * 30, SamplingParams(temperature=0, max_tokens=400, logit_bias=bans))
            assert llm.counters.accepted_tokens > 20
        assert max(map(max, passes)) == 47
        anew = [n for n, positions in enumerate(passes) if 0 in positions]
        assert len(anew) > 5 and [len(passes[n]) for n in anew[1:]] == [23] * (len(anew) - 1)
        assert sum(map(len, passes)) < 3 * 430  # each token, its guess, half a context each time


def test_completions_of_one_prompt_are_drafted_from_one_reading(files: dict[str, Path]) -> None:
    with Llama(files["near"], threads=1) as small:
        with Llama(files["target"], threads=1, draft=small) as llm:
            params = SamplingParams(temperature=0.5, seed=1, max_tokens=6)
            llm.generate("some long prompt " * 40, params, n=16)
            assert 680 < small.computed_tokens < 680 + 16 * 32


def test_cancelling_is_heard_while_the_draft_model_reads(files: dict[str, Path]) -> None:
    with Llama(files["near"], threads=1) as small:
        with Llama(files["target"], threads=1, draft=small) as llm:
            stream = llm.stream("some long prompt " * 40, SamplingParams(temperature=0.5, seed=1))
            forward = small._engine.forward

            def last(*args: Any) -> Any:
                stream.cancel()
                return forward(*args)

            small._engine.forward = last  # type: ignore[method-assign, assignment]
            assert "".join(stream) and stream.result is not None
            assert stream.result.finish_reason == "cancelled"
            assert len(stream.result.token_ids) == 2 and small.computed_tokens == 64


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_draft_of_a_tiny_context(files: dict[str, Path], tmp_path: Path, size: int) -> None:
    shape = dataclasses.replace(CHAT, max_seq_len=size)
    params = SamplingParams(temperature=0.5, seed=2, max_tokens=60)
    with (
        Llama(files["target"], threads=1) as plain,
        Llama(files["target"], threads=1, draft=write(tmp_path / "tiny.bin", 0, shape)) as llm,
    ):
        assert told(llm.generate("hello", params)) == told(plain.generate("hello", params))
        assert llm.counters.drafted_tokens > 0


def refusal(**options: Any) -> str:
    with pytest.raises(LlamaError) as found:
        Llama(**options)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_what_cannot_draft_is_refused_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    target, shape = files["target"], dataclasses.replace(CHAT, vocab_size=300)
    padded = write(tmp_path / "padded.bin", shape=shape)
    names = f"{padded} cannot draft for {target}, it has another vocabulary: "
    assert refusal(path=target, draft=padded) == names + "expected 259 logits, found 300"
    bare = small_models.write_bin(tmp_path / "bare.bin", small_models.config(vocab_size=259))
    assert refusal(path=target, draft=bare) == (
        f"{bare} cannot draft for {target}, it has another vocabulary: expected a tokenizer of "
        "kind json, found none"
    )
    shape = dataclasses.replace(CHAT, head=Head.SEQUENCE, n_labels=1, tied=False)
    judge = write(tmp_path / "judge.bin", shape=shape)
    assert "both must be language models" in refusal(path=target, draft=judge)
    assert "both must be language models" in refusal(path=judge, draft=target)
    assert "no.bin: No such file" in refusal(path=target, draft=tmp_path / "no.bin")
    assert refusal(path=target, draft=3) == "draft must be a Llama or a path, found int"
    assert "give one of them" in refusal(path=target, draft=target, lookup=3)
    assert refusal(path=target, lookup=65) == "lookup must be 0 to 64, found 65"
    assert refusal(path=target, lookup=-1) == "lookup must be 0 to 64, found -1"
    closed = Llama(target)
    closed.close()
    assert refusal(path=target, draft=closed) == "this Llama is closed"
    with Llama(target) as small, Llama(target, draft=small) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=20)).text
        small.close()
        with pytest.raises(LlamaError, match="the draft model: this Llama is closed"):
            llm.generate("a", SamplingParams(max_tokens=20))
        assert not llm._batches.slots._busy


# --- as a user meets it


def run(script: str, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)], input=stdin, capture_output=True,
        text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_flags_and_what_is_told(stories: Path, files: dict[str, Path]) -> None:
    flags = ["--bin", stories, "--seed=4", "--temperature=0.3", "--max_tokens=150"]
    plain = run("run.py", *flags, "One day")
    for more in (["--lookup"], ["--lookup", "4"], ["--draft-bin", stories]):
        done = run("run.py", *flags, *more, "One day")
        assert (done.returncode, done.stdout) == (0, plain.stdout)
        name = more[0].strip("-").removesuffix("-bin")
        told = re.search(rf", {name}: (\d\.\d) tokens a step \((\d+) of (\d+) drafted\)\n$",
                         done.stderr)  # fmt: skip
        assert told is not None and int(told[2]) <= int(told[3]), done.stderr
        assert ", decode 149 tok at " in done.stderr
        if name == "draft":
            assert float(told[1]) > 5 and told[2] == told[3]
    assert "tokens a step" not in plain.stderr
    refused = run("run.py", *flags, "--draft-bin", files["near"], "One day")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"run.py: {files['near']} cannot draft for {stories}, it has another vocabulary: expected "
        "a tokenizer of kind sentencepiece, found json\n"
    )
    flags = ["--bin", files["target"], "--seed=4", "--max_tokens=40"]
    talk = [run("chat.py", *flags, *more, stdin="Hi Hi Hi\n/stats\n") for more in
            ([], ["--lookup"], ["--draft-bin", files["near"]])]  # fmt: skip
    assert talk[0].stdout == talk[1].stdout == talk[2].stdout
    assert [bool(re.search(r"(lookup|draft): \d", t.stderr)) for t in talk] == [False, True, True]


@pytest.mark.parametrize(
    "words, lookup, prompt",
    [
        ([], 0, None), (["--lookup"], 8, None), (["--lookup", "Once"], 8, "Once"),
        (["Once", "--lookup"], 8, "Once"), (["--lookup", "5", "Once"], 5, "Once"),
        (["--lookup=5", "Once"], 5, "Once"), (["--lookup", "--", "--x"], 8, "--x"),
        (["--lookup", "-3"], -3, None), (["--lookup", "--seed", "3"], 8, None),
    ],
)  # fmt: skip
def test_lookup_may_stand_alone(words: list[str], lookup: int, prompt: str | None) -> None:
    parser = cli.Parser(prog="run.py")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--seed")
    cli.add_speculation_flags(parser)
    args = parser.parse_args(words)
    assert (args.lookup, args.prompt) == (lookup, prompt)
