"""A picture of a report of llama.bench: tokens a second over depth and over batch.

Each curve has its limit beside it, dashed: what the memory's bandwidth, or the arithmetic where it
is the lower one, would allow. matplotlib draws it; requirements-dev.txt brings it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.errors import LlamaError

Row = dict[str, Any]


def find_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise LlamaError("--plot needs matplotlib; pip install matplotlib")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes REPORT's picture as PATH, of the kind that its ending names."""
    find_matplotlib()
    import matplotlib

    matplotlib.use("agg")  # no screen is needed
    from matplotlib import pyplot

    batches = sorted({r["batch"] for m in report["models"] for r in _decoded(m)})
    depths = sorted({r["depth"] for m in report["models"] for r in _decoded(m)})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), constrained_layout=True)
    for number, model in enumerate(report["models"]):
        color = f"C{number % 10}"
        _curve(left, model, color, "depth", lambda row: row["batch"] == batches[0])
        _curve(right, model, color, "batch", lambda row: row["depth"] == depths[0])
    left.set_xlabel(f"positions in the cache (sequences decoded together: {batches[0]})")
    right.set_xlabel(f"sequences decoded together (positions in the cache: {depths[0]})")
    for axes, ticks in ((left, depths), (right, batches)):
        axes.set_xticks(ticks)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise LlamaError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _decoded(model: dict[str, Any]) -> list[Row]:
    return [row for row in model["rows"] if row["work"] == "decode"]


def _curve(
    axes: Any, model: dict[str, Any], color: str, over: str, keep: Callable[[Row], bool]
) -> None:
    """One model's rate over OVER, its limit, and its peer's rate."""
    rows = model["rows"]
    at = [i for i, row in enumerate(rows) if row["work"] == "decode" and keep(row)]
    at.sort(key=lambda i: rows[i][over])
    x = [rows[i][over] for i in at]
    name = f"{model['shape'] or model['file']} {model['dtype']}"
    axes.plot(x, [rows[i]["rate"] for i in at], "o-", color=color, label=name)
    axes.plot(x, [rows[i]["limit_rate"] for i in at], "--", color=color, label=f"{name}: limit")
    peer = model["against"]
    if peer:
        theirs = [peer["rows"][i]["rate"] for i in at]
        axes.plot(x, theirs, "x:", color=color, label=f"{name}: {peer['engine']}")
