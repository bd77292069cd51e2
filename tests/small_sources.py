"""Whole checkpoints of a few kilobytes, one in each form that export.py reads, and .bin files: what
tests damage and what fuzzing starts from. numpy and the standard library write them.

`fields` says where the numbers, names and lengths of such a file stand.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama.checkpoints.gguf import LAYER_NAMES as GGUF_LAYERS
from llama.checkpoints.gguf import NAMES as GGUF_NAMES
from llama.checkpoints.hf import LAYER_NAMES as HF_LAYERS
from llama.config import Config, expected_tensors
from llama.format import Record, TokenizerKind, Value, Writer
from llama.quant import GROUP, Kind

SHAPE = Config(
    vocab_size=10, dim=8, hidden_dim=6, head_dim=4, n_layers=1, n_heads=2, n_kv_heads=1,
    max_seq_len=16, norm_eps=1e-5, rope_theta=10000.0, bos_id=1, eos_ids=(2,),
)  # fmt: skip
PIECES = ["<unk>", "<s>", "</s>", "d", "\u2581", "a", "b", "ab", "\u2581a", "c"]
SCORES = [0.0, 0.0, 0.0, -7.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
TYPES = [2, 3, 3, 1, 1, 1, 1, 1, 1, 1]
HF_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def weights(shape: Config = SHAPE, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Meta's names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.5, size).astype("<f4")
        for name, size in expected_tensors(shape).items()
    }


def _renamed(name: str, layers: Mapping[str, str], outside: Mapping[str, str], prefix: str) -> str:
    stem, _, last = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{last}"
    _, n, *rest = stem.split(".")
    return f"{prefix}.{n}.{layers['.'.join(rest)]}.{last}"


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _gguf_value(value: Any) -> bytes:
    """A metadata value behind its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    items = [_gguf_value(item) for item in value]
    (kind,) = {item[:4] for item in items}
    return struct.pack("<I4sQ", 9, kind, len(items)) + b"".join(item[4:] for item in items)


def gguf(shape: Config = SHAPE, quantised: bool = False) -> bytes:
    """f32, or with QUANTISED matrices of q8_0 where columns are whole blocks; vocabulary within."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": shape.n_layers,
        "llama.context_length": shape.max_seq_len, "llama.embedding_length": shape.dim,
        "llama.feed_forward_length": shape.hidden_dim, "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": TYPES, "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    layers = {ours: theirs for theirs, ours in GGUF_LAYERS.items()}
    outside = {ours.removesuffix(".weight"): theirs.removesuffix(".weight")
               for theirs, ours in GGUF_NAMES.items()}  # fmt: skip
    infos, data = b"", b""
    for name, values in weights(shape).items():
        q8 = quantised and values.ndim == 2 and values.shape[1] % 32 == 0
        raw = values.tobytes()
        if q8:  # an f16 scale, 32 codes
            codes = np.clip(values.reshape(-1, 32) * 50, -127, 127).astype(np.int8)
            raw = b"".join(np.float16(0.02).tobytes() + row.tobytes() for row in codes)
        dims = values.shape[::-1]
        infos += _string(_renamed(name, layers, outside, "blk"))
        infos += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 8 * q8, len(data))
        data += raw + bytes(-len(raw) % 32)
    entries = b"".join(_string(key) + _gguf_value(value) for key, value in metadata.items())
    front = struct.pack("<4sIQQ", b"GGUF", 3, len(weights(shape)), len(metadata)) + entries + infos
    return front + bytes(-len(front) % 32) + data


def llama2c(shape: Config = SHAPE) -> bytes:
    found = weights(shape)
    front = struct.pack("<7i", shape.dim, shape.hidden_dim, shape.n_layers, shape.n_heads,
                        shape.n_kv_heads, -shape.vocab_size, shape.max_seq_len)  # fmt: skip
    stems = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
             "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]  # fmt: skip
    order = [f"layers.{n}.{stem}.weight" for stem in stems for n in range(shape.n_layers)]
    freqs = bytes(4 * shape.max_seq_len * shape.head_dim)
    parts = [found[name].tobytes() for name in ("tok_embeddings.weight", *order, "norm.weight")]
    return front + b"".join(parts) + freqs + found["output.weight"].tobytes()


def llama2c_tokenizer() -> bytes:
    out = struct.pack("<I", 5)
    for i, (piece, score) in enumerate(zip(PIECES, SCORES, strict=True)):
        raw = (f"\n{piece}\n" if i in (1, 2) else piece.replace("\u2581", " ")).encode()
        out += struct.pack("<fi", score, len(raw)) + raw
    return out


def sentencepiece() -> bytes:
    from llama.checkpoints.model_proto import sentencepiece_model

    return sentencepiece_model(Path("x"), list(zip(PIECES, SCORES, TYPES, strict=True)))


def tokenizer_json() -> bytes:
    vocab = {piece: i for i, piece in enumerate(["a", "b", "ab", "Ġ", "c"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    added = [{"id": 5, "content": "<e>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}]  # fmt: skip
    return json.dumps({"version": "1.0", "added_tokens": added, "normalizer": None,
                       "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}).encode()


def safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": values.shape,
                        "data_offsets": [at, at + values.nbytes]}  # fmt: skip
        at += values.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"".join(values.tobytes() for values in tensors.values())
    return struct.pack("<Q", len(raw)) + raw + data


def hf_weights(shape: Config = SHAPE) -> bytes:
    return safetensors({_renamed(name, {v: k for k, v in HF_LAYERS.items()}, HF_OUTSIDE,
                                 "model.layers"): values
                        for name, values in weights(shape).items()})  # fmt: skip


def hf_config(shape: Config = SHAPE) -> bytes:
    return json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.dim, "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size, "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": [2],
    }).encode()  # fmt: skip


def pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The data.pkl that torch.save writes of float32 tensors, storages numbered from 0."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        packed = b"".join(b"J" + struct.pack("<i", n) for n in values)
        return packed + (b"\x85" if len(values) == 1 else b"\x86")

    out = b"\x80\x02}q\x00("
    for key, (name, values) in enumerate(tensors.items()):
        strides = tuple(n // values.itemsize for n in values.strides)
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu")
        out += b"J" + struct.pack("<i", values.size % 2**31) + b"tQK\x00" + numbers(values.shape)
        out += numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u."


def zipped(pkl: bytes, tensors: Mapping[str, np.ndarray]) -> bytes:
    """A .pth of that pickle: everything stored, nothing compressed, and no checksum to stop what
    damage does."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", pkl)
        archive.writestr("a/byteorder", "little")
        for key, values in enumerate(tensors.values()):
            archive.writestr(f"a/data/{key}", values.tobytes())
        for info in archive.infolist():
            info.CRC = 0  # of the directory, which is written last
    return out.getvalue()


def pth(shape: Config = SHAPE) -> bytes:
    found = weights(shape)
    return zipped(pickled(found), found)


def meta_params(shape: Config = SHAPE) -> bytes:
    return json.dumps({
        "dim": shape.dim, "n_layers": shape.n_layers, "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads, "norm_eps": shape.norm_eps, "vocab_size": -1,
        "rope_theta": shape.rope_theta,
    }).encode()  # fmt: skip


def ours(path: Path, shape: Config = SHAPE, kind: Kind = Kind.F32, **more: Any) -> bytes:
    """A .bin with matrices of KIND, those without whole groups of 32 columns in f16 where the kind
    needs them; written at PATH."""
    meta: dict[str, Value] = {"general.name": "small", "a.count": 7, "a.share": 0.25}
    records = [Record(name, Kind.F32 if len(size) == 1 else Kind.F16
                      if kind.rotated and size[1] % GROUP else kind, size)
               for name, size in expected_tensors(shape).items()]  # fmt: skip
    with Writer(path, shape, records, meta=meta, force=True,
                tokenizer=(TokenizerKind.JSON, tokenizer_json()), **more) as writer:  # fmt: skip
        for record, values in zip(records, weights(shape).values(), strict=True):
            blocks = record.kind not in (Kind.F32, Kind.F16, Kind.BF16)
            writer.write(record.name, _blocks(record) if blocks else values)
    return path.read_bytes()


def _blocks(record: Record) -> bytes:
    """Random codes with one scale, which is small in q8 and q4 alike."""
    rng = np.random.default_rng(record.n_bytes)
    size = 544 if record.kind in (Kind.Q8, Kind.Q8R) else 288
    blocks = rng.integers(0, 256, (record.n_bytes // size, size), np.uint8)
    blocks[:, :32] = np.frombuffer(np.float16(0.01).tobytes() * 16, np.uint8)
    return blocks.tobytes()


# --- whole sources: the files of a directory, or one file


def sources() -> dict[str, dict[str, bytes]]:
    """Form -> name -> bytes; the first file is what is damaged."""
    return {
        "gguf": {"a.gguf": gguf()},
        "llama2c": {"a.bin": llama2c(), "tokenizer.bin": llama2c_tokenizer()},
        "safetensors": {"model.safetensors": hf_weights(), "config.json": hf_config(),
                        "tokenizer.model": sentencepiece()},
        "pth": {"consolidated.00.pth": pth(), "params.json": meta_params(),
                "tokenizer.model": sentencepiece()},
    }  # fmt: skip


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes a source's files; what export.py is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    single = next((name for name in files if name in ("a.gguf", "a.bin")), None)
    return folder / single if single else folder


# --- where things stand: (offset, bytes) of each number, name and length


def fields(form: str, data: bytes) -> list[tuple[int, int]]:
    found = {"gguf": _gguf_fields, "llama2c": _llama2c_fields, "safetensors": _json_fields,
             "pth": _zip_fields, "bin": _bin_fields}[form]  # fmt: skip
    return sorted(set(found(data)))


def _gguf_fields(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0

    def take(size: int) -> tuple[int, int]:
        nonlocal at
        at += size
        return at - size, size

    def number(code: str) -> int:
        return int(struct.unpack_from("<" + code, data, at)[0])

    def string() -> Iterator[tuple[int, int]]:
        size = number("Q")
        yield take(8)
        yield take(size)

    def value(kind: int) -> Iterator[tuple[int, int]]:
        if kind == 8:
            yield from string()
        elif kind == 9:
            of = number("I")
            yield take(4)
            n = number("Q")
            yield take(8)
            for _ in range(n):
                yield from value(of)
        else:
            yield take(4)

    yield from (take(size) for size in (4, 4))
    n_tensors = number("Q")
    yield take(8)
    n_metadata = number("Q")
    yield take(8)
    for _ in range(n_metadata):
        yield from string()
        kind = number("I")
        yield take(4)
        yield from value(kind)
    for _ in range(n_tensors):
        yield from string()
        n_dims = number("I")
        yield take(4)
        yield from [take(8) for _ in range(n_dims)]
        yield take(4)
        yield take(8)
    yield -(-at // 32) * 32, 4  # the first weight


def _llama2c_fields(data: bytes) -> Iterator[tuple[int, int]]:
    yield from ((4 * i, 4) for i in range(8))


def _json_fields(data: bytes) -> Iterator[tuple[int, int]]:
    yield 0, 8
    (size,) = struct.unpack_from("<Q", data, 0)
    text = data[8 : 8 + size].decode()
    for mark in "{}[]:,":
        yield from ((8 + i, 1) for i, char in enumerate(text) if char == mark)
    yield 8 + size, 4


def _zip_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Of the headers of some members, of the pickle's opcodes for some tensors: the rest is
    like them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    local, central = [4, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2], [4, 2, 2, 2, 2, 2, 2, 4, 4, 4]
    central += [2, 2, 2, 2, 2, 4, 4]
    end = [4, 2, 2, 2, 2, 4, 4, 2]

    def run(at: int, sizes: list[int]) -> Iterator[tuple[int, int]]:
        for size in sizes:
            yield at, size
            at += size

    for number, info in enumerate(infos):
        if number < 3:
            yield from run(info.header_offset, [*local, len(info.filename)])
            yield from run(directory, [*central, len(info.filename)])
        directory += sum(central) + len(info.filename)
    yield from run(directory, end)
    start = infos[0].header_offset + sum(local) + len(infos[0].filename)
    pkl = data[start : start + infos[0].file_size]
    places = [place or 0 for _, _, place in pickletools.genops(pkl)]
    places = [*places[:90], *places[-4:]]  # 30 to a tensor
    yield from ((start + place, 1) for place in places)
    yield from ((start + place + 1, 4) for place in places if pkl[place] in b"JX")


def _bin_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Numbers of the header and of the records; format.md has the table."""
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    n_tensors, n_meta, place = struct.unpack_from("<IIQ", data, 32)
    yield from ((at, 8) for at in (0, 16, 24, 40, 48, 56, 64))
    yield from ((at, 4) for at in (8, 12, 32, 36, *range(72, 204, 4)))
    for record in range(256, 256 + 128 * n_tensors, 128):
        yield record, 64
        yield from ((record + at, 4) for at in (64, 68, 104))
        yield from ((record + at, 8) for at in (72, 80, 88, 96))
    for _ in range(n_meta):
        key, value = struct.unpack_from("<I4xQ", data, place + 8)
        yield from ((place + at, size) for at, size in ((0, 4), (4, 4), (8, 4), (16, 8), (24, key)))
        yield place + 24 + key, value
        place += -(-(24 + key + value) // 8) * 8
    yield place, 8
    yield header_bytes, 4
