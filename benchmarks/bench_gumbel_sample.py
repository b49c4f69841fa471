"""gumbel_sample against torch's softmax + multinomial, a plain argmax, and truncation by torch's sort and top-k;
gumbel_uniform against torch.rand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import gumbel_sample, gumbel_uniform, use_backend

HEAT, KEY = 0.9, 99
Setup = Callable[[], Callable[[], Any]]


@functools.lru_cache(maxsize=2)
def inputs(batch: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(batch, vocabulary, generator=generator) * 2).to(dtype)
    return logits, torch.randint(0, vocabulary, (batch, 4), generator=generator)


def ours(batch: int, vocabulary: int, dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    logits, context = inputs(batch, vocabulary, dtype)
    return lambda: gumbel_sample(logits, context, key=KEY, temperature=HEAT, **options)


def multinomial(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)
    return lambda: torch.multinomial((logits / HEAT).softmax(-1), 1)


def argmax(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)
    return lambda: logits.argmax(-1)


def sorted_multinomial(batch: int, vocabulary: int, dtype: torch.dtype, top_p: float) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)

    def run() -> torch.Tensor:
        values, ids = (logits / HEAT).softmax(-1).sort(-1, descending=True)
        kept = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
        return ids.gather(1, torch.multinomial(kept, 1))

    return run


def top_multinomial(batch: int, vocabulary: int, dtype: torch.dtype, top_k: int) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)

    def run() -> torch.Tensor:
        values, ids = logits.topk(top_k, -1)
        return ids.gather(1, torch.multinomial((values / HEAT).softmax(-1), 1))

    return run


def uniform(batch: int, vocabulary: int) -> Callable[[], Any]:
    _, context = inputs(batch, vocabulary, torch.float32)
    return lambda: gumbel_uniform(context, vocabulary, key=KEY)


def rand(batch: int, vocabulary: int) -> Callable[[], Any]:
    return lambda: torch.rand(batch, vocabulary)


def check(batch: int, vocabulary: int, dtype: torch.dtype, **options: Any) -> None:
    logits, context = inputs(batch, vocabulary, dtype)
    found = gumbel_sample(logits[:4], context[:4], key=KEY, temperature=HEAT, **options)
    with use_backend("reference"):
        right = gumbel_sample(logits[:4], context[:4], key=KEY, temperature=HEAT, **options)
    if not torch.equal(found, right):
        raise AssertionError(f"gumbel_sample drew {found.tolist()}, the reference {right.tolist()}")


def row(shape: tuple[int, int, torch.dtype], peer: str, setup: Setup, asked: float, **options: Any) -> Row:
    batch, vocabulary, dtype = shape
    detail = "".join(f" {name}={value}" for name, value in options.items())
    return Row(
        "gumbel_sample", f"{batch} x {vocabulary}{detail}", str(dtype).removeprefix("torch."),
        functools.partial(ours, *shape, **options), {peer: setup}, peer, asked,
        floor=functools.partial(argmax, *shape), check=functools.partial(check, *shape, **options),
    )  # fmt: skip


def rows() -> Iterator[Row]:
    large = (64, 151_936, torch.float32)
    for shape, faster, slower in ((large, 12.0, 1 / 2.8), ((8, *large[1:]), 8.0, 0.0), ((64, 32_000, torch.float32), 8.0, 0.0)):
        yield row(shape, "softmax+multinomial", functools.partial(multinomial, *shape), faster)
        yield row(shape, "argmax", functools.partial(argmax, *shape), slower)
    half = (8, 151_936, torch.bfloat16)
    yield row(half, "softmax+multinomial", functools.partial(multinomial, *half), 4.0)
    few = (8, 151_936, torch.float32)
    yield row(few, "sort+multinomial", functools.partial(sorted_multinomial, *few, 0.9), 8.0, top_p=0.9)
    yield row(few, "topk+multinomial", functools.partial(top_multinomial, *few, 50), 1.0, top_k=50)
    yield Row(
        "gumbel_uniform", "8 x 151936", "float32", functools.partial(uniform, 8, 151_936),
        {"torch.rand": functools.partial(rand, 8, 151_936)}, "torch.rand", 1.0,
    )  # fmt: skip
