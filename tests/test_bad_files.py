"""Files that are no model, or a damaged one: each is one line of LlamaError and never a crash.

The header's checksum stops accidents; here it is also made right again after each change, as an
attacker would, so that every other check has to stand by itself. llama/format.py's reader shares
no code with the library and judges it: what one refuses, the other must refuse.
"""

from __future__ import annotations

import gc
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.config import Head, Rope, expected_tensors
from llama.engine import Engine, Model
from llama.errors import LlamaError
from llama.format import Required, TokenizerKind, read
from llama.quant import Kind

SHAPE = small_models.config(
    vocab_size=19, dim=10, hidden_dim=7, head_dim=4, n_heads=2, n_kv_heads=1, n_layers=1,
    rope_scaling=Rope.LLAMA3, rope_numbers=(8.0, 1.0, 4.0, 64.0), bos_id=1, eos_ids=(2, 3),
)  # fmt: skip
META = {"general.name": "small", "a.count": 7, "a.share": 0.25, "a.blob": b"\0\1\2"}
RECORDS, RECORD = 256, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def good(folder: Path) -> bytes:
    """A whole file of f32; its norms and matrices stand in Meta's order."""
    tokenizer = (TokenizerKind.JSON, b"{}" * 9)
    path = small_models.write_bin(folder / "good.bin", SHAPE, meta=META, tokenizer=tokenizer)
    return path.read_bytes()


@pytest.fixture(scope="module")
def q8(folder: Path) -> bytes:
    return small_models.of_kind(folder, SHAPE, Kind.Q8).read_bytes()


def seal(data: bytes | bytearray) -> bytes:
    """Makes the header's checksum right again; as far as it can be computed."""
    out = bytearray(data)
    (header_bytes,) = struct.unpack_from("<Q", out, 16)
    struct.pack_into("<I", out, 12, 0)
    struct.pack_into("<I", out, 12, zlib.crc32(out[: min(header_bytes, len(out))]))
    return bytes(out)


def changed(data: bytes, *changes: tuple[int, str, Any]) -> bytes:
    """DATA with (offset, struct code, value) written into it, resealed."""
    out = bytearray(data)
    for at, code, value in changes:
        struct.pack_into("<" + code, out, at, value)
    return seal(out)


def refusal(path: Path) -> str:
    """The one line with which PATH is refused."""
    with pytest.raises(LlamaError) as caught:
        Model(path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{path}: "), line
    return line.removeprefix(f"{path}: ")


def refused(folder: Path, data: bytes) -> str:
    path = folder / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(LlamaError):
        read(path)
    return refusal(path)


def use(path: Path) -> None:
    """Everything that an open model offers, and one token through it."""
    with Model(path) as model:
        assert model.config.vocab_size and model.meta is not None and model.tokenizer
        for i in range(len(model.tensors)):
            try:
                model.verify(i)
            except LlamaError as error:
                assert "checksum" in str(error)
            model.rows(i)
    try:
        with Engine(path, threads=1) as engine:
            engine.forward([0, 1], [0, 0], [0, 1], [True, True])
    except LlamaError as error:
        # max_seq_len is 1 by now, or weights are any bits
        assert "context" in str(error) or "not finite" in str(error)


# --- what is no file, or another's


def test_no_file_at_all(folder: Path) -> None:
    assert refusal(folder / "none.bin") == "No such file or directory"
    assert refusal(folder / "none" / "a.bin") == "No such file or directory"
    assert "is a directory" in refusal(folder)
    assert "not a regular file" in refusal(Path("/dev/null"))
    (folder / "empty.bin").touch()
    assert refusal(folder / "empty.bin") == "is empty"
    assert "too long" in refusal(folder / ("x" * 300 + ".bin"))
    for nothing in ("", "/"):
        with pytest.raises(LlamaError):
            Model(nothing)


def test_a_name_with_a_nul_is_not_cut_there(folder: Path, good: bytes) -> None:
    with pytest.raises(LlamaError, match="null"):
        Model(f"{folder / 'good.bin'}\0.txt")


def test_a_pipe_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.bin")
    assert "not a regular file" in refusal(folder / "pipe.bin")


def test_a_name_of_odd_bytes(folder: Path, good: bytes) -> None:
    path = folder / os.fsdecode(b"n\xe9 \xe2\x82\xac.bin")
    path.write_bytes(good)
    with Model(path) as model:
        assert model.config.dim == SHAPE.dim
    path.write_bytes(good[:-1])
    with pytest.raises(LlamaError, match="cut short"):
        Model(path)


def others() -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("archive/data.pkl", b"x" * 400)
    safetensors = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "GGUF": b"GGUF\3\0\0\0" + bytes(400),
        "zip": archive.getvalue(),
        "safetensors": struct.pack("<Q", len(safetensors)) + safetensors + bytes(400),
        "first bytes": b"Once upon a time " * 40,
        "first bytes are": bytes(4096),
        "first bytes are not": struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(999),
        "LlamaBin": b"LlamaBi",
        "first": b"\n",
    }


@pytest.mark.parametrize("what", list(others()))
def test_another_programs_file(folder: Path, what: str) -> None:
    line = refused(folder, others()[what])
    assert "not a model of this program" in line and what in line and "export.py" in line


# --- accidents


def test_every_truncation(folder: Path, good: bytes) -> None:
    for size in [*range(700), *range(700, len(good), 61), len(good) - 1]:
        refused(folder, good[:size])
    assert "cut short" in refused(folder, good[:100])
    assert "cut short" in refused(folder, good[:-1])
    assert "too long" in refused(folder, good + b"\0")


def test_every_header_byte_counts(folder: Path, good: bytes) -> None:
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    path = folder / "bad.bin"
    path.write_bytes(good)
    with open(path, "r+b", buffering=0) as file:
        for at in range(header_bytes):
            for flip in (*(1 << bit for bit in range(8)), 0xFF):
                os.pwrite(file.fileno(), bytes([good[at] ^ flip]), at)
                with pytest.raises(LlamaError) as caught:
                    Model(path)
                assert "\n" not in str(caught.value)
            os.pwrite(file.fileno(), good[at : at + 1], at)
    with Model(path) as model:
        assert model.meta == META


def test_a_flipped_bit_in_a_tensor_is_found(folder: Path, good: bytes, q8: bytes) -> None:
    for data in (good, q8):
        path = folder / "bit.bin"
        path.write_bytes(data)
        with Model(path) as model:
            names = [t.name for t in model.tensors]
            for i in range(len(names)):
                model.verify(i)
        records = read(path).records
        for i, name in enumerate(names):
            record = records[name]
            for at in (record.offset, record.offset + record.n_bytes - 1):  # the last is padding
                hurt = bytearray(data)
                hurt[at] ^= 4
                path.write_bytes(hurt)
                with Model(path) as model:
                    for j in range(len(names)):
                        if j != i:
                            model.verify(j)
                    with pytest.raises(LlamaError, match=f"bit.bin: {name} is damaged: checksum"):
                        model.verify(i)
    with Model(folder / "good.bin") as model, pytest.raises(LlamaError, match="tensor 12 of 12"):
        model.verify(12)


def test_refusals_leave_nothing_open(folder: Path, good: bytes) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps")
        return (
            len(os.listdir("/proc/self/fd")),
            maps.read_text().count("leak.bin"),
        )

    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc on this system")
    path = folder / "leak.bin"
    before = held()
    for data in (good[:-1], changed(good, (84, "I", 0)), changed(good, (RECORDS + 64, "I", 9))):
        path.write_bytes(data)
        for _ in range(5):
            refusal(path)
    path.write_bytes(good)
    for _ in range(5):
        with pytest.raises(LlamaError):
            Engine(path, isa="none such")
        Model(path).close()
        del [Model(path)][0]
    assert held() == before


# --- lies, with the checksum made right

SIZES = {
    "vocab_size": 80, "dim": 84, "hidden_dim": 88, "head_dim": 92, "n_layers": 96, "n_heads": 100,
    "n_kv_heads": 104, "max_seq_len": 108,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_impossible_sizes(folder: Path, good: bytes, name: str) -> None:
    at = SIZES[name]
    (right,) = struct.unpack_from("<I", good, at)
    for value in (0, 2**24 + 2, 2**31, 2**32 - 2, 2**32 - 1):
        assert f"impossible config: {name} is {value}" in refused(
            folder, changed(good, (at, "I", value))
        )
    if name != "max_seq_len":
        for value in (1, 2, 3, 5, right - 1, right + 1, 2 * right, 4096, 2**16, 2**24):
            if value != right:
                refused(folder, changed(good, (at, "I", value)))


def test_sizes_whose_products_overflow(folder: Path, good: bytes) -> None:
    """2^16 heads of 2^16 are 2^32 rows; times dim 2^24 and 4 bytes, more than 64 bits hold."""
    huge = [(84, "I", 2**24), (92, "I", 2**16), (100, "I", 2**16), (104, "I", 2**16)]
    refused(folder, changed(good, *huge))
    refused(folder, changed(good, (80, "I", 2**24), (84, "I", 2**24), (88, "I", 2**24)))
    record = RECORDS + RECORD * 2  # wq
    for shape in ((2**63, 2), (2**32, 2**32), (2**64 - 1, 1), (2**60, 16), (2**24, 2**24)):
        changes = [(record + 72, "Q", shape[0]), (record + 80, "Q", shape[1])]
        refused(folder, changed(good, *huge, *changes))
        refused(folder, changed(good, *huge, *changes, (record + 96, "Q", 0)))


@pytest.mark.parametrize(
    "at, code, value, says",
    [
        (0, "8s", b"LLAMABIN", "not a model of this program"),
        (8, "I", 0, "version 0, this program reads version 1"),
        (8, "I", 2, "version 2, this program reads version 1"),
        (16, "Q", 0, "header of 0 bytes"),
        (16, "Q", 192, "header of 192 bytes"),
        (16, "Q", 2**63, "damaged: header"),
        (16, "Q", 2**64 - 64, "damaged: header"),
        (24, "Q", 0, "its header says 0 bytes"),
        (24, "Q", 2**64 - 1, "its header says"),
        (32, "I", 0, "meta entries do not fit"),
        (32, "I", 65537, "65537 tensors do not fit"),
        (32, "I", 2**32 - 1, "tensors do not fit"),
        (36, "I", 0, "left over"),
        (36, "I", 5, "cut short"),
        (36, "I", 2**32 - 1, "meta entries do not fit"),
        (40, "Q", 0, "meta entries do not fit"),
        (40, "Q", 2**64 - 8, "meta entries do not fit"),
        (48, "Q", 0, "meta"),
        (48, "Q", 2**64 - 8, "meta entries do not fit"),
        (56, "Q", 0, "its tokenizer does not fit"),
        (64, "Q", 2**64 - 1, "its tokenizer does not fit"),
        (64, "Q", 0, "tokenizer kind 2 with 0 bytes"),
        (72, "I", 0, "tokenizer kind 0 with 18 bytes"),
        (72, "I", 4, "tokenizer kind 4"),
        (72, "I", 2**32 - 1, "tokenizer kind 4294967295"),
        (76, "I", 2, "layers.0.attention.wq.bias is missing"),
        (76, "I", 4, "layers.0.feed_forward.w1.bias is missing"),
        (76, "I", 8, "head 0 has no bias"),
        (76, "I", 16, "unknown flags 0x10"),
        (76, "I", 2**31, "unknown flags 0x80000000"),
        (92, "I", 3, "head_dim is 3, expected an even number"),
        (104, "I", 3, "n_kv_heads is 3, expected a divisor of n_heads 2"),
        (112, "f", 0.0, "norm_eps is 0"),
        (112, "f", -1e-5, "norm_eps is -1e-05"),
        (112, "f", float("nan"), "norm_eps is"),
        (116, "f", float("inf"), "rope_theta is inf"),
        (116, "f", -1.0, "rope_theta is -1"),
        (120, "I", 5, "rope scaling 5 is not known"),
        (120, "I", 3, "rope scaling number 4 is 0"),
        (120, "I", 2**32 - 1, "rope scaling 4294967295 is not known"),
        (124, "f", 0.0, "rope scaling number 0 is 0"),
        (136, "f", float("nan"), "rope scaling number 3 is"),
        (132, "f", 1.0, "llama3 rope scaling from 1 to 1"),
        (156, "i", 19, "bos_id is 19 of 19 tokens"),
        (156, "i", -2, "bos_id is -2"),
        (156, "i", -(2**31), "bos_id is -2147483648"),
        (160, "I", 9, "9 eos ids, at most 8"),
        (160, "I", 2**32 - 1, "eos ids, at most 8"),
        (164, "i", -1, "eos_id is -1"),
        (168, "i", 19, "eos_id is 19 of 19 tokens"),
        (168, "i", 2**31 - 1, "eos_id is 2147483647"),
    ],
)
def test_lies_in_the_header(
    folder: Path, good: bytes, at: int, code: str, value: Any, says: str
) -> None:
    assert says in refused(folder, changed(good, (at, code, value)))


HEAD, LABELS, FLAGS = 196, 200, 76


@pytest.mark.parametrize(
    "values, says",
    [
        ({HEAD: 5}, "head 5 is not known"),
        ({HEAD: 9}, "head 9 is not known"),
        ({HEAD: 2**32 - 1}, "head 4294967295 is not known"),
        ({HEAD: 2}, "0 labels for head 2"),
        ({HEAD: 4}, "0 labels for head 4"),
        ({LABELS: 5}, "5 labels for head 0"),
        ({HEAD: 1, LABELS: 1}, "1 labels for head 1"),
        ({HEAD: 2, LABELS: 65537}, "65537 labels for head 2"),
        ({HEAD: 4, LABELS: 2**32 - 1}, "4294967295 labels for head 4"),
        ({HEAD: 3, LABELS: 3}, "an answer's head has 3 outputs, expected 2"),
        ({HEAD: 3, LABELS: 1}, "an answer's head has 1 outputs, expected 2"),
        ({HEAD: 3, LABELS: 2}, "output.weight has shape (19, 10), expected (2, 10)"),
        ({HEAD: 2, LABELS: 65536}, "output.weight has shape (19, 10), expected (65536, 10)"),
        ({HEAD: 2, LABELS: 19, FLAGS: 1}, "head 2 cannot be tied"),
        ({HEAD: 1, FLAGS: 1}, "head 1 cannot be tied"),
        ({HEAD: 1, FLAGS: 8}, "head 1 has no bias"),
        ({FLAGS: 8}, "head 0 has no bias"),
        ({FLAGS: 9}, "head 0 has no bias"),
        ({HEAD: 4, LABELS: 19, FLAGS: 8}, "output.bias is missing"),
    ],
)
def test_lies_about_the_head(
    folder: Path, good: bytes, values: dict[int, int], says: str
) -> None:
    assert says in refused(folder, changed(good, *((at, "I", n) for at, n in values.items())))


@pytest.mark.parametrize("values", [{HEAD: 1}, {HEAD: 2, LABELS: 19}, {HEAD: 4, LABELS: 19}])
def test_another_head_can_be_true(folder: Path, good: bytes, values: dict[int, int]) -> None:
    path = folder / "other.bin"
    path.write_bytes(changed(good, *((at, "I", n) for at, n in values.items())))
    use(path)
    with Model(path) as model:
        assert (model.config.head, model.config.n_labels) == (values[HEAD], values.get(LABELS, 0))
        assert read(path).config.head == values[HEAD]


def test_a_bias_of_another_shape(folder: Path) -> None:
    shape = small_models.config(head=Head.TOKEN, n_labels=3, output_bias=True, n_layers=1)
    data = small_models.write_bin(folder / "biased.bin", shape).read_bytes()
    record = RECORDS + RECORD * list(expected_tensors(shape)).index("output.bias")
    assert data[record : record + 12] == b"output.bias\0"
    lie = changed(data, (record + 72, "Q", 4), (record + 96, "Q", 16))
    assert "output.bias has shape (4, 1), expected (3, 1)" in refused(folder, lie)


def name64(text: bytes) -> bytes:
    return text.ljust(64, b"\0")


@pytest.mark.parametrize(
    "at, code, value, says",
    [
        (0, "64s", name64(b"tok_embedding.weight"), "tok_embeddings.weight is missing"),
        (0, "64s", name64(b"norm.weight"), "two tensors are called norm.weight"),
        (0, "64s", name64(b""), "tensor 0 has no proper name"),
        (0, "64s", b"x" * 64, "tensor 0 has no proper name"),
        (0, "64s", name64(b"tok_embeddings.weight\0x"), "tensor 0 has no proper name"),
        (0, "64s", name64(b"a\nb"), "tensor 0 has no proper name"),
        (0, "64s", name64(b"\xff\xfe"), "tensor 0 has no proper name"),
        (64, "I", 4, "made by an older version, quantize again"),
        (64, "I", 77, "made by an older version, quantize again"),
        (64, "I", 2**32 - 1, "made by an older version, quantize again"),
        (64, "I", 1, "tok_embeddings.weight has 1280 bytes, its shape needs 640"),
        (64, "I", 5, "its shape needs 576"),
        (64, "I", 6, "tok_embeddings.weight has 10 columns, q8r takes whole groups of 32"),
        (68, "I", 0, "impossible shape: 0 dims"),
        (68, "I", 3, "impossible shape: 3 dims"),
        (68, "I", 1, "impossible shape: 1 dims (19, 10)"),
        (72, "Q", 0, "impossible shape: 2 dims (0, 10)"),
        (72, "Q", 20, "tok_embeddings.weight has shape (20, 10), expected (19, 10)"),
        (72, "Q", 33, "its shape needs 1920"),
        (72, "Q", 2**63, "impossible shape"),
        (80, "Q", 0, "impossible shape"),
        (80, "Q", 2**64 - 1, "impossible shape"),
        (88, "Q", 0, "tok_embeddings.weight lies outside the file: offset 0"),
        (88, "Q", 64, "lies outside"),
        (88, "Q", 2**64 - 64, "lies outside"),
        (88, "Q", 2**63, "lies outside"),
        (96, "Q", 0, "has 0 bytes, its shape needs 1280"),
        (96, "Q", 2**64 - 1, "its shape needs 1280"),
    ],
)
def test_lies_in_a_record(
    folder: Path, good: bytes, at: int, code: str, value: Any, says: str
) -> None:
    assert says in refused(folder, changed(good, (RECORDS + at, code, value)))


def test_places_of_tensors(folder: Path, good: bytes) -> None:
    (offset,) = struct.unpack_from("<Q", good, RECORDS + 88)
    for shift in (1, 4, 16, 32, 63):
        line = refused(folder, changed(good, (RECORDS + 88, "Q", offset + shift)))
        assert "tok_embeddings.weight lies outside" in line
    line = refused(folder, changed(good, (RECORDS + 88, "Q", offset + 64)))
    assert "tok_embeddings.weight and layers.0.attention_norm.weight overlap" in line
    line = refused(folder, changed(good, (RECORDS + 88, "Q", len(good) - 64)))
    assert "lies outside" in line
    line = refused(folder, changed(good, (RECORDS + RECORD + 88, "Q", offset)))
    assert "overlap" in line


def test_a_vector_is_f32_and_one_column(folder: Path, good: bytes) -> None:
    norm = RECORDS + RECORD
    assert "is a vector of f16, expected f32" in refused(folder, changed(good, (norm + 64, "I", 1)))
    assert "impossible shape: 1 dims (10, 2)" in refused(folder, changed(good, (norm + 80, "Q", 2)))
    line = refused(folder, changed(good, (norm + 72, "Q", 9), (norm + 96, "Q", 36)))
    assert "attention_norm.weight has shape (9, 1), expected (10, 1)" in line


def test_a_matrix_of_fewer_columns(folder: Path, good: bytes) -> None:
    """The record is sound in itself; only the config says that it is too narrow."""
    line = refused(folder, changed(good, (RECORDS + 80, "Q", 9), (RECORDS + 96, "Q", 2 * 9 * 64)))
    assert line == "tok_embeddings.weight has shape (19, 9), expected (19, 10)"


def test_missing_tensors_are_named(folder: Path, good: bytes) -> None:
    path = folder / "good.bin"
    for i, name in enumerate(read(path).records):
        line = refused(folder, changed(good, (RECORDS + RECORD * i, "64s", name64(b"other"))))
        assert line == f"{name} is missing"
    untied = changed(good, (76, "I", 1))  # its output.weight is now spare
    (folder / "spare.bin").write_bytes(untied)
    with Model(folder / "spare.bin") as model:
        assert model.config.tied
    layers = changed(good, (96, "I", 2))
    assert refused(folder, layers) == "layers.1.attention_norm.weight is missing"


def entry(at: int, good: bytes) -> int:
    """Where meta entry number AT starts."""
    (place,) = struct.unpack_from("<Q", good, 40)
    for _ in range(at):
        key, value = struct.unpack_from("<I4xQ", good, place + 8)
        place += -(-(24 + key + value) // 8) * 8
    return int(place)


@pytest.mark.parametrize(
    "number, at, code, value, says",
    [
        (0, 8, "I", 0, "longer than its section"),
        (0, 8, "I", 256, "longer than its section"),
        (3, 8, "I", 255, "longer than its section"),
        (0, 8, "I", 2**32 - 1, "longer than its section"),
        (0, 16, "Q", 2**64 - 1, "longer than its section"),
        (0, 16, "Q", 2**64 - 36, "longer than its section"),  # the sum wraps to nothing
        (0, 16, "Q", 2**20, "longer than its section"),
        (1, 16, "Q", 7, "expected 8"),
        (2, 16, "Q", 9, "expected 8"),
        (1, 16, "Q", 0, "expected 8"),
        (0, 4, "I", 1, "needs \"general.name\", which this version does not know"),
        (1, 4, "I", 1, "needs \"a.count\", which this version does not know"),
        (1, 24, "7s", b"a.share", "two meta entries are called"),
        (0, 24, "12s", b"general\nname", "not plain ASCII"),
        (0, 24, "12s", b"general name", "not plain ASCII"),
        (0, 24, "12s", b"general\0name", "not plain ASCII"),
        (0, 24, "12s", b"g\xc3\xa9neralname", "not plain ASCII"),
    ],
)  # fmt: skip
def test_lies_in_a_meta_entry(
    folder: Path, good: bytes, number: int, at: int, code: str, value: Any, says: str
) -> None:
    line = refused(folder, changed(good, (entry(number, good) + at, code, value)))
    assert says in line.replace("'", '"'), line


def test_meta_of_a_later_version(folder: Path) -> None:
    """Unknown optional keys and types do no harm; a required one stops by name."""
    path = small_models.write_bin(
        folder / "later.bin", SHAPE, meta={"later.thing": 5, "general.name": "x"}
    )
    with Model(path) as model:
        assert model.meta == {"later.thing": 5, "general.name": "x"}
    data = path.read_bytes()
    path.write_bytes(changed(data, (entry(0, data), "I", 9)))
    with Model(path) as model:
        assert model.meta == read(path).meta == {"general.name": "x"}
    path = small_models.write_bin(
        folder / "needs.bin", SHAPE, meta={"later.heads": Required(2), "general.name": "x"}
    )
    assert "later.heads" in refusal(path) and "does not know" in refusal(path)


def test_meta_text_that_is_not_utf8(folder: Path, good: bytes) -> None:
    path = folder / "text.bin"
    path.write_bytes(changed(good, (entry(0, good) + 24 + 12, "5s", b"sm\xff\xfe!")))
    with Model(path) as model:
        assert model.meta["general.name"] == "sm\ufffd\ufffd!"


# --- every byte, judged by the other reader


def same_verdict(path: Path) -> bool:
    """Whether PATH opens; the library and format.py must agree, and on what they read."""
    try:
        right = read(path)
    except LlamaError:
        right = None
    try:
        model = Model(path)
    except LlamaError as error:
        assert right is None, f"only the library refuses it: {error}"
        return False
    with model:
        assert right is not None, "only llama/format.py refuses it"
        for name in type(right.config).__match_args__:
            a, b = getattr(model.config, name), getattr(right.config, name)
            assert a == b or a != a, name
        assert model.meta == pytest.approx(right.meta, nan_ok=True) or model.meta == right.meta
        assert model.tokenizer == (right.tokenizer[0].name.lower(), right.tokenizer[1])
        found = {t.name: (t.kind, t.shape, t.crc32) for t in model.tensors}
        assert found == {r.name: (r.kind, r.shape, r.crc32) for r in right.records.values()}
    return True


def test_both_readers_agree_on_every_changed_byte(folder: Path, good: bytes) -> None:
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    path = folder / "agree.bin"
    opened = 0
    for at in [*range(12), *range(16, header_bytes)]:
        if RECORDS + 3 * RECORD <= at < RECORDS + 10 * RECORD:
            continue  # seven more records like the three before
        for value in {0, 1, 0x7F, 0xFF, good[at] ^ 0x20} - {good[at]}:
            if at in range(16, 24) and struct.unpack_from("<Q", good, 16)[0] > len(good):
                continue
            data = bytearray(good)
            data[at] = value
            path.write_bytes(seal(data))
            try:
                opened += same_verdict(path)
            except AssertionError as error:
                raise AssertionError(f"byte {at} = {value:#x}: {error}") from None
    assert opened > 500  # checksums of tensors, padding, texts, numbers within their limits


@settings(max_examples=300)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(folder: Path, good: bytes, data: st.DataObject) -> None:
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    hurt = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        code = data.draw(st.sampled_from("BIQ"))
        size = struct.calcsize(code)
        at = data.draw(st.integers(16 // size, header_bytes // size - 1)) * size
        edge = st.sampled_from([0, 1, 63, 64, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)])
        value = data.draw(st.one_of(edge, st.integers(0, 2 ** (8 * size) - 1)))
        struct.pack_into("<" + code, hurt, at, value)
    path = folder / "fuzz.bin"
    path.write_bytes(seal(hurt))
    if same_verdict(path):
        use(path)


def test_weights_of_any_bits_do_no_harm(folder: Path, good: bytes, q8: bytes) -> None:
    """Infinities, NaNs and codes of -128 as weights: numbers break down, nothing else does."""
    (header_bytes,) = struct.unpack_from("<Q", good, 16)
    for seed, data in enumerate((good, q8, q8)):
        (header_bytes,) = struct.unpack_from("<Q", data, 16)
        noise = np.random.default_rng(seed).bytes(len(data) - header_bytes)
        path = folder / "noise.bin"
        path.write_bytes(data[:header_bytes] + noise)
        use(path)
