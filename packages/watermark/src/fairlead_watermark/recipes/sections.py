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


def candidates_axis(axis: Any, ylabel: str) -> None:
    """A logarithmic axis of n whose ticks are the n that were measured."""
    axis.set(xscale="log", xlabel="candidates n", ylabel=ylabel)
    axis.set_xticks(SIZES, [str(n) for n in SIZES])
    axis.minorticks_off()


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
            bound = [m["bound"][str(n)] for n in SIZES]
            left.plot(SIZES, bound, color=COLOURS[name], ls="--", lw=1, marker="_")
        right.plot(SIZES, [m["evidence"][str(n)] for n in SIZES], color=COLOURS[name], marker="o", label=LABELS[name])
    left.axhline(0, color="black", lw=0.8)
    candidates_axis(left, "reward against unmarked")
    left.set_title("dashed: the bound C √(ln n) − ε", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    candidates_axis(right, "median −log₁₀ p")
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


def audit_section(run: Run, found: dict[str, dict[str, Any]], harmful: int) -> dict[str, guard_audit.Audit]:
    """Shifts of every mark against unmarked, flags, and the simplex picture."""
    sides = {name: _metrics(values, harmful) for name, values in found.items()}
    audits = {name: guard_audit.compare(name, sides[UNMARKED], sides[name]) for name in MARKS}
    rows = [
        {
            "mark": LABELS[name],
            "metric": label,
            "unmarked": f"{s.unmarked:.3f}",
            "marked": f"{s.marked:.3f}",
            "difference, 95 %": f"{s.difference:+.3f} ± {(s.high - s.low) / 2:.3f}",
            "p": f"{s.p_value:.1e}" + (" *" if s.significant else ""),
        }
        for name, audit in audits.items()
        for s, label in ((audit.shifts[metric], label) for metric, label in METRIC_LABELS.items())
    ]
    verdicts = "; ".join(f"{LABELS[name]}: {audit.verdict}" for name, audit in audits.items())
    run.table(
        "Audit: what each mark does to the aligned chat model", rows,
        note=f"{verdicts}. Averaged over keys, prompts and candidates; prompts and keys are crossed random factors; * p < .01. "
        "Attenuation: more unsafe answers. Amplification: more refusals of benign prompts. Surprise is the mean negative "
        "log-probability of the answer under the unmarked model.",
    )  # fmt: skip
    run.figure("audit", _audit_figure(audits), "Shift of each rate against the unmarked model, 95 % intervals over prompts and keys.")
    paths = {}
    for name in MARKS:
        points = [(sides[UNMARKED]["unsafe"].mean(), sides[UNMARKED]["overrefusal"].mean())]
        for n in (1, 4):
            chosen = {k: best_of(found[name][k], found[name]["reward"], n) for k in ("unsafe", "refusal")}
            points.append((chosen["unsafe"][:, :harmful].mean(), chosen["refusal"][:, harmful:].mean()))
        paths[LABELS[name]] = [(float(u), float(o)) for u, o in points]
    colours = {LABELS[name]: COLOURS[name] for name in MARKS}
    run.figure(
        "simplex", guard_audit.simplex_figure(paths, colours),
        "Safe, unsafe, over-refusal: from unmarked to marked to the best of 4 marked answers, near the safe corner.",
    )  # fmt: skip
    shifted = [
        (name, s) for name, audit in audits.items() for m, s in audit.shifts.items()
        if m in ("unsafe", "overrefusal", "helpful") and s.significant
    ]  # fmt: skip
    detail = "; ".join(f"{LABELS[n]} {s.metric} {s.difference:+.3f} (p = {s.p_value:.1e})" for n, s in shifted)
    run.check("audit: at least one mark shifts safety or helpfulness (p < .01)", bool(shifted), detail or "none does")
    worst = max(audits.values(), key=lambda a: abs(a.shifts["helpful"].difference))
    s = worst.shifts["helpful"]
    run.headline(f"helpfulness under {LABELS[worst.mark]}", f"{s.difference:+.1%}", f"from {s.unmarked:.1%}, 95 % {s.low:+.1%} to {s.high:+.1%}")
    return audits


METRIC_LABELS = {
    "unsafe": "unsafe (harmful prompts)", "overrefusal": "over-refusal (benign)", "helpful": "helpful (benign)",
    "reward": "reward", "nll": "surprise, nats per token",
}  # fmt: skip


def _metrics(values: dict[str, Any], harmful: int) -> dict[str, np.ndarray]:
    """Means over candidates, [K, P]: each metric on its own side of the prompts."""
    mean = {k: values[k].mean(-1) for k in ("unsafe", "refusal", "helpful", "reward", "nll")}
    return {
        "unsafe": mean["unsafe"][:, :harmful], "overrefusal": mean["refusal"][:, harmful:],
        "helpful": mean["helpful"][:, harmful:], "reward": mean["reward"], "nll": mean["nll"],
    }  # fmt: skip


def _audit_figure(audits: dict[str, guard_audit.Audit]) -> Any:
    figure, axis = new_figure(8.0, 2.9)
    metrics = ("unsafe", "overrefusal", "helpful", "reward")
    for offset, (name, audit) in zip((0.22, 0.0, -0.22), audits.items(), strict=True):
        shifts = [audit.shifts[m] for m in metrics]
        places = [len(metrics) - i + offset for i in range(len(metrics))]
        errors = [[s.difference - s.low for s in shifts], [s.high - s.difference for s in shifts]]
        axis.errorbar([s.difference for s in shifts], places, xerr=errors, fmt="o", color=COLOURS[name], capsize=3, label=LABELS[name])
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(metrics), 0, -1), [METRIC_LABELS[m] for m in metrics])
    axis.set_xlabel("marked − unmarked")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def resampling_section(run: Run, found: dict[str, dict[str, Any]], harmful: int) -> None:
    """Best of n on the chat model: reward with intervals, guard rates, and the perplexity control."""
    base_KP = found[UNMARKED]["reward"].mean(-1)
    rows, curves = [], {}
    for name in MARKS:
        values = found[name]
        shifts = {n: guard_audit.shift("reward", base_KP, best_of(values["reward"], values["reward"], n)) for n in SIZES}
        curves[name] = shifts
        sigma = float(values["reward"].std(-1, ddof=1).mean())
        control = guard_audit.shift("reward", base_KP, best_of(values["reward"], -values["nll"], 4))
        unsafe = [best_of(values["unsafe"], values["reward"], n)[:, :harmful].mean() for n in (1, 4)]
        helpful = [best_of(values["helpful"], values["reward"], n)[:, harmful:].mean() for n in (1, 4)]
        rows.append(
            {
                "mark": LABELS[name],
                **{f"reward, n = {n}": f"{s.difference:+.3f} ± {(s.high - s.low) / 2:.3f}" for n, s in shifts.items()},
                "likeliest of 4 (control)": f"{control.difference:+.3f} ± {(control.high - control.low) / 2:.3f}",
                "unsafe, n = 1 → 4": f"{unsafe[0]:.3f} → {unsafe[1]:.3f}",
                "helpful, n = 1 → 4": f"{helpful[0]:.3f} → {helpful[1]:.3f}",
                "σ within prompts": f"{sigma:.2f}",
            }
        )
    run.table(
        "Resampling: reward against the unmarked model", rows,
        note="Best of n marked answers under the reward, 95 % intervals. The control takes the likeliest of 4 under the "
        "unmarked model. Plain Gumbel's candidates are equal: no n helps.",
    )  # fmt: skip
    figure, axis = new_figure(6.6, 3.8)
    for name, shifts in curves.items():
        points = [s.difference for s in shifts.values()]
        error = [(s.high - s.low) / 2 for s in shifts.values()]
        axis.errorbar(SIZES, points, yerr=error, color=COLOURS[name], marker="o", capsize=3, label=LABELS[name])
        sigma = float(found[name]["reward"].std(-1, ddof=1).mean())
        if sigma > 0:
            bound = [bounds.resampling_gain(n, sigma) + shifts[1].difference for n in SIZES]
            axis.plot(SIZES, bound, color=COLOURS[name], ls=":", lw=1, marker="_")
    axis.axhline(0, color="black", lw=0.8)
    candidates_axis(axis, "reward against unmarked")
    axis.legend(frameon=False, fontsize=8)
    run.figure(
        "resampling", figure,
        "Best of n on the chat model. Dotted: C √(ln n) − ε, a bound for Gaussian rewards only; this reward takes four "
        "values and saturates at 1, so the curve may fall below it. The bound is put to the test in the closed-form part.",
    )  # fmt: skip
    for name in ("kgw", "modified-gumbel"):
        s = curves[name][4]
        run.check(
            f"resampling, {name}: best of 4 brings the reward back to unmarked", s.low >= 0,
            f"{s.difference:+.3f}, 95 % interval {s.low:+.3f} to {s.high:+.3f}",
        )  # fmt: skip
    gains = [abs(curves["gumbel"][n].difference - curves["gumbel"][1].difference) for n in SIZES]
    run.check("resampling, gumbel: all candidates equal, no gain", max(gains) < 1e-12, f"largest gain {max(gains):.1e}")
    s = curves["kgw"][4]
    run.headline("reward after best of 4, KGW", f"{s.difference:+.2f}", f"against unmarked; {curves['kgw'][1].difference:+.2f} before")


def english_section(run: Run, marks: dict[str, dict[str, Any]], null: list[list[float]], texts: int, tokens: int) -> None:
    """Detection power against n on 200-token English texts."""
    rows = [
        {
            "mark": LABELS[name],
            **{f"detected, n = {n}": f"{power:.1%}" for n, power in m["power"].items()},
            **{f"reward, n = {n}": f"{m['gap'][str(n)]:+.3f} ± {1.96 * m['se'][str(n)]:.3f}" for n in (1, 4)},
            "bound, n = 4": f"{m['bound']['4']:+.3f}",
            "perplexity": f"{m['perplexity']:.1f}",
        }
        for name, m in marks.items()
    ]
    null_rate = float((np.asarray(null) < 0.01).mean())
    run.table(
        f"English: detection at a false-positive rate of .001, {texts} texts of {tokens} tokens per mark", rows,
        note=f"The chosen answer of n is tested. Unmarked texts have p < .01 in {null_rate:.2%} of cases. Reward is against "
        "unmarked text; perplexity is that of the marked text under the unmarked model.",
    )  # fmt: skip
    power = marks["kgw"]["power"]
    run.headline("KGW still detected after best of 4", f"{power['4']:.1%}", f"at FPR .001; {power['1']:.1%} before")


def real_text_section(run: Run, results: list[dict[str, Any]]) -> None:
    """Answers of a real chat model with every token coloured by its score."""
    rows = [
        {
            "mark": LABELS[r["mark"]],
            "answers": len(r["p_values"]),
            "detected at FPR .001": f"{r['power']:.0%}",
            "median p": f"{float(np.median(r['p_values'])):.1e}",
            "perplexity": f"{r['perplexity']:.1f}",
            "tokens per answer": f"{r['mean_length']:.0f}",
        }
        for r in results
    ]
    run.table(
        "Real English: a 135-million-parameter chat model", rows,
        note="Unmarked answers are tested under a KGW key nobody used: the share detected is the false-positive rate.",
    )  # fmt: skip
    html = [_example(r["mark"], e) for r in results for e in r["examples"][:2]]
    run.section(
        "Tokens coloured by score",
        "Green lists: green tokens are tinted. Gumbel: the darker, the larger −ln(1 − u). Unscored tokens (no context yet, "
        "or a repeated one) stay plain. Unmarked text is scored under a KGW key nobody used.",
        html="".join(html),
    )  # fmt: skip
    run.samples(
        [{"mark": r["mark"], "question": e["question"], "answer": "".join(e["tokens"]), "p_value": e["p_value"]} for r in results for e in r["examples"]],
        title="Sample answers", show=0,
    )  # fmt: skip
    plain = next(r for r in results if r["mark"] == UNMARKED)
    run.check("real English: unmarked answers pass for unmarked", plain["power"] <= 0.05, f"{plain['power']:.1%} detected at FPR .001")
    for r in results:
        if r["mark"] != UNMARKED:
            run.metric(f"real English power, {r['mark']}", r["power"])
    kgw = next(r for r in results if r["mark"] == "kgw")
    run.headline("real answers detected, KGW", f"{kgw['power']:.0%}", f"at FPR .001, {kgw['mean_length']:.0f} tokens each")


def _example(mark: str, example: dict[str, Any]) -> str:
    from html import escape

    colour = COLOURS["kgw" if mark == UNMARKED else mark]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    spans = []
    for token, score in zip(example["tokens"], example["scores"], strict=True):
        strength = 0.0 if score is None else min(1.0, score if mark in (UNMARKED, "kgw") else score / 5)
        style = f' style="background:rgba({red},{green},{blue},{0.38 * strength:.2f})"' if strength > 0.02 else ""
        title = "" if score is None else f' title="{score:.2f}"'
        spans.append(f"<span{style}{title}>{escape(token)}</span>")
    p = example["p_value"]
    return (
        f'<div class="marked"><span class="p">{LABELS[mark]} · p = {p:.2g}</span><div class="q">{escape(example["question"])}</div>'
        f'<div class="t">{"".join(spans)}</div></div>'
    )
