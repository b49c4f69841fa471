"""gumbel_sample against torch's softmax + multinomial, and against a plain argmax over the same logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import gumbel_sample, use_backend


@functools.lru_cache(maxsize=2)
def inputs(batch: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(batch, vocabulary, generator=generator) * 2).to(dtype)
    return logits, torch.randint(0, vocabulary, (batch, 4), generator=generator)


def ours(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, context = inputs(batch, vocabulary, dtype)
    return lambda: gumbel_sample(logits, context, key=99, temperature=0.9)


def multinomial(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)
    return lambda: torch.multinomial((logits / 0.9).softmax(-1), 1)


def argmax(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)
    return lambda: logits.argmax(-1)


def check(batch: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, context = inputs(batch, vocabulary, dtype)
    found = gumbel_sample(logits[:4], context[:4], key=99, temperature=0.9)
    with use_backend("reference"):
        right = gumbel_sample(logits[:4], context[:4], key=99, temperature=0.9)
    if not torch.equal(found, right):
        raise AssertionError(f"gumbel_sample drew {found.tolist()}, the reference {right.tolist()}")


def rows() -> Iterator[Row]:
    for batch, vocabulary, multinomial_ratio, argmax_ratio in ((64, 151_936, 12.0, 1 / 2.8), (8, 151_936, 0.0, 0.0), (64, 32_000, 0.0, 0.0)):
        shape = (batch, vocabulary, torch.float32)
        for peer, setup, asked in (("softmax+multinomial", multinomial, multinomial_ratio), ("argmax", argmax, argmax_ratio)):
            yield Row(
                "gumbel_sample", f"{batch} x {vocabulary}", "float32", functools.partial(ours, *shape),
                {peer: functools.partial(setup, *shape)}, peer, asked, floor=functools.partial(argmax, *shape),
                check=functools.partial(check, *shape),
            )  # fmt: skip
