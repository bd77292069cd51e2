"""What llama.bench found, as data and as tables: shares of limits, ratios, README's rows.

One JSON object holds a run: {"machine", "revision", "models": [...]}; docs/performance.md says what
its fields mean. Rates are tokens a second, of all sequences together; the spread of repeats is
(largest - smallest) / median; sizes are bytes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama.errors import LlamaError
from llama.limits import Limits, Load

README = (
    "| model | weights | kernels | threads | prompt tok/s | decode tok/s | "
    "decode, share of bandwidth | as fast as another engine: prompt, decode |",
    "|---|---|---|---|---|---|---|---|",
)


def spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def merged(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One engine's turns as one: each row has all rates, seconds are medians."""
    rows = [dict(row) for row in turns[0]["rows"]]
    for i, row in enumerate(rows):
        for name in ("rates", "bandwidths"):
            row[name] = [number for turn in turns for number in turn["rows"][i][name]]
        row["rate"], row["spread"] = statistics.median(row["rates"]), spread(row["rates"])
    seconds = ("open_seconds", "first_token_seconds")
    return turns[0] | {"rows": rows} | {
        name: statistics.median(turn[name] for turn in turns) for name in seconds
    }  # fmt: skip


def ours(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This engine's turns as a model of the report, each row beside its limit."""
    result = merged(turns)
    facts = [turn["facts"] for turn in turns]
    limits = Limits(**facts[0]["limits"])
    for other in facts[1:]:
        limits = limits.best(Limits(**other["limits"]))
    fields = dict(facts[0]["load"])
    load = Load(**fields | {name: tuple(fields[name]) for name in ("token", "row")})
    for row in result["rows"]:
        row["bandwidth"] = statistics.median(row.pop("bandwidths"))
        row |= limit_of(row, load, replace(limits, bandwidth=row["bandwidth"]))
    opening = [seconds for fact in facts for seconds in fact["opening_seconds"]]
    step = one_decode(result)
    first = next(row["n"] for row in result["rows"] if row["work"] == "prompt")
    kept = ("isa", "threads", "activations", "kv", "dtype", "weight_bytes")
    return {
        **{name: facts[0][name] for name in kept}, "limits": asdict(limits),
        "load": fields, "open_seconds": result["open_seconds"], "first_token_prompt": first,
        "first_token_seconds": result["first_token_seconds"],
        "opening_seconds": statistics.median(opening),
        "opening_steps": statistics.median(opening) * step["rate"] / step["batch"],
        "memory": result["memory"], "rows": result["rows"], "greedy": result["greedy"],
    }  # fmt: skip


def one_decode(model: dict[str, Any]) -> dict[str, Any]:
    """The first row of decoding, of one sequence where there is such a row."""
    rows = [row for row in model["rows"] if row["work"] == "decode"]
    found: dict[str, Any] = next((row for row in rows if row["batch"] == 1), rows[0])
    return found


def limit_of(row: dict[str, Any], load: Load, limits: Limits) -> dict[str, Any]:
    """What bounds a row, the rate that would be its limit, and the share that was reached."""
    n, batch = row["n"], row["batch"]
    if row["work"] == "prompt":
        by, rate = load.peak, n / load.prompt_seconds(n, limits)
    else:
        # each step also reads the position that the step before it added
        seconds, by = load.step_seconds(row["depth"] + (n + 1) / 2, batch, limits)
        rate = batch / seconds
    return {"limit": by, "limit_rate": rate, "share": row["rate"] / rate}


def against(model: dict[str, Any], turns: Sequence[dict[str, Any]], greedy: bool) -> dict[str, Any]:
    """A peer's turns, beside MODEL's rows: ratio is ours over theirs. GREEDY: whether its tokens
    are to be compared."""
    peer = merged(turns)
    for row, own in zip(peer["rows"], model["rows"], strict=True):
        row["ratio"] = own["rate"] / row["rate"]
        del row["bandwidths"]
    peer["greedy"] = agreement(model["greedy"], peer["greedy"]) if greedy else None
    del peer["facts"]
    return peer


def agreement(a: Sequence[int], b: Sequence[int]) -> dict[str, int]:
    """How many tokens were chosen, and how many before the first that differs."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return {"tokens": len(a), "same": same}


# ---- for people


def title(model: dict[str, Any]) -> str:
    """The model as the README calls it."""
    name = str(model["shape"] or Path(model["file"]).stem)
    name = "default" if name.startswith("chat-llama") else name
    return name + (", `--activations 8`" if model["activations"] == 8 else "")


def readme_rows(report: dict[str, Any]) -> Iterator[str]:
    """One row a model: its first prompt, and its first row of decoding."""
    for model in report["models"]:
        prompt = next(r for r in model["rows"] if r["work"] == "prompt")
        decode = one_decode(model)
        peer, times = model["against"], ""
        if peer:
            ratios = (peer["rows"][model["rows"].index(row)]["ratio"] for row in (prompt, decode))
            times = f"{peer['engine']}: {', '.join(f'{ratio:.2f} times' for ratio in ratios)}"
        yield (
            f"| {title(model)} | {model['dtype']}, {model['weight_bytes'] / 1e6:.0f} MB "
            f"| {model['isa']} | {model['threads']} "
            f"| {prompt['rate']:.0f} ({prompt['spread']:.0%}), "
            f"{prompt['share']:.0%} of {prompt['limit']} "
            f"| {decode['rate']:.1f} ({decode['spread']:.0%}) | {decode['share']:.0%} of "
            f"{limit_text(decode['limit'], model['limits'] | decode)} | {times} |"
        )


def limit_text(name: str, limits: dict[str, float]) -> str:
    if name == "bandwidth":
        return f"{limits[name] / 1e9:.1f} GB/s"
    return f"{limits[name] / 1e9:.0f} G {name} multiply-adds/s"


def limit_name(row: dict[str, Any]) -> str:
    name = str(row["limit"])
    return f"{name}, {limit_text(name, row)}" if name == "bandwidth" else name


def table(model: dict[str, Any]) -> Iterator[str]:
    """All that is known of one model, a line at a time."""
    yield (
        f"{model['file']}: {model['dtype']}, {model['weight_bytes'] / 1e6:.0f} MB; {model['isa']}, "
        f"{model['threads']} threads, activations {model['activations']}, kv {model['kv']}"
    )
    told = ", ".join(limit_text(name, model["limits"]) for name in ("bandwidth", "f32", "int8"))
    yield f"limits: {told}"
    peer = model["against"]
    if peer:
        yield f"against {peer['engine']}: {peer['version']}, {peer['file']}; {peer['features']}"
    head = ["work", "tok/s", "share of limit"]
    if peer:
        head += [f"{peer['engine']} tok/s", "ratio"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for i, row in enumerate(model["rows"]):
        cells = [work_text(row), f"{row['rate']:.1f} ({row['spread']:.0%})",
                 f"{row['share']:.0%} of {row['limit_rate']:.1f} by {limit_name(row)}"]  # fmt: skip
        if peer:
            other = peer["rows"][i]
            cells += [f"{other['rate']:.1f} ({other['spread']:.0%})", f"{other['ratio']:.2f}"]
        yield "| " + " | ".join(cells) + " |"
    yield from _opening(model)


def work_text(row: dict[str, Any]) -> str:
    if row["work"] == "prompt":
        return f"prompt of {row['n']}"
    together = f", {row['batch']} together" if row["batch"] > 1 else ""
    return f"decode {row['n']} after {row['depth']}{together}"


def _opening(model: dict[str, Any]) -> Iterator[str]:
    yield (
        f"opened in {model['open_seconds']:.3f} s, first token of a prompt of "
        f"{model['first_token_prompt']} after {model['first_token_seconds']:.3f} s; in the library "
        f"alone {model['opening_seconds']:.3f} s to the first logits, as long as "
        f"{model['opening_steps']:.2f} steps of decoding"
    )
    yield f"memory: {_memory(model['memory'])}"
    peer = model["against"]
    if not peer:
        return
    yield (
        f"{peer['engine']}: opened in {peer['open_seconds']:.3f} s, first token after "
        f"{peer['first_token_seconds']:.3f} s; memory: {_memory(peer['memory'])}"
    )
    if peer["greedy"]:
        yield "greedy: the first {same} of {tokens} tokens are the same".format(**peer["greedy"])


def _memory(held: dict[str, int]) -> str:
    names = {"anonymous": "of its own", "file": "of mapped files",
             "kv": "for keys and values", "scratch": "for a forward pass"}  # fmt: skip
    parts = [f"{held[k] / 1e6:.1f} MB {text}" for k, text in names.items() if k in held]
    return ", ".join(parts) or "not told by this system"


def read(path: Path) -> dict[str, Any]:
    """A report from its file; LlamaError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        list(readme_rows(found))
        for model in found["models"]:
            list(table(model))
    except OSError as error:
        raise LlamaError(f"{path}: cannot open: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        raise LlamaError(f"{path}: not a report of llama.bench --json") from None
    assert isinstance(found, dict)
    return found
