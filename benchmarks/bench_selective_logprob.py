"""selective_logprob against log_softmax + gather."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import selective_logprob


@functools.lru_cache(maxsize=1)
def inputs(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def ours(rows: int, vocabulary: int) -> Callable[[], Any]:
    logits, ids = inputs(rows, vocabulary)
    return lambda: selective_logprob(logits, ids)


def dense(rows: int, vocabulary: int) -> Callable[[], Any]:
    logits, ids = inputs(rows, vocabulary)
    return lambda: logits.log_softmax(-1).gather(-1, ids[:, None])


def maximum(rows: int, vocabulary: int) -> Callable[[], Any]:
    logits, _ = inputs(rows, vocabulary)
    return lambda: logits.amax(-1)


def check(rows: int, vocabulary: int) -> None:
    torch.testing.assert_close(ours(rows, vocabulary)(), dense(rows, vocabulary)()[:, 0], rtol=1e-5, atol=2e-5)


def rows() -> Iterator[Row]:
    for shape in ((64, 32_000), (64, 151_936)):
        yield Row(
            "selective_logprob", f"{shape[0]} x {shape[1]}", "float32", functools.partial(ours, *shape),
            {"log_softmax+gather": functools.partial(dense, *shape)}, "log_softmax+gather", 1.5,
            floor=functools.partial(maximum, *shape), check=functools.partial(check, *shape),
        )  # fmt: skip
