"""Checkpoints of every form, damaged where their numbers stand: cut at each, set to edges, turned
bit by bit; tensors overlapped, moved, doubled and dropped.

Each is LlamaError's one line or an export that format.py reads back whole; a .bin opens and runs,
or is refused. Two child processes do it, so that a crash is a failure with a name, and measure that
none takes a second, or more than 100 MB of memory.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_sources

from llama.checkpoints import gguf_container, safetensors_file, torch_file
from llama.errors import LlamaError

FORMS = ("gguf", "llama2c", "safetensors", "pth", "bin")
SECONDS, MEGABYTES = 1.0, 100
ROOT = Path(__file__).resolve().parent.parent
EDGES = [0, 1, -1, 2**7, 2**15, 2**16, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 1, 2**61,
         2**62 + 1, 2**63 - 1, 2**63]  # fmt: skip
REPEATS = 40  # random changes of several fields


def seal(data: bytes) -> bytes:
    """The checksum of a .bin's header made right, as far as it can be computed."""
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    out = bytearray(data)
    out[12:16] = bytes(4)
    struct.pack_into("<I", out, 12, zlib.crc32(out[: min(header_bytes, len(out))]))
    return bytes(out)


def damages(form: str, whole: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, the file)."""
    fields = small_sources.fields(form, whole)
    rng = np.random.default_rng(1)
    for at, size in fields:
        yield f"cut at {at}", whole[:at]
        yield f"cut at {at + size - 1}", whole[: at + size - 1]
        yield f"without {at}", whole[:at] + whole[at + size :]
        yield f"twice {at}", whole[: at + size] + whole[at:]
        for value in {edge % 256**size for edge in EDGES} if size in (1, 2, 4, 8) else ():
            raw = value.to_bytes(size, "little")
            yield f"{at} = {value}", whole[:at] + raw + whole[at + size :]
        for bit in range(0, 8 * size, 1 if size == 2 else 5):
            raw = (int.from_bytes(whole[at : at + size], "little") ^ 1 << bit).to_bytes(
                size, "little"
            )
            yield f"{at} bit {bit}", whole[:at] + raw + whole[at + size :]
    for number in range(REPEATS):
        out = bytearray(whole)
        for pick in rng.integers(0, len(fields), 3):
            at, size = fields[pick]
            out[at : at + size] = (EDGES[rng.integers(len(EDGES))] % 256**size).to_bytes(
                size, "little"
            )
        yield f"random {number}", bytes(out)
    if form == "gguf":  # a tensor's place becomes that of another, or lies between two
        places = [at for at, size in fields if size == 8][-3:]
        for at in places:
            for value in (0, 1, 8, 16, 32, len(whole)):
                yield f"place {at} = {value}", (
                    whole[:at] + value.to_bytes(8, "little") + whole[at + 8 :]
                )


def headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """safetensors with other headers: places and shapes of tensors, names doubled and dropped."""
    (size,) = struct.unpack_from("<Q", whole, 0)
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def made(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode() + data

    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        for offsets in ([0, end - begin], [begin + 1, end + 1], [begin, begin], [end, begin],
                        [-begin, end], [begin, 2**63], [begin, 2**64 + end], [begin], begin,
                        [begin + 0.0, end], [None, end]):  # fmt: skip
            yield f"{name} at {offsets}", made(
                json.dumps(header | {name: entry | {"data_offsets": offsets}})
            )
        for shape in ([], [0], [2**24, 2**24], [2**32, 2**32], [-1, -1], [1, 2**63], [0, 0, 2**63],
                      entry["shape"][::-1], [1] * 20, [True], "1", None, [1e400], [10**400]):
            yield f"{name} of {shape}", made(
                json.dumps(header | {name: entry | {"shape": shape}})
            )
        for dtype in ("F16", "BF16", "I64", "F8_E4M3", "", None, 7, [], {}):
            yield f"{name} of {dtype}", made(
                json.dumps(header | {name: entry | {"dtype": dtype}})
            )
        yield f"no {name}", made(json.dumps({n: e for n, e in header.items() if n != name}))
        yield f"two {name}", made(json.dumps(header)[:-1] + f", {json.dumps(name)}: {{}}}}")
    empty = {name: header[name] | {"shape": [10, 0], "data_offsets": [0, 0]}
             for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    yield "empty", made(json.dumps(header | empty))
    yield "nested", made("[" * 100_000)
    yield "no object", made("7")


# --- the child


def child(form: str, part: int, folder: Path) -> None:
    """Tries every second file of FORM and prints what a file did that none may do, then how many
    there were, how many were accepted, the longest and the memory."""
    faulthandler.dump_traceback_later(1200, exit=True)  # of what hangs
    use = open_bin if form == "bin" else export
    if form == "bin":
        files = {"a.bin": small_sources.ours(folder / "a.bin")}
    else:
        files = small_sources.sources()[form]
    name, whole = next(iter(files.items()))
    path = small_sources.put(folder, files)
    use(path, folder)  # the whole file is good; all modules are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = accepted = 0
    longest = 0.0
    more = headers(whole) if form == "safetensors" else iter(())
    for number, (what, data) in enumerate([*damages(form, whole), *more]):
        if number % 2 != part:
            continue
        if form == "bin":
            data = seal(data) if len(data) >= 256 and data[:8] == whole[:8] else data
        (folder / name).write_bytes(data)
        tried += 1
        print(f"trying {what}", file=sys.stderr)  # the last one stands there after a crash
        start = time.process_time()
        try:
            use(path, folder)
            accepted += 1
        except LlamaError as error:
            if "\n" in str(error):
                print(f"{what}: not one line: {error!r}")
        except BaseException as error:
            print(f"{what}: {type(error).__name__}: {error}")
        longest = max(longest, time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([tried, accepted, longest, grown / 1024]))


def export(path: Path, folder: Path) -> None:
    from llama import checkpoints
    from llama.checkpoints.convert import convert
    from llama.format import read

    checkpoint = checkpoints.load(path)
    convert(checkpoint, folder / "out" / "b.bin", checkpoint.default_kind(), force=True)
    assert set(read(folder / "out" / "b.bin").tensors)


def open_bin(path: Path, folder: Path) -> None:
    from llama.engine import Engine

    with Engine(path, threads=1) as engine:
        engine.forward([0, 1], [0, 0], [0, 1], [True, True])


@pytest.mark.parametrize("form", FORMS)
def test_damage(form: str, tmp_path: Path) -> None:
    children = []
    for part in range(2):
        folder = tmp_path / str(part)
        (folder / "out").mkdir(parents=True)
        children.append(subprocess.Popen(
            [sys.executable, __file__, form, str(part), str(folder)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        )  # fmt: skip
    for running in children:
        out, err = running.communicate()
        *wrong, last = out.splitlines() or [""]
        assert running.returncode == 0, f"{err[-500:]}{out[-2000:]}"
        assert not wrong, "\n".join(wrong[:20])
        tried, accepted, longest, grown = json.loads(last)
        assert tried > 50 and accepted < tried, last
        assert longest < SECONDS and grown < MEGABYTES, last


def test_tensors_share_no_bytes(tmp_path: Path) -> None:
    """Else a small file could ask for any amount of work: each of its bytes, in each tensor."""
    whole = small_sources.hf_weights()
    (size,) = struct.unpack_from("<Q", whole, 0)
    header = json.loads(whole[8 : 8 + size])
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    header[up]["data_offsets"] = header[gate]["data_offsets"]
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
    with pytest.raises(LlamaError, match=r"mlp.gate_proj.weight and .*mlp.up_proj.weight overlap"):
        safetensors_file.read(path)
    whole = small_sources.gguf()
    at = [at for at, size in small_sources.fields("gguf", whole) if size == 8][-1]
    (tmp_path / "a.gguf").write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(LlamaError, match="overlap"):
        gguf_container.Container(tmp_path / "a.gguf")
    wide = {"w": np.broadcast_to(np.float32(1), (1 << 20, 1 << 20))}
    pkl = small_sources.pickled(wide).replace(
        b"J" + struct.pack("<i", 0) + b"tQ", b"J" + struct.pack("<i", 1) + b"tQ"
    )
    (tmp_path / "a.pth").write_bytes(small_sources.zipped(pkl, {"w": np.ones(1, "<f4")}))
    with pytest.raises(LlamaError, match="more numbers than the file has bytes"):
        torch_file.read(tmp_path / "a.pth")


# --- settings

VALUES = [10**400, 1e300, 1e39, 1e-46, 1e-300, -1, 0, 2**24 + 1, 2**63, float("nan"), float("inf"),
          True, "", "\ud800", [], [None], [10**400], {}, {"1": 1}, {"-1": {"content": "a"}},
          {"9": {"content": "\ud800"}}, [{"name": "default", "template": 3}]]  # fmt: skip
ROPES = {"rope_type": "", "type": "", "factor": 2.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
         "beta_slow": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
         "truncate": True, "rope_theta": 1e4, "partial_rotary_factor": 1.0}  # fmt: skip
TEXTS = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True, "add_eos_token": False,
         "legacy": False, "tokenizer_class": "LlamaTokenizer", "chat_template": "x",
         "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}  # fmt: skip
SCALED = {"use_scaled_rope": True, "rope_scaling_factor": 8, "high_freq_factor": 4}
META = {**SCALED, "multiple_of": 2, "ffn_dim_multiplier": 1, "max_seq_len": 8, "head_dim": 4}


def settings() -> Iterator[tuple[str, str, dict[str, object]]]:
    """(form, file, its settings), one of them odd."""
    config = json.loads(small_sources.hf_config())
    params = json.loads(small_sources.meta_params())
    for value in VALUES:
        for key in [*config, "sliding_window", "id2label", "num_labels", "attention_bias"]:
            yield "safetensors", "config.json", config | {key: value}
        for kind in ("yarn", "llama3", "linear", "dynamic"):
            for key in ROPES:
                rope = ROPES | {"rope_type": kind, key: value}
                yield "safetensors", "config.json", config | {"rope_scaling": rope}
        for key in [*params, *META]:
            yield "pth", "params.json", params | (META if key in META else {}) | {key: value}
        for key in TEXTS:
            yield "safetensors", "tokenizer_config.json", TEXTS | {key: value}


def test_every_setting_may_be_anything(tmp_path: Path) -> None:
    sources = small_sources.sources()
    paths = {form: small_sources.put(tmp_path / form, sources[form])
             for form in ("safetensors", "pth")}  # fmt: skip
    (tmp_path / "out").mkdir()
    accepted = refused = 0
    for form, name, values in settings():
        (paths[form] / name).write_text(json.dumps(values))
        try:
            export(paths[form], tmp_path)
            accepted += 1
        except LlamaError as error:
            assert "\n" not in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name} {values}"[:800]) from error
        (paths[form] / name).write_bytes(sources[form].get(name, b"{}"))
    assert accepted > 300 and refused > 800, (accepted, refused)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
