"""Draws docs/methods/img/objectives.svg: the loss of one pair and its gradient against the margin, for every registered objective.

    python docs/objective_curves.py

The pair: 20 tokens each, s_w = -30 + D/2, s_l = -30 - D/2, both references at -30. Lists hold the same two sequences.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fairlead import registry
from fairlead.kinds import SequenceStats

HERE = Path(__file__).resolve().parent
LENGTH, MIDDLE = 20, -30.0
MARGINS = [-30 + 1.5 * i for i in range(41)]
COLUMNS = 6


def pair(objective: Any, margin: float) -> Any:
    """What the objective makes of the pair."""
    sums = torch.tensor([MIDDLE + margin / 2, MIDDLE - margin / 2], dtype=torch.float64, requires_grad=True)
    columns: dict[str, Any] = {"group": [0, 0], "role": [1, -1], "rank": [0, 1], "reward": torch.tensor([1.0, 0.0])}
    reference = torch.full((2,), MIDDLE, dtype=torch.float64)
    extra = {
        "ref_logp_mean": reference / LENGTH, "mismatched_ratio": torch.zeros(2), "wpo_weight": torch.ones(2, dtype=torch.float64),
        "weighted_length": torch.full((2,), float(LENGTH)), "old_logp": reference,
    }  # fmt: skip
    if "token_logp" in objective.needs or type(objective).__name__ == "GRPO":
        extra |= {
            "token_logp": (sums / LENGTH)[:, None].expand(2, LENGTH), "token_mask": torch.ones(2, LENGTH, dtype=torch.bool),
            "old_token_logp": (reference / LENGTH)[:, None].expand(2, LENGTH),
        }  # fmt: skip
    objective.training = False
    found = objective(SequenceStats(sums, [LENGTH, LENGTH], reference, extra=extra, **columns))
    (gradient,) = torch.autograd.grad(found.loss, sums)
    return float(found.loss.detach()), *(float(g) for g in gradient)


def draw() -> str:
    """The SVG, the same for the same versions."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    names = [m.name for m in registry.methods("objective") if m.package == "fairlead-training"]
    rows = math.ceil(len(names) / COLUMNS)
    style = {"svg.hashsalt": "objectives", "svg.fonttype": "none", "font.size": 7, "path.simplify": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 1.55 * rows), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            loss, chosen, rejected = zip(*(pair(registry.create("objective", name), d) for d in MARGINS), strict=True)
            axes.plot(MARGINS, loss, color="#444444", linewidth=1.4)
            axes.set_title(name, fontsize=8)
            slopes = axes.twinx()
            slopes.axhline(0, color="#bbbbbb", linewidth=0.6)
            slopes.plot(MARGINS, chosen, color="#00796b", linewidth=1.1)
            slopes.plot(MARGINS, rejected, color="#c2410c", linewidth=1.1, linestyle="--")
            for side in (axes, slopes):
                side.locator_params(axis="y", nbins=3)
                side.spines["top"].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    (HERE / "methods" / "img" / "objectives.svg").write_text(draw(), encoding="utf-8")
