"""Norms and inner products of per-sample gradients: known values, both paths, cancellation, and the Fisher's trace."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import fisher_diag_linear, grad_gram_linear, grad_norm_linear, use_backend
from fairlead_kernels.ops.grad_norm_linear.tiled import ghost, ghost_is_cheaper

A = torch.tensor([[[1.0, 2], [0, 1]]])
G = torch.tensor([[[1.0, -1], [2, 1]]])
BACKENDS = ["reference", "tiled"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["auto", "ghost", "direct"])
def test_known_norm(backend: str, method: str) -> None:
    with use_backend(backend):
        assert float(grad_norm_linear(A, G, method=method)) ** 2 == pytest.approx(19, rel=1e-6)
        assert float(grad_gram_linear(A, G)) == pytest.approx(19, rel=1e-6)
    assert float(grad_norm_linear(A, G, method=method, bias=True)) ** 2 == pytest.approx(28, rel=1e-6)
    assert float(grad_gram_linear(A, G, bias=True)) == pytest.approx(28, rel=1e-6)


def test_the_rule_counts_multiplications() -> None:
    assert ghost_is_cheaper(255, 512, 512) and not ghost_is_cheaper(256, 512, 512)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    method=st.sampled_from(["auto", "ghost", "direct"]),
    seed=st.integers(0, 99),
)
def test_norms_and_products_are_those_of_the_gradients(
    lengths: list[int], inputs: int, outputs: int, method: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(lengths), inputs, generator=generator)
    g = torch.randn(sum(lengths), outputs, generator=generator)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    each = [(g[x:y].double().T @ a[x:y].double()).flatten() for x, y in pairwise(cuts.tolist())]
    gradients = torch.stack(each)
    norms = grad_norm_linear(a, g, cu_seqlens=cuts, method=method)
    torch.testing.assert_close(norms, gradients.norm(dim=1).float(), rtol=2e-4, atol=1e-4)
    gram = grad_gram_linear(a, g, cu_seqlens=cuts)
    torch.testing.assert_close(gram, (gradients @ gradients.T).float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram.double()).min()) > -1e-3
    torch.testing.assert_close(grad_norm_linear(a, -3 * g, cu_seqlens=cuts), 3 * norms, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(gram.diagonal().clamp(min=0).sqrt(), norms, rtol=1e-3, atol=2e-2)


def test_the_trace_of_the_fisher_is_the_sum_of_squared_norms() -> None:
    activations, grads = torch.randn(5, 9, 12), torch.randn(5, 9, 10)
    mask = torch.rand(5, 9) > 0.3
    weight, bias = fisher_diag_linear(activations, grads, mask, bias=True)
    norms = grad_norm_linear(activations, grads, mask, bias=True)
    torch.testing.assert_close(weight.sum() + bias.sum(), norms.square().sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["auto", "ghost"])
def test_tokens_that_cancel_are_computed_directly(method: str) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(64), torch.randn(64)
    activations = torch.stack([a, a + 1e-4 * torch.randn(64)])[None]
    grads = torch.stack([g, -g])[None]
    right = float((grads[0].double().T @ activations[0].double()).norm())
    square, size = ghost(activations[0], grads[0])
    assert square < 1e-6 * size  # nothing of it is left in float32
    assert float(grad_norm_linear(activations, grads, method=method)) == pytest.approx(right, rel=1e-3)
    assert float(grad_norm_linear(activations[:, :1].repeat(1, 2, 1), grads, method=method)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    activations, grads = torch.randn(3, 40, 64).to(dtype), torch.randn(3, 40, 32).to(dtype)
    right = torch.einsum("bto,bti->boi", grads.double(), activations.double()).flatten(1).norm(dim=1)
    for method in ("ghost", "direct"):
        found = grad_norm_linear(activations, grads, method=method)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method: one of auto, ghost, direct"):
        grad_norm_linear(A, G, method="fast")
