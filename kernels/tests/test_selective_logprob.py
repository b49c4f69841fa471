"""selective_logprob: equal to log_softmax and gather, its gradient onehot - softmax, and what it does with -inf."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import native, selective_logprob, use_backend

BACKENDS = [
    "reference",
    pytest.param("c", marks=pytest.mark.skipif(native.why_absent() is not None, reason="no C library")),
]


def dense(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 5000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    scale=st.sampled_from([0.1, 5.0, 200.0]),
    seed=st.integers(0, 99),
)
def test_it_is_gather_of_log_softmax(
    backend: str, rows: int, vocabulary: int, temperature: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    with use_backend(backend):
        found = selective_logprob(logits, ids, temperature)
    right = dense(logits.double(), ids, temperature).float()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_onehot_minus_softmax(backend: str) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, weight = torch.tensor([0, 4999, 7, 7]), torch.tensor([1.0, -2.0, 0.5, 0.0])
    with use_backend(backend):
        (slope,) = torch.autograd.grad(selective_logprob(logits, ids, 0.5), logits, weight)
    onehot = torch.nn.functional.one_hot(ids, 5000).float()
    right = weight[:, None] * (onehot - (logits.detach() / 0.5).softmax(-1)) / 0.5
    torch.testing.assert_close(slope, right, rtol=1e-5, atol=1e-6)
    assert float(slope.sum(1).abs().max()) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits_and_a_vocabulary_of_one(backend: str) -> None:
    lone = torch.full((1, 9000), -math.inf)
    lone[0, 8000] = -3.0
    with use_backend(backend):
        assert selective_logprob(lone, torch.tensor([8000])).tolist() == [0]
        assert selective_logprob(lone, torch.tensor([5])).tolist() == [-math.inf]
        assert selective_logprob(torch.tensor([[7.0]]), torch.tensor([0])).tolist() == [0]
        unknown = torch.zeros(2, 9000)
        unknown[1, 3] = math.nan
        assert selective_logprob(unknown, torch.tensor([0, 0])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_a_row_changes_nothing(backend: str) -> None:
    logits, ids = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    with use_backend(backend):
        moved = selective_logprob(logits + torch.tensor([[-50.0], [0.0], [80.0]]), ids)
        torch.testing.assert_close(moved, selective_logprob(logits, ids), rtol=1e-5, atol=5e-5)


def test_leading_dimensions_are_kept() -> None:
    logits, ids = torch.randn(2, 3, 11), torch.randint(0, 11, (2, 3))
    torch.testing.assert_close(selective_logprob(logits, ids), dense(logits, ids))
    assert selective_logprob(logits[:, :0], ids[:, :0]).shape == (2, 0)


@pytest.mark.parametrize(
    ("ids", "temperature", "text"),
    [
        (torch.tensor([0, 11]), 1.0, r"ids in \[0, 11\) are needed, not 11"),
        (torch.tensor([-1, 0]), 1.0, "not -1"),
        (torch.tensor([0.0, 1.0]), 1.0, "ids_N"),
        (torch.tensor([0]), 1.0, "ids_N"),
        (torch.tensor([0, 1]), 0.0, "temperature"),
        (torch.tensor([0, 1]), math.nan, "temperature"),
    ],
)
def test_wrong_input_is_refused_in_one_line(ids: torch.Tensor, temperature: float, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        selective_logprob(torch.zeros(2, 11), ids, temperature)
