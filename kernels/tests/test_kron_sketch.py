"""kron_sketch: the projection of the gradient that it claims to be, unbiased, and the same wherever it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairlead_kernels import kron_sketch, prf, use_backend
from fairlead_kernels.ops.kron_sketch.reference import signs


def test_it_is_the_gradient_projected_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 20, generator=generator, dtype=torch.float64)
    g = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    left = signs(40, 11, 7, 2, 0, a)
    right = signs(3, 20, 7, 2, 1, a)
    expected = torch.einsum("ko,bto,bti,li->bkl", left, g, a, right).flatten(1) / 120**0.5
    found = kron_sketch(a, g, seed=7, layer=2, size=(40, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-13)
    dense = torch.kron(left, right) / 120**0.5  # on the row-major gradient
    gradients = torch.einsum("bto,bti->boi", g, a).flatten(1)
    torch.testing.assert_close(found, gradients @ dense.T, rtol=0, atol=2e-13)


def test_signs_are_the_bits_of_the_keyed_function() -> None:
    found = signs(70, 9, 5, 3, 1, torch.zeros(1))
    for row, column in ((0, 0), (31, 8), (32, 4), (69, 2)):
        word = int(prf(torch.tensor([[3, 1, row // 32]]), torch.tensor([[column]]), key=5, function="philox"))
        assert found[row, column] == (1 if (word >> row % 32) & 1 else -1)
    assert found.abs().eq(1).all()


def test_inner_products_are_unbiased_over_seeds() -> None:
    generator = torch.Generator().manual_seed(1)
    a, g = torch.randn(2, 6, 24, generator=generator), torch.randn(2, 6, 16, generator=generator)
    gradients = torch.einsum("bto,bti->boi", g, a).flatten(1)
    truth = gradients @ gradients.T
    products = torch.stack([(phi := kron_sketch(a, g, seed=seed, size=(8, 8))) @ phi.T for seed in range(200)])
    error = products.std(0) / 200**0.5
    assert bool(((products.mean(0) - truth).abs() < 3 * error).all())


def test_packed_masked_and_single_rows_give_the_same_sketch() -> None:
    torch.manual_seed(2)
    a, g, mask = torch.randn(3, 4, 10), torch.randn(3, 4, 6), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    settings: dict[str, Any] = {"seed": 9, "layer": 4, "size": (5, 7)}
    padded = kron_sketch(a, g, mask, **settings)
    kept = mask.bool()
    packed = kron_sketch(a[kept], g[kept], cu_seqlens=torch.tensor([0, 2, 2, 6]), **settings)
    torch.testing.assert_close(padded, packed)
    assert padded.shape == (3, 35) and not padded[1].any()
    rows = kron_sketch(a[0], g[0], **settings)
    torch.testing.assert_close(rows[:2].sum(0), padded[0])
    with use_backend("reference"):
        torch.testing.assert_close(kron_sketch(a, g, mask, **settings), padded)


def test_another_seed_or_layer_gives_another_sketch() -> None:
    a, g = torch.randn(1, 2, 10), torch.randn(1, 2, 6)
    first = kron_sketch(a, g, seed=1)
    assert torch.equal(first, kron_sketch(a, g, seed=1))
    assert not torch.equal(first, kron_sketch(a, g, seed=2))
    assert not torch.equal(first, kron_sketch(a, g, seed=1, layer=1))
    assert not torch.equal(first, kron_sketch(a, g, seed=1 + 2**63))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seed": -1}, "seed: an integer in"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1, "layer": -1}, "layer: an integer in"),
        ({"seed": 1, "size": (0, 3)}, "size: an integer in"),
        ({"seed": 1, "size": 32}, "size: two integers"),
    ],
)
def test_wrong_input_is_refused_in_one_line(settings: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        kron_sketch(torch.ones(1, 2, 3), torch.ones(1, 2, 3), **settings)
