"""Objectives of groups, lists and demonstrations: LOGO, RRHF, PRO, Plackett-Luce, AFT, PoFT."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_batches import random_groups, stats

from fairlead import registry
from fairlead.errors import ConfigError, InputError
from fairlead.kinds import LossOutput, SequenceStats
from fairlead_training import agreement


def run(name: str, batch: SequenceStats, **settings: Any) -> LossOutput:
    found: LossOutput = registry.create("objective", name, **settings)(batch)
    return found


def scores(values: list[float], **columns: Any) -> SequenceStats:
    """A single group whose token means are the values."""
    return stats(values, group=[0] * len(values), **columns)


def three(s_l: tuple[float, float] = (-12.0, -15.0), n_l: tuple[int, int] = (4, 6)) -> SequenceStats:
    return stats([-10.0, *s_l], [5, *n_l], group=[0, 0, 0], role=["chosen", "rejected", "rejected"])


def test_logo_averages_the_rejected_each_over_its_own_length() -> None:
    out = run("logo", three(), beta=10, gamma=3, lam=0.1)
    assert out.loss.item() == pytest.approx(0.211048, abs=1e-6)
    assert out.dlogp.tolist() == pytest.approx([-0.041974, 0.013734, 0.009156], abs=1e-6)


def test_logo_treats_its_rejected_answers_alike() -> None:
    first = run("logo", stats([-2.0, -3.0, -2.5], group=[0, 0, 0], role=[1, -1, -1]), beta=10, gamma=3, lam=0)
    second = run("logo", stats([-2.0, -2.5, -3.0], group=[0, 0, 0], role=[1, -1, -1]), beta=10, gamma=3, lam=0)
    assert first.loss.item() == second.loss.item() == pytest.approx(0.011048, abs=1e-6)  # the published code gives 0.005980


def test_copies_of_a_rejected_answer_share_its_gradient() -> None:
    once = run("logo", stats([-10.0, -12.0], [5, 4], group=[0, 0], role=[1, -1]))
    many = run("logo", stats([-10.0] + [-12.0] * 4, [5] + [4] * 4, group=[0] * 5, role=[1] + [-1] * 4))
    torch.testing.assert_close(many.loss, once.loss)
    torch.testing.assert_close(many.dlogp[0], once.dlogp[0])
    torch.testing.assert_close(many.dlogp[1:], once.dlogp[1:].expand(4) / 4)


def test_logo_takes_groups_of_different_sizes() -> None:
    batch = stats([-10.0, -12, -8, -12, -15], [5, 4, 5, 4, 6], group=[7, 7, 3, 3, 3], role=[1, -1, 1, -1, -1])
    parts = [
        run("logo", stats([-8.0, -12, -15], [5, 4, 6], group=[0, 0, 0], role=[1, -1, -1])),
        run("logo", stats([-10.0, -12], [5, 4], group=[0, 0], role=[1, -1])),
    ]
    torch.testing.assert_close(run("logo", batch).per_item, torch.cat([p.per_item for p in parts]))
    assert torch.autograd.gradcheck(lambda s: run("logo", SequenceStats(s, batch.length, group=batch.group, role=batch.role)).loss, batch.logp)


def test_logo_without_a_margin_left_gives_log_two() -> None:
    out = run("logo", stats([-2.0, -2.3], group=[0, 0], role=[1, -1]), beta=10, gamma=3, lam=0)
    assert out.loss.item() == pytest.approx(math.log(2))
    with pytest.raises(InputError, match="group 0: has 1 chosen and 0 rejected"):
        run("logo", stats([-2.0], group=[0], role=[1]))
    with pytest.raises(ConfigError, match="disagree"):
        registry.create("objective", "logo", gamma=3, beta=10, gamma_beta_ratio=0.2)


@pytest.mark.parametrize(("reward", "loss", "gradient"), [([3.0, 1, 2], 0.5, [-1, 0, 0]), ([1.0, 2, 3], 1.0, [2, -1, -2])])
def test_rrhf_sums_its_hinges_and_holds_up_the_best(reward: list[float], loss: float, gradient: list[float]) -> None:
    out = run("rrhf", scores([-0.5, -0.8, -0.6], reward=reward))
    assert out.loss.item() == pytest.approx(loss)
    assert out.dlogp.tolist() == pytest.approx(gradient)


def test_equal_rewards_make_no_pair_and_the_first_of_the_best_is_held_up() -> None:
    out = run("rrhf", scores([-0.9, -0.5, -0.6], reward=[1.0, 1.0, 0.0]))
    assert out.loss.item() == pytest.approx(0.3 + 0.9)
    assert out.dlogp.tolist() == pytest.approx([-2, 0, 1])


def test_pro_is_the_likelihood_of_the_ranking() -> None:
    ranked = run("pro", scores([-0.5, -0.8, -0.6], rank=[0, 1, 2]))
    assert ranked.loss.item() == pytest.approx(1.771058, abs=1e-6)
    assert ranked.dlogp.tolist() == pytest.approx([-0.622022, -0.269821, 0.891843], abs=1e-6)
    torch.testing.assert_close(run("plackett-luce", scores([-0.5, -0.8, -0.6], rank=[0, 1, 2])).loss, ranked.loss)
    rewarded = run("pro", scores([-0.5, -0.8, -0.6], reward=[3.0, 2, 1]))
    assert rewarded.loss.item() == pytest.approx(1.910040, abs=1e-6)
    assert rewarded.dlogp.tolist() == pytest.approx([-1.342134, -0.148074, 1.088449], abs=1e-6)


def test_pro_takes_tied_rewards_without_dividing_by_zero() -> None:
    out = run("pro", scores([-0.5, -0.8, -0.6], reward=[1.0, 1.0, 0.0]))
    first = math.log(math.exp(-0.5) + math.exp(0) + math.exp(-0.6)) + 0.5
    assert out.loss.item() == pytest.approx(first + math.log(math.exp(-0.8) + math.exp(-0.6)) + 0.8)
    assert bool(out.dlogp.isfinite().all())


def test_pros_likelihood_term_grows_with_the_list() -> None:
    plain, out = (run("pro", stats([-1.0, -2, -3], [2, 2, 2], group=[0] * 3, rank=[0, 1, 2]), sft_weight=w) for w in (0, 0.05))
    assert (out.loss - plain.loss).item() == pytest.approx(0.05 * 4 * 1.0)


def test_the_plackett_luce_likelihoods_of_all_rankings_sum_to_one() -> None:
    rows = [run("plackett-luce", scores([-0.5, -0.8, -0.6, -2.0], rank=list(r))).loss for r in itertools.permutations(range(4))]
    assert float(torch.stack(rows).detach().neg().exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["rrhf", "pro", "plackett-luce", "aft", "logo", "dpo-list"])
def test_lists_of_different_lengths_count_as_themselves_alone_in_any_order(name: str) -> None:
    columns = random_groups(4, seed=1, members=4)
    keep = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, 10, 12, 13, 14])  # sizes 4, 2, 3, 3
    columns = {k: v[keep] for k, v in columns.items()}
    whole = run(name, SequenceStats(**columns))
    alone = [run(name, SequenceStats(**{k: v[columns["group"] == g] for k, v in columns.items()})) for g in range(4)]
    torch.testing.assert_close(whole.per_item, torch.cat([out.per_item for out in alone]))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    other = run(name, SequenceStats(**{k: v[order] for k, v in columns.items()}))
    torch.testing.assert_close(other.loss, whole.loss)
    torch.testing.assert_close(other.dlogp, whole.dlogp[order])
    if name != "aft":
        s = columns.pop("logp").clone().requires_grad_(True)
        assert torch.autograd.gradcheck(lambda x: run(name, SequenceStats(x, **columns)).loss, s)


@pytest.mark.parametrize("name", ["rrhf", "pro", "plackett-luce", "dpo-list"])
def test_a_batch_of_single_answers_is_no_step(name: str) -> None:
    out = run(name, stats([-1.0, -2.0], ref_logp=[-1.0, -1.0], group=[0, 1], rank=[0, 0]))
    assert out.loss.item() == 0 and out.dlogp.tolist() == [0, 0]


def test_rankings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="ranked equal"):
        run("plackett-luce", scores([-1.0, -2.0], rank=[0, 0]))
    with pytest.raises(InputError, match="not be negative"):
        run("rrhf", scores([-1.0, -2.0], rank=[0, -1]))
    with pytest.raises(InputError, match="reward, rank or role"):
        run("rrhf", scores([-1.0, -2.0]))


P_N: list[float] = [-0.50, -0.80, -0.60, -1.20]
LABELS = [1, 1, -1, -1]


@pytest.mark.parametrize(
    ("variant", "loss", "gradient"),
    [
        ("plain", 1.457020, [-0.326433, -0.440638, 0.495264, 0.271807]),
        ("detached", 1.457020, [-0.326433, -0.440638, 0, 0]),
        ("boundary", 1.984156, [-0.367045, -0.495459, 0.147174, -0.104084]),
    ],
)
def test_afts_variants_differ_in_what_they_do_to_wrong_chains(variant: str, loss: float, gradient: list[float]) -> None:
    out = run("aft", scores(P_N, role=LABELS), variant=variant, boundary_beta=0.15)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert out.dlogp.tolist() == pytest.approx(gradient, abs=1e-6)
    if variant == "plain":
        assert float(out.dlogp.sum()) == pytest.approx(0, abs=1e-12)


def test_a_wrong_chain_on_the_boundary_is_left_alone() -> None:
    out = run("aft", scores([-0.5, -0.8, -0.95], role=[1, 1, -1]), boundary_beta=0.15)
    assert out.loss.item() == pytest.approx(1.385462, abs=1e-6)
    assert float(out.dlogp[2]) == pytest.approx(0, abs=1e-12)
    for s_n in (-3.0, -1.2, -0.9, -0.2):
        slope = float(run("aft", scores([-0.5, -0.8, s_n], role=[1, 1, -1]), boundary_beta=0.15).dlogp[2])
        assert math.copysign(1, slope) == math.copysign(1, s_n + 0.95)


def test_afts_ranking_form() -> None:
    bounded = run("aft", scores([-0.5, -0.8, -0.6], rank=[0, 1, 2]), boundary_beta=0.15)
    assert bounded.loss.item() == pytest.approx(1.778829, abs=1e-6)
    assert bounded.dlogp.tolist() == pytest.approx([-0.522544, -0.352380, 0.180718], abs=1e-6)
    detached = run("aft", scores([-0.5, -0.8, -0.6], rank=[0, 1, 2]), variant="detached")
    assert detached.loss.item() == pytest.approx(1.352494, abs=1e-6)
    assert detached.dlogp.tolist() == pytest.approx([-0.425557, -0.315848, 0], abs=1e-6)


def test_afts_limits() -> None:
    shift = 0.7
    for variant in ("plain", "detached", "boundary"):
        here, there = (run("aft", scores([x - d for x in P_N], role=LABELS), variant=variant) for d in (0, shift))
        torch.testing.assert_close(here.loss, there.loss)
        torch.testing.assert_close(here.dlogp, there.dlogp)
    far = run("aft", scores(P_N, role=LABELS), boundary_beta=40)
    torch.testing.assert_close(far.loss, run("aft", scores(P_N, role=LABELS), variant="plain").loss)
    near = run("aft", scores([-0.5, -0.9], role=[1, -1]), boundary_beta=0)
    assert near.loss.item() == pytest.approx(math.log(1 + 2 * math.cosh(0.4)))


def test_a_question_without_both_kinds_costs_nothing_and_is_counted() -> None:
    out = run("aft", stats([*P_N, -1.0, -2.0], group=[0] * 4 + [1] * 2, role=[*LABELS, 1, 1]))
    assert float(out.per_item[1].detach()) == 0 and out.dlogp[4:].tolist() == [0, 0]
    assert out.loss.item() == pytest.approx(1.984156 / 2, abs=1e-6)
    assert out.metrics["aft/usable"] == 0.5


def test_aft_adds_the_likelihood_of_marked_reference_chains() -> None:
    extra = {"reference": torch.tensor([False] * 4 + [True])}
    out = run("aft", stats([*P_N, -3.0], [1] * 4 + [2], group=[0] * 5, role=[*LABELS, 1], extra=extra), align_weight=0.5)
    assert out.loss.item() == pytest.approx(1.5 + 0.5 * 1.984156, abs=1e-6)
    assert float(out.dlogp[4]) == pytest.approx(-0.5)


def test_assessment_accuracy_is_the_area_under_the_curve() -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    rng = np.random.default_rng(0)
    s, label = -rng.random(40), rng.integers(0, 2, 40)
    found = run("aft", scores(list(s), role=list(2 * label - 1))).metrics["aft/assessment_accuracy"]
    assert found == pytest.approx(roc_auc_score(label, s))
    assert run("aft", scores([-1.0, -1.0], role=[1, -1])).metrics["aft/assessment_accuracy"] == 0


def poft(logp: list[float], length: list[int], r_bar: list[float], **settings: Any) -> LossOutput:
    return run("poft", stats(logp, length, extra={"ref_logp_mean": r_bar}), **settings)


def test_poft_is_weighted_cross_entropy() -> None:
    first = poft([-10.0], [5], [-2.2])
    assert first.loss.item() == pytest.approx(0.598139, abs=1e-6)
    assert float(first.dlogp[0]) == pytest.approx(-0.090033, abs=1e-6)
    second = poft([-22.0], [8], [-2.2])
    assert (second.loss.item(), float(second.dlogp[0])) == pytest.approx((1.005492, -0.079267), abs=1e-6)
    out = poft([-10.0, -22.0], [5, 8], [-2.2, -1.0], beta=2, gamma=0.3)
    tau = [1 / (1 + math.exp(2 * (a - r) + 0.3)) for a, r in ((-2.0, -2.2), (-2.75, -1.0))]
    assert out.dlogp.tolist() == pytest.approx([-2 * t / n / 2 for t, n in zip(tau, (5, 8), strict=True)])


def test_poft_lies_between_cross_entropy_and_nothing() -> None:
    assert float(-poft([-30.0], [1], [0.0]).dlogp[0]) == pytest.approx(1, abs=1e-12)
    assert float(poft([-0.1], [1], [-60.0]).dlogp[0]) == pytest.approx(0, abs=1e-12)
    even = poft([-4.0], [2], [-2.0])
    assert (even.loss.item(), even.metrics["poft/tau"]) == pytest.approx((math.log(2), 0.5))
    assert poft([math.log(0.2)], [1], [math.log(0.1)], gamma=math.log(3)).metrics["poft/tau"] == pytest.approx(1 / 7)
    gmean = pytest.importorskip("scipy.stats").gmean
    p = [0.1, 0.3, 0.05]
    tau = poft([math.log(0.2)], [1], [float(np.mean(np.log(p)))]).metrics["poft/tau"]
    assert tau == pytest.approx(gmean(p) / (gmean(p) + 0.2))


@pytest.mark.parametrize("r_bar", [0.1, float("nan"), -float("inf")])
def test_scores_that_no_model_gives_are_refused(r_bar: float) -> None:
    with pytest.raises(InputError, match="ref_logp_mean"):
        poft([-1.0], [1], [r_bar])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0, 1, 2, 3), (1, 0, 2, 3), [0, 2, 3]), ((0, 1, 2), (2, 1, 0), [0]), ((2, 1, 0), (2, 1, 0), [2, 1, 0]), ((2, 0, 3, 1), (0, 2, 1, 3), [2, 3])],
)
def test_agreement_is_the_first_of_the_longest_common_orders(first: Any, second: Any, expected: list[int]) -> None:
    assert agreement(first, second) == expected


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))))
def test_agreement_is_in_both_rankings_and_none_is_longer(pair: tuple[list[int], list[int]]) -> None:
    first, second = pair
    found = agreement(first, second)
    common = [
        list(c) for k in range(len(first), 0, -1) for c in itertools.combinations(first, k)
        if [second.index(x) for x in c] == sorted(second.index(x) for x in c)
    ]  # fmt: skip
    longest = [c for c in common if len(c) == len(common[0])]
    assert found == min(longest, key=lambda c: [first.index(x) for x in c])


def test_two_random_rankings_of_four_agree_on_two_and_a_half() -> None:
    lengths = [len(agreement(range(4), p)) for p in itertools.permutations(range(4))]
    assert sum(lengths) == 58
    with pytest.raises(InputError, match="permutation"):
        agreement([0, 0], [0, 1])


@given(st.lists(st.floats(-5, -0.1), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_on_the_order_that_the_policy_has_already_no_hinge_is_active(values: list[float], rng: Any) -> None:
    other = list(range(len(values)))
    rng.shuffle(other)
    own = sorted(range(len(values)), key=lambda i: -values[i])
    kept = agreement(other, own)
    if len(kept) > 1:
        out = run("rrhf", scores([values[i] for i in kept], rank=list(range(len(kept)))), sft_weight=0)
        assert out.loss.item() == 0 and out.metrics["rrhf/active"] == 0
