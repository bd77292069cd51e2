"""Merges a PEFT adapter into a checkpoint: W + scale B A, row by row while it is exported.

An adapter names modules as transformers does, whatever the checkpoint's own form is, and its rows
of q_proj and k_proj follow Hugging Face's order of rotary pairs, as the base's would there. So
they are put into Meta's order here, as hf.py does with the weights, and one rule serves every
source. What the adapter holds must be what its configuration announces, no more and no less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from llama.checkpoints import hf, safetensors_file, torch_file
from llama.checkpoints.adapted import Adapted, LowRank, Offset, Step, Transposed
from llama.checkpoints.checkpoint import Checkpoint, show
from llama.checkpoints.lora_config import LoraConfig
from llama.checkpoints.settings import Settings
from llama.checkpoints.tensors import Interleaved, Tensor, Unreadable
from llama.errors import LlamaError
from llama.format import Head
from llama.quant import widen

CHUNK_BYTES = 1 << 24
FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector(?:\.weight)?|(?P<base>base_layer\.)?(?:weight|bias))"
)
INPUT, OUTPUT = "tok_embeddings", "output"
LINEAR = re.compile(r"layers\.\d+\.(attention|feed_forward)\.\w+")
PAIRED = re.compile(r"layers\.\d+\.attention\.w[qk]")


@dataclass
class _Module:
    """What the adapter holds for one module."""

    name: str  # as transformers has it
    stem: str  # as we have it, without .weight
    parts: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False  # its whole weight is the base's own, with whatever is tied to that


def merge(checkpoint: Checkpoint, path: Path) -> None:
    """Changes CHECKPOINT's tensors to those of the adapter in the directory PATH merged into it,
    and says so in its notes and its origin. Reads the adapter once, the base not at all.

    Raises LlamaError, one line, for what is no plain LoRA, does not fit, is missing or not finite.
    """
    if not (path / "adapter_config.json").is_file():
        raise LlamaError(
            f"{path}: expected a PEFT adapter's directory, found "
            f"{'no adapter_config.json in it' if path.is_dir() else 'none'}"
        )
    config = LoraConfig.read(Settings.read(path / "adapter_config.json"))
    files = [path / name for name in FILES if (path / name).is_file()]
    if not files:
        raise LlamaError(f"{path}: expected {' or '.join(FILES)} beside adapter_config.json")
    _Merge(checkpoint, config, files[0]).run()
    name = path.resolve().name
    checkpoint.meta["general.origin"] = f"{checkpoint.meta['general.origin']!s} + LoRA {name}"


class _Merge:
    def __init__(self, checkpoint: Checkpoint, config: LoraConfig, file: Path) -> None:
        self.checkpoint, self.config, self.file = checkpoint, config, file
        self.tensors = dict(checkpoint.tensors)
        self.ranks: list[int] = []  # of the matrices that B A is added to
        self.replaced: list[str] = []
        self.apart = False  # what was tied is not any more
        self.modules = {name: _Module(name, stem) for name, stem in _names(checkpoint)}

    def run(self) -> None:
        self.read()
        for module in self.modules.values():
            self.announced(module)
        self.untie()
        for module in self.modules.values():
            for part in ("weight", "bias"):
                if part in module.parts:
                    self.put(module, part)
            if any(part.startswith("lora_") for part in module.parts):
                self.change(module)
        if not self.ranks and not self.replaced:
            raise LlamaError(f"{self.config.settings.path}: it changes nothing in this model")
        self.checkpoint.tensors = self.tensors
        self.note()

    def read(self) -> None:
        """Sorts the adapter's tensors by module, each checked to be finite."""
        read = safetensors_file.read if self.file.suffix == ".safetensors" else torch_file.read
        for key, tensor in read(self.file).items():
            match = KEY.fullmatch(key)
            if match is None:
                self.fail(key, "no tensor that a plain LoRA has")
            if match["module"] not in self.modules:
                self.fail(key, f"a {self.checkpoint.source} base has no such module")
            module = self.modules[match["module"]]
            part = match["part"].removeprefix("base_layer.")
            part = "lora_magnitude_vector" if part.startswith("lora_magnitude") else part
            if part in module.parts:
                self.fail(key, "stands there twice")
            if isinstance(tensor, Unreadable):
                self.fail(key, f"expected f32, f16 or bf16, found {tensor.dtype}")
            self.check_finite(key, tensor)
            module.parts[part] = tensor
            if part == "weight":
                module.shared = match["base"] is not None or not self.config.replaces(module.name)

    def announced(self, module: _Module) -> None:
        """The module's tensors are those that the configuration asks for."""
        config, name, linear = self.config, module.name, LINEAR.fullmatch(module.stem) is not None
        targeted = config.targeted(name, linear)
        if targeted and "norm" in module.stem.split(".")[-1]:
            self.fail(name, "a norm cannot be a target of LoRA")
        wanted = set()
        if targeted and module.stem == INPUT:
            wanted = {"lora_embedding_A", "lora_embedding_B"}
            if config.dora or config.offset:
                self.fail(name, "use_dora and lora_bias of the embedding are not supported")
        elif targeted:
            wanted = {"lora_A.weight", "lora_B.weight"}
            wanted |= {"lora_B.bias"} if config.offset else set()
            wanted |= {"lora_magnitude_vector"} if config.dora else set()
        whole = config.replaces(name) and not targeted
        if whole:
            wanted.add("weight")
        biased = f"{module.stem}.bias" in self.tensors
        trained = config.biases == "all" or (config.biases == "lora_only" and targeted)
        if biased and (whole or trained):
            wanted.add("bias")
        for part in sorted(wanted - module.parts.keys()):
            self.fail(f"{name}.{part}", "is missing, adapter_config.json asks for it")
        for part in sorted(module.parts.keys() - wanted - {"weight", "bias"}):
            self.fail(f"{name}.{part}", "adapter_config.json does not ask for it")
        for part in ("bias", "lora_B.bias"):
            if part in module.parts and not biased:
                self.fail(f"{name}.{part}", "the base has no such bias to change")

    def untie(self) -> None:
        """A base whose output matrix is its embedding, of which the adapter changes one alone,
        has two matrices from then on. What replaces the weight that both share changes both."""
        if not self.checkpoint.config.tied:
            return
        for module in self.modules.values():
            if module.stem in (INPUT, OUTPUT) and module.parts:
                if module.shared:
                    self.put(replace(module, stem=INPUT), "weight")
                    del module.parts["weight"]
                self.apart |= bool(module.parts)
        if self.apart:
            self.tensors[f"{OUTPUT}.weight"] = self.tensors[f"{INPUT}.weight"]
            self.checkpoint.config = replace(self.checkpoint.config, tied=False)

    def put(self, module: _Module, part: str) -> None:
        """A tensor of the adapter takes the place of the base's."""
        name, tensor = f"{module.stem}.{part}", module.parts[part]
        old = self.tensors[name]
        hint = "" if module.stem not in (INPUT, OUTPUT) else ": another vocabulary is not supported"
        self.expect(module, part, old.shape, hint)
        self.tensors[name] = Adapted(self.in_order(module, tensor), old.dtype)
        self.replaced.append(f"{module.name}.{part}")

    def change(self, module: _Module) -> None:
        """The base's weight, and bias, become those of base and adapter together."""
        parts, scale = module.parts, self.config.scale(module.name)
        weight = self.tensors[f"{module.stem}.weight"]
        (rows, columns), rank = weight.shape, self.config.rank(module.name)
        if module.stem == INPUT:  # PEFT holds these two the other way round
            self.expect(module, "lora_embedding_A", (rank, rows))
            self.expect(module, "lora_embedding_B", (columns, rank))
            a: Tensor = Transposed(parts["lora_embedding_B"])
            b: Tensor = Transposed(parts["lora_embedding_A"])
        else:
            self.expect(module, "lora_A.weight", (rank, columns))
            self.expect(module, "lora_B.weight", (rows, rank))
            a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None:
            self.expect(module, "lora_magnitude_vector", (rows,))
            magnitude = self.in_order(module, magnitude)
        self.step(f"{module.stem}.weight", LowRank(self.in_order(module, b), a, scale, magnitude))
        if "lora_B.bias" in parts:
            self.expect(module, "lora_B.bias", (rows,))
            offset = self.in_order(module, parts["lora_B.bias"])
            self.step(f"{module.stem}.bias", Offset(offset, scale))
        self.ranks.append(rank)

    def step(self, name: str, step: Step) -> None:
        old = self.tensors[name]
        steps = old.steps if isinstance(old, Adapted) else ()
        source = old.source if isinstance(old, Adapted) else old
        self.tensors[name] = Adapted(source, old.dtype, (*steps, step))

    def in_order(self, module: _Module, tensor: Tensor) -> Tensor:
        """Rows of q_proj and k_proj in Meta's order."""
        if PAIRED.fullmatch(module.stem) is None:
            return tensor
        return Interleaved(tensor, self.checkpoint.config.head_dim)

    def expect(self, module: _Module, part: str, shape: tuple[int, ...], hint: str = "") -> None:
        found = module.parts[part].shape
        if found != shape:
            self.fail(f"{module.name}.{part}", f"expected {show(shape)}, found {show(found)}{hint}")

    def check_finite(self, key: str, tensor: Tensor) -> None:
        if not tensor.shape:
            self.fail(key, "expected a vector or a matrix, found a single number")
        width = int(np.prod(tensor.shape[1:], dtype=np.int64))
        step = max(CHUNK_BYTES // (4 * max(width, 1)), 1)
        for first in range(0, tensor.shape[0], step):
            rows = widen(tensor.rows(first, min(first + step, tensor.shape[0])))
            if not np.isfinite(rows).all():
                self.fail(key, "a weight in it is not finite")
            del rows

    def fail(self, name: str, problem: str) -> NoReturn:
        raise LlamaError(f"{self.file}: {name[:100]}: {problem}")

    def note(self) -> None:
        """Tells a person what was merged, and what was not taken."""
        folder, said = self.file.parent, self.config.settings
        what = []
        if self.ranks:
            n, rank = len(self.ranks), sorted({min(self.ranks), max(self.ranks)})
            what.append(f"{n} matri{'ces' if n > 1 else 'x'} of rank {' to '.join(map(str, rank))}")
        if self.replaced:
            n = len(self.replaced)
            more = f" and {n - 3} more" if n > 3 else ""
            what.append(f"{', '.join(self.replaced[:3])}{more} replaced")
        notes = [f"LoRA {folder.resolve().name} merged: {'; '.join(what)}"]
        if self.apart:
            notes.append("  the output matrix, tied to the embedding before, is one of its own now")
        base = said.text("base_model_name_or_path", "").rstrip("/").rpartition("/")[2]
        known = {self.checkpoint.path.resolve().name, self.checkpoint.meta.get("general.name")}
        if base and base not in known:
            notes.append(f"  it was trained on {base[:80]}: taken to be the same weights")
        if said.flag("fan_in_fan_out", False):
            notes.append("  fan_in_fan_out is ignored, as PEFT does with a Llama's matrices")
        if (folder / "tokenizer_config.json").is_file():
            notes.append("  its own tokenizer and chat template are not taken, the base's are")
        self.checkpoint.notes += notes


def _names(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(transformers' name, ours without .weight) of every module that holds weights."""
    ours = {INPUT: "model.embed_tokens", "norm": "model.norm", OUTPUT: "lm_head"}
    for n in range(checkpoint.config.n_layers):
        for theirs, stem in hf.LAYER_NAMES.items():
            ours[f"layers.{n}.{stem}"] = f"model.layers.{n}.{theirs}"
    for stem, theirs in ours.items():
        if checkpoint.source == "Hugging Face":
            theirs = checkpoint.own_names.get(f"{stem}.weight", theirs).removesuffix(".weight")
        if stem != OUTPUT or checkpoint.config.head != Head.NONE:
            yield theirs, stem
