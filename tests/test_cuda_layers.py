"""A model split over the CPU and the emulated GPU; what its sessions share there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from emulator import (
    FEW,
    MANY,
    ROUNDED,
    SHAPE,
    WIDE,
    built,
    distance,
    feed,
    free_bytes,
    greedy,
    run_out,
)  # fmt: skip

from llama import Llama, harness, stages
from llama._lib import ffi
from llama.config import Head
from llama.engine import Engine, Model, sample_logits
from llama.errors import LlamaError
from llama.quant import Kind
from llama.sampling import SamplingParams

pytestmark = [pytest.mark.usefixtures("cuda"), pytest.mark.other_build]
DEEP = replace(SHAPE, n_layers=4)
GREEDY = SamplingParams(temperature=0.0)
MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_models.write_bin(tmp_path / "model.bin", DEEP)


def split(path: Path, n: int, **options: Any) -> Engine:
    return Engine(path, device="cuda", gpu_layers=n, **options)


# ---- the same answers


@pytest.mark.parametrize(
    "n, kv", [*((n, "f32") for n in range(6)), (2, "f16"), (4, "f16"), (3, "q8")]
)
def test_greedy_tokens_of_a_real_model(stories: Path, n: int, kv: str) -> None:
    """Of any number of its layers there; once the GPU has chosen, and once the host."""
    with Engine(stories, kv=kv) as cpu, split(stories, n, kv=kv) as both:
        info = both.info()
        assert (info.device, info.host_layers) == ("cuda", both.config.n_layers - n)
        theirs = greedy(cpu, [1], 40)
        assert greedy(both, [1], 40) == theirs
        both.trim(0, 0)
        for i, (now, after) in enumerate(pairwise(theirs)):
            both.forward([now], [0], [i], [True], keep=True)
            assert both.sample(0, GREEDY, [], 0, i) == after


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_logits_of_trims_forks_and_batches(model: Path, n: int, kv: str) -> None:
    rng = np.random.default_rng(3)
    with Engine(model, kv=kv, isa="scalar") as cpu, split(model, n, kv=kv) as both:
        for e in (cpu, both):
            feed(e, np.arange(75))
            e.fork(0, 1, 37)  # a shared page, copied when one writes in it
            e.fork(0, 2, 32)
            e.trim(0, 35)
            e.slide(2, 3, 11)
        for count in (1, 1, 1, 5):
            sequences = np.repeat([2, 0, 1, 3], count)
            tokens = rng.integers(0, 101, 4 * count)
            positions = np.concatenate([both.length(s) + np.arange(count) for s in (2, 0, 1, 3)])
            want = rng.integers(0, 2, 4 * count).astype(bool) | (positions == 0)
            theirs, ours = (e.forward(tokens, sequences, positions, want) for e in (cpu, both))
            assert distance(ours, theirs) < MANY + ROUNDED[kv]


@pytest.mark.parametrize("head", list(Head))
def test_heads_hidden_states_and_the_stream(tmp_path: Path, head: Head) -> None:
    labels = {Head.SEQUENCE: 3, Head.ANSWER: 2, Head.TOKEN: 5}.get(head, 0)
    path = small_models.write_bin(tmp_path / "m.bin", replace(DEEP, head=head, n_labels=labels))
    for n in (0, 2):
        with Engine(path) as cpu, split(path, n) as both:
            assert distance(feed(both, range(75)), feed(cpu, range(75))) < FEW
            assert distance(feed(both, [5], hidden=True), feed(cpu, [5], hidden=True)) < FEW
            want = [True, False, True]
            ours, theirs = (e.trace([1, 2, 3], [1] * 3, range(3), want) for e in (both, cpu))
            same = DEEP.n_layers - n + 1  # the CPU's share, to the last bit
            assert np.array_equal(ours[0][:same], theirs[0][:same])
            assert distance(ours[0], theirs[0]) < FEW and distance(ours[1], theirs[1]) < FEW


@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4, Kind.Q8R, Kind.Q4R, Kind.Q4E])
@pytest.mark.parametrize("tied", [False, True])
def test_kinds_and_tied_models(tmp_path: Path, kind: Kind, tied: bool) -> None:
    path = small_models.of_kind(tmp_path, replace(WIDE, tied=tied), kind)
    with Engine(path, kv="f32", activations=16) as cpu:
        theirs = feed(cpu, range(40))
    for n in range(WIDE.n_layers + 1):
        with split(path, n, kv="f32", activations=16) as both:
            assert distance(feed(both, range(40)), theirs) < MANY


def test_sampling_on_either_side(model: Path) -> None:
    """What the GPU leaves to the host, logits that are too many to stay, log-probabilities."""
    with split(model, 2) as both:
        logits = feed(both, range(70))
        both.trim(0, 0)
        both.forward(range(70), [0] * 70, range(70), [True] * 70, keep=True)
        for row in (0, 69):
            for params in (GREEDY, SamplingParams(temperature=0.8, typical_p=0.6, seed=4)):
                ours = both.sample(row, params, [], 0, 3)
                assert ours == sample_logits(logits[row], params, [], 0, 3)
        logprob, top = both.logprobs(69, 5, 3)
        whole = logits[69] - np.log(np.exp(logits[69].astype(float)).sum())
        assert abs(logprob - whole[5]) < 1e-5 and max(top.values()) == pytest.approx(whole.max())


def test_stages_run_where_their_layer_is(model: Path, monkeypatch: pytest.MonkeyPatch,
                                         emulated: Any) -> None:  # fmt: skip
    monkeypatch.setattr(stages, "lib", emulated)
    x = np.random.default_rng(1).standard_normal((9, SHAPE.dim)).astype(np.float32)
    for n in (0, 2):
        with Engine(model) as cpu, split(model, n) as both:
            streams, given = [x.copy(), x.copy()], [x, x]
            for layer in range(DEEP.n_layers):
                for stage in range(6):
                    given = [
                        stages.run_stage(e, layer, stage, s, g, {})
                        for e, s, g in zip((both, cpu), streams, given, strict=True)
                    ]
                assert distance(*streams) < MANY and distance(*given) < MANY


# ---- keys and values


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_keys_and_values_are_the_cpus(model: Path, n: int, kv: str) -> None:
    """In the plain layout, whichever side they come from; so is a sequence that they make."""
    with Engine(model, kv=kv) as cpu, split(model, n, kv=kv) as both:
        feed(cpu, range(90)), feed(both, range(90))
        assert both.info().kv_bytes_per_position == cpu.info().kv_bytes_per_position
        ours, theirs = both.read_kv(0, 3, 85), cpu.read_kv(0, 3, 85)
        assert len(ours) == len(theirs)
        if kv == "f32":
            assert distance(np.frombuffer(ours, "f4"), np.frombuffer(theirs, "f4")) < MANY
        whole = cpu.read_kv(0, 0, 90)
        both.write_kv(1, 0, 90, whole)
        assert both.read_kv(1, 0, 90) == whole
        assert distance(feed(both, [7], 1), feed(cpu, [7])) < FEW


def test_a_saved_conversation_goes_on_anywhere(tiny: Path, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    messages = [{"role": "user", "content": "hello"}]
    path, places = tmp_path / "a.session", [("cpu", None), ("cuda", None), ("cuda", 1), ("cuda", 0)]
    with Llama(tiny, device="cuda", gpu_layers=1) as llm:
        messages.append({"role": "assistant", "content": llm.chat(messages, params).text})
        tokens = llm.save_session(path, messages)
        messages.append({"role": "user", "content": "and now?"})
        right = llm.chat(messages, params)
    for device, n in places:
        with Llama(tiny, device=device, gpu_layers=n) as llm:
            assert llm.load_session(path) == (messages[:2], tokens) and tokens > 20
            result = llm.chat(messages, params)
            assert result.cached_tokens == right.cached_tokens == tokens
            assert result.token_ids == right.token_ids


def test_running_out_is_an_error_and_the_process_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = free_bytes()
    with split(model, 2) as e, Engine(model) as cpu:
        run_out(e, cpu, monkeypatch)
    assert free_bytes() == before


def test_what_breaks_is_found_on_either_side(tmp_path: Path) -> None:
    from test_cuda import rewrite

    path = small_models.write_bin(tmp_path / "m.bin", DEEP)
    for layer in range(4):
        broken = tmp_path / f"broken{layer}.bin"
        name = f"layers.{layer}.ffn_norm.weight"
        rewrite(path, broken, lambda n, v, name=name: v * np.float32(np.nan) if n == name else v)
        with split(broken, 2) as e, pytest.raises(LlamaError, match=f"layer {layer} gives numbers"):
            feed(e, [1, 2])


# ---- memory and mistakes


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4])
def test_the_plan_names_how_many_layers_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """That many open, and one more does not; with none of them room for a context is left."""
    path = small_models.of_kind(tmp_path, replace(WIDE, n_layers=6), kind)
    before = free_bytes()
    with Engine(path, device="cuda", max_seq_len=4096) as e:
        whole = before - free_bytes() + 6 * 4096 * e.info().kv_bytes_per_position // 6
    taken, seen = (4 << 30) - before, set()
    for less in (1, whole // 6, whole // 3, whole // 2):
        monkeypatch.setenv("CUDA_ON_CPU_MEMORY", str(taken + whole + 64 * MIB - less))
        message = r"; with this one the last (\d) of 6 layers fit$"
        with pytest.raises(LlamaError, match=message) as caught:
            Engine(path, device="cuda", max_seq_len=4096)
        assert "\n" not in str(caught.value)
        fits = int(re.findall(r"the last (\d) of", str(caught.value))[0])
        split(path, fits, max_seq_len=4096).close()
        message = f"weights of {fits + 1} layers.* the last {fits} of 6 layers fit"
        with pytest.raises(LlamaError, match=message):
            split(path, fits + 1, max_seq_len=4096)
        seen.add(fits)
    assert len(seen) > 1


def test_what_cannot_be_split_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"gpu_layers": 2}, "gpu_layers goes with device 'cuda' or 'auto', found 'cpu'"),
        ({"gpu_layers": 5, "device": "cuda"}, "gpu_layers is 5, expected 0 to 4, the layers of "),
        ({"gpu_layers": -1, "device": "auto"}, "gpu_layers is -1, expected 0 to 4"),
    ):
        with pytest.raises(LlamaError) as caught:
            Engine(model, **options)  # type: ignore[arg-type]
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "none")
    with pytest.raises(LlamaError, match='^device "cuda": this machine has no NVIDIA driver$'):
        split(model, 2)
    with Engine(model, device="auto", gpu_layers=2) as e:  # all of it, then
        assert (e.info().device, e.info().host_layers) == ("cpu", 0)


def test_the_library_itself_refuses_them(model: Path, emulated: Any) -> None:
    options, session = ffi.new("llama_session_options *"), ffi.new("llama_session **")
    with Model(model) as m:
        for device, layers, message in (
            (b"cpu", 1, 'layers are split with device "cuda" only, found device "cpu"'),
            (b"cuda", 5, "host_layers is 5, expected at most 4, the model's layers"),
        ):
            options.device = name = ffi.new("char[]", device)
            options.host_layers = layers
            assert emulated.llama_session_open(m.handle, options, session) == -1
            assert ffi.string(emulated.llama_error()).decode() == message
            del name


def test_auto_and_what_a_session_tells(model: Path) -> None:
    with Engine(model, device="auto", gpu_layers=3, isa="scalar", threads=1) as e:
        assert e.chosen == "cuda, emulated on the CPU, sm_80 and scalar"
        info = e.info()
        assert (info.device, info.host_layers, info.threads) == ("cuda", 1, 1)
        assert 0 < info.gpu_scratch_bytes < info.scratch_bytes
        tensors = {t.name: t.bytes for t in e.model.tensors}
        layer = sum(n for name, n in tensors.items() if name.startswith("layers.0."))
        assert e.plan.weights == tensors["tok_embeddings.weight"] + layer
        assert e.plan.kv_bytes_per_position * 4 == info.kv_bytes_per_position
        assert e.plan.scratch == info.scratch_bytes - info.gpu_scratch_bytes


# ---- weights that sessions share


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_sessions_of_a_model_share_its_weights(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Brought there once, also for a session with fewer layers there; given back with the last."""
    path = small_models.write_bin(tmp_path / "m.bin", WIDE)
    before = free_bytes()
    with Model(path) as model:
        weights = model.config.weight_bytes
        told: list[int] = []
        taken = []
        engines = []
        for n in (None, None, 1):
            free = free_bytes()
            engines.append(Engine(model, device="cuda", gpu_layers=n,
                                  progress=lambda done, total: told.append(total)))  # fmt: skip
            taken.append(free - free_bytes())
        assert len(told) == 1 and told[0] >= weights
        assert taken[1] == pytest.approx(taken[0] - told[0], abs=4096) and taken[2] <= taken[1]
        answers = [feed(e, range(5)) for e in engines]
        assert np.array_equal(answers[0], answers[1])
        assert distance(answers[2], answers[0]) < FEW
        for i, closing in enumerate(order):
            engines[closing].close()
            for left in order[i + 1 :]:
                engines[left].trim(0, 0)
                assert np.array_equal(feed(engines[left], range(5)), answers[left])
        assert free_bytes() == before
        with Engine(model, device="cuda") as again:  # brought there anew
            assert np.array_equal(feed(again, range(5)), answers[0])
    assert free_bytes() == before


def test_sessions_that_open_at_once_share(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "m.bin", WIDE)
    before = free_bytes()
    told: list[int] = []
    with Model(path) as model, ThreadPoolExecutor(4) as pool:

        def opened(_: int) -> Engine:
            return Engine(model, device="cuda", progress=lambda done, total: told.append(done))

        engines = list(pool.map(opened, range(4)))
        assert len(told) == 1
        answers = [feed(e, range(9)) for e in engines]
        assert all(np.array_equal(a, answers[0]) for a in answers)
        list(pool.map(Engine.close, engines))
    assert free_bytes() == before


def test_threads_whose_gpu_is_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another library in the process may have chosen for them."""

    def work(e: Engine) -> Any:
        feed(e, range(40))
        e.fork(0, 1, 37)
        e.slide(1, 2, 9)
        e.write_kv(2, 0, 40, e.read_kv(0, 0, 40))
        rows = [feed(e, [5] * n, s) for s in range(3) for n in (1, 1, 1, 30)]
        e.forward([1], [3], [0], [True], keep=True)
        chosen = e.sample(0, SamplingParams(repetition_penalty=1.2), [1], 0, 0)
        return rows, chosen, e.logprobs(0, 5, 3)

    with Engine(model, device="cuda") as e:
        rows, *rest = work(e)
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "second")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        e = one.submit(Engine, model, device="cuda").result()
        again, *others = other.submit(work, e).result()
        one.submit(e.close).result()
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True)) and rest == others


def test_who_is_told_of_progress_may_close_another(model: Path) -> None:
    """As Python's collector of garbage may, in the middle of anything."""
    before = free_bytes()
    with Model(model) as m:
        first = Engine(m, device="cuda", gpu_layers=1)
        with Engine(m, device="cuda", progress=lambda done, total: first.close()) as second:
            feed(second, [1, 2])
        with pytest.raises(LlamaError, match="used after close"):
            feed(first, [1])
        assert free_bytes() == before


def test_an_engine_leaves_a_model_that_it_was_given_open(model: Path) -> None:
    with Model(model) as m:
        Engine(m).close()
        with Engine(m) as e:
            feed(e, [1])
        assert m.config.n_layers == 4


# ---- the commands


def evaluated(*words: str) -> Any:
    library = str(built("", "llama") / "libllama.so")
    command = [sys.executable, "-m", "llama.eval", *words, "--json", "-"]
    done = subprocess.run(command, env=os.environ | {"LLAMA_LIBRARY": library}, text=True,
                          capture_output=True)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_eval_on_the_gpu_against_the_cpu(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What a day this is, and what a night it was. " * 12, encoding="utf-8")
    both = ("--bin", str(tiny), "--against", str(tiny), "--text", str(text), "--context", "64")
    for flags in (["cuda"], ["cuda", "--gpu-layers", "1"], ["auto", "--gpu-layers", "0"]):
        rc, out, err = evaluated(*both, "--device", *flags)
        assert rc == 0, err
        assert (f"device of {tiny}: cuda, emulated on the CPU" in err) is (flags[0] == "auto")
        found = json.loads(out)
        assert (found["model"]["device"], found["against"]["device"]) == ("cuda", "cpu")
        assert found["model"]["isa"].startswith("emulated on the CPU, sm_80")
        assert all(r["against"]["kl"]["value"] < 1e-6 for r in found["results"])
    assert evaluated(*both, "--against-gpu-layers", "1")[1:] == (
        "", "llama.eval: gpu_layers goes with device 'cuda' or 'auto', found 'cpu'\n")  # fmt: skip


def test_the_harness_takes_layers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with harness.Adapter(str(tiny), gpu_layers=1, device="cuda:0").llm as llm:
        info = llm._engine.info()
        assert (info.device, info.host_layers) == ("cuda", llm.config.n_layers - 1)
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", "none")
    with pytest.raises(LlamaError, match="this machine has no NVIDIA driver"):
        harness.Adapter(str(tiny), gpu_layers=1, device="cuda:0")
    with harness.Adapter(str(tiny), device="cuda:0").llm as llm:
        assert llm._engine.info().device == "cpu"


def test_a_draft_is_on_the_gpu_whole(tiny: Path) -> None:
    told: list[tuple[int, int]] = []
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with Llama(tiny) as llm:
        right = llm.generate("What a day", params).token_ids
    with Llama(tiny, device="auto", gpu_layers=1, draft=tiny,
               progress=lambda done, total: told.append((done, total))) as llm:  # fmt: skip
        assert llm._own_draft is not None and llm._own_draft._engine.info().host_layers == 0
        assert [done for done, total in told if done == total] == [total for _, total in told]
        assert len(told) == 2 and told[0][1] < told[1][1]  # a layer and the head; all of them
        assert str(llm.chosen).count("cuda, emulated on the CPU, sm_80") == 2
        assert llm.generate("What a day", params).token_ids == right
        assert llm.counters.drafted_tokens > 0


# ---- weights on their way


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    path = small_models.write_bin(tmp_path / "m.bin", replace(WIDE, dim=768, hidden_dim=4000))
    told: list[tuple[int, int]] = []
    for n in (None, 1):
        told.clear()
        before = free_bytes()
        with Engine(path, device="cuda", gpu_layers=n,
                    progress=lambda done, total: told.append((done, total))) as e:  # fmt: skip
            assert len(told) > 1 and told[-1][0] == told[-1][1] <= e.config.weight_bytes + MIB
            assert before - free_bytes() > told[-1][1]
        done = [d for d, _ in told]
        assert done == sorted(set(done)) and len({total for _, total in told}) == 1
    told.clear()
    Engine(path, progress=lambda done, total: told.append((done, total))).close()
    assert not told  # the CPU reads the file in place


SHOWN = """
import time
from llama.cli import upload_shown
with upload_shown({}) as show:
    show(10, 100), time.sleep(0.2), show(60, 100)
"""


@pytest.mark.parametrize("delay, terminal", [(0.1, True), (600, True), (0.1, False)])
def test_a_bar_is_shown_where_it_takes_long(delay: float, terminal: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", SHOWN.format(delay)], stderr=theirs, check=True)
    os.write(theirs, b".")
    shown = os.read(ours, 10000).decode()
    os.close(ours), os.close(theirs)
    assert ("weights to the GPU" in shown and "60" in shown) is (terminal and delay < 1)
    assert shown == "." or "weights" in shown


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no")])
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_progress_may_stop_it(model: Path, error: Any, device: str) -> None:
    before = free_bytes()

    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, ValueError)):
        Engine(model, device=device, progress=stop)
    assert free_bytes() == before
