"""Sections, figures and thresholds of the watermark-alignment-resampling report.

Everything here is computed from the stages' stored results, so a report can be made again without any model.
Axes: K keys, P prompts, N candidates; prompts come harmful first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairlead.runs import Run

from .. import audit as guard_audit
from .. import bounds
from .closed_form import SIZES
from .organism import MARKS, UNMARKED, best_of

COLOURS = {UNMARKED: "#5b6470", "kgw": "#1b7f4d", "gumbel": "#c2571a", "modified-gumbel": "#3b5bdb"}
LABELS = {UNMARKED: "unmarked", "kgw": "KGW", "gumbel": "Gumbel", "modified-gumbel": "modified Gumbel"}
SIGNIFICANCE = 0.01


def new_figure(width: float = 6.4, height: float = 3.8, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure without pyplot, hence without global state or a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes if columns > 1 else axes[0]


def closed_form_section(run: Run, result: dict[str, Any]) -> None:
    """Gap to the unmarked model against n with the theorem's bound, and what is left of the mark."""
    figure, (left, right) = new_figure(9.2, 3.8, 2)
    for name, m in result["marks"].items():
        gap = [m["gap"][str(n)] for n in SIZES]
        error = [1.96 * m["se"][str(n)] for n in SIZES]
        left.errorbar(SIZES, gap, yerr=error, color=COLOURS[name], marker="o", capsize=3, label=LABELS[name])
        if m["sigma"] > 0:
            smooth = np.geomspace(1, SIZES[-1], 60)
            curve = [bounds.resampling_gain(float(x), m["sigma"]) - m["eps"] for x in smooth]
            left.plot(smooth, curve, color=COLOURS[name], ls="--", lw=1)
        right.plot(SIZES, [m["evidence"][str(n)] for n in SIZES], color=COLOURS[name], marker="o", label=LABELS[name])
    left.axhline(0, color="black", lw=0.8)
    left.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="candidates n", ylabel="reward against unmarked")
    left.set_title("dashed: the bound C √(ln n) − ε", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    right.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="candidates n", ylabel="median −log₁₀ p")
    right.set_title("the mark in the chosen answer", fontsize=9)
    right.set_ylim(bottom=0)
    run.figure(
        "closed-form", figure,
        f"Closed-form bigram model, {result['prompts']} prompts of {result['length']} tokens, one key per prompt, "
        "95 % intervals over prompts. Plain Gumbel repeats one answer, so resampling cannot help it.",
    )  # fmt: skip
    rows = [
        {
            "mark": LABELS[name],
            "cost of the mark ε": f"{m['eps']:+.3f}",
            **{f"gap, n = {n}": f"{m['gap'][str(n)]:+.3f} ± {1.96 * m['se'][str(n)]:.3f}" for n in SIZES},
            "detected at 1 %, n = 1": f"{m['power']['1']:.1%}",
            "n = 4": f"{m['power']['4']:.1%}",
            "equal candidates": f"{m['duplicates']:.0%}",
            "unsafe from .05": f"{m['guard']['unsafe']:.3f}",
            "best of 4": f"{m['guard']['unsafe_best_of_4']:.4f}",
        }
        for name, m in result["marks"].items()
    ]
    run.table("Closed form: what the mark costs and what resampling returns", rows)
