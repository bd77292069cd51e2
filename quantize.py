#!/usr/bin/env python3
"""Makes a model file smaller: 8 or 4 bits a weight, or the best mixture for a size or a loss, with
a receipt of what that lost."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def main() -> int:
    from llama import cli

    parser = cli.Parser(prog="quantize.py", description=__doc__)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--bits", type=int, choices=[8, 4, 32],
        help="bits a weight, scales apart; 32 decodes instead: the same weights as floats, for "
        "llama.eval --against, so that only the engine's own rounding differs",
    )  # fmt: skip
    goal.add_argument(
        "--size", metavar="SIZE",
        help="the best mixture of 4, 8 and 16 bits in a file of at most so much: 3.9GB, 700MiB",
    )  # fmt: skip
    goal.add_argument(
        "--max-kld", type=float, metavar="X",
        help="the smallest whose mean KL divergence from the source is at most X nats",
    )  # fmt: skip
    parser.add_argument(
        "--bin", type=Path, metavar="FILE",
        help="the model to shrink (default: bin/chat-llama.bin)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="what to write (default: FILE-q8.bin, FILE-q4.bin, FILE-f32.bin or FILE-mixed.bin)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", metavar="TEXT",
        help="what the model runs on to learn which errors matter (not for 8 bits): a text file, "
        "self (what it writes by itself) or none (default: self)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help="how much of it (default: 8192)"
    )
    parser.add_argument(
        "--rotate", choices=["auto", "yes", "no"], default="auto",
        help="turn each group of 32 weights, and what they are multiplied with, so that 8-bit "
        "activations lose little (default: auto, where the weights lose nothing by it)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: one a core)")
    args = parser.parse_args()

    def work() -> int:
        from llama.mixed import goal_of, mix
        from llama.shrink import BITS, calibration_of, report, shrink

        calibrate = calibration_of(args.bits, args.calibrate, args.calibration_tokens)
        wanted = goal_of(args.size, args.max_kld)
        source = args.bin or cli.default_bin()
        label = BITS[args.bits].label if args.bits else "mixed"
        out = args.out or source.parent / f"{source.stem}-{label}.bin"
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        rotate = {"auto": None, "yes": True, "no": False}[args.rotate]
        options = {"force": args.force, "threads": args.threads, "calibrate": calibrate,
                   "rotate": rotate, "command": command}  # fmt: skip
        receipt = (shrink(source, out, args.bits, **options) if args.bits
                   else mix(source, out, wanted, **options))  # fmt: skip
        report(receipt, out)
        return 0

    return cli.run("quantize.py", work, interrupted="interrupted, nothing was written")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
