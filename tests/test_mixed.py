"""quantize.py --size and --max-kld: promises that are kept, measured on files that others read;
and what the receipt says of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
from test_activations import decoded
from test_quantize import ROOT, SHAPE, command, write
from test_stops import WRITE, start, stopped_at

from llama import distance, format
from llama.calibrate import Calibration, hold_out, texts_of
from llama.config import Config, Head
from llama.distance import Deviation, Distance, measure
from llama.engine import Engine, Model, isa_names
from llama.errors import LlamaError
from llama.exact import rounding
from llama.format import Record, Writer
from llama.mixed import Goal, kinds_of, mix
from llama.model import Transformer
from llama.quant import Kind, matrix_bytes
from llama.receipt import Receipt, read_receipt
from llama.sensitivity import Sensitivity, near_divergence
from llama.shrink import Calibrate, shrink
from llama.stages import aligned, multiply

SHORT = Calibrate(tokens=300)
MORE = Calibrate(tokens=1024)


def kinds(path: Path) -> dict[str, Kind]:
    return {name: r.kind for name, r in format.read(path).records.items() if len(r.shape) == 2}


# --- the engine with matrices of different kinds


SMALL = Config(
    vocab_size=301, dim=96, hidden_dim=170, head_dim=20, n_layers=3, n_heads=5, n_kv_heads=5,
    max_seq_len=128, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
IDS = [(7 * i + i * i) % 301 for i in range(70)]


def mixture(path: Path, out: Path, seed: int) -> Path:
    """PATH with each matrix in a kind of its own, so that those that share an input differ."""
    rng = np.random.default_rng(seed)

    def any_kind(shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return Kind.F32
        few = [kind for kind in Kind if not (kind.rotated and shape[1] % 32)]
        return few[rng.integers(len(few))]

    with Model(path) as model:
        records = [Record(t.name, any_kind(t.shape), t.shape) for t in model.tensors]
        with Writer(out, format.read(path).config, records) as writer:
            for i, r in enumerate(records):
                if len(r.shape) == 1:
                    writer.write(r.name, model.rows(i))
                else:
                    size = matrix_bytes(r.kind, r.rows, r.columns)
                    writer.write(r.name, model.quantize(i, 0, r.rows, r.kind, size)[0])
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [16, 8])
def test_kinds_may_differ_within_a_layer(tmp_path: Path, seed: int, bits: int) -> None:
    """The PyTorch model reads the same file by docs/format.md alone and computes in float64."""
    source = small_models.write_bin(tmp_path / "m.bin", SMALL, seed)
    path = mixture(source, tmp_path / "x.bin", seed)
    assert len(set(list(kinds(path).values())[1:8])) > 2
    right = Transformer(path).forward(IDS).numpy()
    found = []
    for isa in isa_names():
        with Engine(path, kv="f32", activations=bits, isa=isa, threads=2) as engine:
            n = len(IDS)
            logits = engine.forward(IDS, [0] * n, range(n), [True] * n)
            assert logits is not None
            engine.trim(0, 0)
            one = [engine.forward([t], [0], [i], [True]) for i, t in enumerate(IDS)]
            found += [logits.tobytes(), np.concatenate(one).tobytes()]  # type: ignore[arg-type]
        assert np.abs(logits - right).max() < (4e-4 if bits == 16 else 8e-2) * np.abs(right).max()
    assert len(set(found)) == 1


# --- what is measured


@pytest.mark.parametrize("kind", list(Kind))
def test_products(tmp_path: Path, kind: Kind) -> None:
    """By numpy in float64, of rows of a file and of blocks in their place, for any threads."""
    path = small_models.of_kind(tmp_path, SHAPE, kind)
    rows = format.read(path).tensors["output.weight"].astype(np.float64)
    x = np.random.default_rng(0).normal(size=(21, rows.shape[1])).astype(np.float32)
    with Model(path) as model:
        index = [t.name for t in model.tensors].index("output.weight")
        for first, n in ((0, 45), (0, 32), (32, 13), (16, 0), (0, 0)):
            right = x @ rows[first : first + n].T
            found = [multiply(model, index, x, first, n, threads=t) for t in (1, 2, 3)]
            assert np.allclose(found[0], right, atol=1e-5)
            assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
        blocks, _ = model.quantize(index, 16, 29, Kind.Q4, matrix_bytes(Kind.Q4, 29, rows.shape[1]))
        data = Kind.Q4, np.frombuffer(blocks, np.uint8)
        decoded_ = format.untile(data[1], Kind.Q4, 29, rows.shape[1])
        assert np.allclose(multiply(model, index, x, 16, 29, data), x @ decoded_.T, atol=1e-5)
        for bad in ((x[:, :39], 0, 45, None), (x, 0, 46, None), (x, 8, 16, None),
                    (x, 0, 16, data), (x, 50, None, None)):  # fmt: skip
            with pytest.raises(LlamaError):
                multiply(model, index, *bad)
        assert multiply(model, index, x[:0]).shape == (0, 45)


def test_divergence_of_near_rows() -> None:
    """distance.py's, which is float64."""
    rng = np.random.default_rng(0)
    right = (4 * rng.normal(size=(50, 3000))).astype(np.float32)
    for size, bound in ((1.0, 1e-4), (0.1, 1e-3), (0.01, 1e-2)):
        ours = right + (size * rng.normal(size=right.shape) + 3).astype(np.float32)
        p, q = distance.log_softmax(right), distance.log_softmax(ours)
        assert near_divergence(right, ours).sum() == pytest.approx(
            distance.divergence(p, q).sum(), rel=bound
        )
    assert (near_divergence(right, right) == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_each_matrix_alone(stories: Path, tmp_path: Path, tied: bool) -> None:
    """The loss of rounding one matrix is that of a file in which it alone was rounded."""
    if not tied:
        found = format.read(stories)
        shape = replace(found.config, tied=False)
        stories = small_models.write_bin(tmp_path / "m.bin", shape, tokenizer=found.tokenizer)
    texts = texts_of(stories, 300)[:3]
    head = "tok_embeddings.weight" if tied else "output.weight"
    with Model(stories) as model, ExitStack() as stack:
        c, tensors = model.config, model.tensors
        blocks = {}
        for i, t in enumerate(tensors):
            if len(t.shape) == 2:
                data = aligned(matrix_bytes(Kind.Q4, *t.shape))
                data[:] = np.frombuffer(
                    model.quantize(i, 0, t.shape[0], Kind.Q4, data.size)[0], np.uint8
                )
                blocks[t.name] = (Kind.Q4, data)
        coarse = format.untile(blocks["tok_embeddings.weight"][1], Kind.Q4, c.vocab_size, c.dim)
        calibration = stack.enter_context(Calibration(stories, texts))
        steps: list[int] = []
        ours = Sensitivity(calibration.engine, texts, lambda t: model.rows(0, t, 1)[0],
                           done=steps.append)  # fmt: skip
        ours.embedding("tok_embeddings.weight", lambda t: coarse[t])
        expected_steps = ours.steps()
        for number in range(c.n_layers):
            ours.layer(number, {n: b for n, b in blocks.items() if f"layers.{number}." in n})
        losses = ours.losses({head: blocks[head]})
        assert losses.keys() == blocks.keys() and sum(steps) == expected_steps
        for name in ("tok_embeddings.weight", "output.weight", "layers.0.attention.wk.weight",
                     "layers.2.attention.wo.weight", "layers.3.feed_forward.w1.weight",
                     "layers.4.feed_forward.w2.weight"):  # fmt: skip
            if name not in blocks:
                continue
            records = [Record(t.name, Kind.Q4 if t.name == name else t.kind, t.shape)
                       for t in tensors]  # fmt: skip
            path = tmp_path / f"{name}.bin"
            with Writer(path, format.read(stories).config, records) as writer:
                for i, t in enumerate(tensors):
                    writer.write(t.name, blocks[name][1].tobytes() if t.name == name
                                 else model.rows(i))  # fmt: skip
            right = measure(stories, path, texts=texts)
            assert isinstance(right, Distance)
            assert losses[name] == pytest.approx(right.mean_kl, rel=0.02), name


def test_rounding_of_the_engine_alone(stories: Path, tmp_path: Path) -> None:
    """Against a file of the same weights in f32."""
    shrink(stories, tmp_path / "q.bin", 4)
    exact = decoded(tmp_path / "q.bin", tmp_path / "exact.bin")
    ids = hold_out(texts_of(stories, 1024))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.exact.page", lambda engine: ids[0])
        found, activations = rounding(tmp_path / "q.bin")
    right = measure(exact, tmp_path / "q.bin", texts=ids[:1])
    assert isinstance(found, Distance) and isinstance(right, Distance)
    assert activations == 16 and found.n == right.n
    assert found.mean_kl == pytest.approx(right.mean_kl, rel=0.05) and found.mean_kl < 2e-4


# --- promises


@pytest.fixture(scope="module")
def ends(stories: Path) -> tuple[int, int]:
    """The smallest size that may be asked for, as its refusal says, and the source's."""
    out = stories.parent / "never.bin"
    with pytest.raises(LlamaError, match="the smallest possible") as caught:
        mix(stories, out, Goal(size=1))
    assert not out.exists()
    least = int(re.findall(r"takes ([\d,]+),", str(caught.value))[0].replace(",", ""))
    return least, stories.stat().st_size


def test_a_size_is_kept(stories: Path, tmp_path: Path, ends: tuple[int, int]) -> None:
    """From the smallest on: never above, no more below than a matrix's step, and nearer the source
    for each step up."""
    least, _ = ends
    found: list[Receipt] = []
    for n, size in enumerate((least, least + 30_000, least + 250_000)):
        out = tmp_path / f"{n}.bin"
        receipt = mix(stories, out, Goal(size=size), calibrate=MORE)
        assert size - 20_000 < out.stat().st_size <= size and receipt.bytes_after <= size
        assert receipt.kinds == {name: kind.label for name, kind in kinds(out).items()}
        found.append(receipt)
    kl = [r.held_out.mean_kl for r in found if isinstance(r.held_out, Distance)]
    assert kl == sorted(kl, reverse=True) and kl[2] < kl[0] / 10
    assert all(r.predicted / 2 < measured < 2 * r.predicted
               for r, measured in zip(found, kl, strict=True))  # fmt: skip
    assert set(found[0].kinds.values()) <= {"q4", "q4r"} and len(set(found[1].kinds.values())) > 1


def test_a_better_use_of_the_bytes(stories: Path, tmp_path: Path) -> None:
    """On fresh stories: no worse than as many bytes spent on matrices taken at random."""
    plain = tmp_path / "plain.bin"
    receipt = mix(stories, tmp_path / "ours.bin", Goal(size=240_000), calibrate=MORE)
    fresh = texts_of(stories, 6000)[-4:]
    ours = measure(stories, tmp_path / "ours.bin", texts=fresh)
    names = list(receipt.kinds)
    with Model(stories) as model:
        for seed in range(3):
            rng, left = np.random.default_rng(seed), receipt.bytes_after
            left -= format.read(tmp_path / "ours.bin").records[names[0]].offset
            kind = dict.fromkeys(names, Kind.Q4)
            shapes = {t.name: t.shape for t in model.tensors}
            left -= sum(matrix_bytes(Kind.Q4, *shapes[name]) for name in names) + 20_000
            for name in rng.permutation(names):
                step = matrix_bytes(Kind.Q8, *shapes[name]) - matrix_bytes(Kind.Q4, *shapes[name])
                if step <= left:
                    kind[name], left = Kind.Q8, left - step
            records = [Record(t.name, kind.get(t.name, t.kind), t.shape) for t in model.tensors]
            with Writer(plain, format.read(stories).config, records, force=True) as writer:
                for i, r in enumerate(records):
                    size = matrix_bytes(r.kind, r.rows, r.columns)
                    writer.write(r.name, model.quantize(i, 0, r.rows, r.kind, size)[0]
                                 if len(r.shape) == 2 else model.rows(i))  # fmt: skip
            theirs = measure(stories, plain, texts=fresh)
            assert isinstance(ours, Distance) and isinstance(theirs, Distance)
            assert ours.mean_kl < theirs.mean_kl


@pytest.mark.parametrize("most", [0.02, 1e-3, 2e-5])
def test_a_distance_is_kept(
    stories: Path, tmp_path: Path, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the file itself, on text that was not used, measured once more here."""
    out = tmp_path / "q.bin"
    receipt = mix(stories, out, Goal(max_kld=most), calibrate=MORE)
    _, held_out = hold_out(texts_of(stories, 1024 + 1024 // 15))
    found = measure(stories, out, texts=held_out, name="that text, held out")
    assert found == receipt.held_out and isinstance(found, Distance) and found.mean_kl <= most
    smallest = set(receipt.kinds.values()) == {"q4"}
    assert smallest or found.mean_kl > most / 2  # not kept by being far too large
    told = capsys.readouterr().err
    assert told.count("another mixture") == len(re.findall(r"predicted \S+, measured", told))


def test_a_distance_below_16_bits_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match=r"--max-kld 1e-12: .* (\S+) nats were measured") as caught:
        mix(stories, tmp_path / "q.bin", Goal(max_kld=1e-12), calibrate=SHORT)
    assert 1e-12 < float(re.findall(r"kind (\S+) nats", str(caught.value))[0]) < 1e-5
    assert list(tmp_path.iterdir()) == []


def test_from_16_bits_nothing_is_lost(stories: Path, tmp_path: Path) -> None:
    """An f16 source at its own size is itself, weight by weight."""
    half = small_models.quantized(stories, tmp_path / "h.bin", Kind.F16)
    receipt = mix(half, tmp_path / "q.bin", Goal(max_kld=1e-12), calibrate=SHORT)
    assert set(receipt.kinds.values()) == {"f16"}
    assert isinstance(receipt.held_out, Distance) and receipt.held_out.mean_kl == 0
    a, b = format.read(half).tensors, format.read(tmp_path / "q.bin").tensors
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert receipt.rounding is None and receipt.activations == 0


def test_a_mixture_may_be_shrunk_again(stories: Path, tmp_path: Path) -> None:
    """What is in 4 bits stays as it is, byte for byte."""
    mix(stories, tmp_path / "a.bin", Goal(size=260_000), calibrate=SHORT)
    shrink(tmp_path / "a.bin", tmp_path / "b.bin", 4, calibrate=SHORT)
    before, after = kinds(tmp_path / "a.bin"), kinds(tmp_path / "b.bin")
    four, eight = {Kind.Q4, Kind.Q4R}, {Kind.Q8, Kind.Q8R}
    assert eight & set(before.values()) and four & set(before.values())
    a, b = format.read(tmp_path / "a.bin").tensors, format.read(tmp_path / "b.bin").tensors
    for name, kind in before.items():
        layers = name.startswith("layers.")
        assert after[name] in (four if layers else {kind})
        assert np.array_equal(a[name], b[name]) == (kind == after[name])


def test_same_bytes_for_any_threads(tmp_path: Path) -> None:
    source = write(tmp_path / "m.bin")
    found = set()
    for goal in (Goal(size=45_000), Goal(max_kld=1e-3)):
        for threads in (1, 2, 3, 3):
            mix(source, tmp_path / "q.bin", goal, threads=threads, force=True, calibrate=SHORT)
            found.add((tmp_path / "q.bin").read_bytes())
    assert len(found) == 2


@pytest.mark.parametrize("head", [Head.NONE, Head.SEQUENCE])
def test_other_heads(stories: Path, tmp_path: Path, head: Head) -> None:
    """A size for the sake of their numbers; a text must be given."""
    found = format.read(stories)
    labels = 3 * (head == Head.SEQUENCE)
    shape = replace(found.config, head=head, n_labels=labels, tied=False)
    source = small_models.write_bin(
        tmp_path / "m.bin", shape, tokenizer=found.tokenizer, meta=found.meta
    )
    with pytest.raises(LlamaError, match="--calibrate FILE"):
        mix(source, tmp_path / "q.bin", Goal(size=300_000))
    with pytest.raises(LlamaError, match="--max-kld is about next tokens"):
        mix(source, tmp_path / "q.bin", Goal(max_kld=0.1))
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 100)
    calibrate = Calibrate(tmp_path / "text.txt", 512)
    errors = []
    for size in (230_000, 300_000):
        receipt = mix(source, tmp_path / "q.bin", Goal(size=size), calibrate=calibrate, force=True)
        assert isinstance(receipt.held_out, Deviation) and receipt.bytes_after <= size
        assert receipt.kinds.get("output.weight", "f32") == "f32"
        assert receipt.held_out.relative_error**2 < 4 * receipt.predicted
        errors.append(receipt.held_out.relative_error)
    assert errors[1] < errors[0]


def test_kinds_that_a_matrix_may_have(tmp_path: Path) -> None:
    """Smaller ones and its own; where blocks of 32 columns are larger than the weights, none."""
    for kind, expected in ((Kind.F32, "q4 q8 f16"), (Kind.F16, "q4 q8 f16"),
                           (Kind.BF16, "q4 q8 bf16"), (Kind.Q8, "q4 q8"),
                           (Kind.Q4, "q4")):  # fmt: skip
        with Model(small_models.of_kind(tmp_path, SMALL, kind)) as model:
            assert [k.label for k in kinds_of(model.tensors[2], Head.LM)] == expected.split()
    narrow = replace(SHAPE, dim=2, hidden_dim=3)
    with Model(small_models.write_bin(tmp_path / "n.bin", narrow)) as model:
        assert kinds_of(model.tensors[2], Head.LM) == [Kind.F16]


# --- the receipt and the command


def test_errors_of_what_matrices_yield(stories: Path, tmp_path: Path) -> None:
    """sqrt(tr(E H E^T) / tr(W H W^T)) by numpy, with H of the inputs that calibration had."""
    calibrate = Calibrate(tokens=200)  # all of them are looked at
    receipt = shrink(stories, tmp_path / "q.bin", 4, calibrate=calibrate)
    texts, _ = hold_out(texts_of(stories, 200 + 200 // 15))
    before, after = format.read(stories).tensors, format.read(tmp_path / "q.bin").tensors
    name = "layers.0.attention.wv.weight"
    w = before["layers.0.attention_norm.weight"].astype(np.float64)
    x = np.concatenate([before["tok_embeddings.weight"][text] for text in texts]).astype(np.float64)
    x *= w / np.sqrt((x * x).mean(1, keepdims=True) + format.read(stories).config.norm_eps)
    error = ((after[name] - before[name]) @ x.T) ** 2
    right = np.sqrt(error.sum() / ((before[name] @ x.T) ** 2).sum())
    assert receipt.outputs[name] == pytest.approx(right, rel=1e-3)
    assert receipt.outputs.keys() == {n for n in receipt.errors if n.startswith("layers.")}
    assert not shrink(stories, tmp_path / "p.bin", 4).outputs


def lines(text: str) -> Iterator[str]:
    yield from (line.strip() for line in text.splitlines())


def test_the_command(stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.bin"
    done = command("--bin", stories, "--size", "250KB", "--out", out, "--calibration-tokens", 1024)
    assert (done.returncode, done.stdout) == (0, "") and out.stat().st_size <= 250_000
    with Model(out) as model:
        receipt = read_receipt(model.meta["quantize.receipt"])
    assert list(lines(done.stderr)) == [f"wrote {out}", *map(str.strip, receipt.lines())]
    assert receipt.command.startswith("quantize.py --bin") and "--size 250KB" in receipt.command
    info = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--info", "--bin", str(out)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "to a mixture of kinds" in info and "measured with --activations 16" in info
    for line in receipt.lines():
        assert line.strip() in info
    drawn = [line.split()[-1] for line in receipt.lines() if line.startswith("  attention.w")]
    assert any(re.fullmatch("[48f]{5}", kinds_) for kinds_ in drawn)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--size", "3.9XB"), "--size is '3.9XB', expected a size such as 3.9GB"),
        (("--size", "10KB"), "the smallest possible"),
        (("--size", "1MB", "--max-kld", "1"), "not allowed with argument"),
        (("--size", "1MB", "--bits", "4"), "not allowed with argument"),
        (("--max-kld", "0"), "--max-kld is 0.0, expected nats above 0"),
        (("--max-kld", "nan"), "--max-kld is nan"),
        (("--max-kld", "x"), "invalid float value: 'x'"),
        (("--size", "1MB", "--calibrate", "none"), "measure on a text"),
        (("--max-kld", "1", "--calibration-tokens", "3"), "--calibration-tokens is 3"),
    ],
)
def test_bad_words(stories: Path, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = command("--bin", stories, "--out", tmp_path / "q.bin", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(stories: Path, tmp_path: Path) -> None:
    """And said before anything is measured."""
    out = tmp_path / "q.bin"
    out.write_text("mine")
    with pytest.raises(LlamaError, match="--force"):
        mix(stories, out, Goal(size=1), calibrate=Calibrate(tmp_path / "no text.txt"))
    assert out.read_text() == "mine"


@pytest.mark.parametrize("place", ["llama.sensitivity.Sensitivity.layer", WRITE])
def test_interrupt_leaves_nothing(tmp_path: Path, place: str) -> None:
    """Ctrl-C while it measures, and while it writes."""
    source = write(tmp_path / "m.bin", SHAPE)
    stop = stopped_at(signal.SIGINT, place)
    process = start("quantize.py", "--max-kld=0.01", f"--bin={source}", first=stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin"]
