"""KTO, BCO with its running shift, and the on-policy objectives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_batches import PAIR_A, PAIR_B, pair, stats
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from fairlead import registry
from fairlead.errors import ConfigError, InputError
from fairlead.kinds import LossOutput, SequenceStats


def make(name: str, **settings: Any) -> Any:
    return registry.create("objective", name, **settings)


def rows(u: list[float], label: list[bool], **columns: Any) -> SequenceStats:
    """Unpaired rows whose log-ratios are u."""
    return stats([x - 100 for x in u], ref_logp=[-100.0] * len(u), role=label, **columns)


def test_the_gap_between_the_two_bounds_is_its_formula_and_positive() -> None:
    a, b = torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64), torch.tensor([0.1, 1.2, -3.0], dtype=torch.float64)
    gap = torch.log1p((torch.exp(-a) + torch.exp(-b)) / (1 + torch.exp(-(a + b))))
    for k in range(3):
        x, y = float(a[k]), float(b[k])
        batch = stats([x - 50, -y - 50], ref_logp=[-50.0, -50.0], group=[0, 0], role=[1, -1])
        found = make("bco", delta=0.0, beta=1)(batch).loss - make("dpo", beta=1)(batch).loss
        assert found.item() == pytest.approx([0.685737, 0.892392, 1.862254][k], abs=1e-6) == pytest.approx(float(gap[k]), abs=1e-6)


def test_bco_with_any_shift_is_above_dpo() -> None:
    g = torch.Generator().manual_seed(0)
    r_w, r_l, delta = (3 * torch.randn(10_000, generator=g, dtype=torch.float64) for _ in range(3))
    logp = torch.stack([r_w, r_l], 1).flatten() - 100
    batch = SequenceStats(logp, torch.ones(20_000), torch.full_like(logp, -100), torch.arange(20_000) // 2, [1, -1] * 10_000)
    dpo = make("dpo", beta=1)(batch).per_item
    bco = -logsigmoid(r_w - delta) - logsigmoid(-(r_l - delta))
    assert bool((bco > dpo).all())
    fixed = make("bco", beta=1, delta=0.5)(batch).per_item
    assert bool((fixed[0::2] + fixed[1::2] > dpo).all())


def test_the_class_midpoint_minimises_the_error_term() -> None:
    batch = rows([1.0, -0.5], [True, False])
    objective = make("bco", beta=1, delta="batch")
    assert objective(batch).metrics["bco/delta"] == pytest.approx(0.25)

    def error(delta: float) -> float:
        return math.exp(-(1 - delta)) + math.exp(-0.5 - delta)

    assert [error(d) for d in (0, 0.25, 0.5)] == pytest.approx([0.974410, 0.944733, 0.974410], abs=1e-6)
    assert error(0.25) == pytest.approx(2 * math.exp(-0.75))


def test_bco_is_elementwise_binary_cross_entropy() -> None:
    u, label = [1.0, -0.5, 3.0, 0.2, -7.0], [True, False, False, True, False]
    out = make("bco", delta=0.05)(rows(u, label))
    expected = binary_cross_entropy_with_logits(
        0.1 * torch.tensor(u, dtype=torch.float64) - 0.05, torch.tensor(label, dtype=torch.float64), reduction="none"
    )
    torch.testing.assert_close(out.per_item.detach(), expected)
    up = torch.tensor(label)
    torch.testing.assert_close(out.loss.detach(), expected[up].mean() + expected[~up].mean())
    torch.testing.assert_close(make("bco", delta=0.05, reduction="sample_mean")(rows(u, label)).loss.detach(), expected.mean())


def test_bco_of_pairs_without_a_shift_is_bco_pair() -> None:
    for which in (PAIR_A, PAIR_B):
        ours, paired = make("bco", delta=0.0)(pair(which)), make("bco-pair")(pair(which))
        torch.testing.assert_close(ours.loss, paired.loss)
        torch.testing.assert_close(ours.dlogp, paired.dlogp)


def test_a_constant_in_every_reward_is_shifted_away_and_not_by_kto() -> None:
    u, label = [1.0, -0.5, 3.0, -2.0], [True, False, True, False]
    moved = [x + 4 for x in u]
    for kind in ("ema", "batch"):
        torch.testing.assert_close(make("bco", delta=kind)(rows(moved, label)).loss, make("bco", delta=kind)(rows(u, label)).loss)
    assert make("bco", delta=0.0)(rows(moved, label)).loss.item() != pytest.approx(make("bco", delta=0.0)(rows(u, label)).loss.item())
    assert make("kto", z0=0.3)(rows(moved, label)).loss.item() != pytest.approx(make("kto", z0=0.3)(rows(u, label)).loss.item())


def deltas(kind: str, batches: list[tuple[list[float], list[bool]]], rho: float = 0.5) -> list[float]:
    objective = make("bco", beta=1, delta=kind, rho=rho)
    return [objective(rows(r, label)).metrics["bco/delta"] for r, label in batches]


def test_the_running_shift_over_batches_of_one_and_two_classes() -> None:
    three = [([5.0, 5.0], [True, True]), ([1.0, 0.0], [True, False]), ([9.0], [False])]
    assert deltas("ema", three) == pytest.approx([0, 0.5, 0.5])
    assert deltas("batch", three) == pytest.approx([0, 0.5, 0.5])
    assert deltas("cumulative", three) == pytest.approx([5, 2.75, 4])
    later = [([1.0, 0.0], [True, False]), ([3.0, 0.0], [True, False])]
    assert deltas("ema", later) == pytest.approx([0.5, 0.5 * 0.5 + 0.5 * 1.5])


def test_the_shifts_agree_on_equal_balanced_batches_only() -> None:
    balanced = [([2.0, 2.0, -4.0, -4.0], [True, True, False, False])] * 3
    assert [deltas(k, balanced)[-1] for k in ("ema", "batch", "cumulative")] == pytest.approx([-1, -1, -1])
    unequal = [([2.0, 2.0, 2.0, 2.0, -4.0], [True] * 4 + [False])]
    assert deltas("batch", unequal) == pytest.approx([-1])
    assert deltas("cumulative", unequal) == pytest.approx([0.8])


def test_the_cumulative_shift_is_the_mean_of_all_rewards() -> None:
    rng = np.random.default_rng(0)
    batches = [(list(rng.normal(size=5)), [True, False, True, True, False]) for _ in range(20)]
    assert deltas("cumulative", batches)[-1] == pytest.approx(np.mean([b[0] for b in batches]))


def test_a_batch_of_one_class_has_a_finite_loss_of_that_class() -> None:
    out = make("bco", delta=0.05)(rows([1.0, 2.0], [True, True]))
    assert out.loss.item() == pytest.approx(float(-logsigmoid(torch.tensor([0.05, 0.15])).mean()))


def test_class_weights_and_density_ratios_multiply_items() -> None:
    u, label = [1.0, -0.5], [True, False]
    plain = make("bco", delta=0.05)(rows(u, label)).per_item
    out = make("bco", delta=0.05, up_weight=2, down_weight=3)(rows(u, label, weight=[1.0, 0.5])).per_item
    torch.testing.assert_close(out, plain * torch.tensor([2.0, 1.5], dtype=torch.float64))


def test_the_row_mean_has_the_values_of_trl() -> None:
    for which, expected in ((PAIR_A, 0.656428), (PAIR_B, 0.772200)):
        assert make("bco", delta=0.05, reduction="sample_mean")(pair(which)).loss.item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    u=st.lists(st.floats(-90, 90), min_size=4, max_size=4), w=st.floats(0.5, 10), delta=st.floats(-2, 2), beta=st.floats(0.01, 0.5)
)
def test_bco_pulls_ups_up_and_pushes_downs_down_by_its_sigmoids(u: list[float], w: float, delta: float, beta: float) -> None:
    out = make("bco", delta=delta, beta=beta)(rows(u, [True, True, True, False], weight=[1.0, 1.0, 1.0, w]))
    r = beta * torch.tensor(u, dtype=torch.float64) - delta
    expected = torch.cat([-beta * torch.sigmoid(-r[:3]) / 3, beta * w * torch.sigmoid(r[3:])])
    torch.testing.assert_close(out.dlogp, expected, rtol=1e-6, atol=1e-12)


def test_self_normalised_means_divide_by_the_sum_of_the_weights() -> None:
    u, label, w = [1.0, -0.5, 2.0], [True, False, False], [1.0, 4.0, 0.5]
    item = make("bco", delta=0.05)(rows(u, label)).per_item.detach()
    plain = make("bco", delta=0.05)(rows(u, label, weight=w)).loss
    assert plain.item() == pytest.approx(float(item[0] + (4 * item[1] + 0.5 * item[2]) / 2))
    ours = make("bco", delta=0.05, self_normalised=True)(rows(u, label, weight=w)).loss
    assert ours.item() == pytest.approx(float(item[0] + (4 * item[1] + 0.5 * item[2]) / 4.5))
    all_rows = make("bco", delta=0.05, self_normalised=True, reduction="sample_mean")(rows(u, label, weight=w)).loss
    assert all_rows.item() == pytest.approx(float((item[0] + 4 * item[1] + 0.5 * item[2]) / 5.5))


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.01, 20), down_weight=st.floats(0, 3))
def test_self_normalised_means_do_not_depend_on_the_scale_of_the_weights(scale: float, down_weight: float) -> None:
    u, label = [1.0, -0.5, 2.0], [True, False, False]
    objective = make("bco", delta="batch", self_normalised=True, down_weight=down_weight)
    one, other = (objective(rows(u, label, weight=[1.0, 0.7 * c, 1.9 * c])) for c in (1.0, scale))
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.dlogp, other.dlogp)


def test_self_normalised_means_have_a_right_gradient_and_bear_weights_of_zero() -> None:
    label, ref = [True, False, False], [-9.0, -9.0, -9.0]

    def loss(logp: torch.Tensor) -> torch.Tensor:
        batch = SequenceStats(logp, torch.ones(3), torch.tensor(ref).double(), role=label, weight=torch.tensor([1.0, 0.3, 2.0]))
        found: torch.Tensor = make("bco", delta=0.1, self_normalised=True)(batch).loss
        return found

    assert torch.autograd.gradcheck(loss, torch.tensor([-8.0, -12.0, -5.0], dtype=torch.float64, requires_grad=True))
    nothing = make("bco", delta=0.0, self_normalised=True)(rows([1.0, -0.5], [True, False], weight=[1.0, 0.0]))
    assert nothing.loss.item() == pytest.approx(-float(logsigmoid(torch.tensor(0.1)))) and nothing.dlogp[1] == 0
    with pytest.raises(InputError, match=r"weight: a density ratio is not negative, got -0\.5"):
        make("bco")(rows([1.0, -0.5], [True, False], weight=[1.0, -0.5]))


def test_the_shift_is_saved_and_frozen_outside_training() -> None:
    first = make("bco", beta=1)
    first(rows([1.0, 0.0], [True, False]))
    first.training = False
    assert first(rows([9.0, 3.0], [True, False])).metrics["bco/delta"] == pytest.approx(0.5)
    second = make("bco", beta=1)
    second.load_state_dict(first.state_dict())
    assert second(rows([3.0, 0.0], [True, False])).metrics["bco/delta"] == pytest.approx(0.9 * 0.5 + 0.1 * 1.5)
    with pytest.raises(InputError, match="state must hold"):
        second.load_state_dict({"delta": 1})


def _rank(rank: int, folder: str, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    r = [([4.0, 0.0, 1.0], [True, False, True]), ([-2.0, 2.0], [False, False])][rank]
    found = [make("bco", beta=1, delta=kind)(rows(*r)).metrics["bco/delta"] for kind in ("batch", "cumulative")]
    queue.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_use_the_shift_of_their_union(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(k, str(tmp_path), queue)) for k in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get() for _ in workers)
    for worker in workers:
        worker.join(30)
    union = ([4.0, 0.0, 1.0, -2.0, 2.0], [True, False, True, False, False])
    expected = [deltas("batch", [union])[0], deltas("cumulative", [union])[0]]
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(expected)


def test_kto_takes_its_zero_point_from_mismatched_pairs() -> None:
    def run(mismatched: list[float]) -> LossOutput:
        out: LossOutput = make("kto")(rows([1.0, -0.5], [True, False], extra={"mismatched_ratio": mismatched}))
        return out

    found = run([0.5, 0.1])
    assert found.metrics["kl"] == pytest.approx(0.3)
    torch.testing.assert_close(found.loss, make("kto", z0=0.3)(rows([1.0, -0.5], [True, False])).loss)
    assert run([-5.0, 1.0]).metrics["kl"] == 0
    weighted = make("kto", z0=0.3, desirable_weight=2, undesirable_weight=3)(rows([1.0, -0.5], [True, False])).per_item
    torch.testing.assert_close(weighted, make("kto", z0=0.3)(rows([1.0, -0.5], [True, False])).per_item * torch.tensor([2.0, 3.0]))
    with pytest.raises(InputError, match="wanted"):
        make("kto", z0=0)(stats([-1.0], ref_logp=[-1.0], role=[0]))


REWARDS: dict[str, Any] = {"reward": [1.0, 0.0, 0.0, 1.0], "group": [0] * 4}
LOGP, LENGTH = [-4.0, -6.0, -9.0, -2.0], [2, 3, 3, 1]


def test_advantages_of_a_group() -> None:
    out = make("rloo")(stats(LOGP, LENGTH, **REWARDS))
    assert (-4 * out.dlogp).tolist() == pytest.approx([0.666667, -0.666667, -0.666667, 0.666667], abs=1e-6)
    out = make("gspo")(stats(LOGP, LENGTH, **REWARDS))
    sign = np.array([1, -1, -1, 1])
    assert (-4 * out.dlogp).tolist() == pytest.approx(list(0.865875 * sign / LENGTH), abs=1e-6)
    out = make("grpo")(stats(LOGP, LENGTH, **REWARDS))
    assert (-4 * out.dlogp).tolist() == pytest.approx(list(0.865875 * sign / LENGTH), abs=1e-6)
    assert out.per_item.tolist() == pytest.approx(list(-0.865875 * sign), abs=1e-6)


def test_a_group_of_one_has_no_advantage() -> None:
    for name in ("rloo", "grpo", "gspo"):
        out = make(name)(stats([-4.0, -2.0], reward=[3.0, 1.0], group=[0, 1]))
        assert out.loss.item() == 0 and out.dlogp.tolist() == [0, 0]


def test_reinforce_takes_the_reward_as_advantage() -> None:
    out = make("reinforce")(stats(LOGP, LENGTH, reward=[1.0, -2.0, 0.0, 3.0]))
    assert out.per_item.tolist() == pytest.approx([4, -12, 0, 6])
    assert (-4 * out.dlogp).tolist() == pytest.approx([1, -2, 0, 3])


def tokens(change: float = 0.0, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token columns of four sequences, and their sums."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(3) < torch.tensor(LENGTH)[:, None]
    logp = -0.1 - torch.rand(4, 3, generator=g, dtype=torch.float64)
    old = logp + change * torch.randn(4, 3, generator=g, dtype=torch.float64)
    ref = logp + 0.3 * torch.randn(4, 3, generator=g, dtype=torch.float64)
    return {"token_logp": logp, "token_mask": mask, "old_token_logp": old, "ref_token_logp": ref}, torch.where(mask, logp, 0.0).sum(1)


@pytest.mark.parametrize(
    ("aggregation", "divisor"), [("grpo", [2, 3, 3, 1]), ("bnpo", [9 / 4] * 4), ("dapo", [9 / 4] * 4), ("dr-grpo", [7.0] * 4)]
)
def test_aggregations_of_grpo_differ_in_what_a_sequence_is_divided_by(aggregation: str, divisor: list[float]) -> None:
    chosen = {"aggregation": aggregation, "max_length": 7}
    sums = make("grpo", **chosen)(stats(LOGP, LENGTH, **REWARDS))
    assert (-4 * sums.dlogp).tolist() == pytest.approx(list(0.865875 * np.array([1, -1, -1, 1]) / divisor), abs=1e-6)
    columns, s = tokens()
    out = make("grpo", **chosen)(stats(s.tolist(), LENGTH, **REWARDS, extra=columns))
    torch.testing.assert_close(out.loss, sums.loss)
    assert out.dtokens is not None
    torch.testing.assert_close(out.dtokens, torch.where(columns["token_mask"], sums.dlogp[:, None], 0.0))


def test_the_clipped_loss_of_old_samples_is_its_formula() -> None:
    columns, s = tokens(change=0.3)
    out = make("grpo", beta_kl=0.04)(stats(s.tolist(), LENGTH, **REWARDS, extra=columns))
    expected = []
    for i, advantage in enumerate([0.865875, -0.865875, -0.865875, 0.865875]):
        losses = []
        for t in range(LENGTH[i]):
            new, old, ref = (float(columns[k][i, t]) for k in ("token_logp", "old_token_logp", "ref_token_logp"))
            rho = math.exp(new - old)
            losses.append(-min(rho * advantage, min(max(rho, 0.8), 1.2) * advantage) + 0.04 * (math.exp(ref - new) - (ref - new) - 1))
        expected.append(sum(losses) / len(losses))
    assert out.per_item.tolist() == pytest.approx(expected, abs=1e-5)
    assert 0 < out.metrics["clip_ratio"] < 1

    def loss(token_logp: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = make("grpo", beta_kl=0.04)(stats(s.tolist(), LENGTH, **REWARDS, extra={**columns, "token_logp": token_logp})).loss
        return found

    assert torch.autograd.gradcheck(loss, columns["token_logp"].clone().requires_grad_(True))


def test_gspo_cuts_whole_sequences() -> None:
    old = [x - d * n for x, d, n in zip(LOGP, (0.5, 0.5, 0.01, 0.01), LENGTH, strict=True)]
    out = make("gspo", epsilon=0.2)(stats(LOGP, LENGTH, **REWARDS, extra={"old_logp": old}))
    rho, advantage = math.exp(0.5), 0.865875
    assert out.per_item.tolist() == pytest.approx([-1.2 * advantage, rho * advantage, math.exp(0.01) * advantage, -math.exp(0.01) * advantage], abs=1e-5)
    assert float(out.dlogp[0]) == 0 and float(out.dlogp[1]) > 0
    assert out.metrics["clip_ratio"] == 0.25


def test_what_grpo_cannot_do_with_sums_is_refused() -> None:
    with pytest.raises(InputError, match="token_logp"):
        make("grpo")(stats(LOGP, LENGTH, **REWARDS, extra={"old_logp": LOGP}))
    with pytest.raises(InputError, match="ref_token_logp"):
        make("grpo", beta_kl=0.1)(stats(LOGP, LENGTH, **REWARDS))
    with pytest.raises((InputError, ConfigError), match="max_length"):
        make("grpo", aggregation="dr-grpo")
