"""Reads the output of a build with -Xptxas=-v and prints each CUDA kernel's registers, with any
spills; fails if a kernel of decoding spills, or if the input holds no kernels.

    cmake --build FOLDER --target llama 2>&1 | python3 tests/cuda_registers.py
"""

import re
import sys

# the kernels that must keep everything in registers
DECODING = ("embed", "gemv", "rope_store", "attend", "join_splits", "prepare", "swiglu", "sample")


def main() -> int:
    text = sys.stdin.read()
    found = re.findall(
        r"Compiling entry function '_ZN\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+"
        r"(\w+?)' for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers", text, re.DOTALL,
    )  # fmt: skip
    kernels: dict[str, dict[str, str]] = {}
    bad = []
    for file, mangled, sm, stores, loads, registers in found:
        name, rest = re.match(r"([a-z_]+\d*?)(I.*|E?[vPN0-9].*)", mangled).groups()  # type: ignore
        numbers = re.findall(r"L[jib](\d+)E", rest)
        kernel = f"{file}.cu {name}<{', '.join(numbers)}>" if numbers else f"{file}.cu {name}"
        spills = int(stores) + int(loads)
        kernels.setdefault(kernel, {})[sm] = registers + (f" +{spills}B" if spills else "")
        if spills and name in DECODING:
            bad.append(f"{kernel} on {sm}")
    if not kernels:
        sys.stdout.write(text)
        print("cuda_registers: no kernels were compiled")
        return 1
    missing = set(DECODING) - {kernel.split()[1].split("<")[0] for kernel in kernels}
    machines = sorted({sm for row in kernels.values() for sm in row})
    print(f"{'registers a thread (+ bytes spilled)':40}" + "".join(f"{sm:>12}" for sm in machines))
    for kernel, row in sorted(kernels.items()):
        print(f"{kernel:40}" + "".join(f"{row.get(sm, '-'):>12}" for sm in machines))
    for kernel in bad:
        print(f"cuda_registers: {kernel} spills, and is a kernel of decoding")
    for name in sorted(missing):
        print(f"cuda_registers: no kernel is called {name}, which is one of decoding here")
    return len(bad) + len(missing) > 0


if __name__ == "__main__":
    sys.exit(main())
