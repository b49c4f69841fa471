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
    ids = texts(rows)[: rows // 16]

    def run() -> Any:
        with use_backend("reference"):
            return gumbel_score(ids, key=99, context_width=4)

    return run


def check(rows: int) -> None:
    found, right = ours(rows)(), eager(rows)()
    torch.testing.assert_close(found[0][: rows // 16], right[0], rtol=1e-12, atol=1e-9)


def rows() -> Iterator[Row]:
    yield Row(
        "gumbel_score", "4096 x 512", "int64", functools.partial(ours, 4096), {"torch, 1/16 of the rows": functools.partial(eager, 4096)},
        "torch, 1/16 of the rows", 0.3, check=functools.partial(check, 4096),
    )  # fmt: skip
