"""fisher_diag_linear, norms and sketches of per-sample gradients against making each gradient: vmap(grad), and a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import fisher_diag_linear, grad_norm_linear, kron_sketch

BATCH = 32


@functools.lru_cache(maxsize=4)
def inputs(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, tokens, width)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def ours(function: Callable[..., Any], tokens: int, width: int) -> Callable[[], Any]:
    activations, grads = inputs(tokens, width)
    return lambda: function(activations, grads)


def loss(weight: torch.Tensor, a_TI: torch.Tensor, g_TO: torch.Tensor) -> torch.Tensor:
    """Its gradient at the layer's outputs is g."""
    return (torch.nn.functional.linear(a_TI, weight) * g_TO).sum()


def each_gradient(finish: Callable[[torch.Tensor], Any], tokens: int, width: int) -> Callable[[], Any]:
    activations, grads = inputs(tokens, width)
    weight, every = torch.zeros(width, width), torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: finish(every(weight, activations, grads))


def one_by_one(tokens: int, width: int) -> Callable[[], Any]:
    activations, grads = inputs(tokens, width)
    weight = torch.zeros(width, width, requires_grad=True)

    def call() -> torch.Tensor:
        total = torch.zeros(width, width)
        for a_TI, g_TO in zip(activations, grads, strict=True):
            total += torch.autograd.grad(loss(weight, a_TI, g_TO), weight)[0].square()
        return total

    return call


def batch_gradient(tokens: int, width: int) -> Callable[[], Any]:
    activations, grads = inputs(tokens, width)
    return lambda: grads.flatten(0, 1).T @ activations.flatten(0, 1)


def squared(gradients: torch.Tensor) -> torch.Tensor:
    return gradients.square().sum(0)


def norms(gradients: torch.Tensor) -> torch.Tensor:
    return gradients.flatten(1).norm(dim=1)


def sketch(activations: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    return kron_sketch(activations, grads, seed=1)


def agree(function: Callable[..., Any], finish: Callable[[torch.Tensor], Any], tokens: int, width: int) -> None:
    found, right = ours(function, tokens, width)(), each_gradient(finish, tokens, width)()
    if float((found - right).abs().max() / right.abs().max()) > 1e-5:
        raise AssertionError("per-sample gradients say otherwise")


def close_on_average(tokens: int, width: int) -> None:
    """A sketch keeps squared norms: exactly in expectation over seeds, here within a fifth on average over samples."""
    found, right = ours(sketch, tokens, width)().norm(dim=1), each_gradient(norms, tokens, width)()
    if abs(float(found.square().mean() / right.square().mean()) - 1) > 0.2:
        raise AssertionError("the sketch's norms are not those of the gradients")


def rows() -> Iterator[Row]:
    cases = (
        ("fisher_diag_linear", fisher_diag_linear, squared, 64, 512, 2.3),
        ("fisher_diag_linear", fisher_diag_linear, squared, 1, 512, 15.0),
        ("fisher_diag_linear", fisher_diag_linear, squared, 64, 256, 1.2),
        ("grad_norm_linear", grad_norm_linear, norms, 64, 512, 2.3),
    )
    for name, function, finish, tokens, width, at_least in cases:
        peers = {"vmap(grad)": functools.partial(each_gradient, finish, tokens, width)}
        if finish is squared:
            peers["one by one"] = functools.partial(one_by_one, tokens, width)
        yield Row(
            operation=name,
            shape=f"{BATCH} x {tokens} x {width} x {width}",
            dtype="float32",
            ours=functools.partial(ours, function, tokens, width),
            peers=peers,
            baseline="vmap(grad)",
            at_least=at_least,
            floor=functools.partial(batch_gradient, tokens, width),
            check=functools.partial(agree, function, finish, tokens, width),
        )
    yield Row(
        operation="kron_sketch 32x32",
        shape=f"{BATCH} x 64 x 512 x 512",
        dtype="float32",
        ours=functools.partial(ours, sketch, 64, 512),
        peers={"vmap(grad)": functools.partial(each_gradient, norms, 64, 512)},
        baseline="vmap(grad)",
        at_least=4.0,
        check=functools.partial(close_on_average, 64, 512),
    )
