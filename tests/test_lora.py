"""export.py --lora against PEFT itself where it is installed, and against torch where it is not.

PEFT makes the adapter, runs it unmerged for the logits and merges it for the weights. Adapters
written here by hand, in PEFT's names, are merged by torch into a checkpoint of its own, which is
exported as any other: nothing of the code under test is on that side either.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf

from llama.checkpoints import Options, load, lora
from llama.checkpoints.convert import convert
from llama.engine import Engine
from llama.errors import LlamaError
from llama.format import Bin, Config, read

PREFIX = "base_model.model."
SHAPE = small_models.config(n_kv_heads=2)
BIASED = replace(SHAPE, attention_bias=True, mlp_bias=True)
TIED = replace(SHAPE, tied=True)
Tensors = dict[str, torch.Tensor]


def export(source: Path, out: Path, *adapters: Path) -> Bin:
    checkpoint = load(source, Options(lora=adapters))
    convert(checkpoint, out, checkpoint.default_kind(), force=True)
    return read(out)


def assert_same(found: Bin, known: Bin, bound: float = 1e-6) -> None:
    """The same tensors, to BOUND of each one's largest weight."""
    assert set(found.tensors) == set(known.tensors) and found.config.tied == known.config.tied
    for name, tensor in known.tensors.items():
        worst = np.abs(found.tensors[name] - tensor).max()
        assert worst <= bound * np.abs(tensor).max(), (name, worst)


# ---- against PEFT


PEFT_CASES: dict[str, tuple[Config, dict[str, Any]]] = {
    "list": (SHAPE, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_alpha": 5}),
    "regex": (SHAPE, {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "all-linear": (SHAPE, {"target_modules": "all-linear", "lora_alpha": 7}),
    "default": (SHAPE, {"task_type": "CAUSAL_LM"}),
    "rslora": (SHAPE, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (SHAPE, {
        "target_modules": ["q_proj", "k_proj", "o_proj"], "use_rslora": True,
        "rank_pattern": {"k_proj": 5, r"layers\.\d+\.self_attn.q_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.o_proj": 30},
    }),
    "layers": (SHAPE, {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]}),
    "pattern of layers": (SHAPE, {
        "target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers",
    }),
    "excluded": (SHAPE, {
        "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj",
    }),
    "dora": (SHAPE, {"target_modules": "all-linear", "use_dora": True}),
    "embedding and output": (SHAPE, {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "saved": (SHAPE, {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"],
    }),
    "a saved block": (SHAPE, {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "k_proj"]}),
    "lora_bias": (BIASED, {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
    "all biases": (BIASED, {"target_modules": ["k_proj"], "bias": "all"}),
    "their biases": (BIASED, {"target_modules": ["k_proj", "v_proj"], "bias": "lora_only"}),
    "tied, embedding saved": (TIED, {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
    }),
    "tied, both saved": (TIED, {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
    }),
    "tied, output saved": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, matrices between": (TIED, {"target_modules": ["q_proj", "down_proj"]}),
    "tied, embedding": (TIED, {"target_modules": ["embed_tokens"]}),
}  # fmt: skip


def quiet(call: Any, *args: Any, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **more)


def peft_model(model: Any, seed: int, **options: Any) -> Any:
    """MODEL with a trained adapter, which is to say a random one."""
    peft = pytest.importorskip("peft")
    adapted = quiet(peft.get_peft_model, model, peft.LoraConfig(**({"r": 3} | options)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * (0.3 if "lora" in name else 0.1))
    return adapted.eval()


def logits_of(found: Path, tokens: list[int]) -> np.ndarray:
    with Engine(found, threads=1, kv="f32") as engine:
        n = len(tokens)
        logits = engine.forward(tokens, [0] * n, range(n), [True] * n)
        assert logits is not None
        return logits


@pytest.mark.parametrize("case", PEFT_CASES)
def test_weights_and_logits_are_pefts(tmp_path: Path, case: str) -> None:
    shape, options = PEFT_CASES[case]
    model = small_models.transformers_llama(shape)
    model.save_pretrained(tmp_path / "base")
    adapted = peft_model(model, 1, **options)
    quiet(adapted.save_pretrained, tmp_path / "adapter")
    tokens = [int(t) for t in np.random.default_rng(3).integers(0, shape.vocab_size, 20)]
    with torch.no_grad():
        theirs = adapted(torch.tensor([tokens])).logits[0].numpy()
    found = export(tmp_path / "base", tmp_path / "a.bin", tmp_path / "adapter")
    ours = logits_of(tmp_path / "a.bin", tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    if case == "tied, embedding":
        return  # merging, PEFT changes the output matrix too, which its adapter had left alone
    merged = quiet(adapted.merge_and_unload)
    merged.config.tie_word_embeddings = found.config.tied
    merged.save_pretrained(tmp_path / "merged")
    assert_same(found, export(tmp_path / "merged", tmp_path / "b.bin"), 1e-5)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_half_width_base_is_pefts(tmp_path: Path, dtype: str) -> None:
    """PEFT rounds B A before it adds it, so it is held to a few roundings; we round once."""
    model = small_models.transformers_llama(SHAPE).to(small_models.DTYPES[dtype])
    model.save_pretrained(tmp_path / "base")
    adapted = peft_model(model, 1, target_modules="all-linear")
    quiet(adapted.save_pretrained, tmp_path / "adapter")
    found = export(tmp_path / "base", tmp_path / "a.bin", tmp_path / "adapter")
    assert found.records["layers.0.attention.wq.weight"].kind.label == dtype
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    known = export(tmp_path / "merged", tmp_path / "b.bin")
    assert_same(found, known, {"f16": 2**-10, "bf16": 2**-7}[dtype])


def test_two_adapters_are_pefts(tmp_path: Path) -> None:
    """In order: the second is trained on what the first made of the base."""
    model = small_models.transformers_llama(SHAPE)
    model.save_pretrained(tmp_path / "base")
    options: list[dict[str, Any]] = [{"use_dora": True}, {"use_dora": True, "r": 2}]
    for n, more in enumerate(options):
        adapted = peft_model(model, n, target_modules=["q_proj", "up_proj"], **more)
        quiet(adapted.save_pretrained, tmp_path / f"adapter{n}")
        model = adapted.merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    first, second = tmp_path / "adapter0", tmp_path / "adapter1"
    found = export(tmp_path / "base", tmp_path / "a.bin", first, second)
    assert_same(found, export(tmp_path / "merged", tmp_path / "b.bin"), 1e-5)
    other = export(tmp_path / "base", tmp_path / "c.bin", second, first)
    with pytest.raises(AssertionError):
        assert_same(other, found, 1e-3)  # the order counts


# ---- against torch


SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [
    "q_proj", "k_proj", "down_proj"]}  # fmt: skip


def write(folder: Path, tensors: Tensors, as_bin: bool = False, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    if as_bin:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))
    return folder


def pairs(weights: Tensors, ends: tuple[str, ...], r: int = 3, seed: int = 5) -> Tensors:
    """Random A and B for the Hugging Face WEIGHTS whose modules end so."""
    torch.manual_seed(seed)
    out = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(ends) and name.endswith(".weight"):
            out[f"{stem}.lora_A.weight"] = torch.randn(r, weight.shape[1])
            out[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], r)
    return out


def merged(weights: Tensors, adapter: Tensors, scale: float) -> Tensors:
    """What torch makes of Hugging Face WEIGHTS and an ADAPTER, in float64."""
    out = dict(weights)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = adapter[f"{stem}.lora_B.weight"]
            weight = weights[f"{stem}.weight"].double() + scale * b.double() @ a.double()
            out[f"{stem}.weight"] = weight.float()
    return out


def base(folder: Path, shape: Config = SHAPE) -> tuple[Path, Tensors]:
    small_models.write_hf(folder, shape, small_models.weights(shape))
    return folder, load_file(folder / "model.safetensors")


def known(folder: Path, tensors: Tensors, shape: Config = SHAPE) -> Bin:
    """The .bin of a Hugging Face checkpoint of TENSORS."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(small_models.hf_settings(shape)))
    return export(folder, folder.with_suffix(".bin"))


ENDS = tuple(SETTINGS["target_modules"])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_by_torch(tmp_path: Path, form: str, rslora: bool) -> None:
    source, weights = base(tmp_path / "base")
    adapter = pairs(weights, ENDS)
    folder = write(tmp_path / "adapter", adapter, form == "bin", use_rslora=rslora)
    found = export(source, tmp_path / "a.bin", folder)
    scale = 6 / (math.sqrt(3) if rslora else 3)
    assert_same(found, known(tmp_path / "known", merged(weights, adapter, scale)))
    assert found.meta["general.origin"] == "Hugging Face base + LoRA adapter"


@pytest.mark.parametrize("source", ["Meta", "Meta, 4 shards", "GGUF", "GGUF Q8_0"])
def test_every_source_has_the_same_modules(tmp_path: Path, source: str) -> None:
    """An adapter of the Hugging Face form fits the same weights in any other: rows of q_proj and
    k_proj are put into Meta's order on the way."""
    import gguf

    shape = small_models.config(vocab_size=64, dim=32, hidden_dim=64, head_dim=8)
    own = small_models.weights(shape)
    if source.startswith("Meta"):
        path = small_models.write_meta(tmp_path / "m", shape, own, 4 if "4" in source else 1)
    else:
        path = tmp_path / "m.gguf"
        kind = gguf.GGMLQuantizationType
        write_gguf(path, shape, kind.Q8_0 if "Q8_0" in source else kind.F32)
    plain = export(path, tmp_path / "plain.bin")
    tensors = {name: torch.from_numpy(t.copy()) for name, t in plain.tensors.items()}
    weights = small_models.to_hf(tensors, shape)
    adapter = pairs(weights, ENDS)
    found = export(path, tmp_path / "a.bin", write(tmp_path / "adapter", adapter))
    expected = known(tmp_path / "known", merged(weights, adapter, 2.0), shape)
    quantised = "Q8_0" in source
    assert_same(found, expected, 2**-10 if quantised else 1e-6)  # f16 by default
    if quantised:
        checkpoint = load(path, Options(lora=(tmp_path / "adapter",)))
        assert checkpoint.default_kind().label == "f16"


def test_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, of heads of 6, give the same file as one chunk."""
    source, weights = base(tmp_path / "base")
    tensors = pairs(weights, ENDS)
    for n in range(2):
        tensors[f"model.layers.{n}.self_attn.q_proj.lora_magnitude_vector"] = torch.rand(24) + 0.5
        tensors[f"model.layers.{n}.self_attn.k_proj.lora_magnitude_vector"] = torch.rand(12) + 0.5
        tensors[f"model.layers.{n}.mlp.down_proj.lora_magnitude_vector"] = torch.rand(24) + 0.5
    folder = write(tmp_path / "adapter", tensors, use_dora=True)
    whole = export(source, tmp_path / "a.bin", folder)
    asked = []
    rows = lora.LowRank.change
    monkeypatch.setattr(lora.LowRank, "change", lambda self, values, first, last: (
        asked.append(last - first), rows(self, values, first, last))[1])  # fmt: skip
    monkeypatch.setattr(sys.modules[convert.__module__], "CHUNK_BYTES", 1)
    assert_same(export(source, tmp_path / "b.bin", folder), whole)
    assert max(asked) == 16


def test_order_of_two(tmp_path: Path) -> None:
    """What the second replaces whole, the first has changed in vain."""
    source, weights = base(tmp_path / "base")
    first = write(tmp_path / "first", pairs(weights, ENDS))
    new = {"lm_head.weight": torch.randn(44, 24)}
    second = pairs(weights, ("lm_head",))
    saved = write(tmp_path / "saved", new, modules_to_save=["lm_head"], target_modules=[])
    head = write(tmp_path / "head", second, target_modules=["lm_head"])
    found = export(source, tmp_path / "a.bin", first, saved, head)
    expected = merged(weights, pairs(weights, ENDS), 2.0) | new
    assert_same(found, known(tmp_path / "known", merged(expected, second, 2.0)))
    found = export(source, tmp_path / "b.bin", head, saved)
    assert_same(found, known(tmp_path / "other", weights | new))
    assert found.meta["general.origin"] == "Hugging Face base + LoRA head + LoRA saved"


def test_what_was_tied(tmp_path: Path) -> None:
    """A module of its own for one of the two unties them; the same for both ties them again; and
    what replaces the weight that they share leaves them tied."""
    source, weights = base(tmp_path / "base", TIED)
    assert load(source).config.tied
    new = torch.randn(44, 24)
    one = {"model.embed_tokens.weight": new}
    both = one | {"lm_head.weight": new.clone()}
    apart = known(tmp_path / "apart", one | {"lm_head.weight": weights["model.embed_tokens.weight"]}
                  | {n: t for n, t in weights.items() if "embed" not in n})  # fmt: skip
    again = known(tmp_path / "again", weights | one, TIED)
    for tensors, saved, expected in (
        (one, ["embed_tokens"], apart), (both, ["embed_tokens", "lm_head"], again),
        (one, [], again), ({"model.embed_tokens.base_layer.weight": new}, [], again),
    ):  # fmt: skip
        folder = write(tmp_path / "adapter", tensors, target_modules=[], modules_to_save=saved)
        assert_same(export(source, tmp_path / "a.bin", folder), expected)


@pytest.mark.parametrize("saved", [True, False])
def test_a_head_of_labels(tmp_path: Path, saved: bool) -> None:
    """Of a sequence classifier: replaced whole, or with matrices of its own."""
    transformers = pytest.importorskip("transformers")
    settings = small_models.hf_settings(SHAPE, architectures=None, num_labels=3, pad_token_id=None)
    del settings["rope_scaling"], settings["rope_theta"]
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path / "base")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = ("q_proj", "k_proj") if saved else ("q_proj", "k_proj", "score")
    adapter = pairs(weights, ends)
    expected = merged(weights, adapter, 2.0)
    more: dict[str, Any] = {"target_modules": list(ends), "task_type": "SEQ_CLS"}
    if saved:
        adapter["score.weight"] = expected["score.weight"] = torch.randn(3, 24)
        more["modules_to_save"] = ["classifier", "score"]
    model.load_state_dict(expected)
    model.save_pretrained(tmp_path / "known")
    found = export(tmp_path / "base", tmp_path / "a.bin", write(tmp_path / "a", adapter, **more))
    assert_same(found, export(tmp_path / "known", tmp_path / "b.bin"))
    assert found.tensors["output.weight"].shape == (3, 24)


def test_notes(tmp_path: Path) -> None:
    source, weights = base(tmp_path / "base")
    tensors = pairs(weights, ENDS) | {"model.norm.weight": torch.ones(24)}
    folder = write(tmp_path / "mine", tensors, base_model_name_or_path="org/other",
                   fan_in_fan_out=True, modules_to_save=["model.norm"])  # fmt: skip
    (folder / "tokenizer_config.json").write_text("{}")
    notes = "\n".join(load(source, Options(lora=(folder,))).notes)
    assert "LoRA mine merged: 6 matrices of rank 3; model.norm.weight replaced" in notes
    assert "trained on other: taken to be the same weights" in notes
    assert "fan_in_fan_out is ignored" in notes
    assert "its own tokenizer and chat template are not taken" in notes
    write(tmp_path / "mine", tensors, base_model_name_or_path="some/base/",
          modules_to_save=["model.norm"])  # fmt: skip
    assert "trained on" not in "\n".join(load(source, Options(lora=(folder,))).notes)


# ---- refused


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "ADALORA"}, "peft_type: expected LORA, found ADALORA"),
    ({"peft_type": None}, "peft_type: expected LORA"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa is not supported: it changes"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = pissa_niter_16"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights = loftq"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices = \[1\] is not supported"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"target_parameters": ["a"]}, "target_parameters"),
    ({"something_new": 2}, "something_new = 2 is not supported"),
    ({"r": "x"}, "r: expected a whole number, found 'x'"),
    ({"r": 0}, "expected a rank above zero, found 0"),
    ({"rank_pattern": {"q_proj": 2.5}}, "expected a rank above zero, found 2.5"),
    ({"alpha_pattern": {"q_proj": "a"}}, "expected a number, found 'a'"),
    ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight: expected 2 x 24, found 3 x 24"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern: not a regular expression"),
    ({"target_modules": "*"}, "target_modules: not a regular expression"),
    ({"target_modules": [3]}, r"target_modules: expected a list of names or one text, found \[3\]"),
    ({"modules_to_save": "norm"}, "modules_to_save: expected a list of names, found 'norm'"),
    ({"target_modules": ["q_proj"]}, "lora_A.weight: adapter_config.json does not ask for it"),
    ({"target_modules": [*ENDS, "v_proj"]}, "v_proj.lora_A.weight: is missing"),
    ({"target_modules": [*ENDS, "norm"]}, "a norm cannot be a target"),
    ({"layers_to_transform": [0]}, "layers.1.*does not ask for it"),
    ({"layers_to_transform": ["a"]}, "layers_to_transform: expected layers' numbers"),
    ({"use_dora": True}, "lora_magnitude_vector: is missing"),
    ({"use_dora": True, "lora_bias": True}, "expected lora_bias or use_dora, found both"),
    ({"lora_bias": True}, "lora_B.bias: is missing"),
    ({"bias": "some"}, "bias: expected none, all or lora_only, found 'some'"),
    ({"modules_to_save": ["lm_head"]}, "lm_head.weight: is missing"),
], ids=str)  # fmt: skip
def test_refused_settings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source, weights = base(tmp_path / "base")
    folder = write(tmp_path / "adapter", pairs(weights, ENDS), **change)
    with pytest.raises(LlamaError, match=message) as caught:
        load(source, Options(lora=(folder,)))
    assert "\n" not in str(caught.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("change", "message"), [
    ({f"{Q}.lora_A.weight": torch.ones(3, 25)}, "expected 3 x 24, found 3 x 25"),
    ({f"{Q}.lora_B.weight": torch.ones(25, 3)}, "expected 24 x 3, found 25 x 3"),
    ({f"{Q}.lora_B.weight": torch.ones(24)}, "expected 24 x 3, found 24"),
    ({f"{Q}.lora_A.weight": torch.full((3, 24), math.nan)}, "lora_A.weight: a weight in it is not"),
    ({f"{Q}.lora_B.weight": torch.full((24, 3), math.inf)}, "lora_B.weight: a weight in it is not"),
    ({f"{Q}.lora_A.weight": torch.ones(3, 24, dtype=torch.int32)}, "expected f32, f16 or bf16"),
    ({f"{Q}.lora_A.weight": torch.tensor(1.0)}, "found a single number"),
    ({f"{Q}.bias": torch.ones(24)}, "q_proj.bias: the base has no such bias"),
    ({f"{Q}.lora_E": torch.ones(3, 1)}, "lora_E: no tensor that a plain LoRA has"),
    ({f"{Q}.lora_A.default.weight": torch.ones(3, 24)}, "no such module|no tensor that a plain"),
    ({"model.layers.2.mlp.up_proj.lora_A.weight": torch.ones(3, 24)}, "base has no such module"),
    ({"score.weight": torch.ones(1, 24)}, "score.weight: a Hugging Face base has no such module"),
    ({"lm_head.weight": torch.ones(45, 24)}, "expected 44 x 24, found 45 x 24: another vocabulary"),
    ({f"{Q}.lora_magnitude_vector": torch.ones(24)}, "does not ask for it"),
    ({f"{Q}.lora_embedding_A": torch.ones(3, 24)}, "does not ask for it"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_refused_tensors(tmp_path: Path, change: Tensors, message: str) -> None:
    source, weights = base(tmp_path / "base")
    folder = write(tmp_path / "adapter", pairs(weights, ENDS) | change)
    with pytest.raises(LlamaError, match=message) as caught:
        load(source, Options(lora=(folder,)))
    assert "\n" not in str(caught.value)
    convert(load(source), tmp_path / "a.bin", load(source).default_kind())  # the base is whole


def test_embedding_is_refused_where_it_is_not_plain(tmp_path: Path) -> None:
    source, _ = base(tmp_path / "base")
    tensors = {
        "model.embed_tokens.lora_embedding_A": torch.ones(3, 44),
        "model.embed_tokens.lora_embedding_B": torch.ones(24, 3),
    }
    for setting in ("use_dora", "lora_bias"):
        folder = write(tmp_path / "adapter", tensors, target_modules=["embed_tokens"],
                       **{setting: True})  # fmt: skip
        with pytest.raises(LlamaError, match="use_dora and lora_bias of the embedding are not"):
            load(source, Options(lora=(folder,)))


def test_too_large_is_named(tmp_path: Path) -> None:
    """Finite matrices whose product is not, and DoRA of a row of zeros."""
    source, weights = base(tmp_path / "base")
    tensors = {name: tensor * 1e20 for name, tensor in pairs(weights, ENDS).items()}
    folder = write(tmp_path / "adapter", tensors)
    with pytest.raises(LlamaError, match="layers.0.attention.wq.weight: weight .* is not finite"):
        export(source, tmp_path / "a.bin", folder)
    assert not (tmp_path / "a.bin").exists()
    zeros = small_models.weights(SHAPE) | {"layers.0.attention.wv.weight": torch.zeros(12, 24)}
    small_models.write_hf(tmp_path / "zeros", SHAPE, zeros)
    stem = "model.layers.0.self_attn.v_proj"
    tensors = {f"{stem}.lora_A.weight": torch.zeros(3, 24), f"{stem}.lora_B.weight":
               torch.zeros(12, 3), f"{stem}.lora_magnitude_vector": torch.ones(12)}  # fmt: skip
    folder = write(tmp_path / "dora", tensors, use_dora=True, target_modules=["v_proj"],
                   layers_to_transform=[0])  # fmt: skip
    with pytest.raises(LlamaError, match="layers.0.attention.wv.weight: weight .* is not finite"):
        export(tmp_path / "zeros", tmp_path / "a.bin", folder)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    source, weights = base(tmp_path / "base")

    def refused(path: Path, message: str) -> None:
        with pytest.raises(LlamaError, match=message):
            load(source, Options(lora=(path,)))

    refused(tmp_path / "none", "expected a PEFT adapter's directory, found none")
    refused(source, "expected a PEFT adapter's directory, found no adapter_config.json in it")
    folder = write(tmp_path / "adapter", pairs(weights, ENDS))
    refused(folder / "adapter_model.safetensors", "expected a PEFT adapter's directory, found no")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "expected adapter_model.safetensors or adapter_model.bin beside")
    (folder / "adapter_model.bin").write_bytes(b"no zip")
    refused(folder, "expected PyTorch's zip format")
    (folder / "adapter_config.json").write_text("[")
    refused(folder, "adapter_config.json: expected JSON")
    empty = write(tmp_path / "empty", {}, target_modules=["c_attn"])
    refused(empty, "adapter_config.json: it changes nothing in this model")


def test_the_script(tmp_path: Path) -> None:
    source, weights = base(tmp_path / "base")
    write(tmp_path / "mine", pairs(weights, ENDS))
    shutil.copytree(tmp_path / "mine", tmp_path / "again")
    script = Path(__file__).resolve().parent.parent / "export.py"
    command = [sys.executable, str(script), str(source), "--out", str(tmp_path / "a.bin")]

    def run(*more: str) -> tuple[int, str, str]:
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, err = run("--lora", str(tmp_path / "mine"), "--lora", str(tmp_path / "again"))
    assert (status, out) == (0, "") and "LoRA mine merged: 6 matrices of rank 3" in err
    twice = merged(merged(weights, pairs(weights, ENDS), 2.0), pairs(weights, ENDS), 2.0)
    assert_same(read(tmp_path / "a.bin"), known(tmp_path / "known", twice))
    status, out, err = run("--force", "--lora", str(tmp_path / "nothing"))
    assert (status, out, err.count("\n")) == (1, "", 1) and "found none" in err
