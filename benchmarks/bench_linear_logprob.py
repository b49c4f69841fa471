"""linear_logprob, forward and backward, against a dense head: linear + log_softmax + gather."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import linear_logprob

TOKENS, WIDTH = 2048, 512


@functools.lru_cache(maxsize=1)
def inputs(vocabulary: int, frozen: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Made in place, so that what they leave behind does not hide the peak of a call."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(TOKENS, WIDTH).normal_(generator=generator).requires_grad_()
    weight = torch.empty(vocabulary, WIDTH).normal_(std=WIDTH**-0.5, generator=generator).requires_grad_(not frozen)
    return hidden, weight, torch.randint(0, vocabulary, (TOKENS,), generator=generator)


def dense_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def step(function: Callable[..., torch.Tensor], vocabulary: int, frozen: bool) -> Callable[[], Any]:
    hidden, weight, target = inputs(vocabulary, frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    return lambda: torch.autograd.grad(function(hidden, weight, target).sum(), leaves)


def check() -> None:
    for frozen in (False, True):
        found, right = step(linear_logprob, 5000, frozen)(), step(dense_logprob, 5000, frozen)()
        for x, y in zip(found, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def most_mib(vocabulary: int, frozen: bool) -> float:
    """32 MiB, four tiles of 32 MiB, and the head's gradient where it is trained."""
    gradient = 0 if frozen else vocabulary * WIDTH * 4 / 2**20
    return 32 + 4 * 32 + gradient


def rows() -> Iterator[Row]:
    for vocabulary in (32_000, 151_936):
        for head, at_least in (("trained", 1 / 1.35), ("frozen", 1 / 1.1)):
            yield Row(
                operation=f"linear_logprob {head}",
                shape=f"{TOKENS} x {WIDTH} x {vocabulary}",
                dtype="float32",
                ours=functools.partial(step, linear_logprob, vocabulary, head == "frozen"),
                peers={"dense": functools.partial(step, dense_logprob, vocabulary, head == "frozen")},
                baseline="dense",
                at_least=at_least,
                memory=True,
                most_mib=most_mib(vocabulary, head == "frozen"),
                check=check,
                peer_repeats=1,
            )
