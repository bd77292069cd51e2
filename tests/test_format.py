"""The .bin file: docs/format.md against llama/format.py, byte by byte, and its refusals."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.errors import LlamaError
from llama.format import (
    Config,
    Head,
    Record,
    Required,
    Rope,
    TokenizerKind,
    Writer,
    expected_tensors,
    read,
)
from llama.quant import Kind, matrix_bytes, narrow, tile, untile, widen

SMALL = Config(5, 6, 7, 2, 1, 3, 1, 9, 1e-5, 1e4, tied=True, bos_id=1, eos_ids=(2, 4))


def filled(config: Config, kind: Kind = Kind.F32) -> tuple[list[Record], dict[str, np.ndarray]]:
    random = np.random.default_rng(7)
    arrays = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in expected_tensors(config).items()
    }
    records = [Record(n, kind if a.ndim == 2 else Kind.F32, a.shape) for n, a in arrays.items()]
    return records, arrays


def write(path: Path, config: Config = SMALL, **options: Any) -> dict[str, np.ndarray]:
    records, arrays = filled(config, options.pop("kind", Kind.F32))
    with Writer(path, config, records, **options) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return arrays


# ---- tiles ----

floats = st.sampled_from([Kind.F32, Kind.F16, Kind.BF16])


@given(floats, st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_tiles_return_what_went_in(kind: Kind, rows: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    array = narrow(random.standard_normal((rows, columns)).astype(np.float32), kind)
    data = tile(array, kind)
    assert data.nbytes == matrix_bytes(kind, rows, columns)
    assert np.array_equal(
        untile(data.reshape(-1).view(np.uint8), kind, rows, columns), widen(array)
    )


def test_f32_weight_stands_where_the_document_says() -> None:
    rows, columns = 37, 5
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    data = tile(array, Kind.F32).tobytes()
    for r in range(rows):
        for c in range(columns):
            at = 4 * (16 * columns * (r // 16) + 16 * c + r % 16)
            assert struct.unpack_from("<f", data, at)[0] == array[r, c]
    padding = np.frombuffer(data, np.float32).reshape(3, columns, 16)[2, :, 5:]
    assert not padding.any()


@settings(max_examples=20)
@given(st.sampled_from([k for k in Kind if k >= Kind.Q8]), st.integers(1, 34), st.integers(1, 70))
def test_blocks_decode_as_the_document_says(kind: Kind, rows: int, columns: int) -> None:
    q8 = kind in (Kind.Q8, Kind.Q8R)
    columns = -(-columns // 32) * 32 if kind.rotated else columns
    random = np.random.default_rng(rows * 100 + columns)
    size = 544 if q8 else 288
    blocks = -(-columns // 32)
    data = random.integers(0, 256, (-(-rows // 16), blocks, size), np.uint8)
    scales = random.standard_normal((*data.shape[:2], 16)).astype("<f2")
    data[:, :, :32] = scales.view(np.uint8)
    found = untile(data.reshape(-1), kind, rows, columns)
    drawn = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    levels = [int(word) for word in re.findall(r"code 0 to 15, are ([-\d ]+)\.", drawn)[0].split()]
    if kind == Kind.Q4E:
        ends = re.findall(r"its levels being (-?\d+) to (-?\d+) in steps of (\d+)", drawn)[0]
        levels = list(range(int(ends[0]), int(ends[1]) + 1, int(ends[2])))
    stored = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for column in range(columns):
            block, c = data[r // 16, column // 32].tobytes(), column % 32
            (bits,) = struct.unpack_from("<H", block, 2 * (r % 16))
            if q8:
                (code,) = struct.unpack_from("<b", block, 32 + (c // 4 * 16 + r % 16) * 4 + c % 4)
                scale = struct.unpack("<e", struct.pack("<H", bits))[0]
            else:
                byte = block[32 + (c % 16 // 4 * 16 + r % 16) * 4 + c % 4]
                code = levels[byte & 15 if c < 16 else byte >> 4] + ((bits & 63) - 32) * 2
                scale = struct.unpack("<e", struct.pack("<H", bits >> 6 << 6))[0] / 64
            stored[r, column] = np.float32(scale) * np.float32(code)
    if kind.rotated:
        turn = np.array([[0.25]])
        for _ in range(5):  # Sylvester's construction
            turn = np.kron([[1, 1], [1, -1]], turn)
        stored = (stored.reshape(rows, -1, 32).astype(np.float64) @ turn).reshape(rows, columns)
    assert np.array_equal(found, stored)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_rounding_is_torchs(values: list[float]) -> None:
    torch = pytest.importorskip("torch")
    array = np.array(values, np.float32)
    tensor = torch.from_numpy(array)
    assert np.array_equal(narrow(array, Kind.F16), tensor.half().numpy(), equal_nan=True)
    bf16 = widen(narrow(array, Kind.BF16))
    assert np.array_equal(bf16, tensor.bfloat16().float().numpy(), equal_nan=True)


# ---- the file ----


def test_header_stands_where_the_document_says(tmp_path: Path) -> None:
    config = Config(
        5, 6, 7, 2, 1, 3, 1, 9, 1e-5, 5e5, Rope.LLAMA3, (8.0, 1.0, 4.0, 8192.0), bos_id=1,
        eos_ids=(2, 4),
    )  # fmt: skip
    write(tmp_path / "a.bin", config, tokenizer=(TokenizerKind.JSON, b"{}"), meta={"k": 7})
    data = (tmp_path / "a.bin").read_bytes()

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", data, at)[0])

    def u64(at: int) -> int:
        return int(struct.unpack_from("<Q", data, at)[0])

    assert data[:8] == b"LlamaBin" and u32(8) == 1
    header_bytes, n = u64(16), len(expected_tensors(config))
    assert header_bytes % 64 == 0 and u64(24) == len(data)
    assert zlib.crc32(data[:12] + bytes(4) + data[16:header_bytes]) == u32(12)
    assert (u32(32), u32(36), u64(40)) == (n, 1, 256 + 128 * n)
    assert u64(48) == 24 + 8 + 8 and u64(56) == u64(40) + u64(48) and u64(64) == 2
    assert data[u64(56) : u64(56) + 2] == b"{}" and u32(72) == 2 and u32(76) == 0
    assert struct.unpack_from("<8I", data, 80) == (5, 6, 7, 2, 1, 3, 1, 9)
    assert struct.unpack_from("<ff", data, 112) == (np.float32(1e-5), 5e5)
    assert struct.unpack_from("<I8f", data, 120) == (2, 8, 1, 4, 8192, 0, 0, 0, 0)
    assert struct.unpack_from("<iI8i", data, 156) == (1, 2, 2, 4, 0, 0, 0, 0, 0, 0)
    assert not any(data[196:256])
    # the first record: tok_embeddings.weight (5, 6)
    assert data[256:320] == b"tok_embeddings.weight".ljust(64, b"\0")
    kind, n_dims, rows, columns, offset, size, crc = struct.unpack_from("<IIQQQQI", data, 320)
    assert (kind, n_dims, rows, columns, size) == (0, 2, 5, 6, 16 * 6 * 4)
    assert offset % 64 == 0 and offset >= header_bytes
    assert crc == zlib.crc32(data[offset : offset + size]) and not any(data[364:384])
    # the meta entry
    assert struct.unpack_from("<IIIIQ", data, u64(40)) == (1, 0, 1, 0, 8)
    assert data[u64(40) + 24 : u64(40) + 25] == b"k"
    assert struct.unpack_from("<q", data, u64(40) + 25) == (7,)


@pytest.mark.parametrize(
    "head, n_labels, bias",
    [(Head.NONE, 0, False), (Head.SEQUENCE, 1, False), (Head.SEQUENCE, 3, True),
     (Head.ANSWER, 2, True), (Head.TOKEN, 65536, False)],
)  # fmt: skip
def test_heads_stand_where_the_document_says(
    tmp_path: Path, head: Head, n_labels: int, bias: bool
) -> None:
    config = Config(5, 6, 7, 2, 1, 3, 1, 9, 1e-5, 5e5, head=head, n_labels=n_labels,
                    output_bias=bias)  # fmt: skip
    arrays = write(tmp_path / "a.bin", config)
    data = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack_from("<III", data, 196) == (head, n_labels, 0) and not any(data[204:256])
    assert struct.unpack_from("<I", data, 76) == (8 * bias,)
    found = read(tmp_path / "a.bin")
    assert found.config.head == head and found.config.n_outputs == (n_labels or 6)
    assert list(found.tensors) == list(arrays)
    assert ("output.weight" in arrays, "output.bias" in arrays) == (head != Head.NONE, bias)
    if n_labels:
        assert arrays["output.weight"].shape == (n_labels, 6)
        assert np.array_equal(found.tensors["output.weight"], arrays["output.weight"])
    if bias:
        assert np.array_equal(found.tensors["output.bias"], arrays["output.bias"])


configs = st.builds(
    Config,
    vocab_size=st.integers(1, 40),
    dim=st.integers(1, 20),
    hidden_dim=st.integers(1, 20),
    head_dim=st.integers(1, 4).map(lambda n: 2 * n),
    n_layers=st.integers(1, 2),
    n_heads=st.just(4),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    max_seq_len=st.integers(1, 2**24),
    norm_eps=st.floats(2**-30, 1, width=32),
    rope_theta=st.floats(1, 2**24, width=32),
    rope_scaling=st.just(Rope.LINEAR),
    rope_numbers=st.tuples(st.floats(0.5, 8, width=32)),
    tied=st.booleans(),
    bos_id=st.none(),
    eos_ids=st.lists(st.just(0), max_size=8).map(tuple),
)
metas = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255),
    st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(max_size=99),
    ),
    max_size=5,
)


@settings(max_examples=40)
@given(configs, floats, metas, st.binary(min_size=1, max_size=200))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    config: Config,
    kind: Kind,
    meta: dict[str, Any],
    tokenizer: bytes,
) -> None:
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    blob = (TokenizerKind.SENTENCEPIECE, tokenizer)
    arrays = write(path, config, kind=kind, meta=meta, tokenizer=blob)
    found = read(path)
    assert found.config == config and found.meta == meta and found.tokenizer == blob
    assert list(found.tensors) == list(arrays)
    for name, array in arrays.items():
        rounded = widen(narrow(array, kind)) if array.ndim == 2 else array
        assert np.array_equal(found.tensors[name], rounded)


def test_chunks_and_blocks_make_the_same_file(tmp_path: Path) -> None:
    config = Config(70, 6, 50, 2, 1, 3, 1, 9, 1e-5, 1e4)
    records, arrays = filled(config)
    write(tmp_path / "whole.bin", config)
    with Writer(tmp_path / "pieces.bin", config, records) as writer:
        for name, array in arrays.items():
            for first in range(0, len(array), 32):
                chunk = array[first : first + 32]
                matrix = chunk.ndim == 2
                writer.write(name, tile(chunk, Kind.F32).tobytes() if matrix else chunk)
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "pieces.bin").read_bytes()


def test_the_system_gets_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.format.LARGE_WRITE", 512)
    write(tmp_path / "usual.bin")
    pieces: list[tuple[int, int]] = []

    class Spy:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            pieces.append((self.file.tell(), len(data)))
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    records, arrays = filled(SMALL)
    with Writer(tmp_path / "spied.bin", SMALL, records) as writer:
        writer._file = Spy(writer._file)  # type: ignore[assignment]
        for name, array in arrays.items():
            writer.write(name, array)
    *middle, rest, header = [piece for piece in pieces if piece[1]]
    assert len(middle) > 2
    assert all(at % 512 == n % 512 == 0 for at, n in middle)
    assert rest[0] % 512 == 0 and rest[1] < 512 and header[0] == 0
    assert (tmp_path / "spied.bin").read_bytes() == (tmp_path / "usual.bin").read_bytes()


def test_wrong_chunks_are_bugs(tmp_path: Path) -> None:
    records, arrays = filled(SMALL)
    wrong: list[tuple[str, Any]] = [
        ("norm.weight", arrays["norm.weight"]),  # out of order
        ("tok_embeddings.weight", np.zeros((6, 6), np.float32)),  # too many rows
        ("tok_embeddings.weight", np.zeros((3, 6), np.float32)),  # not a multiple of 16
        ("tok_embeddings.weight", np.zeros((5, 7), np.float32)),  # too wide
        ("tok_embeddings.weight", bytes(100)),  # half a strip
    ]
    for name, chunk in wrong:
        with pytest.raises(ValueError):
            with Writer(tmp_path / "a.bin", SMALL, records) as writer:
                writer.write(name, chunk)
    with pytest.raises(ValueError, match="norm.weight"):
        with Writer(tmp_path / "a.bin", SMALL, records) as writer:
            for name in list(arrays)[:-1]:
                writer.write(name, arrays[name])
    assert not any(tmp_path.iterdir())


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    device = tmp_path / "device"
    os.mkfifo(device)  # as /dev/null would be for root
    with pytest.raises(LlamaError, match="device: is not a regular file"):
        write(device, force=True)
    assert device.is_fifo()


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("mine")
    with pytest.raises(LlamaError, match="exists already"):
        write(path)
    assert path.read_text() == "mine"
    write(path, force=True)
    assert read(path).config == read(path).config
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, LlamaError("bad weight"), OSError("disk")])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    records, arrays = filled(SMALL)
    with pytest.raises(BaseException):  # noqa: B017 (each of them)
        with Writer(tmp_path / "a.bin", SMALL, records) as writer:
            writer.write("tok_embeddings.weight", arrays["tok_embeddings.weight"])
            assert [p.name for p in tmp_path.iterdir()] == [f"a.bin.tmp-{os.getpid()}"]
            raise error
    assert not any(tmp_path.iterdir())


def test_a_small_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(LlamaError, match=r"needs [\d,]+ bytes of disk, 1,000 are free"):
        write(tmp_path / "a.bin")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    (tmp_path / f"a.bin.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(LlamaError, match="cannot write: No space left"):
        write(path)
    assert not any(tmp_path.iterdir())


def test_impossible_places_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="found a directory"):
        write(tmp_path)
    with pytest.raises(LlamaError, match="No such file"):
        write(tmp_path / "none" / "a.bin")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 0}, "dim must be 1 to"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"n_kv_heads": 2}, "n_kv_heads must divide"),
        ({"norm_eps": 0.0}, "norm_eps must be finite"),
        ({"rope_theta": float("inf")}, "rope_theta must be finite"),
        ({"rope_theta": 1e39}, "rope_theta must be finite"),
        ({"bos_id": 5}, "bos id"),
        ({"eos_ids": (-1,)}, "eos id"),
        ({"eos_ids": (0,) * 9}, "at most 8"),
        ({"rope_scaling": Rope.LINEAR}, "takes 1 numbers"),
        ({"head": Head.SEQUENCE, "tied": False}, "sequence head takes 1 to 65536 labels, found 0"),
        ({"head": Head.TOKEN, "tied": False, "n_labels": 65537}, "1 to 65536 labels, found 65537"),
        ({"head": Head.ANSWER, "tied": False, "n_labels": 3}, "answer head takes 2 to 2 labels"),
        ({"head": Head.NONE, "tied": False, "n_labels": 1}, "none head takes 0 to 0 labels"),
        ({"n_labels": 1}, "lm head takes 0 to 0 labels, found 1"),
        ({"head": Head.NONE}, "none head can be neither tied nor biased"),
        ({"head": Head.SEQUENCE, "n_labels": 2}, "sequence head can be neither tied"),
        ({"head": Head.NONE, "tied": False, "output_bias": True}, "none head can be neither"),
        ({"output_bias": True}, "lm head can be neither tied nor biased"),
        ({"rope_scaling": Rope.LLAMA3, "rope_numbers": (8.0, 4.0, 1.0, 9.0)}, "low_freq_factor"),
    ],
)
def test_impossible_configs_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from dataclasses import replace

    with pytest.raises(LlamaError, match=message):
        Writer(tmp_path / "a.bin", replace(SMALL, **changes), [])


# ---- damage ----


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.bin"
    write(path, tokenizer=(TokenizerKind.JSON, b"{}"), meta={"general.name": "x", "other": 1.5})
    return path.read_bytes()


def reseal(data: bytearray) -> bytes:
    """Makes the header's checksum right again after a change."""
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    struct.pack_into("<I", data, 12, 0)
    struct.pack_into("<I", data, 12, zlib.crc32(data[:header_bytes]))
    return bytes(data)


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(LlamaError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path, good: bytes) -> None:
    for size in [*range(0, 300), *range(300, len(good), 97), len(good) - 1]:
        refused(tmp_path / "a.bin", good[:size])
    refused(tmp_path / "a.bin", good + b"\0")


@settings(max_examples=300)
@given(st.data())
def test_a_changed_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject
) -> None:
    """With the checksum made right again every check is on its own; none may crash."""
    path = tmp_path_factory.getbasetemp() / "changed.bin"
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_bytes - 1))
        changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(changed))
    if changed[:header_bytes] != good[:header_bytes]:
        with pytest.raises(LlamaError):
            read(path)
    path.write_bytes(reseal(changed) if changed[16:24] == good[16:24] else bytes(changed))
    try:
        for tensor in read(path).tensors.values():
            assert tensor.dtype == np.float32
    except LlamaError:
        pass


def test_refusals_say_what_is_wrong(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.bin"

    def changed(at: int, code: str, *values: Any) -> str:
        data = bytearray(good)
        struct.pack_into("<" + code, data, at, *values)
        return refused(path, reseal(data))

    assert "not a .bin" in changed(0, "8s", b"GGUFGGUF")
    assert "version 1, found 2" in changed(8, "I", 2)
    assert "unknown tokenizer kind 9" in changed(72, "I", 9)
    assert "flags" in changed(76, "I", 16)
    assert "dim must be" in changed(84, "I", 0)
    assert "made by an older version, quantize again" in changed(320, "I", 77)
    assert "impossible" in changed(344, "Q", 2**63)  # offset
    assert "overlap" in changed(344 + 128, "Q", struct.unpack_from("<Q", good, 344)[0])
    assert "tok_embeddings.weight: expected (5, 6), found (6, 6)" in changed(328, "Q", 6)
    assert "output.weight is missing" in changed(76, "I", 0)
    meta = struct.unpack_from("<Q", good, 40)[0]
    entry = 24 + len("general.name") + 1
    assert "needs 'other', which" in changed(meta + -(-entry // 8) * 8 + 4, "I", 1)
    assert "general.name" not in refused(path, bytes(len(good)))
    data = bytearray(good)
    data[struct.unpack_from("<Q", good, 344)[0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(LlamaError, match="tok_embeddings.weight: checksum differs"):
        _ = read(path).tensors["tok_embeddings.weight"]
    for nothing in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(LlamaError, match="cannot open"):
            read(nothing)


def test_required_meta_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", meta={"later.thing": Required(1)})
    with pytest.raises(LlamaError, match="needs 'later.thing', which this version does not know"):
        read(tmp_path / "a.bin")


def test_bad_meta_keys_are_refused(tmp_path: Path) -> None:
    for key in ("", "a b", "é", "x" * 256, "a\n"):
        with pytest.raises(LlamaError, match="meta key: expected 1 to 255 ASCII"):
            write(tmp_path / "a.bin", meta={key: 1})
