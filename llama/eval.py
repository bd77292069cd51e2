"""python3 -m llama.eval: how well a model file predicts a text, and how far it is from another.

Perplexity is exp of the mean surprise, -ln p, of a text's tokens. How much context each token has
decides the number, so every figure names its convention:

  llama.cpp  windows side by side, the begin token in place of each one's first where the model
             has one; of a window of N tokens those behind the first N/2 + 1 are scored
  papers     windows side by side, the begin token before the whole text only; all tokens of a
             window but its first are scored (GPTQ, arXiv:2210.17323, and those after it)
  strided    windows that overlap and begin STRIDE apart; each token is scored once, in the first
             window that holds it (transformers' documentation, "Perplexity of fixed-length models")

In the first two a last window that the text does not fill is left out. With --against both files
read the same windows, a part at a time, and no logits are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama import distance
from llama.cli import Parser, default_bin, run, say, upload_shown
from llama.config import Head
from llama.errors import LlamaError
from llama.reward import vocabularies_differ
from llama.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from llama.engine import Engine

CONVENTIONS = {
    "llama.cpp": "the second half of each window",
    "papers": "all of each window but its first token",
    "strided": "each token once, in overlapping windows",
}
USUAL = {"llama.cpp": 512, "papers": 2048, "strided": 2048}  # contexts
NO_TEXT = (
    "--text FILE says on what (- is standard input); without it --against compares on a built-in "
    "page, which is too short for perplexity"
)


# --- windows


@dataclass(frozen=True)
class Window:
    """IDS go through the network together; those behind position FIRST are scored."""

    ids: list[int]
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.first


def windows(
    convention: str, ids: Sequence[int], context: int, bos: int | None, stride: int = 0
) -> Iterator[Window]:
    """The windows of a text's IDS, which begin with BOS where the model has one. STRIDE is of the
    convention "strided" alone."""
    if convention == "strided":
        done = 1  # tokens that are scored, or have nothing before them
        for start in range(0, len(ids), stride):
            end = min(start + context, len(ids))
            done = max(done, start + 1)
            if end > done:
                yield Window(list(ids[start:end]), done - 1 - start)
                done = end
        return
    for start in range(0, len(ids) - context + 1, context):
        part = list(ids[start : start + context])
        if convention == "papers":
            yield Window(part, 0)
        else:
            yield Window(part if bos is None else [bos, *part[1:]], context // 2)


def enough(found: Iterator[Window], tokens: int | None) -> list[Window]:
    """Of the windows FOUND the first that score TOKENS together; None: all."""
    taken: list[Window] = []
    scored = 0
    for window in found:
        if tokens is not None and scored >= tokens:
            break
        taken.append(window)
        scored += window.scored
    return taken


# --- figures


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, as if the scored tokens were independent of each other."""

    value: float
    error: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} ± {self.error:.2g}"


def mean(values: NDArray[np.float64]) -> Estimate:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def perplexity(surprise: NDArray[np.float64]) -> Estimate:
    """Of the tokens' SURPRISE (n), -ln p: the delta method gives its error."""
    m = mean(surprise)
    value = math.exp(m.value) if m.value < 709 else math.inf
    return Estimate(value, value * m.error)


@dataclass(frozen=True)
class Comparison:
    """How a file compares with the reference, over the positions that were looked at."""

    kl: Estimate  # nats, KL(reference || file)
    # the value at rank 0.99 (n - 1) of the n sorted divergences, linear between two neighbours
    kl_99: float
    kl_max: float
    same_token: Estimate  # share, 0 to 1
    reference: Estimate | None = None  # the reference's perplexity
    difference: Estimate | None = None  # file's less reference's; its error is of the pairs

    def lines(self) -> Iterator[str]:
        if self.reference is not None and self.difference is not None:
            share = self.difference.value / self.reference.value
            yield f"  the reference's  {self.reference:.4f}"
            yield f"  difference       {self.difference:+.4f} ({share:+.3%})"
        yield f"  KL divergence    mean {self.kl:.3e} nats, 99th percentile {self.kl_99:.3e}, " \
              f"largest {self.kl_max:.3e}"  # fmt: skip
        yield f"  same next token  {100 * self.same_token.value:.2f}% ± " \
              f"{100 * self.same_token.error:.2g}"  # fmt: skip


class Totals:
    """What each scored position gave: 8 to 25 bytes of it."""

    def __init__(self, n: int, files: int) -> None:
        self.n = 0
        self.surprise = np.full((files, n), np.nan)  # -ln p of the token that came
        self.kl = np.full(n if files > 1 else 0, np.nan)
        self.same = np.zeros(n if files > 1 else 0, bool)

    def add(self, logps: Sequence[NDArray[np.float64]], came: Sequence[int]) -> None:
        """LOGPS of the file and of the reference, if there is one, each (rows, vocab_size); CAME
        are the tokens that came, of which the last row may have none."""
        rows = len(logps[0])
        here = slice(self.n, self.n + rows)
        for file, logp in enumerate(logps):
            self.surprise[file, self.n : self.n + len(came)] = -logp[range(len(came)), came]
        if len(logps) > 1:
            ours, reference = logps
            self.kl[here] = distance.divergence(reference, ours)
            self.same[here] = distance.same_token(reference, ours)
        self.n += rows

    def comparison(self, with_perplexity: bool = True) -> Comparison:
        kl, same = mean(self.kl), mean(self.same.astype(np.float64))
        found = Comparison(kl, float(np.percentile(self.kl, 99)), float(self.kl.max()), same)
        if not with_perplexity:
            return found
        ours, reference = (perplexity(surprise) for surprise in self.surprise)
        paired = ours.value * self.surprise[0] - reference.value * self.surprise[1]
        difference = Estimate(ours.value - reference.value, mean(paired).error)
        return Comparison(kl, found.kl_99, found.kl_max, same, reference, difference)


@dataclass(frozen=True)
class Figures:
    """One convention with one context, measured; or the built-in page, with no convention."""

    convention: str | None
    context: int
    stride: int | None
    windows: int
    scored: int  # tokens; of the page, positions
    perplexity: Estimate | None
    against: Comparison | None

    def lines(self) -> Iterator[str]:
        """For people."""
        if self.convention is None:
            yield f"the built-in page, {self.scored} positions; too short for perplexity"
        else:
            stride = f", {self.stride} apart" if self.stride else ""
            yield (
                f'context {self.context}, convention "{self.convention}": '
                f"{self.windows} windows{stride}, {CONVENTIONS[self.convention]}: "
                f"{self.scored} tokens scored"
            )
            yield f"  perplexity       {self.perplexity:.4f}"
        if self.against is not None:
            yield from self.against.lines()


def evaluate(
    engines: Sequence[Engine], found: Sequence[Window], progress: Callable[[int], object],
    last_too: bool = False,
) -> Totals:  # fmt: skip
    """Runs the windows FOUND through the file's engine and the reference's, if there is one.
    PROGRESS hears how many tokens went through. LAST_TOO: also look at the position behind each
    window's last token, of which nobody knows what came."""
    totals = Totals(sum(window.scored + last_too for window in found), len(engines))
    for window in found:
        known = 0
        end = len(window.ids) - 1 + last_too
        for at, logits in distance.outputs(engines, window.ids, window.first, end):
            rows = len(logits[0])
            came = window.ids[at + 1 : at + 1 + rows]
            totals.add([distance.log_softmax(one) for one in logits], came)
            progress(at + rows - known)
            known = at + rows
    return totals


# --- the command


def arguments() -> argparse.Namespace:
    parser = Parser(
        prog="llama.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bin", type=Path, metavar="FILE", help="the model to judge (default: "
                        "bin/chat-llama.bin)")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="FILE", help="the reference: a model of the"
                        " same vocabulary that counts as right; may be the same file")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; - is standard input")
    parser.add_argument(
        "--context", type=int, action="append", metavar="N", help="tokens of a window; may be given"
        " several times (default: 512 for llama.cpp, 2048 for the others, or all the model has)",
    )  # fmt: skip
    parser.add_argument(
        "--convention", choices=list(CONVENTIONS), action="append",
        help="may be given several times (default: llama.cpp and papers)",
    )  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="N", help="between windows of the convention "
                        "strided (default: half of the context)")  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N", help="stop when so many are scored, "
                        "counting whole windows (default: all of the text)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="all of it as JSON; - is standard output")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--isa", metavar="NAME", help="the CPU kernels (default: the best)")
    devices = ("cpu", "cuda", "auto")
    for prefix, whose in ("", "the model's"), ("against-", "the reference's"):
        parser.add_argument(
            f"--{prefix}activations", type=int, metavar="BITS",
            help=f"{whose}: 8 or 16 bits for what meets quantised weights (default: 16)",
        )  # fmt: skip
        parser.add_argument(
            f"--{prefix}kv", metavar="KIND",
            help=f"{whose} keys and values: f32, f16, q8 (default: f32 for an f32 file, else f16)",
        )  # fmt: skip
        parser.add_argument(
            f"--{prefix}device", choices=devices,
            help=f"{whose}; auto: cuda where there is a GPU and it fits (default: cpu)",
        )  # fmt: skip
        parser.add_argument(
            f"--{prefix}gpu-layers", type=int, metavar="N",
            help=f"with cuda: {whose} last N layers on the GPU, the others on the CPU "
            "(default: all)",
        )  # fmt: skip
    given = parser.parse_args()
    for name in ("tokens", "stride"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} must be 1 or more, found {getattr(given, name)}")
    for context in given.context or ():
        if context < 3:
            parser.error(f"--context must be 3 or more, found {context}")
    if given.against is None:
        for name in OWN:
            if getattr(given, f"against_{name}") is not None:
                flag = f"--against-{name.replace('_', '-')}"
                parser.error(f"{flag} is of the reference, which --against names")
    if given.stride is not None and "strided" not in (given.convention or ()):
        parser.error("--stride is of --convention strided")
    if given.text is None and (given.against is None or given.context or given.convention):
        parser.error(NO_TEXT)
    return given


def read_text(name: str) -> bytes:
    """The bytes of the text file NAME, checked to be UTF-8 and not empty."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    where = "standard input" if name == "-" else name
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise LlamaError(f"{where}: is no UTF-8 text (byte {error.start})") from None
    if not data.strip():
        raise LlamaError(f"{where}: holds no text")
    return data


def sha256(path: Path) -> str:
    """Of the whole file, as sha256sum prints it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def file_facts(engine: Engine, fingerprint: bool) -> dict[str, Any]:
    """What was measured, and how it ran. FINGERPRINT reads all of the file."""
    path, config, info = engine.model.path, engine.config, engine.info()
    weights = sum(math.prod(tensor.shape) for tensor in engine.model.tensors)
    facts = {
        "file": str(path), "bytes": config.file_bytes, "dtype": config.dtype,
        "bits_per_weight": 8 * config.weight_bytes / weights, "device": info.device,
        "isa": info.isa, "threads": info.threads, "activations": info.activations,
        "kv": info.kv_kind,
    }  # fmt: skip
    return facts | ({"sha256": sha256(path)} if fingerprint else {})


def described(facts: dict[str, Any]) -> str:
    return (
        f"{facts['file']}: {facts['dtype']}, {facts['bits_per_weight']:.2f} bits a weight; "
        f"{facts['isa']}, activations {facts['activations']}, kv {facts['kv']}"
    )


@dataclass(frozen=True)
class Task:
    """One thing to measure; the built-in page has no convention."""

    convention: str | None
    context: int
    stride: int | None
    windows: list[Window]


def plan(
    given: argparse.Namespace, engines: Sequence[Engine], ids: Sequence[int], bos: int | None
) -> Iterator[Task]:
    """What is asked for of a text's IDS."""
    most = min(engine.config.max_seq_len for engine in engines)
    for convention in given.convention or ("llama.cpp", "papers"):
        for context in given.context or [min(USUAL[convention], most)]:
            if context > most:
                raise LlamaError(
                    f"--context {context}: expected at most the model's own {most}, what it was "
                    "trained for"
                )
            stride = (given.stride or context // 2) if convention == "strided" else None
            if stride is not None and stride > context:
                raise LlamaError(f"--stride {stride} would skip tokens: expected at most {context}")
            found = enough(windows(convention, ids, context, bos, stride or 0), given.tokens)
            if not found:
                raise LlamaError(f"the text has {len(ids)} tokens and a window takes {context}")
            yield Task(convention, context, stride, found)


def check_pair(engines: Sequence[Engine]) -> Tokenizer:
    """The tokenizer of both; LlamaError where they do not belong together."""
    tokenizers = []
    for engine in engines:
        config = engine.config
        if config.head != Head.LM:
            raise LlamaError(f"{engine.model.path}: is no language model")
        tokenizers.append(
            open_tokenizer(
                *engine.tokenizer, config.vocab_size, config.bos_id, config.eos_ids, engine.meta
            )
        )
    ours, reference = tokenizers[0], tokenizers[-1]
    problem = vocabularies_differ(ours, reference)
    if problem is None and ours.vocab_size != reference.vocab_size:
        problem = f"expected {ours.vocab_size} logits, found {reference.vocab_size}"
    if problem is None and ours.bos_id != reference.bos_id:
        problem = f"expected the begin token {ours.bos_id}, found {reference.bos_id}"
    if problem is not None:
        raise LlamaError(f"{engines[-1].model.path}: has another vocabulary: {problem}")
    return ours


def measure(
    given: argparse.Namespace, engines: Sequence[Engine], data: bytes | None
) -> dict[str, Any]:
    """All that was asked for, as one JSON object; a person reads along on standard output."""
    from llama.machine import cpu_name

    began = time.monotonic()
    tokenizer = check_pair(engines)
    out = say if given.json == "-" else print
    facts = [file_facts(engine, given.json is not None) for engine in engines]
    for name, fact in zip(("model", "reference"), facts, strict=False):
        out(f"{name:<10}{described(fact)}")
    text: dict[str, Any] | None = None
    if data is None:
        page = distance.page(engines[0])
        tasks = [Task(None, len(page), None, [Window(page, 0)])]
    else:
        ids = tokenizer.encode(data.decode(), bos=True)
        text = {"file": given.text, "bytes": len(data), "tokens": len(ids),
                "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
        out(f"{'text':<10}{given.text}: {len(ids)} tokens")
        tasks = list(plan(given, engines, ids, tokenizer.bos_id))
    results = []
    for figures in figures_of(tasks, engines):
        for line in figures.lines():
            out(line)
        results.append(asdict(figures))
    return {
        "command": ["llama.eval", *sys.argv[1:]], "cpu": cpu_name(), "model": facts[0],
        "against": facts[1] if len(facts) > 1 else None, "text": text, "results": results,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def figures_of(tasks: Sequence[Task], engines: Sequence[Engine]) -> Iterator[Figures]:
    """Each task's, under one progress bar."""
    from tqdm import tqdm

    total = sum(len(window.ids) - 1 for task in tasks for window in task.windows)
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for task in tasks:
            page = task.convention is None
            totals = evaluate(engines, task.windows, bar.update, last_too=page)
            bar.clear()
            yield Figures(
                task.convention, task.context, task.stride, len(task.windows), totals.n,
                None if page else perplexity(totals.surprise[0]),
                totals.comparison(not page) if len(engines) > 1 else None,
            )  # fmt: skip


def _plain(value: Any) -> Any:
    """VALUE as JSON has it: null for what is no finite number, such as the error of one token."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


OWN = ("activations", "kv", "device", "gpu_layers")  # flags of each model


def opened(given: argparse.Namespace, path: Path, prefix: str) -> Engine:
    """PATH's engine, by the flags of this PREFIX."""
    from llama.engine import Engine

    own = {name: getattr(given, prefix + name) for name in OWN}
    own["device"] = own["device"] or "cpu"
    with upload_shown() as progress:
        engine = Engine(path, threads=given.threads, isa=given.isa, progress=progress, **own)
    if engine.chosen is not None:
        say(f"device of {path}: {engine.chosen}")
    return engine


def main() -> int:
    given = arguments()
    data = None if given.text is None else read_text(given.text)
    with ExitStack() as stack:
        engines = [stack.enter_context(opened(given, given.bin or default_bin(), ""))]
        if given.against is not None:
            engines.append(stack.enter_context(opened(given, given.against, "against_")))
        found = measure(given, engines, data)
    if given.json is not None:
        line = json.dumps(_plain(found), ensure_ascii=False, allow_nan=False)
        if given.json == "-":
            print(line)
        else:
            Path(given.json).write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run("llama.eval", main))
