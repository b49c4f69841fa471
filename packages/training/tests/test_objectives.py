"""Objectives of pairs, with and without a reference: their values, their gradients, what they depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objective_batches import PAIR_A, PAIR_B, both, pair, random_groups, stats

from fairlead import registry
from fairlead.errors import ConfigError, InputError, UnknownNameError
from fairlead.kinds import SequenceStats

# loss; dL/ds_w; dL/ds_l of pair A and of pair B, beta 0.1 where nothing else is said; most of them from TRL 1.16
TABLE: list[tuple[str, dict[str, Any], tuple[float, float, float], tuple[float, float, float]]] = [
    ("dpo", {}, (0.620957, -0.046257, 0.046257), (0.854355, -0.057444, 0.057444)),
    ("cdpo", {"eps": 0.1}, (0.635957, -0.036257, 0.036257), (0.824355, -0.047444, 0.047444)),
    ("robust", {"eps": 0.1}, (0.602207, -0.058757, 0.058757), (0.891855, -0.069944, 0.069944)),
    ("ipo", {}, (21.855625, -1.87, 2.3375), (28.741512, -1.340278, 1.191358)),
    ("ipo-sum", {}, (12.25, -7, 7), (64, -16, 16)),
    ("hinge", {}, (0.85, -0.1, 0.1), (1.3, -0.1, 0.1)),
    ("exo-pair", {"eps": 1e-3}, (2.505517, -0.167972, 0.167972), (3.286512, -0.176175, 0.176175)),
    ("nca-pair", {}, (1.350825, -0.021253, 0.024375), (1.469407, -0.032475, 0.026249)),
    ("bco-pair", {}, (1.312856, -0.047502, 0.048750), (1.542536, -0.054983, 0.052498)),
    ("sppo-hard", {}, (36.25, -8, 9), (85, -14, 12)),
    ("apo-zero", {}, (0.962523, -0.024938, 0.024984), (1.074813, -0.024752, 0.024938)),
    ("apo-down", {}, (0.987549, 0.000078, 0.024860), (1.024609, 0.000306, 0.024446)),
    ("discopop", {"tau": 0.05}, (0.849338, -0.062520, 0.062520), (0.855580, -0.055192, 0.055192)),
    ("sigmoid-norm", {}, (0.677029, -0.009838, 0.012297), (0.711366, -0.006363, 0.005656)),
    ("sft", {}, (2.0, -0.2, 0), (2.75, -0.125, 0)),
    ("f-dpo", {"divergence": "forward-kl"}, (0.631154, -0.017218, 0.077164), (1.104602, -0.494074, 0.024599)),
    ("f-dpo", {"divergence": "js"}, (0.660652, -0.013003, 0.030095), (0.787937, -0.048023, 0.014663)),
    ("r-dpo", {"alpha": 0.2}, (0.533382, -0.041338, 0.041338), (0.974077, -0.062246, 0.062246)),
    ("dpop", {"lam": 5}, (0.620957, -0.046257, 0.046257), (1.541008, -0.471501, 0.078583)),
    ("simpo", {"beta": 2, "gamma": 1}, (0.313262, -0.107577, 0.134471), (2.578890, -0.231035, 0.205365)),
    ("alphapo", {"alpha": 0.5, "beta": 2, "gamma": 1}, (0.002347, -0.002548, 0.005252), (5.949789, -0.986192, 0.602488)),
    ("cpo", {"beta": 0.1, "lam": 0}, (0.598139, -0.045017, 0.045017), (0.913015, -0.059869, 0.059869)),
    ("cpo", {"beta": 0.1, "lam": 1}, (2.598139, -0.245017, 0.045017), (3.663015, -0.184869, 0.059869)),
    ("cpo-ipo", {}, (16.0, -1.6, 2.0), (33.0625, -1.4375, 1.277778)),
    ("orpo", {"lam": 0.1}, (2.028875, -0.205801, 0.006599), (2.869144, -0.134297, 0.008947)),
    ("slic", {"delta": 1, "lam": 0.1}, (1.0, -0.1, 0), (7.2, -1.1, 1.0)),
    ("logo", {"beta": 2, "gamma": 1, "lam": 0}, (0.313262, -0.107577, 0.134471), (2.578890, -0.231035, 0.205365)),
    ("plackett-luce", {}, (0.313262, -0.053788, 0.067235), (1.136871, -0.084897, 0.075464)),
    ("pro", {}, (0.313262, -0.053788, 0.067235), (1.136871, -0.084897, 0.075464)),
    ("dpo-list", {}, (0.620957, -0.046257, 0.046257), (0.854355, -0.057444, 0.057444)),
    ("kto", {"z0": 0.3}, (0.481259, -0.012485, 0.012480), (0.537370, -0.012336, 0.012485)),
    ("bco", {"delta": 0.05, "reduction": "sample_mean"}, (0.656428, -0.024375, 0.023751), (0.772200, -0.028109, 0.025625)),
    ("aot", {}, (0.620957, -0.046257, 0.046257), (0.854355, -0.057444, 0.057444)),
    ("aot-unpaired", {}, (0.620957, -0.046257, 0.046257), (0.854355, -0.057444, 0.057444)),
]  # fmt: skip
PAIRWISE = [
    "dpo", "cdpo", "robust", "ipo", "ipo-sum", "hinge", "exo-pair", "nca-pair", "bco-pair", "sppo-hard", "aot", "aot-unpaired",
    "apo-zero", "apo-down", "discopop", "sigmoid-norm", "f-dpo", "r-dpo", "dpop", "rpo", "simpo", "alphapo", "orpo", "cpo",
    "cpo-ipo", "slic",
]  # fmt: skip
OF_THE_MARGIN = ["dpo", "cdpo", "ipo-sum", "hinge", "exo-pair", "discopop", "robust"]


def make(name: str, **settings: Any) -> Any:
    return registry.create("objective", name, **settings)


@pytest.mark.parametrize(("name", "settings", "a", "b"), TABLE)
def test_values_and_gradients_are_those_of_the_formula(name: str, settings: dict[str, Any], a: Any, b: Any) -> None:
    for which, (loss, dw, dl) in ((PAIR_A, a), (PAIR_B, b)):
        extra = {"reward": [1.0, 0.0]} if name == "pro" else {}
        batch = pair(which, **extra)
        out = make(name, **settings)(batch)
        assert [float(out.loss.detach()), *out.dlogp.tolist()] == pytest.approx([loss, dw, dl], abs=1.1e-6)
        out.loss.backward()
        torch.testing.assert_close(batch.logp.grad, out.dlogp)


def sg(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slope(x: float) -> float:
    return sg(x) * sg(-x)


def log_odds_slope(a: float) -> float:
    return 1 / (1 - math.exp(a))


# d_w, d_l of the table of weights, from s, n, u of both sides
WEIGHTS: dict[str, tuple[dict[str, Any], Callable[[Any], tuple[float, float]]]] = {
    "dpo": ({}, lambda p: (0.1 * sg(-p.z),) * 2),
    "cdpo": ({"eps": 0.2}, lambda p: (0.1 * (sg(-p.z) - 0.2),) * 2),
    "robust": ({"eps": 0.2}, lambda p: (0.1 * (0.8 * sg(-p.z) + 0.2 * sg(p.z)) / 0.6,) * 2),
    "ipo-sum": ({}, lambda p: (2 * (5 - p.uw + p.ul),) * 2),
    "ipo": ({}, lambda p: (2 * (5 - p.uw / p.nw + p.ul / p.nl) / p.nw, 2 * (5 - p.uw / p.nw + p.ul / p.nl) / p.nl)),
    "hinge": ({}, lambda p: (0.1 * (p.z < 1),) * 2),
    "exo-pair": ({}, lambda p: (0.1 * slope(p.z) * (math.log(999) - p.z),) * 2),
    "nca-pair": ({}, lambda p: (0.1 * (sg(-0.1 * p.uw) - sg(0.1 * p.uw) / 2), 0.05 * sg(0.1 * p.ul))),
    "bco-pair": ({}, lambda p: (0.1 * sg(-0.1 * p.uw), 0.1 * sg(0.1 * p.ul))),
    "sppo-hard": ({}, lambda p: (2 * (5 - p.uw), 2 * (p.ul + 5))),
    "apo-zero": ({}, lambda p: (0.1 * slope(0.1 * p.uw), 0.1 * slope(0.1 * p.ul))),
    "apo-down": ({}, lambda p: (0.1 * (slope(p.z) - slope(0.1 * p.uw)), 0.1 * slope(p.z))),
    "discopop": ({"tau": 0.5}, lambda p: (discopop_weight(p.z, 0.5),) * 2),
    "sigmoid-norm": ({}, lambda p: tuple(0.1 * sg(-0.1 * (p.uw / p.nw - p.ul / p.nl)) / n for n in (p.nw, p.nl))),
    "r-dpo": ({}, lambda p: (0.1 * sg(-p.z - 0.2 * (p.nw - p.nl)),) * 2),
    "dpop": ({}, lambda p: dpop_weights(p, 5)),
    "rpo": ({"alpha": 0.7}, lambda p: (0.1 * sg(-p.z) + 0.7 / p.nw, 0.1 * sg(-p.z))),
    "simpo": ({"beta": 2, "gamma": 0.5}, lambda p: tuple(2 * sg(0.5 - 2 * (p.aw - p.al)) / n for n in (p.nw, p.nl))),
    "cpo": ({}, lambda p: (0.1 * sg(-0.1 * (p.sw - p.sl)) + 1 / p.nw, 0.1 * sg(-0.1 * (p.sw - p.sl)))),
    "cpo-ipo": ({}, lambda p: (2 * (5 - p.aw + p.al) / p.nw, 2 * (5 - p.aw + p.al) / p.nl)),
    "slic": ({}, lambda p: ((p.sw - p.sl < 1) + 0.1, 1.0 * (p.sw - p.sl < 1))),
    "orpo": ({}, lambda p: orpo_weights(p, 0.1)),
    "f-dpo": ({"divergence": "alpha", "alpha": 0.5}, lambda p: alpha_weights(p, 0.5)),
    "rrhf": ({}, lambda p: ((p.aw < p.al) / p.nw + 1 / p.nw, (p.aw < p.al) / p.nl)),
}


def discopop_weight(z: float, tau: float) -> float:
    m = sg(z / tau)
    return 0.1 * (sg(-z) * (1 - m) + math.exp(-z) * m - m * (1 - m) * (math.exp(-z) + math.log(sg(z))) / tau)


def dpop_weights(p: Any, lam: float) -> tuple[float, float]:
    pull = 0.1 * sg(-0.1 * (p.uw - p.ul - lam * max(0, -p.uw)))
    return pull * (1 + lam * (p.uw < 0)), pull


def orpo_weights(p: Any, lam: float) -> tuple[float, float]:
    odds = p.aw - math.log(1 - math.exp(p.aw)) - p.al + math.log(1 - math.exp(p.al))
    pull = lam * sg(-odds)
    return (1 + pull * log_odds_slope(p.aw)) / p.nw, pull * log_odds_slope(p.al) / p.nl


def alpha_weights(p: Any, alpha: float) -> tuple[float, float]:
    z = 0.1 * (math.exp((alpha - 1) * p.uw) - math.exp((alpha - 1) * p.ul)) / (alpha - 1)
    return 0.1 * sg(-z) * math.exp((alpha - 1) * p.uw), 0.1 * sg(-z) * math.exp((alpha - 1) * p.ul)


class Values:
    """Numbers of one pair, for the closed forms."""

    def __init__(self, batch: SequenceStats, row: int) -> None:
        assert batch.ref_logp is not None
        s, n, u = (x.detach().tolist()[2 * row : 2 * row + 2] for x in (batch.logp, batch.length, batch.logp - batch.ref_logp))
        (self.sw, self.sl), (self.nw, self.nl), (self.uw, self.ul) = s, n, u
        self.aw, self.al, self.z = self.sw / self.nw, self.sl / self.nl, 0.1 * (self.uw - self.ul)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_of_a_pair_are_the_closed_forms(name: str) -> None:
    settings, closed = WEIGHTS[name]
    columns = random_groups(20, seed=3)
    del columns["reward"]  # rrhf takes the order from the roles
    batch = SequenceStats(**columns)
    out = make(name, **settings)(batch)
    for row in range(20):
        d_w, d_l = -20 * out.dlogp[2 * row], 20 * out.dlogp[2 * row + 1]
        assert (float(d_w), float(d_l)) == pytest.approx(closed(Values(batch, row)), rel=1e-9, abs=1e-12)


def test_batch_objectives_are_those_of_the_whole_batch() -> None:
    assert make("dpo")(both()).loss.item() == pytest.approx(0.737656, abs=1e-6)
    assert make("aot")(both()).loss.item() == pytest.approx(0.737656, abs=1e-6)
    unpaired = make("aot-unpaired")(both())
    assert unpaired.loss.item() == pytest.approx(0.732052, abs=1e-6)
    assert unpaired.dlogp.tolist() == pytest.approx([-0.025, 0.026871, -0.026871, 0.025], abs=1e-6)
    sft = make("sft")(both())
    assert sft.per_item.tolist() == pytest.approx([32 / 13, 32 / 13])


@pytest.mark.parametrize("name", OF_THE_MARGIN)
def test_objectives_of_the_margin_see_nothing_else(name: str) -> None:
    plain = make(name)(both())
    moved = both()
    assert moved.ref_logp is not None
    other = SequenceStats(moved.logp - 3, moved.length * 2, moved.ref_logp, moved.group, moved.role)
    torch.testing.assert_close(make(name)(other).loss, plain.loss)
    torch.testing.assert_close(make(name)(other).dlogp, plain.dlogp)


def test_one_objective_is_anothers_special_case() -> None:
    def same(*those: tuple[str, dict[str, Any]]) -> None:
        outs = [make(name, **settings)(both(reward=[1.0, 0.0, 1.0, 0.0])) for name, settings in those]
        for out in outs[1:]:
            torch.testing.assert_close(out.loss, outs[0].loss)
            torch.testing.assert_close(out.dlogp, outs[0].dlogp)

    same(("dpo", {}), ("cdpo", {"eps": 0}), ("robust", {"eps": 0}), ("f-dpo", {"divergence": "reverse-kl"}),
         ("f-dpo", {"divergence": "alpha", "alpha": 1}), ("r-dpo", {"alpha": 0}), ("dpop", {"lam": 0}), ("rpo", {"alpha": 0}),
         ("dpo-list", {}))  # fmt: skip
    same(("simpo", {"beta": 3, "gamma": 0.7}), ("logo", {"beta": 3, "gamma": 0.7, "lam": 0}), ("alphapo", {"beta": 3, "gamma": 0.7, "alpha": 0}))
    same(("plackett-luce", {}), ("simpo", {"beta": 1, "gamma": 0}), ("pro", {}), ("aft", {"variant": "plain"}))
    same(("hinge", {}), ("f-dpo", {"objective": "hinge", "divergence": "reverse-kl"}))
    same(("cdpo", {"eps": 0.1}), ("f-dpo", {"objective": "cdpo", "settings": {"eps": 0.1}, "divergence": "reverse-kl"}))
    same(("bco-pair", {}), ("bco", {"delta": 0.0}))


@pytest.mark.parametrize("name", [n for n in PAIRWISE if "ref_logp" in registry.create("objective", n).needs])
def test_a_constant_added_to_policy_and_reference_changes_nothing(name: str) -> None:
    batch = both()
    assert batch.ref_logp is not None
    moved = SequenceStats(batch.logp - 5, batch.length, batch.ref_logp - 5, batch.group, batch.role)
    settings = {"alpha": 0} if name == "rpo" else {}
    torch.testing.assert_close(make(name, **settings)(moved).loss, make(name, **settings)(batch).loss)


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_order_of_the_rows_changes_nothing(name: str) -> None:
    order = [3, 0, 2, 1]
    plain, other = make(name)(both()), make(name)(both(order))
    torch.testing.assert_close(other.loss, plain.loss)
    torch.testing.assert_close(other.dlogp, plain.dlogp[order])


@pytest.mark.parametrize("name", [n for n in PAIRWISE if not n.startswith("aot")])
def test_pairs_of_two_micro_batches_average_to_the_whole(name: str) -> None:
    parts = [make(name)(pair(which)) for which in (PAIR_A, PAIR_B)]
    whole = make(name)(both())
    torch.testing.assert_close(whole.loss, (parts[0].loss + parts[1].loss) / 2)
    torch.testing.assert_close(whole.dlogp, torch.cat([p.dlogp for p in parts]) / 2)


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_pass_gradcheck(name: str) -> None:
    batch = both()
    settings = {"lam": 2} if name == "dpop" else {}

    def loss(logp: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = make(name, **settings)(SequenceStats(logp, batch.length, batch.ref_logp, batch.group, batch.role)).loss
        return out

    assert torch.autograd.gradcheck(loss, batch.logp)


def test_weights_multiply_items_and_the_mean_is_not_renormalised() -> None:
    plain = make("dpo")(both())
    out = make("dpo")(both(weight=[2.0, 0.5, 3.0, 0.25]))
    torch.testing.assert_close(out.per_item, plain.per_item * torch.tensor([1.0, 0.75], dtype=torch.float64))
    torch.testing.assert_close(out.loss, out.per_item.mean())


def test_weights_travel_through_the_sort_of_aot() -> None:
    # u: A 1, -0.5; B -2, 1: the sorted chosen are (B, A), the sorted rejected (A, B)
    weight = [2.0, 3.0, 5.0, 7.0]
    plain, out = make("aot-unpaired")(both()), make("aot-unpaired")(both(weight=weight))
    torch.testing.assert_close(out.per_item, plain.per_item * torch.tensor([5.0 * 3, 2.0 * 7], dtype=torch.float64))
    # s_w - s_l: A 2, B -4, so the first sorted margin is B's
    plain, out = make("aot")(both()), make("aot")(both(weight=weight))
    torch.testing.assert_close(out.per_item, plain.per_item * torch.tensor([5.0 * 7, 2.0 * 3], dtype=torch.float64))


def test_discopop_starts_with_the_wrong_slope() -> None:
    out = make("discopop")(stats([-3.0, -4.0], ref_logp=[-3.0, -4.0], group=[0, 0], role=[1, -1]))
    assert float(-out.dlogp[0]) == pytest.approx(-0.0784, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, -1e-12, -1e-8, -1e-6, -0.69, -50.0, -1e4])
def test_orpo_is_finite_from_certain_to_impossible_sequences(mean: float, dtype: torch.dtype) -> None:
    for chosen, rejected in ((mean, -1.0), (-1.0, mean), (mean, mean)):
        out = make("orpo")(stats([chosen, rejected], dtype=dtype, group=[0, 0], role=[1, -1]))
        assert bool(out.loss.isfinite()) and bool(out.dlogp.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_do_not_overflow(dtype: torch.dtype) -> None:
    for name, settings in (
        ("discopop", {}), ("discopop", {"tau": 3}), ("f-dpo", {}), ("f-dpo", {"objective": "ipo-sum"}), ("f-dpo", {"objective": "discopop"}),
        ("f-dpo", {"divergence": "alpha", "alpha": 3}), ("alphapo", {"alpha": 2}), ("exo-pair", {}),
    ):  # fmt: skip
        for u in ((-1e4, 0), (1e4, 0), (0, -1e4), (0, 1e4), (1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)):
            ref = [min(0.0, -x) - 1 for x in u]
            logp = [r + x for r, x in zip(ref, u, strict=True)]
            out = make(name, **settings)(stats(logp, ref_logp=ref, dtype=dtype, group=[0, 0], role=[1, -1]))
            assert bool(out.loss.isfinite()) and bool(out.dlogp.isfinite().all()), (name, u)


def test_wpo_scales_value_and_gradient_of_any_pair_objective() -> None:
    for base, settings in (("dpo", {"beta": 0.3}), ("simpo", {}), ("aot-unpaired", {}), ("orpo", {})):
        w = torch.tensor([0.5, 0.8, 0.9, 0.1], dtype=torch.float64)
        plain = make(base, **settings)(both(weight=w.tolist()))
        batch = both()
        out = make("wpo", objective=base, settings=settings)(
            SequenceStats(batch.logp, batch.length, batch.ref_logp, batch.group, batch.role, extra={"wpo_weight": w})
        )
        torch.testing.assert_close(out.per_item, plain.per_item)
        torch.testing.assert_close(out.dlogp, plain.dlogp)
    with pytest.raises(ConfigError, match="pair objective"):
        make("wpo", objective="kto")


def test_wpos_weight_is_one_for_a_token_as_likely_as_its_law_makes_likely() -> None:
    from fairlead_training import wpo_weight

    p = torch.tensor([0.5, 0.3, 0.2])
    token, mask = p.log()[None, :], torch.tensor([[True, True, False]])
    expected = math.exp((math.log(0.5) + math.log(0.3)) / 2 - math.log(0.38))
    assert wpo_weight(token, torch.full((1, 3), math.log(0.38)), mask).tolist() == pytest.approx([expected])
    uniform = torch.full((1, 3), 0.25).log()
    assert wpo_weight(uniform, uniform, mask).tolist() == pytest.approx([1.0])


def test_ld_dpo_counts_the_longer_sequences_tail_by_alpha() -> None:
    torch.manual_seed(0)
    length, group = torch.tensor([5, 3, 2, 4]), torch.tensor([0, 0, 1, 1])
    policy, reference = (-torch.rand(4, 5, dtype=torch.float64) for _ in range(2))
    objective = make("ld-dpo", alpha=0.3)
    weights = objective.token_weights(length, group)
    assert weights.tolist() == [
        pytest.approx(row)
        for row in ([1, 1, 1, 0.3, 0.3], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0.3, 0.3, 0])
    ]
    logp, ref = (policy * weights).sum(1), (reference * weights).sum(1)
    role, extra = [1, -1, 1, -1], {"weighted_length": weights.sum(1)}
    out = objective(SequenceStats(logp, length, ref, group, role, extra=extra))
    torch.testing.assert_close(out.loss, make("dpo")(SequenceStats(logp, length, ref, group, role)).loss)
    ones = make("ld-dpo", alpha=1).token_weights(length, group)
    assert torch.equal(ones, (torch.arange(5) < length[:, None]).float())
    with pytest.raises(InputError, match="summed with token_weights"):
        objective(SequenceStats(logp, length, ref, group, role, extra={"weighted_length": length}))


def test_bad_settings_and_batches_are_refused_in_one_line() -> None:
    def refused(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=match) as error:
            call()
        assert "\n" not in str(error.value)

    refused(ConfigError, "eps", lambda: make("exo-pair", eps=0))
    refused(ConfigError, "eps", lambda: make("robust", eps=0.5))
    refused(ConfigError, "beta", lambda: make("dpo", beta=0))
    refused(ConfigError, "disagree", lambda: make("simpo", beta=2, gamma=1, gamma_beta_ratio=0.3))
    refused(ConfigError, "margin alone", lambda: make("f-dpo", objective="nca-pair"))
    refused(UnknownNameError, "'dpo'", lambda: make("dpoo"))
    refused(InputError, "group 0: has 2 chosen and 0 rejected", lambda: make("dpo")(stats([-1, -2.0], ref_logp=[-1, -1], group=[0, 0], role=[1, 1])))
    refused(InputError, "group 1: has 0 chosen", lambda: make("simpo")(stats([-1, -2.0, -3], group=[0, 0, 1], role=[1, -1, -1])))
    refused(InputError, "no pair", lambda: make("simpo")(stats([-1.0], group=[0], role=[0])))
    refused(InputError, "no chosen", lambda: make("sft")(stats([-1.0], role=[-1])))
    refused(InputError, "ref_logp", lambda: make("dpo")(stats([-1, -2.0], group=[0, 0], role=[1, -1])))


def test_gamma_may_be_given_as_its_ratio_to_beta() -> None:
    assert make("simpo", beta=2.5, gamma_beta_ratio=0.4).config.gamma == pytest.approx(1.0)
    assert make("logo", gamma_beta_ratio=0.2).config.gamma == pytest.approx(2.0)


def test_metrics_are_those_of_the_field() -> None:
    found = make("dpo")(both()).metrics
    assert found == pytest.approx(
        {"rewards/chosen": -0.05, "rewards/rejected": 0.025, "rewards/margins": -0.075, "rewards/accuracies": 0.5,
         "logps/chosen": -16, "logps/rejected": -15}
    )  # fmt: skip
