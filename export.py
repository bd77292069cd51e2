#!/usr/bin/env python3
"""Turns a checkpoint (Meta, Hugging Face, GGUF, llama2.c) into bin/NAME.bin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama import checkpoints
from llama.checkpoints import default
from llama.errors import LlamaError

BIN = Path(__file__).resolve().parent / "bin"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__)
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="SOURCE",
        help="the checkpoint: a directory, a .gguf, llama2.c's .bin (default: the one in bin/; "
        "if there is none, SmolLM2-135M-Instruct is downloaded)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=BIN / "chat-llama.bin",
        help="what to write (default: bin/chat-llama.bin)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["f32", "f16", "bf16"],
        help="how to store weights (default: the source's own; f16 for a quantised one)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH",
        help="a tokenizer's file (default: the one in the checkpoint or beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--template", metavar="NAME",
        help="chat template's family, or none (default: found in the checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N",
        help="positions the model was trained for (default: found or inferred)",
    )  # fmt: skip
    return parser.parse_args([dashed(word) for word in sys.argv[1:]])


def dashed(word: str) -> str:
    """--max_seq_len=8 -> --max-seq-len=8."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def main() -> int:
    given = arguments()
    try:
        options = checkpoints.Options(given.tokenizer, given.template, given.max_seq_len)
        source = given.source or checkpoints.find(BIN)
        common = {"dtype": given.dtype, "force": given.force, "options": options}
        if source is None:
            default.export_default(given.out, **common)
        else:
            checkpoints.export(source, given.out, **common)
    except LlamaError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
