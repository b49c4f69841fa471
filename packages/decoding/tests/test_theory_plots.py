"""The pictures show the numbers they claim to show."""

from __future__ import annotations

import io

import numpy as np
import pytest

from fairlead_decoding import theory
from fairlead_decoding.theory import plots

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # log-space code must not lean on silent NaN

P, R = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, 3.0])
LOG_P = np.log(P)


def curve(axis: object, label: str) -> np.ndarray:
    (line,) = [line for line in axis.get_lines() if str(line.get_label()).startswith(label)]  # type: ignore[attr-defined]
    return np.array(line.get_xydata(), dtype=float)


def test_best_of_n_is_drawn_under_the_tilt() -> None:
    (axis,) = plots.reward_kl_figure(LOG_P, R, points={"mine": (0.1, 1.2)}).axes
    optimum, bon, mine = (curve(axis, label) for label in ("tilt", "best-of-n", "mine"))
    assert (np.interp(bon[1:, 0], optimum[:, 0], optimum[:, 1]) >= bon[1:, 1] - 2e-3).all()
    assert mine.tolist() == [[0.1, 1.2]]
    assert optimum[0] == pytest.approx([0, 1.0]) and bon[-1, 0] == pytest.approx(float(theory.bon_kl_exact(LOG_P, R, 16)))


def test_exact_estimate_and_bound_are_drawn_in_order() -> None:
    (axis,) = plots.bon_kl_figure({"four outcomes": (LOG_P, R)}).axes
    exact, estimate, bound = (curve(axis, label)[:, 1] for label in ("exact", "estimate", "bound"))
    assert (exact <= estimate + 1e-9).all() and (estimate <= bound + 1e-9).all() and exact[-1] < bound[-1]


def test_the_rate_function_touches_zero_where_the_model_earns() -> None:
    (axis,) = plots.rate_figure([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.0, 1.2]).axes
    model = curve(axis, "the model")
    assert model[:, 1].min() < 1e-3 and model[model[:, 1].argmin(), 0] == pytest.approx(-1.3045, abs=5e-3)


def test_lengths_transforms_and_procedures_are_drawn() -> None:
    lengths = [theory.best_of_n_at_length([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], m, 0.1) for m in (5, 10, 20)]
    (axis,) = plots.lengths_figure(lengths).axes
    assert curve(axis, "reward gap")[:, 1] == pytest.approx([x.gap for x in lengths])
    left, right = plots.procedures_figure(4, 0.5).axes
    assert curve(left, "best-of-4")[-1] == pytest.approx([1, 4]) and curve(left, "worst-of-4")[0] == pytest.approx([0, 4])
    assert curve(right, "Φ: identity")[-1, 1] == pytest.approx(np.exp(1 / 0.24281) * 0.24281**-1 / np.expm1(1 / 0.24281), rel=1e-3)
    axes = plots.win_rate_figure(4, ("identity", "exp:10"), 0.5, {"exp:10": [(0.5, (0.71, 0.87, 0.68))]}).axes
    assert [curve(a, "Φ: identity")[-1, 1] for a in axes] == pytest.approx([0.7737, 0.7998, 0.8860], abs=1e-4)
    circles = [[line for line in a.get_lines() if line.get_marker() == "o"] for a in axes]
    assert [float(line.get_ydata()[0]) for (line,) in circles] == [0.71, 0.87, 0.68]


def test_a_figure_becomes_svg_without_a_display() -> None:
    stream = io.BytesIO()
    plots.bon_kl_figure({"a": (LOG_P, R), "b": (LOG_P, -R)}).savefig(stream, format="svg")
    assert stream.getvalue().startswith(b"<?xml")
