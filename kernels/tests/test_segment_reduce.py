"""segment_reduce: the oracles, empty segments, NaN, gradients, and that the same call gives the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import native, segment_reduce, use_backend

BACKENDS = [
    "reference",
    pytest.param("c", marks=pytest.mark.skipif(native.why_absent() is not None, reason="no C library")),
]
CUTS = torch.tensor([0, 3, 5, 9])
VALUES = torch.tensor([1.0, 2, 3, 10, 20, -1, -2, -3, -4])
KNOWN = {"sum": [6, 30, -10], "mean": [2, 15, -2.5], "last": [3, 20, -4], "argmax": [2, 4, 5], "max": [3, 20, -1]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", KNOWN)
def test_known_segments(backend: str, op: str) -> None:
    with use_backend(backend):
        assert segment_reduce(VALUES, CUTS, op).tolist() == KNOWN[op]
        twice = torch.stack([VALUES, VALUES], 1)
        assert segment_reduce(twice, CUTS.int(), op).T.tolist() == [KNOWN[op]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_is_that_of_each_slice(backend: str) -> None:
    with use_backend(backend):
        found = segment_reduce(VALUES * 40, CUTS, "logsumexp")
    right = torch.stack([part.logsumexp(0) for part in (VALUES * 40).split([3, 2, 4])])
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_segments_follow_their_rules(backend: str) -> None:
    cuts = torch.tensor([0, 0, 2, 2])
    expected = {"sum": 0.0, "max": -math.inf, "logsumexp": -math.inf, "argmax": -1, "mean": math.nan, "last": math.nan}
    with use_backend(backend):
        for op, value in expected.items():
            found = segment_reduce(torch.tensor([5.0, 5.0]), cuts, op)
            assert str(found[0].item()) == str(found[2].item()) == str(value)
        assert segment_reduce(torch.tensor([5.0, 5.0]), cuts, "mean", mean_of_empty=0.0).tolist() == [0, 5, 0]
        assert segment_reduce(torch.tensor([5.0, 5.0]), cuts, "argmax")[1] == 0  # the lowest on ties


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_through_but_never_wins(backend: str) -> None:
    values = torch.tensor([math.nan, 1.0, math.nan, -math.inf, -math.inf, 2.0, math.nan])
    cuts = torch.tensor([0, 2, 3, 5, 7])
    with use_backend(backend):
        assert segment_reduce(values, cuts, "argmax").tolist() == [1, -1, 3, 5]
        for op in ("sum", "mean", "max", "logsumexp"):
            found = segment_reduce(values, cuts, op)
            assert found.isnan().tolist() == [True, True, False, True] and found[2] == -math.inf


@pytest.mark.parametrize("op", ["sum", "mean", "max", "last", "logsumexp"])
def test_gradients_stay_finite_beside_empty_segments_and_masked_values(op: str) -> None:
    values = torch.tensor([1.0, 3.0, 3.0, -math.inf, -math.inf], requires_grad=True)
    cuts = torch.tensor([0, 0, 3, 3, 5])
    (slope,) = torch.autograd.grad(segment_reduce(values, cuts, op)[1], values)
    share = torch.tensor([1.0, 3.0, 3.0]).softmax(0).tolist()
    right = {"sum": [1, 1, 1], "mean": [1 / 3] * 3, "max": [0, 1, 0], "last": [0, 0, 1], "logsumexp": share}[op]
    torch.testing.assert_close(slope, torch.tensor([*right, 0, 0], dtype=torch.float32))


def test_a_segment_of_masked_values_has_no_gradient_of_its_logsumexp() -> None:
    values = torch.tensor([-math.inf, -math.inf, 1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(segment_reduce(values, torch.tensor([0, 2, 3]), "logsumexp").sum(), values)
    assert slope.tolist() == [0, 0, 1]


@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    width=st.integers(1, 4),
    op=st.sampled_from(["sum", "mean", "max", "argmax", "last", "logsumexp"]),
    seed=st.integers(0, 99),
)
def test_any_segments_equal_their_slices_reduced(lengths: list[int], width: int, op: str, seed: int) -> None:
    values = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    found = segment_reduce(values, cuts, op)
    assert torch.equal(found.nan_to_num(7), segment_reduce(values, cuts, op).nan_to_num(7))
    for i, part in enumerate(values.split(lengths)):
        if len(part) == 0:
            continue
        right = {
            "sum": part.sum(0),
            "mean": part.mean(0),
            "max": part.amax(0),
            "argmax": part.argmax(0) + cuts[i],
            "last": part[-1],
            "logsumexp": part.logsumexp(0),
        }[op]
        torch.testing.assert_close(found[i], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "cuts", "op", "text"),
    [
        (VALUES, [0, 3, 8], "sum", "from 0 to 9 is needed"),
        (VALUES, [1, 3, 9], "sum", "from 0 to 9 is needed"),
        (VALUES, [0, 5, 3, 9], "sum", "never fall"),
        (VALUES, [0, 9], "median", "one of sum, mean"),
        (VALUES, [0.0, 9.0], "sum", "integer edges"),
        (VALUES.int(), [0, 9], "sum", "floating"),
    ],
)
def test_wrong_input_is_refused_in_one_line(values: torch.Tensor, cuts: list[int], op: str, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        segment_reduce(values, torch.tensor(cuts), op)
