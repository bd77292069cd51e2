#!/usr/bin/env python3
"""Makes a model file smaller: 8 or 4 bits a weight, with a receipt of what that lost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama.cli import DEFAULT_BIN, Parser, run


def arguments() -> argparse.Namespace:
    parser = Parser(prog="quantize.py", description=__doc__)
    parser.add_argument(
        "--bits", type=int, choices=[8, 4], required=True, help="bits a weight, scales apart"
    )
    parser.add_argument(
        "--bin", type=Path, default=DEFAULT_BIN, metavar="FILE",
        help="the model to shrink (default: bin/chat-llama.bin)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="what to write (default: FILE-q8.bin or -q4.bin)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: one a core)")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    from llama.shrink import report, shrink

    out = given.out or given.bin.parent / f"{given.bin.stem}-q{given.bits}.bin"
    report(shrink(given.bin, out, given.bits, force=given.force, threads=given.threads), out)
    return 0


if __name__ == "__main__":
    sys.exit(run("quantize.py", main))
