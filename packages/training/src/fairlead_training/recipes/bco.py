"""`fairlead run bco`: thumbs up and down without pairs, and prompts that differ between the two.

BCO (Jung et al., arXiv 2404.04656) on tabular policies, where win rates are exact. First the pairs of a world are split into
ups and downs, equal and unequal in number: the reward shift against none, against KTO and against DPO on the pairs. Then the
downs come from other prompts than the ups, and density ratios mend it. The objectives are the package's own, the world is
that of `tabular`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.kinds import Recipe
from fairlead.runs import Run

from ..density_ratio import fit
from .tabular import divergence, drawn_rows, train_pairs, train_rows, unpaired, win_rate, win_rates, world

# Shares of the pairs whose winner is kept as an up and whose loser as a down.
SHARES: dict[str, tuple[float, float]] = {"1 : 1": (1, 1), "1 : 0.25": (1, 0.25), "0.25 : 1": (0.25, 1)}
UNPAIRED = ("bce", "bco", "kto")
ARMS = ("not tilted", "w = 1", "w clamped", "w unclamped")
RARE = -0.5


class BcoConfig(MethodConfig):
    """Sizes; the defaults take under two minutes of one core."""

    worlds: int = Field(3, ge=1, description="worlds of the first part, seeded 3 seed, 3 seed + 1, ... by default")
    tilted_worlds: int = Field(5, ge=1, description="worlds of the second part, seeded 5 seed, 5 seed + 1, ... by default")
    prompts: int = Field(40, ge=10, description="prompts of a world")
    answers: int = Field(6, ge=2, description="answers per prompt")
    pairs: int = Field(4000, ge=40, description="labelled pairs that are split into ups and downs")
    rows: int = Field(20_000, ge=40, description="ups, and downs, of the second part")
    tilt: float = Field(1.0, description="prompts of downs are drawn with probability ~ exp(tilt g), g the prompt's feature")
    beta: float = Field(0.1, gt=0, description="weight of the log-ratio, of all objectives")
    steps: int = Field(400, ge=1, description="full-batch Adam steps")
    learning_rate: float = Field(0.05, gt=0, description="learning rate of Adam")


class Bco(Recipe):
    """Exact win rates of BCO, BCE, KTO and DPO, and of BCO with density ratios."""

    Config = BcoConfig
    config: BcoConfig

    def __call__(self, run: Run) -> None:
        run.describe("Binary classifier optimisation", "Thumbs up and down without pairs: what the reward shift and the density ratios add.", "2404.04656")
        counts, tilted = self.config.worlds, self.config.tilted_worlds
        split: list[dict[str, Any]] = []
        for index in range(counts):
            progress = partial(run.progress, f"training, world {index}")
            split += run.stage(f"split-{index}", partial(compare, self.config, run.seed * counts + index, progress))
        matched: list[dict[str, Any]] = []
        for index in range(tilted):
            progress = partial(run.progress, f"matching, world {index}")
            matched += run.stage(f"tilted-{index}", partial(match, self.config, run.seed * tilted + index, progress))
        report_split(run, split)
        report_tilted(run, matched)


def compare(config: BcoConfig, seed: int, progress: Any) -> list[dict[str, Any]]:
    """Win rates and KL in one world: DPO on the pairs, the three others on each split of them."""
    place = world(seed, prompts=config.prompts, answers=config.answers, pairs=config.pairs)
    budget: dict[str, Any] = {"steps": config.steps, "learning_rate": config.learning_rate, "beta": config.beta}
    found = [("dpo", "pairs", train_pairs(place, "dpo", **budget))]
    for shares, (up, down) in SHARES.items():
        ups, downs = round(up * config.pairs), round(down * config.pairs)
        rows = unpaired(place, ups, downs)
        # KTO takes the mean of the rows; these weights make of it the sum of the class means that BCO takes.
        classes = {"desirable_weight": (ups + downs) / ups, "undesirable_weight": (ups + downs) / downs}
        settings: dict[str, tuple[str, dict[str, Any]]] = {
            "bce": ("bco", {"delta": 0.0}), "bco": ("bco", {"delta": "batch"}), "kto": ("kto", classes)
        }  # fmt: skip
        for name in UNPAIRED:
            objective, own = settings[name]
            found.append((name, shares, train_rows(place, rows, objective, **budget, **own)))
            progress(len(found), 1 + len(SHARES) * len(UNPAIRED))
    return [
        {"seed": seed, "objective": name, "shares": shares, "win_rate": win_rate(place, policy), "kl": divergence(place, policy)}
        for name, shares, policy in found
    ]


def match(config: BcoConfig, seed: int, progress: Any) -> list[dict[str, Any]]:
    """Win rates of BCO in one world, over all prompts and over those that the downs shun, by how the downs come and count."""
    place = world(seed, prompts=config.prompts, answers=config.answers, pairs=1)
    feature = torch.randn(config.prompts, generator=torch.Generator().manual_seed(10_000 + seed), dtype=torch.float64)
    uniform = torch.ones_like(feature)
    plain = drawn_rows(place, uniform, uniform, config.rows, 20_000 + seed)
    tilted = drawn_rows(place, uniform, (config.tilt * feature).exp(), config.rows, 30_000 + seed)
    emb_N1 = feature[tilted.prompt, None]
    weights: dict[str, torch.Tensor | None] = {"not tilted": None, "w = 1": None}
    for name, bounds in (("w clamped", {}), ("w unclamped", {"low": 0.0, "high": float("inf")})):
        ratio = fit(emb_N1[tilted.up], emb_N1[~tilted.up], **bounds)
        weights[name] = torch.where(tilted.up, 1.0, ratio.weight(emb_N1))
    budget: dict[str, Any] = {"steps": config.steps, "learning_rate": config.learning_rate, "beta": config.beta}
    found = []
    for done, name in enumerate(ARMS, 1):
        rows = plain if name == "not tilted" else tilted
        rate_P = win_rates(place, train_rows(place, rows, "bco", weight=weights[name], delta="batch", **budget))
        found.append({"seed": seed, "arm": name, "all": float(rate_P.mean()), "rare": float(rate_P[feature < RARE].mean())})
        progress(done, len(ARMS))
    return found


def report_split(run: Run, rows: list[dict[str, Any]]) -> None:
    """The first part: table and thresholds."""

    def column(name: str, shares: str, what: str = "win_rate") -> np.ndarray:
        return np.array([x[what] for x in rows if (x["objective"], x["shares"]) == (name, shares)])

    for x in rows:
        run.metric("win rate", x["win_rate"], seed=x["seed"], objective=x["objective"], shares=x["shares"], kl=x["kl"])
    dpo = column("dpo", "pairs")
    gains = {shares: column("bco", shares) - column("bce", shares) for shares in SHARES}
    behind = column("bco", "1 : 1") - dpo
    run.section(
        "The shift",
        f"With as many ups as downs BCO comes within {np.abs(behind).max():.3f} of DPO, which sees the pairs. Without the shift (BCE), a "
        f"looser bound of DPO, it ends {gains['1 : 1'].mean():.3f} lower. KTO, whose gradient fades on rows that it classifies badly, ends "
        f"{(column('bco', '1 : 1') - column('kto', '1 : 1')).mean():.3f} lower.",
    )
    table = [
        {"ups : downs": shares, "dpo (all pairs)": _each(dpo), **{name: _each(column(name, shares)) for name in UNPAIRED}} for shares in SHARES
    ]
    run.table("Exact win rates", table, note="One figure per world; 0.5 is the reference. KTO sums class means here.")
    divergences = {"dpo (all pairs)": column("dpo", "pairs", "kl"), **{name: column(name, "1 : 1", "kl") for name in UNPAIRED}}
    run.table("KL to the reference at 1 : 1, nats", [{name: _each(kl, 2) for name, kl in divergences.items()}])
    even = gains["1 : 1"]
    run.check("1 : 1: bco − bce at least .04 in every world", bool((even >= 0.04).all()), f"smallest {even.min():.4f}")
    run.check("1 : 1: bco − dpo at least −.04 in every world", bool((behind >= -0.04).all()), f"smallest {behind.min():.4f}")
    for shares in list(SHARES)[1:]:
        gain = gains[shares]
        run.check(
            f"{shares}: bco above bce in every world, by .01 in the mean", bool((gain > 0).all() and gain.mean() >= 0.01),
            f"smallest {gain.min():.4f}, mean {gain.mean():.4f}",
        )  # fmt: skip
    run.headline("BCO over BCE, as many ups as downs", f"{even.mean():+.3f}", f"{even.min():+.3f} to {even.max():+.3f}")
    run.headline("BCO over DPO on the pairs", f"{behind.mean():+.3f}", f"{behind.min():+.3f} to {behind.max():+.3f}")


def report_tilted(run: Run, rows: list[dict[str, Any]]) -> None:
    """The second part: table and thresholds."""

    def column(arm: str, what: str) -> np.ndarray:
        return np.array([x[what] for x in rows if x["arm"] == arm])

    def recovered(what: str, arm: str = "w clamped") -> float:
        loss = column("not tilted", what).mean() - column("w = 1", what).mean()
        return float((column(arm, what).mean() - column("w = 1", what).mean()) / loss)

    for x in rows:
        run.metric("win rate, tilted downs", x["all"], seed=x["seed"], arm=x["arm"], rare=x["rare"])
    run.section(
        "The density ratios",
        "The downs now come from prompts with a high feature g, the ups from all prompts alike. Where downs are rare, bad answers are "
        f"not pushed down: the win rate falls by {(column('not tilted', 'all') - column('w = 1', 'all')).mean():.3f}. Weights from a "
        f"logistic regression on g, held in 0.5 to 10, win back {recovered('all'):.0%} of it ({recovered('all', 'w unclamped'):.0%} unbounded). "
        "They mend a bias, not a lack of rows.",
    )
    run.table(
        "Win rates with tilted downs",
        [
            {"prompts": text, **{arm: f"{column(arm, what).mean():.3f}" for arm in ARMS}}
            for what, text in (("all", "all"), ("rare", f"g < {RARE}"))
        ],
        note=f"Mean of {len(column('w = 1', 'all'))} worlds.",
    )
    for what, text, bound in (("all", "all prompts", 1 / 2), ("rare", f"g < {RARE}", 1 / 3)):
        share = recovered(what)
        run.check(f"clamped weights win back at least {bound:.2f} of the loss, {text}", bool(share >= bound), f"{share:.3f}")
    gain = column("w clamped", "all") - column("w = 1", "all")
    run.check("clamped weights gain over all prompts in every world", bool((gain > 0).all()), f"smallest {gain.min():.4f}")
    run.headline("share of the loss by tilted prompts won back", f"{recovered('all'):.0%}", f"{recovered('rare'):.0%} at g < {RARE}")


def _each(values: np.ndarray, digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
