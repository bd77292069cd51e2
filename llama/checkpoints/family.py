"""Which family a chat template belongs to, seen from the template's own text.

llama/templates.py holds one function a family; the name is stored in the .bin so that it need
not guess. What no family fits is left unnamed: its Jinja text is stored all the same.
"""

from __future__ import annotations

import re

# Marks that only one family writes, looked for in this order.
MARKS = [
    ("chatml", ("<|im_start|>", "<|im_end|>")),
    ("llama3", ("<|start_header_id|>", "<|eot_id|>")),
    ("llama2", ("[INST]", "[/INST]")),
    ("zephyr", ("<|user|>", "<|assistant|>")),
    ("codellama70b", ("Source: ", "<step>", "Destination: user")),
    ("vicuna", ("USER: ", "ASSISTANT:")),
]
FAMILIES = [name for name, _ in MARKS]


def family_of(jinja: str) -> str | None:
    """The family whose marks all stand in the template, or None."""
    for name, marks in MARKS:
        if all(mark in jinja for mark in marks):
            if name != "zephyr" or "</s>" in jinja or "eos_token" in jinja:
                return name
    return None


def family_by_name(name: str) -> str | None:
    """The family that a directory's name tells where its files do not: Vicuna 1.1 and later (its
    checkpoints hold no template; 1.0's was another), and Meta's Code Llama 70B Instruct."""
    if re.search(r"(?i)vicuna.*v?1\.[1-9]", name):
        return "vicuna"
    if re.search(r"(?i)code.?llama.*70b.*instruct", name):
        return "codellama70b"
    return None


def sounds_like_chat(name: str) -> bool:
    """True for directory names like llama-2-7b-chat and Meta-Llama-3-8B-Instruct."""
    return re.search(r"(?i)(chat|instruct)", name) is not None
