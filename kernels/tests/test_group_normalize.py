"""group_normalize: known advantages, what they are invariant to, NaN policies, groups of one and of equals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import group_normalize, native, use_backend

BACKENDS = [
    "reference",
    pytest.param("c", marks=pytest.mark.skipif(native.why_absent() is not None, reason="no C library")),
]
REWARDS = torch.tensor([1.0, 2, 3, 6, 5, 5, 5, 5])
CUTS = torch.tensor([0, 4, 8])
KNOWN = {
    "grpo": [-0.9258, -0.4629, 0, 1.3887],
    "dr-grpo": [-2, -1, 0, 3],
    "rloo": [-2.6667, -1.3333, 0, 4],
    "batch": [x / ((22 / 7) ** 0.5 + 1e-4) for x in (-2, -1, 0, 3)],  # all eight have variance 22 / 7
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KNOWN)
def test_known_advantages_and_exactly_zero_for_equal_rewards(backend: str, kind: str) -> None:
    with use_backend(backend):
        found = group_normalize(REWARDS, CUTS, kind)
    torch.testing.assert_close(found[:4], torch.tensor(KNOWN[kind], dtype=torch.float32), rtol=0, atol=1e-4)
    assert found[4:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_quantiles(backend: str) -> None:
    rewards, cuts = torch.tensor([0.1, 0.4, 0.4, 0.9, 7.0]), torch.tensor([0, 4, 5])
    with use_backend(backend):
        assert group_normalize(rewards, cuts, "quantile").tolist() == [0.25, 0.75, 0.75, 1, 1]
        assert group_normalize(rewards, cuts, "midrank").tolist() == [0.125, 0.5, 0.5, 0.875, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "batch", "rloo"])
def test_equal_rewards_whose_float_mean_differs_from_them_get_exactly_zero(backend: str, kind: str) -> None:
    with use_backend(backend):
        for value in (0.1, 0.3, 1e-3, 123.456):
            assert not group_normalize(torch.full((7,), value), torch.tensor([0, 7]), kind).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_one_gets_zero_with_a_warning(backend: str) -> None:
    with use_backend(backend), pytest.warns(UserWarning, match="1 of 2 groups have one reward"):
        found = group_normalize(torch.tensor([9.0, 1.0, 2.0]), torch.tensor([0, 1, 3]), "grpo")
    assert found[0] == 0 and found[1] < 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*KNOWN, "quantile", "midrank"])
def test_dropped_rewards_leave_the_others_as_if_they_had_not_been_there(backend: str, kind: str) -> None:
    with use_backend(backend):
        holed = torch.tensor([1.0, math.nan, 2, 3, 6, 5, 5, math.nan, 5, 5])
        found = group_normalize(holed, torch.tensor([0, 5, 10]), kind, nan="drop")
        kept = ~holed.isnan()
        assert torch.equal(found[kept], group_normalize(REWARDS, CUTS, kind)) and not found[~kept].any()
        zeroed = group_normalize(holed, torch.tensor([0, 5, 10]), kind, nan="zero")
        assert torch.equal(zeroed, group_normalize(holed.nan_to_num(0.0), torch.tensor([0, 5, 10]), kind))
        nothing = group_normalize(torch.full((3,), math.nan), torch.tensor([0, 3]), kind, nan="drop")
        assert nothing.tolist() == [0, 0, 0]


@given(
    sizes=st.lists(st.integers(2, 7), min_size=1, max_size=6),
    kind=st.sampled_from(["grpo", "dr-grpo", "rloo", "batch", "quantile", "midrank"]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_backends_agree_and_invariances_hold(sizes: list[int], kind: str, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(-8, 9, (sum(sizes),), generator=generator).to(dtype) / 4
    cuts = torch.tensor([0, *sizes]).cumsum(0)
    found = group_normalize(rewards, cuts, kind)
    with use_backend("reference"):
        torch.testing.assert_close(found, group_normalize(rewards, cuts, kind))
    shift = torch.randint(-4, 5, (len(sizes),), generator=generator).repeat_interleave(torch.tensor(sizes)).to(dtype)
    if kind != "batch":
        torch.testing.assert_close(found, group_normalize(rewards + shift, cuts, kind))
    if kind == "grpo":
        exact = group_normalize(rewards.double(), cuts, kind, eps=0.0)
        torch.testing.assert_close(exact, group_normalize(rewards.double() * 4, cuts, kind, eps=0.0))
        for part, row in zip(rewards.split(sizes), exact.split(sizes), strict=True):
            if part.max() > part.min():
                torch.testing.assert_close(row.std(), torch.ones((), dtype=torch.float64))
    for part, row in zip(rewards.double().split(sizes), found.split(sizes), strict=True):
        if kind in ("grpo", "dr-grpo", "rloo", "batch"):
            assert abs(float(row.sum())) < 1e-4
        if kind == "rloo":
            others = (part.sum() - part) / (len(part) - 1)
            torch.testing.assert_close(row.double(), part - others, rtol=1e-5, atol=1e-5)
        if kind == "quantile":
            right = (part[None, :] <= part[:, None]).double().mean(1)
            torch.testing.assert_close(row.double(), right, rtol=1e-6, atol=1e-6)


def test_the_quantile_of_a_sample_in_its_own_set_has_the_mean_it_must_have() -> None:
    rewards = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    found = group_normalize(rewards, torch.arange(0, 5001, 5), "quantile")
    assert float(found.mean()) == pytest.approx(6 / 10, abs=1e-6)


def test_advantages_are_constants() -> None:
    assert not group_normalize(REWARDS.clone().requires_grad_(), CUTS, "grpo").requires_grad


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_normalize(REWARDS, CUTS, "grpo")
        group_normalize(torch.tensor([1.0]), torch.tensor([0, 1]), "quantile")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rewards_N": torch.tensor([1.0, math.nan])}, "1 of 2 are NaN"),
        ({"rewards_N": torch.tensor([1.0, math.inf])}, "finite"),
        ({"offsets": torch.tensor([0, 0, 2])}, "every group needs a member"),
        ({"kind": "ppo"}, "one of grpo"),
        ({"eps": -1.0}, "eps"),
        ({"nan": "ignore"}, "one of raise"),
        ({"rewards_N": torch.tensor([1, 2])}, "floating"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict[str, Any], text: str) -> None:
    given_: dict[str, Any] = {"rewards_N": torch.tensor([1.0, 2.0]), "offsets": torch.tensor([0, 2])}
    with pytest.raises((ValueError, TypeError), match=text):
        group_normalize(**{**given_, **change})
