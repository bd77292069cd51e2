"""What the root scripts share: flags, opening the model, and how a program ends.

Only text goes to stdout; prompts, notes and the speed line go to stderr. Whatever is wrong is
one line behind the program's name and exit status 1; Ctrl-C is 130. SIGTERM and SIGHUP clean up as
Ctrl-C does, say nothing and are 143 and 129, as a shell counts them.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from llama.errors import LlamaError
from llama.overflow import POLICIES
from llama.sampling import SamplingParams, params_from

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_BIN = ROOT / "bin" / "chat-llama.bin"

# --type: what each method sets; other flags come on top
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"top_k": 0, "top_p": 1.0},
    "top_k": {"top_k": 40, "top_p": 1.0},
    "top_p": {"top_k": 0, "top_p": 0.9},
}
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "mirostat", "seed")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Parser(argparse.ArgumentParser):
    """Flags may be written with dashes or underscores; a wrong one is one line and status 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        for at, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name.startswith("--") and " " not in name:
                flag = known.get(name.replace("_", "-"))
                if flag is None:
                    flags = list(self._option_string_actions)
                    near = [it for it in flags if it.startswith(name)]
                    bare = [it.lstrip("-") for it in flags]  # all would be alike in their dashes
                    alike = difflib.get_close_matches(name.lstrip("-"), bare, 1)
                    near = near or [f"--{it}" for it in alike]
                    self.error(f"there is no {name}" + (f", but {near[0]}" if near else ""))
                words[at] = flag + equals + value
                action = self._option_string_actions[flag]
                if action.nargs == "?" and not equals:
                    following = "".join(words[at + 1 : at + 2])
                    if not following.removeprefix("-").isdecimal():  # the prompt, perhaps
                        words[at] += f"={action.const}"
        return super().parse_known_args(words, namespace)


def add_sampling_flags(parser: Parser, max_tokens: int) -> None:
    group = parser.add_argument_group("how tokens are chosen")
    group.add_argument(
        "--type", choices=list(METHODS), default="top_p",
        help="the method: greedy takes the likeliest token; the others draw, at --temperature, "
        "from all tokens, from the top_k (40) likeliest, or from the likeliest that together "
        "have probability top_p (0.9) (default: top_p)",
    )  # fmt: skip
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 0.6)")
    group.add_argument("--top_k", type=int, metavar="K", help="0 keeps all")
    group.add_argument("--top_p", type=float, metavar="P", help="1 keeps all")
    group.add_argument(
        "--min_p", type=float, metavar="P",
        help="drop tokens below P times the likeliest one's probability (default: 0, off)",
    )  # fmt: skip
    group.add_argument(
        "--repetition_penalty", type=float, metavar="R",
        help="above 1 makes tokens that occurred less likely (default: 1, off)",
    )  # fmt: skip
    group.add_argument(
        "--presence_penalty", type=float, metavar="R",
        help="-2 to 2, taken from the logits of tokens in the completion (default: 0, off)",
    )  # fmt: skip
    group.add_argument(
        "--frequency_penalty", type=float, metavar="R",
        help="-2 to 2, the same for each time they occurred (default: 0, off)",
    )  # fmt: skip
    group.add_argument(
        "--logit_bias", action="append", default=[], metavar="ID=BIAS",
        help="add to a token's logit; -inf bans it; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--typical_p", type=float, metavar="P",
        help="keep the tokens nearest the expected surprise that together have probability P "
        "(default: 1, off)",
    )  # fmt: skip
    group.add_argument(
        "--mirostat", metavar="TAU[,ETA]",
        help="Mirostat 2: TAU bits of surprise on average, 5 is usual, adapting at rate ETA (0.1); "
        "top_k, top_p, min_p and typical_p are idle then (default: off)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument(
        "--max_tokens", type=int, default=max_tokens, metavar="N",
        help=f"the longest completion (default: {max_tokens})",
    )  # fmt: skip
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be given several times",
    )  # fmt: skip


def add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the model and the machine")
    group.add_argument(
        "--bin", type=Path, metavar="FILE",
        help="the model file, from export.py or quantize.py (default: bin/chat-llama.bin)",
    )  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    group.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda", "auto"],
        help="auto: cuda where there is a GPU and the model fits (default: cpu)",
    )  # fmt: skip
    group.add_argument(
        "--gpu-layers", type=int, metavar="N",
        help="with cuda: the last N layers on the GPU, the others on the CPU (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--max-seq-len", type=int, metavar="N", help="context length (default: the model's own)"
    )
    group.add_argument(
        "--kv", metavar="KIND",
        help="how to keep keys and values: f32, f16, or q8: half of f16's memory, less exact "
        "(default: f16, for an f32 file f32)",
    )  # fmt: skip
    group.add_argument(
        "--activations", type=int, metavar="BITS",
        help="what meets quantised weights: 16 bits, or 8: faster prompts, less exact (default: 8 "
        "for rotated weights, which lose little by it, else 16)",
    )  # fmt: skip
    group.add_argument(
        "--isa", metavar="NAME", help="the CPU kernels (default: the best there are)"
    )
    group.add_argument(
        "--show-prompt", action="store_true", help="print every token of the prompt to stderr"
    )


def add_overflow_flags(parser: Parser, default: str | None, what: str) -> None:
    """DEFAULT is WHAT in the help's words."""
    group = parser.add_argument_group("when the context is full")
    group.add_argument(
        "--overflow", choices=POLICIES, default=default,
        help="stop: the text ends there; error: with an error; slide: the first tokens "
        f"stay, of the others the oldest half goes, and the text runs on (default: {what})",
    )  # fmt: skip
    group.add_argument(
        "--keep", type=int, metavar="N",
        help="first tokens that slide keeps (default: 4, in a chat all before the first question)",
    )  # fmt: skip


def add_speculation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("drafts, which the model checks several at once: same text")
    group.add_argument(
        "--lookup", type=int, nargs="?", const=8, default=0, metavar="N",
        help="draft up to N tokens (8) from what followed the latest ones when they stood in the "
        "text before; pays where a text quotes, sums up or corrects its prompt",
    )  # fmt: skip
    group.add_argument(
        "--draft-bin", type=Path, metavar="FILE",
        help="a much smaller model of the same vocabulary that drafts them; on the same device, "
        "whole",
    )  # fmt: skip


def params_of(args: argparse.Namespace) -> SamplingParams:
    """The sampling flags as SamplingParams; a value that cannot be is a LlamaError."""
    knobs = dict(METHODS[args.type])
    given = {
        name: value
        for name in (*DRAWING, *PENALTIES, "max_tokens", "logprobs")
        if (value := getattr(args, name, None)) is not None
    }
    # refuses a bad value even where the method overrules it
    params_from(_mirostat(dict(given)))
    if args.type == "greedy":
        idle = [name for name in DRAWING if name != "seed" and given.pop(name, 0)]
        if idle:
            say(f"note: --type greedy makes --{', --'.join(idle)} idle")
    knobs |= _mirostat(given)
    return params_from({**knobs, "logit_bias": _biases(args.logit_bias), "stop": tuple(args.stop)})


def _mirostat(given: dict[str, Any]) -> dict[str, Any]:
    """GIVEN with --mirostat's TAU[,ETA] as the two parameters that it is."""
    text = given.pop("mirostat", None)
    if text is None:
        return given
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise LlamaError(f"--mirostat must be TAU or TAU,ETA, found {text!r}")
    return given | dict(zip(("mirostat_tau", "mirostat_eta"), numbers, strict=False))


def _biases(words: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for word in words:
        token, _, bias = word.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise LlamaError(f"--logit_bias must be ID=BIAS, found {word!r}") from None
    return biases


def open_model(
    args: argparse.Namespace, template: str | None = None, date: str | None = None
) -> Any:
    """The Llama that the flags name; the default model is fetched if there is none yet."""
    from llama.generate import Llama

    with warnings.catch_warnings(record=True) as notes, upload_shown() as progress:
        warnings.simplefilter("always", UserWarning)  # said below, in a line without a source
        llm = Llama(
            args.bin or default_bin(), threads=args.threads, device=args.device,
            max_seq_len=args.max_seq_len, kv=args.kv, activations=args.activations, isa=args.isa,
            template=template, date=date, overflow=args.overflow or "stop",
            keep=args.keep, lookup=args.lookup, draft=args.draft_bin,
            gpu_layers=args.gpu_layers, progress=progress,
        )  # fmt: skip
    if llm.chosen is not None:
        say(f"device: {llm.chosen}")
    for note in notes:
        say(f"note: {note.message}")
    return llm


@contextmanager
def upload_shown(delay: float = 1.0) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal, once weights have been on their way for so many
    seconds."""
    from tqdm import tqdm

    with tqdm(desc="weights to the GPU", unit="B", unit_scale=True, leave=False, disable=None,
              delay=delay) as bar:  # fmt: skip

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def default_bin() -> Path:
    """bin/chat-llama.bin, made of the default model unless bin/ holds another to make it from."""
    path = DEFAULT_BIN
    if path.exists():
        return path
    from llama import checkpoints
    from llama.checkpoints import default

    found = checkpoints.find(path.parent)
    if found is not None:
        raise LlamaError(f"{path} is not there yet; python3 export.py makes it from {found.name}")
    default.export_default(path)
    return path


def say(line: str) -> None:
    """A line for the person, on stderr."""
    print(line, file=sys.stderr, flush=True)


def show_prompt(llm: Any, ids: Sequence[int]) -> None:
    """Every token of a prompt on stderr, and what is odd about it."""
    from llama.config import Head

    tokenizer = llm.tokenizer
    width = len(str(llm.config.vocab_size))
    say(f"prompt: {len(ids)} tokens")
    for token in ids:
        mark = "  control" if tokenizer.is_control(token) else ""
        say(f"{token:>{width + 2}}  {tokenizer.shown(token)}{mark}")
    if len(ids) > 1 and tokenizer.bos_id is not None and ids[0] == ids[1] == tokenizer.bos_id:
        say("warning: the prompt begins with two begin tokens")
    if not tokenizer.eos_ids and llm.config.head == Head.LM:
        say("warning: the model names no end token; only --max_tokens and --stop end its text")


def speed_line(llm: Any) -> str:
    """What was computed since the model was opened, and how fast."""
    from llama.machine import bandwidth

    c, info = llm.counters, llm.info()
    parts = []
    if c.prompt_tokens:
        rate = c.prompt_tokens / max(c.prompt_seconds, 1e-9)
        parts.append(f"prompt {c.prompt_tokens} tok at {rate:.1f} tok/s")
    if c.decode_tokens:
        rate = c.decode_tokens / max(c.decode_seconds, 1e-9)
        parts.append(f"decode {c.decode_tokens} tok at {rate:.1f} tok/s")
        # a step reads the weights once, whatever the batch, and the cache of each sequence
        read = c.decode_steps * llm.config.step_bytes
        read += c.decode_positions * info.kv_bytes_per_position + c.draft_bytes
        speed = read / max(c.decode_seconds, 1e-9)
        part = f"{speed / 1e9:.1f} GB/s"
        if info.device == "cpu":
            # a small model sits in the caches and may well be faster than memory
            limit = bandwidth(info.threads, speed if read > 100e6 * c.decode_steps else 0.0)
            part += f" = {100 * speed / limit:.0f}% of this machine's {limit / 1e9:.1f} GB/s"
        parts.append(part)
    if c.decode_tokens and llm.drafts_by is not None:
        rate = c.decode_tokens / max(c.decode_tokens - c.accepted_tokens, 1)  # of each text
        right = f"{c.accepted_tokens} of {c.drafted_tokens} drafted" if c.drafted_tokens else "none"
        parts.append(f"{llm.drafts_by}: {rate:.1f} tokens a step ({right})")
    return ", ".join(parts) or "nothing was computed"


def text_of(argument: str) -> str:
    """A command line's word as text; bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(argument).decode("utf-8", "replace")


def _leave_when_told() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit, so that what is half-done is put away; more
    of them do not disturb that. Who started the program with one ignored keeps it so."""
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def leave(number: int, frame: object) -> NoReturn:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    try:
        for number in ours:
            signal.signal(number, leave)
    except ValueError:
        pass  # not the main thread, which alone hears signals


def run(name: str, main: Callable[[], int], interrupted: str = "") -> int:
    """MAIN's status, with every way to fail turned into a line and a status; INTERRUPTED is
    Ctrl-C's line."""
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
        if hasattr(getattr(sys, stream), "reconfigure"):
            errors = "backslashreplace" if stream == "stderr" else "replace"
            getattr(sys, stream).reconfigure(encoding="utf-8", errors=errors)
    try:
        _leave_when_told()
        status = main()
        sys.stdout.flush()
        return status
    except LlamaError as error:
        say(f"{name}: {error}")
        return 1
    except ModuleNotFoundError as error:
        say(f"{name}: the package {error.name} is missing; pip install -r requirements.txt")
        return 1
    except KeyboardInterrupt:
        if interrupted:
            say(f"{name}: {interrupted}")
        return 130
    except BrokenPipeError:
        # the reader has seen enough; what is still buffered must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        say(f"{name}: {error.filename or 'standard output'}: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
