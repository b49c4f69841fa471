"""Writes a training's curves into a run directory: metrics.jsonl while it goes, figures and the page when it ends."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from fairlead.progress import Bar
from fairlead.runs import Run

SHOWN = (
    ("loss", "eval_loss"), ("rewards/margins", "eval_rewards/margins"), ("rewards/accuracies", "eval_rewards/accuracies"),
    ("logps/chosen", "logps/rejected"), ("reward", "eval_reward"), ("kl",), ("completions/mean_length",),
)  # fmt: skip


class RunReport(TrainerCallback):
    """Every number that is logged becomes a row of the run's metrics; the first process alone writes."""

    def __init__(self, run: Run) -> None:
        self.run, self.bar = run, Bar()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self.bar("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the numbers."""
        if state.is_world_process_zero:
            for name, value in (logs or {}).items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.run.metric(name, value, step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the curves of the whole training, resumed parts with it, and table where it ended."""
        if state.is_world_process_zero:
            draw(self.run, state.log_history)


def draw(run: Run, history: list[dict[str, Any]]) -> None:
    """Figures and a table of what Trainer logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = [names for names in SHOWN if any(name in row for row in history for name in names)]
    if panels:
        figure = Figure(figsize=(4.2 * min(2, len(panels)), 2.9 * math.ceil(len(panels) / 2)), layout="constrained")
        axes = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, names in zip(axes, panels, strict=False):
            for name in names:
                points = [(row["step"], row[name]) for row in history if name in row]
                if points:
                    axis.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 12 else None, markersize=3)
            axis.set_xlabel("step")
            axis.legend(frameon=False, fontsize=8)
        run.figure("curves", figure, "Means over the steps since the last point; eval: over the held-out rows.")
    last: dict[str, Any] = {}
    for row in history:
        last.update(row)
    run.table("Where it ended", [{"quantity": name, "last value": f"{value:.5g}"} for name, value in sorted(last.items()) if isinstance(value, float)])
    for name in ("loss", "rewards/accuracies", "reward", "eval_loss"):
        if name in last:
            run.headline(name, f"{last[name]:.4g}", "last logged")
