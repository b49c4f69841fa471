"""gumbel_score (dedup included) against the same statistic in plain torch operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import gumbel_score, use_backend


@functools.lru_cache(maxsize=1)
def texts(rows: int) -> torch.Tensor:
    return torch.randint(0, 32_000, (rows, 512), generator=torch.Generator().manual_seed(0))


def ours(rows: int) -> Callable[[], Any]:
    ids = texts(rows)
    return lambda: gumbel_score(ids, key=99, context_width=4)


def eager(rows: int) -> Callable[[], Any]:
    ids = texts(rows)

    def run() -> Any:
        with use_backend("reference"):
            return gumbel_score(ids, key=99, context_width=4)

    return run


def check(rows: int) -> None:
    found, right = ours(rows)(), eager(rows)()
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-9, equal_nan=True)


def rows() -> Iterator[Row]:
    for count, faster in ((4096, 4.0), (64, 3.0)):
        yield Row(
            "gumbel_score", f"{count} x 512", "int64", functools.partial(ours, count),
            {"torch": functools.partial(eager, count)}, "torch", faster, check=functools.partial(check, count),
            peer_repeats=2,
        )  # fmt: skip
