"""green_count against transformers' WatermarkDetector.

The detector needs minutes for 4096 texts, so it gets two of them and the ratio asked for is scaled by the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import green_count, use_backend

KEY, GAMMA, VOCABULARY, TOKENS, PEER_ROWS = 99, 0.25, 32_000, 512, 2


@functools.lru_cache(maxsize=1)
def texts(rows: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def ours(rows: int, scheme: str) -> Callable[[], Any]:
    ids, width = texts(rows), 4 if scheme == "selfhash" else 1
    return lambda: green_count(ids, key=KEY, gamma=GAMMA, context_width=width, scheme=scheme)


def detector(scheme: str) -> Callable[[], Any]:
    from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

    width = 4 if scheme == "selfhash" else 1
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1)
    marking = WatermarkingConfig(greenlist_ratio=GAMMA, seeding_scheme=scheme, context_width=width)
    ids = texts(4096)[:PEER_ROWS].clone()
    # A detector of its own per call: it keeps the lists that it has made.
    return lambda: WatermarkDetector(config, "cpu", marking)(ids)


def check(scheme: str) -> None:
    ids, width = texts(4096)[:16], 4 if scheme == "selfhash" else 1
    found = green_count(ids, key=KEY, gamma=GAMMA, context_width=width, scheme=scheme)
    with use_backend("reference"):
        right = green_count(ids, key=KEY, gamma=GAMMA, context_width=width, scheme=scheme)
    if not all(torch.equal(x, y) for x, y in zip(found, right, strict=True)):
        raise AssertionError("the backend in use and the reference disagree")


def rows() -> Iterator[Row]:
    name = f"WatermarkDetector, {PEER_ROWS} of the rows"
    for scheme in ("lefthash", "selfhash"):
        yield Row(
            operation=f"green_count {scheme}",
            shape=f"4096x{TOKENS}, V {VOCABULARY}",
            dtype="int64",
            ours=functools.partial(ours, 4096, scheme),
            peers={name: functools.partial(detector, scheme)},
            baseline=name,
            at_least=5000 * PEER_ROWS / 4096,
            check=functools.partial(check, scheme),
        )
