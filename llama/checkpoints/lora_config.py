"""What adapter_config.json says: which modules a PEFT adapter changes, and by what rule.

Every setting is one of three: it is read here, it mattered to training alone, or it changes the
numbers in a way that is not merged and is refused by name. So is a setting nobody here knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llama.checkpoints.settings import Settings
from llama.errors import LlamaError

READ = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "lora_bias", "bias", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "fan_in_fan_out",
}  # fmt: skip
# Of training, of other devices, or how tensors came to be that the adapter holds as they are.
WITHOUT_EFFECT = {
    "lora_dropout", "inference_mode", "task_type", "revision", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "loftq_config", "corda_config", "eva_config",
    "lora_ga_config", "velora_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Beginnings that leave the base's weights as they are; others (pissa, olora, loftq, corda,
# lora_ga) take the first B A out of them.
BEGINNINGS = (True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
DEFAULT_TARGETS = ["q_proj", "v_proj"]  # PEFT's for a Llama, where target_modules is null


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json, checked."""

    settings: Settings
    targets: str | list[str]  # a regular expression, "all-linear", or names' ends
    excluded: str | list[str]
    saved: list[str]  # modules that the adapter replaces whole
    layers: list[int] | None
    biases: str  # "none", "all", "lora_only": which biases were trained and are replaced
    dora: bool
    offset: bool  # lora_bias: B has a bias

    @classmethod
    def read(cls, settings: Settings) -> LoraConfig:
        """Raises LlamaError for what is not merged, by its name."""
        _refuse_others(settings)
        values = settings.values
        layers = values.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and not _all(layers, int):
            raise _wrong(settings, "layers_to_transform", "layers' numbers")
        biases = settings.text("bias", "none")
        if biases not in ("none", "all", "lora_only"):
            raise _wrong(settings, "bias", "none, all or lora_only")
        targets = _names(settings, "target_modules")
        return cls(
            settings,
            DEFAULT_TARGETS if values.get("target_modules") is None else targets,
            _names(settings, "exclude_modules"),
            _names(settings, "modules_to_save", text=False),
            layers or None,
            biases,
            settings.flag("use_dora", False),
            settings.flag("lora_bias", False),
        )

    def targeted(self, module: str, linear: bool) -> bool:
        """Whether MODULE, by its full name, has matrices A and B; LINEAR: it is one of those that
        "all-linear" means."""
        if _matches(self.settings, "exclude_modules", self.excluded, module):
            return False
        if any(f".{name}." in f".{module}." for name in self.saved):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return linear
        found = _matches(self.settings, "target_modules", self.targets, module)
        if not found or self.layers is None or isinstance(self.targets, str):
            return found
        patterns = _names(self.settings, "layers_pattern")
        patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
        for pattern in patterns:
            pattern = rf"(.*?\.)??({pattern})\.(?P<layer>\d+)\..*"
            layer = _fits(self.settings, "layers_pattern", pattern, module)
            if layer is not None:
                return int(layer["layer"]) in self.layers
        return False

    def replaces(self, module: str) -> bool:
        """Whether modules_to_save names MODULE or what it lies in; ends of names count."""
        parts = module.split(".")
        outer = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(path.endswith(name) for path in outer for name in self.saved)

    def rank(self, module: str) -> int:
        return int(self._of(module, "rank_pattern", self.settings.count("r", 8)))

    def scale(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
        alpha = float(self._of(module, "alpha_pattern", self.settings.real("lora_alpha", 8.0)))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.settings.flag("use_rslora", False) else rank)

    def _of(self, module: str, key: str, default: float) -> float:
        """MODULE's number: the first pattern that the end of its name fits, else DEFAULT."""
        number: Any = default
        for pattern, value in self.settings.inside(key).values.items():
            if _fits(self.settings, key, rf"(.*\.)?({pattern})", module) is not None:
                number = value
                break
        whole = key == "rank_pattern"
        kind = int if whole else (int, float)
        good = isinstance(number, kind) and not isinstance(number, bool) and math.isfinite(number)
        if not good or (whole and number < 1):
            what = "a rank above zero" if whole else "a number"
            raise LlamaError(f"{self.settings.path}: {module}: expected {what}, found {number!r}")
        return number  # type: ignore[no-any-return]


def _refuse_others(settings: Settings) -> None:
    where, values = settings.path, settings.values
    if values.get("peft_type") != "LORA":
        found = str(values.get("peft_type", "nothing"))[:40]
        raise LlamaError(f"{where}: peft_type: expected LORA, found {found}")
    start = values.get("init_lora_weights", True)
    start = True if start is None else start
    if (start.lower() if isinstance(start, str) else start) not in BEGINNINGS:
        raise LlamaError(
            f"{where}: init_lora_weights = {str(start)[:40]} is not supported: it changes the "
            "base's weights as well; save the adapter as a plain LoRA (PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    for key in sorted(values.keys() - READ - WITHOUT_EFFECT):
        if values[key] not in (None, False, "", [], {}):
            raise LlamaError(f"{where}: {key} = {str(values[key])[:60]} is not supported")
    if settings.flag("lora_bias", False) and settings.flag("use_dora", False):
        raise LlamaError(f"{where}: expected lora_bias or use_dora, found both")


def _names(settings: Settings, key: str, text: bool = True) -> Any:
    """A list of names; with TEXT also one regular expression."""
    value = settings.values.get(key)
    if value is None:
        return []
    if (isinstance(value, str) and text) or _all(value, str):
        return value
    raise _wrong(settings, key, "a list of names" + " or one text" * text)


def _all(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _wrong(settings: Settings, key: str, what: str) -> LlamaError:
    found = repr(settings.values.get(key))[:60]
    return LlamaError(f"{settings.path}: {key}: expected {what}, found {found}")


def _matches(settings: Settings, key: str, names: str | Iterable[str], module: str) -> bool:
    """Whether a regular expression fits MODULE whole, or one of NAMES is its end."""
    if isinstance(names, str):
        return bool(names) and _fits(settings, key, names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _fits(settings: Settings, key: str, pattern: str, text: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, text)
    except re.error as error:
        raise LlamaError(f"{settings.path}: {key}: not a regular expression: {error}") from None
