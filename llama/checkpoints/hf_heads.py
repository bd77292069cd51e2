"""Which head a Hugging Face checkpoint has: a language model's, one of labels, or none.

config.json's `architectures` says it, and the head's tensors must say the same. What its labels
are called, and how their logits are read, goes into the file's meta entries.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from llama.checkpoints.settings import Settings
from llama.errors import LlamaError
from llama.format import Config, Head, Value

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
OUTPUTS = ("lm_head", "score", "qa_outputs")


@dataclass(frozen=True)
class Architecture:
    """A class of transformers as its files show it."""

    name: str
    head: Head
    prefixes: tuple[str, ...]  # what may stand before the names of the network's own tensors
    output: str  # the stem of the head's tensors, one of OUTPUTS; "" for none

    def prefix(self, names: Collection[str]) -> str:
        """The prefix that the tensors NAMES have."""
        found = [prefix for prefix in self.prefixes if f"{prefix}embed_tokens.weight" in names]
        return (*found, self.prefixes[0])[0]


ARCHITECTURES = [
    Architecture("LlamaModel", Head.NONE, ("", "model."), ""),
    Architecture("LlamaForSequenceClassification", Head.SEQUENCE, ("model.",), "score"),
    Architecture("LlamaForTokenClassification", Head.TOKEN, ("model.",), "score"),
    Architecture("LlamaForQuestionAnswering", Head.ANSWER, ("transformer.", "model."),
                 "qa_outputs"),
    Architecture("LLaMAForCausalLM", Head.LM, ("model.",), "lm_head"),
    Architecture("LlamaForCausalLM", Head.LM, ("model.",), "lm_head"),
]  # fmt: skip


def architecture_of(settings: Settings) -> Architecture:
    """What config.json says; a language model where it says nothing."""
    said = settings.values.get("architectures") or ["LlamaForCausalLM"]
    for architecture in ARCHITECTURES:
        if said == [architecture.name]:
            return architecture
    names = [architecture.name for architecture in ARCHITECTURES]
    raise LlamaError(
        f"{settings.path}: architectures: expected {', '.join(names[:-1])} or {names[-1]}, found "
        f"{str(said)[:80]}"
    )


def labels_of(settings: Settings, head: Head) -> list[str]:
    """The labels' names by number; none for heads that have no labels of their own."""
    if head not in (Head.SEQUENCE, Head.TOKEN):
        return []
    named = settings.inside("id2label").values
    if not named:
        n = settings.count("num_labels", 2)  # transformers' default, which it does not write
        return [f"LABEL_{i}" for i in range(n)]
    try:
        by_number = {int(key): str(name) for key, name in named.items()}
    except ValueError:
        by_number = {}
    if sorted(by_number) != list(range(len(named))):
        raise LlamaError(
            f"{settings.path}: id2label: expected the labels 0 to {len(named) - 1}, found "
            f"{', '.join(map(str, named))[:60]}"
        )
    return [by_number[i] for i in range(len(named))]


def output_bias(settings: Settings, head: Head) -> bool:
    """Whether transformers gives such a head a bias."""
    if head == Head.TOKEN:
        return settings.flag("token_classification_bias", True)
    return head == Head.ANSWER


def meta_of(settings: Settings, config: Config, notes: list[str]) -> dict[str, Value]:
    """The meta entries of a head of labels; docs/format.md says what each means."""
    labels = labels_of(settings, config.head)
    if not labels:
        return {}
    if len(set(labels)) < len(labels):
        notes.append("id2label has a name twice: the labels are called LABEL_0, LABEL_1, ...")
        labels = [f"LABEL_{i}" for i in range(len(labels))]
    meta: dict[str, Value] = {"head.labels": json.dumps(labels, ensure_ascii=False)}
    if config.head == Head.SEQUENCE:
        if settings.has("problem_type"):
            problem = settings.text("problem_type")
            if problem not in PROBLEMS:
                raise LlamaError(
                    f"{settings.path}: problem_type: expected {', '.join(PROBLEMS)}, found "
                    f"{problem[:40]!r}"
                )
            meta["head.problem_type"] = problem
        pad = settings.count("pad_token_id", -1)
        if 0 <= pad < config.vocab_size:
            meta["head.pad_id"] = pad
    return meta
