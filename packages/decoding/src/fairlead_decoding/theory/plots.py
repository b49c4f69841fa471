"""The pictures of theory: one function per idea, each returns a matplotlib Figure and touches no global state.

What is drawn is computed here from the other modules; where it is shown or saved is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import as_letters, as_problem
from .best_of_n import bon_expected_reward, bon_kl_bound, bon_kl_estimate, bon_kl_exact, bon_log_pmf
from .inference_aware import frontier
from .memoryless import LengthResult, rate_function
from .procedures import BestOfN, Identity, WorstOfN
from .tilts import expected, kl_divergence, kl_max, solve_alpha, tilt
from .transforms import TransformLike, as_transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, RED = "#3b5bdb", "#c2571a", "#1b7f4d", "#5b6470", "#b3261e"
PALETTE = (GREY, BLUE, ORANGE, GREEN, "#7a3e9d", RED)
SIZES = (1, 2, 4, 8, 16)


def new_figure(width: float = 6.4, height: float = 3.8, columns: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure without pyplot, hence without global state or a display, and its axes in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def sizes_axis(axis: Any, sizes: Sequence[int], label: str = "answers n (logarithmic)") -> None:
    """A logarithmic axis of n whose ticks are the given n."""
    axis.set(xscale="log", xlabel=label)
    axis.set_xticks(list(sizes), [str(n) for n in sizes])
    axis.minorticks_off()


def reward_kl_figure(
    log_p: ArrayLike, r: ArrayLike, sizes: Sequence[int] = SIZES, points: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """Expected reward against KL divergence: the tilt, which nothing exceeds, and best-of-n with its exact divergence.

    log_p, r: float64 [M]. points: further policies, label -> (KL in nats, expected reward).
    """
    log_p, r = as_problem(log_p, r)
    figure, (axis,) = new_figure()
    extras = dict(points or {})
    reach = max([float(bon_kl_exact(log_p, r, max(sizes))), *(kl for kl, _ in extras.values())]) * 1.15
    # reward grows as the square root of the divergence at first, so the grid is even in that root
    budgets = np.linspace(0, 1, 80) ** 2 * min(reach, float(kl_max(log_p, r)) * (1 - 1e-9))
    alphas = [solve_alpha(log_p, r, kl) for kl in budgets]
    curve = [tilt(log_p, r, alpha) for alpha in alphas]
    axis.plot(
        [kl_divergence(phi, log_p) for phi in curve], [expected(phi, r) for phi in curve], color=BLUE, label="tilt p exp(αr): the optimum"
    )
    counts = np.geomspace(1, max(sizes), 80)
    axis.plot(
        [bon_kl_exact(log_p, r, n) for n in counts], [bon_expected_reward(log_p, r, n) for n in counts], color=ORANGE, ls="--", label="best-of-n"
    )
    for n in sizes:
        at = float(bon_kl_exact(log_p, r, n)), float(bon_expected_reward(log_p, r, n))
        axis.plot(*at, "o", color=ORANGE)
        axis.annotate(f"n = {n}", at, xytext=(6, -11), textcoords="offset points", fontsize=8, color=ORANGE)
    for (label, at), colour in zip(extras.items(), (GREEN, "#7a3e9d", RED, GREY) * (1 + len(extras)), strict=False):
        axis.plot(*at, "s", color=colour, label=label)
    axis.set(xlabel="KL divergence from the model, nats", ylabel="expected reward")
    axis.margins(y=0.1)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def bon_kl_figure(problems: Mapping[str, tuple[ArrayLike, ArrayLike]], sizes: Sequence[int] = SIZES) -> Figure:
    """KL divergence of best-of-n against n, one panel per model: exact, the estimate from the chosen answer's
    probability (averaged exactly), and the bound log n - (n-1)/n. problems: title -> (log_p [M], r [M])."""
    figure, axes = new_figure(max(4.2, 3.2 * len(problems)), 3.4, len(problems), sharey=True)
    counts = np.geomspace(1, max(sizes), 60)
    for axis, (title, (log_p, r)) in zip(axes, problems.items(), strict=True):
        log_p, r = as_problem(log_p, r)
        estimate = [float(np.exp(bon_log_pmf(log_p, r, n)) @ bon_kl_estimate(log_p, n)) for n in counts]
        axis.plot(counts, bon_kl_bound(counts), color=GREY, ls=":", label="bound log n − (n−1)/n")
        axis.plot(counts, estimate, color=GREEN, ls="--", label="estimate")
        axis.plot(counts, [float(bon_kl_exact(log_p, r, n)) for n in counts], color=ORANGE, label="exact")
        sizes_axis(axis, sizes)
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("KL(best-of-n || model), nats")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def rate_figure(p: ArrayLike, q: ArrayLike, alphas: Sequence[float]) -> Figure:
    """Rate function J(theta) of the mean reward per letter under aligned models; its zero is what they earn."""
    figure, (axis,) = new_figure()
    log_p, log_q = as_letters(p, q)
    grid = np.linspace(log_q.min(), log_q.max(), 201)
    for alpha, colour in zip(alphas, PALETTE, strict=False):
        axis.plot(grid, rate_function(p, q, alpha, grid), color=colour, label="the model, α = 0" if alpha == 0 else f"aligned, α = {alpha:.2f}")
        axis.plot(float(expected(tilt(log_p, log_q, alpha), log_q)), 0, "o", color=colour)
    axis.set(xlabel="reward per letter θ, nats", ylabel="rate J(θ), nats per letter", ylim=(-0.02, None))
    axis.legend(frameon=False, fontsize=8, loc="upper center")
    return figure


def lengths_figure(results: Sequence[LengthResult]) -> Figure:
    """What best-of-exp(m delta) lacks against the tilt of the same budget, per letter, against the length m."""
    figure, (axis,) = new_figure()
    lengths = [x.m for x in results]
    axis.plot(lengths, [x.gap for x in results], "o-", color=BLUE, label="reward gap, nats per letter")
    axis.plot(lengths, [x.kl_bon_tilt for x in results], "s-", color=ORANGE, label="KL(best-of-n || tilt), nats per letter")
    scale = results[-1].gap * lengths[-1] / np.log(lengths[-1])
    axis.plot(lengths, [scale * np.log(m) / m for m in lengths], color=GREY, ls=":", label="log m / m, scaled to the last gap")
    axis.set(yscale="log", ylabel="per letter (logarithmic)")
    sizes_axis(axis, lengths, "length m in letters (logarithmic)")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def procedures_figure(n: float = 4, kl: float = 0.5, transforms: Sequence[TransformLike] = ("identity", "exp:10", "exp:-10")) -> Figure:
    """Left: the weight g(u) that a procedure gives to quantile u. Right: the quantile density f(u) of the optimum for
    each transform at the same KL divergence."""
    figure, (left, right) = new_figure(9.0, 3.5, 2)
    u = np.linspace(0, 1, 301)
    for procedure, label, colour in (
        (Identity(), "single sample", GREY), (BestOfN(n), f"best-of-{n:g}", BLUE), (WorstOfN(n), f"worst-of-{n:g}", ORANGE),
    ):  # fmt: skip
        left.plot(u, procedure.density(u), color=colour, label=label)
    left.set(xlabel="quantile u of the reward", ylabel="weight g(u)", title="what the procedure does")
    for transform, colour in zip(transforms, PALETTE, strict=False):
        point = frontier(transform, kl=kl)
        right.plot(point.quantiles, point.density, color=colour, label=_label(point.transform.name))
    right.set(xlabel="quantile u of the reward", ylabel="density f(u) against the model", title=f"what is optimal at {kl:g} nats")
    for axis in (left, right):
        axis.title.set_fontsize(9)
        axis.legend(frameon=False, fontsize=8)
    return figure


def win_rate_figure(
    n: float = 4, transforms: Sequence[TransformLike] = ("identity", "exp:10", "exp:-10"), reach: float = 1.0,
    points: Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]] | None = None,
) -> Figure:  # fmt: skip
    """Win rate against KL divergence for each transform, in closed form: of one sample, after best-of-n, after worst-of-n.

    points: transform's name -> measured policies as (KL, (single, best-of-n, worst-of-n)), drawn as circles.
    """
    figure, axes = new_figure(10.5, 3.7, 3)
    procedures = (Identity(), BestOfN(n), WorstOfN(n))
    kls = reach * np.linspace(0, 1, 26)[1:] ** 2
    for transform, colour in zip(transforms, PALETTE, strict=False):
        curve = [frontier(transform, kl=kl) for kl in kls]
        name = as_transform(transform).name
        for place, (axis, procedure) in enumerate(zip(axes, procedures, strict=True)):
            axis.plot([0.0, *kls], [0.5, *(x.under(procedure) for x in curve)], color=colour, label=_label(name))
            for kl, rates in (points or {}).get(name, ()):
                axis.plot(kl, rates[place], "o", color=colour, mfc="white", mew=1.6)
    for axis, title in zip(axes, ("one sample", f"best-of-{n:g}", f"worst-of-{n:g}"), strict=True):
        axis.set(xlabel="KL divergence, nats")
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("win rate against the model")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _label(name: str) -> str:
    return "Φ: " + name.replace(":", " ")
