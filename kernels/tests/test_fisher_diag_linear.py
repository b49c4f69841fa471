"""fisher_diag_linear against autograd: known values, padded and packed, one token, bias, and the quantities it is not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import fisher_diag_linear, token_fisher_diag_linear, use_backend

A = torch.tensor([[[1.0, 2], [0, 1]]])
G = torch.tensor([[[1.0, -1], [2, 1]]])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_known_values_of_the_sequence_and_of_the_token_fisher(backend: str) -> None:
    with use_backend(backend):
        assert fisher_diag_linear(A, G).tolist() == [[1, 16], [1, 1]]
        assert token_fisher_diag_linear(A, G).tolist() == [[1, 8], [1, 5]]
    weight, bias = fisher_diag_linear(A, G, bias=True)
    assert weight.tolist() == [[1, 16], [1, 1]] and bias.tolist() == [9, 0]


def autograd_squares(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """A net of two linear layers over sequences; per sample one backward pass, squared and summed."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    width = max(lengths)
    inputs = torch.randn(len(lengths), width, 5)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    squares = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row, length in zip(inputs, lengths, strict=True):
        net.zero_grad()
        net(row[:length]).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            squares[name] += parameter.grad.square()
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        net[i].register_forward_hook(lambda _, x, y, i=i: seen.update({f"a{i}": x[0], f"y{i}": y})) for i in (0, 2)
    ]
    loss = (net(inputs).square().sum(-1) * mask).sum()
    grads = torch.autograd.grad(loss, [seen["y0"], seen["y2"]])
    for hook in hooks:
        hook.remove()
    layers = {"0": (seen["a0"].detach(), grads[0]), "2": (seen["a2"].detach(), grads[1])}
    return {"squares": squares, "layers": layers, "mask": mask, "lengths": lengths}


@pytest.mark.parametrize("layer", ["0", "2"])
def test_it_is_the_sum_of_squared_gradients_of_autograd_padded_and_packed(layer: str) -> None:
    truth = autograd_squares([4, 1, 6, 3])
    activations, grads = truth["layers"][layer]
    mask, expected = truth["mask"], truth["squares"]
    assert not grads[~mask].any()  # padding gets no gradient by itself
    cuts = torch.tensor([0, *truth["lengths"]]).cumsum(0)
    padded = fisher_diag_linear(activations, grads, mask, bias=True)
    packed = fisher_diag_linear(activations[mask], grads[mask], cu_seqlens=cuts.int(), bias=True)
    for found in (padded, packed):
        torch.testing.assert_close(found[0], expected[f"{layer}.weight"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[f"{layer}.bias"], rtol=1e-5, atol=1e-6)


def test_it_is_vmap_of_grad_squared() -> None:
    activations, grads = torch.randn(6, 9, 20), torch.randn(6, 9, 11)

    def loss(weight: torch.Tensor, a_TI: torch.Tensor, g_TO: torch.Tensor) -> torch.Tensor:
        return ((a_TI @ weight.T) * g_TO).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(torch.zeros(11, 20), activations, grads)
    torch.testing.assert_close(fisher_diag_linear(activations, grads), each.square().sum(0), rtol=1e-5, atol=1e-5)


def test_one_row_per_sample_is_one_product_and_one_sample_is_the_gradient_squared() -> None:
    activations, grads = torch.randn(6, 20), torch.randn(6, 11)
    right = grads.square().T @ activations.square()
    torch.testing.assert_close(fisher_diag_linear(activations, grads), right)
    torch.testing.assert_close(fisher_diag_linear(activations[:, None], grads[:, None]), right)
    torch.testing.assert_close(token_fisher_diag_linear(activations[None], grads[None]), right)
    torch.testing.assert_close(fisher_diag_linear(activations[None], grads[None]), (grads.T @ activations).square())


def test_the_token_fisher_and_the_squared_batch_gradient_are_other_quantities() -> None:
    torch.manual_seed(0)
    activations, grads = torch.randn(8, 16, 12) + 0.5, torch.randn(8, 16, 10)
    right = fisher_diag_linear(activations, grads)

    def gap(other: torch.Tensor) -> float:
        return float((other - right).norm() / right.norm())

    assert gap(token_fisher_diag_linear(activations, grads)) > 0.1
    assert gap(torch.einsum("bto,bti->oi", grads, activations).square()) > 0.1


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_order_scale_and_layout(lengths: list[int], inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    a = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    g = torch.randn(count, outputs, generator=generator, dtype=torch.float64)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    found = fisher_diag_linear(a, g, cu_seqlens=cuts)
    assert found.dtype == torch.float64
    backwards = [list(range(x, y)) for x, y in pairwise(cuts.tolist())][::-1]
    order = torch.tensor([i for part in backwards for i in part], dtype=torch.int64)
    mirrored = torch.tensor([0, *lengths[::-1]]).cumsum(0)
    torch.testing.assert_close(fisher_diag_linear(a[order], g[order], cu_seqlens=mirrored), found)
    torch.testing.assert_close(fisher_diag_linear(a, 3 * g, cu_seqlens=cuts), 9 * found)
    pieces = [torch.zeros(outputs, inputs, dtype=torch.float64)]
    pieces += [(g[x:y].T @ a[x:y]).square() for x, y in pairwise(cuts.tolist())]
    torch.testing.assert_close(found, torch.stack(pieces).sum(0))


def test_blocks_of_outputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairlead_kernels.ops.fisher_diag_linear import tiled

    activations, grads = torch.randn(3, 4, 10), torch.randn(3, 4, 7)
    right = fisher_diag_linear(activations, grads)
    monkeypatch.setattr(tiled, "ELEMENTS", 20)
    torch.testing.assert_close(fisher_diag_linear(activations, grads), right)


@pytest.mark.parametrize(
    ("args", "settings", "text"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 2, 4)), {}, "output_grads_BTO"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4).double()), {}, "dtype and device"),
        ((torch.ones(3), torch.ones(3)), {}, "activations_BTI"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 2).bool()), {}, "mask_BT"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3)), {}, "mask_BT"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4)), {"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ((torch.ones(5, 4), torch.ones(5, 4)), {"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "never fall"),
        ((torch.ones(5, 4), torch.ones(5, 4)), {"cu_seqlens": torch.tensor([0, 3])}, "from 0 to 5"),
    ],
)
def test_wrong_input_is_refused_in_one_line(args: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        fisher_diag_linear(*args, **settings)
