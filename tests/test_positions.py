"""--rope-scaling and --max-seq-len against transformers' own scalings, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch

from llama import checkpoints
from llama.checkpoints import Options, hf, load, positions
from llama.checkpoints.settings import Settings
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import Config, Rope

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = small_models.ORIGINAL
# what is typed, and what transformers calls it for a model of 32 positions
SAME = {
    "none": {"rope_type": "default"},
    "linear:4": {"rope_type": "linear", "factor": 4.0},
    "dynamic:2": {"rope_type": "dynamic", "factor": 2.0},
    "yarn:4": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32},
    "yarn:1.5,24": {"rope_type": "yarn", "factor": 1.5, ORIGINAL: 24},
    "llama3:32": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, ORIGINAL: 8192},
    "llama3:8,1,2": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 2.0, ORIGINAL: 8192},
    "llama3:2,0.5,3,16": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0.5,
                          "high_freq_factor": 3.0, ORIGINAL: 16},
}  # fmt: skip


@pytest.mark.parametrize("text", SAME)
@pytest.mark.filterwarnings("ignore")
def test_what_is_typed_is_transformers_scaling(tmp_path: Path, text: str) -> None:
    """A plain checkpoint exported with the flag, against transformers' model with the scaling; the
    same flag on a checkpoint that says something else."""
    shape = small_models.config(head_dim=16)
    model = small_models.transformers_llama(shape, seed=1, rope=SAME[text])
    model.save_pretrained(tmp_path / "hf")
    said = hf.config_of(Settings.read(tmp_path / "hf/config.json"))
    others: list[dict[str, object]] = [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 7.0},
    ]
    for other in others:
        settings = json.loads((tmp_path / "hf/config.json").read_text())
        settings["rope_parameters"] = other
        (tmp_path / "hf/config.json").write_text(json.dumps(settings))
        options = Options(max_seq_len=64, rope_scaling=text)
        found = load(tmp_path / "hf", options)
        assert found.config.rope_scaling == said.rope_scaling
        assert found.config.rope_numbers == pytest.approx(said.rope_numbers)
        assert "set by --rope-scaling" in found.notes[-2]
        assert ("the checkpoint says linear x7" in found.notes[-2]) == ("factor" in other)
    checkpoints.export(tmp_path / "hf", tmp_path / "a.bin", options=options, say=lambda line: None)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 50).tolist()
    with torch.inference_mode():
        right = model(torch.tensor([tokens])).logits[0].numpy()
    with Engine(tmp_path / "a.bin", threads=1) as engine:
        ours = engine.forward(tokens, [0] * 50, range(50), [True] * 50, rope_lengths=[50] * 50)
    assert ours is not None and np.abs(ours - right).max() <= 1e-4 * np.abs(right).max()


def test_what_is_left_out_is_the_models_own() -> None:
    def complete(config: Config, text: str) -> tuple[float, ...]:
        return positions.complete(config, positions.parse(text)).rope_numbers

    plain = small_models.config(max_seq_len=4096)
    assert complete(plain, "dynamic:2") == (2.0, 4096.0)
    assert complete(plain, "dynamic:2,2048") == (2.0, 2048.0)
    attention = 0.1 * np.log(8) + 1
    yarn = small_models.config(
        max_seq_len=16384, rope_scaling=Rope.YARN, rope_numbers=(4.0, 4096.0, 32, 1, 1.2, 1)
    )
    assert complete(yarn, "yarn:8") == pytest.approx((8.0, 4096.0, 32.0, 1.0, attention, 1.0))
    three = small_models.config(
        max_seq_len=131072, rope_scaling=Rope.LLAMA3, rope_numbers=(8.0, 1.0, 4.0, 8192.0)
    )
    assert complete(three, "dynamic:2") == (2.0, 8192.0)
    assert complete(three, "none") == ()


@pytest.mark.parametrize("text, message", [
    ("", "expected none, linear:FACTOR, .*; found ''"),
    ("longrope:4", "expected none, .*; found 'longrope:4'"),
    ("linear", "expected none, linear:FACTOR"),
    ("linear:", "expected none, linear:FACTOR"),
    ("linear:x", "found 'linear:x'"),
    ("linear:2,4096", "found 'linear:2,4096'"),
    ("none:1", "found 'none:1'"),
    ("yarn:4,4096,32", "found 'yarn:4,4096,32'"),
    ("llama3:8,1", "found 'llama3:8,1'"),
    ("linear:0", "numbers must be above 0 and at most 16777216, found 'linear:0'"),
    ("linear:nan", "numbers must be above 0"),
    ("yarn:4,-1", "numbers must be above 0"),
    ("dynamic:inf", "numbers must be above 0"),
    ("yarn:4,1e30", "numbers must be above 0 and at most 16777216"),
    ("linear:0.5", "the factor must be at least 1, found 0.5"),
    ("llama3:8,4,1", "llama3's LOW must be below its HIGH, found 4 and 1"),
])  # fmt: skip
def test_wrong_ones_are_one_line(text: str, message: str) -> None:
    with pytest.raises(LlamaError, match="--rope-scaling: .*" + message) as caught:
        load(Path("nowhere"), Options(rope_scaling=text))
    assert "\n" not in str(caught.value)


def test_what_a_person_reads(tmp_path: Path) -> None:
    shape = small_models.config(max_seq_len=4096)
    source = small_models.write_hf(tmp_path / "m", shape, small_models.weights(shape))

    def export(*flags: str) -> tuple[int, list[str]]:
        command = [sys.executable, ROOT / "export.py", source, "--out", tmp_path / "a.bin"]
        done = subprocess.run([*command, "--force", *flags], capture_output=True, text=True,
                              check=False)  # fmt: skip
        return done.returncode, done.stderr.splitlines()

    status, lines = export("--rope-scaling=yarn:4", "--max-seq-len=16384")
    assert status == 0 and "context 16384, yarn rope x4" in lines[0]
    assert lines[2:4] == [
        "  rope scaling yarn x4 from 4096: set by --rope-scaling; the checkpoint says none",
        "  context 16384: beyond the 4096 positions it was trained for; rope scaling yarn x4 from "
        "4096 applies",
    ]
    status, lines = export("--rope_scaling", "linear:2")
    assert status == 0 and lines[2].endswith("the context stays 4096 (--max-seq-len sets another)")
    status, lines = export("--max-seq-len=8192")
    assert lines[2] == (
        "  context 8192: beyond the 4096 positions it was trained for; it has no rope scaling to "
        "reach them (--rope-scaling sets one)"
    )
    status, lines = export("--max-seq-len=2048")
    assert status == 0 and len(lines) == 3
    status, lines = export("--rope-scaling=linear:x")
    assert status == 1 and len(lines) == 1 and lines[0].startswith("export.py: --rope-scaling: ")
