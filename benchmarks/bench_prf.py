"""prf, words of given tokens: the backend in use against the reference in torch, and against copying the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import prf, use_backend

BATCH, TOKENS, KEY = 8, 32_000, 99


@functools.lru_cache(maxsize=1)
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TOKENS, (BATCH, TOKENS), generator=generator)
    return torch.randint(0, TOKENS, (BATCH, 4), generator=generator), tokens


def ours(function: str) -> Callable[[], Any]:
    context, tokens = inputs()
    return lambda: prf(context, tokens, key=KEY, function=function)


def reference(function: str) -> Callable[[], Any]:
    context, tokens = inputs()

    def call() -> Any:
        with use_backend("reference"):
            return prf(context, tokens, key=KEY, function=function)

    return call


def copy() -> Callable[[], Any]:
    _, tokens = inputs()
    out = torch.empty_like(tokens)
    return lambda: out.copy_(tokens)


def check(function: str) -> None:
    if not torch.equal(ours(function)(), reference(function)()):
        raise AssertionError("the backend in use and the reference disagree")


def rows() -> Iterator[Row]:
    for function, at_least in (("mix32", 10), ("philox", 10)):
        yield Row(
            operation=f"prf {function}",
            shape=f"{BATCH}x{TOKENS} after 4",
            dtype="int64",
            ours=functools.partial(ours, function),
            peers={"reference": functools.partial(reference, function)},
            baseline="reference",
            at_least=at_least,
            floor=copy,
            check=functools.partial(check, function),
        )
