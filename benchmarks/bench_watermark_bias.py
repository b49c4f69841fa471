"""watermark_bias against transformers' WatermarkLogitsProcessor and against one in-place add over the same logits.

Ours biases by counter-based lists, transformers by a permutation per row: equality with the peer is therefore of the
share of green tokens and of delta, and of the bits with our reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import use_backend, watermark_bias

Setup = Callable[[], Callable[[], Any]]
KEY, GAMMA, DELTA = 99, 0.25, 2.0
COLUMNS = {"lefthash": 1, "minhash": 4, "selfhash": 3}


@functools.lru_cache(maxsize=2)
def inputs(batch: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the last ids of each row. All ways of a row share them; an addition more or less changes no speed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, 8), generator=generator)
    return torch.randn(batch, vocabulary, generator=generator).to(dtype), ids


def ours(batch: int, vocabulary: int, dtype: torch.dtype, scheme: str) -> Callable[[], Any]:
    logits, ids = inputs(batch, vocabulary, dtype)
    context = ids[:, -COLUMNS[scheme] :]
    return lambda: watermark_bias(logits, context, key=KEY, gamma=GAMMA, delta=DELTA, scheme=scheme, out=logits)


def in_place_add(batch: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits, _ = inputs(batch, vocabulary, dtype)
    return lambda: logits.add_(1e-3)


def processor(vocabulary: int, scheme: str) -> Any:
    from transformers.generation.logits_process import WatermarkLogitsProcessor

    width = 4 if scheme == "selfhash" else 1
    return WatermarkLogitsProcessor(
        vocabulary, "cpu", greenlist_ratio=GAMMA, bias=DELTA, seeding_scheme=scheme, context_width=width
    )


def transformers(batch: int, vocabulary: int, dtype: torch.dtype, scheme: str) -> Callable[[], Any]:
    logits, ids = inputs(batch, vocabulary, dtype)
    peer = processor(vocabulary, scheme)
    return lambda: peer(ids, logits)


def check(vocabulary: int, dtype: torch.dtype, scheme: str) -> None:
    """Two rows: the reference's bits, and (left-hash) as many tokens raised by delta as the peer raises."""
    logits, ids = torch.zeros(2, vocabulary, dtype=dtype), torch.arange(16).reshape(2, 8)
    context = ids[:, -COLUMNS[scheme] :]
    settings: dict[str, Any] = {"key": KEY, "gamma": GAMMA, "delta": DELTA, "scheme": scheme}
    biased = watermark_bias(logits, context, **settings)
    with use_backend("reference"):
        if not torch.equal(biased, watermark_bias(logits, context, **settings)):
            raise AssertionError("the backend in use and the reference disagree")
    if scheme == "lefthash":
        share, peer = (float((x == DELTA).float().mean()) for x in (biased, processor(vocabulary, scheme)(ids, logits)))
        if abs(share - peer) > 5 * (GAMMA / (2 * vocabulary)) ** 0.5:
            raise AssertionError(f"a share of {share:.4f} is green, the peer's is {peer:.4f}")


def row(batch: int, vocabulary: int, dtype: torch.dtype, scheme: str, baseline: str, at_least: float) -> Row:
    peers: dict[str, Setup] = {"in-place add": functools.partial(in_place_add, batch, vocabulary, dtype)}
    if baseline == "transformers":
        peers = {"transformers": functools.partial(transformers, batch, vocabulary, dtype, scheme)}
    return Row(
        operation=f"watermark_bias {scheme}",
        shape=f"{batch}x{vocabulary}",
        dtype=str(dtype).removeprefix("torch."),
        ours=functools.partial(ours, batch, vocabulary, dtype, scheme),
        peers=peers,
        baseline=baseline,
        at_least=at_least,
        floor=functools.partial(in_place_add, batch, vocabulary, dtype),
        check=functools.partial(check, vocabulary, dtype, scheme),
    )


def rows() -> Iterator[Row]:
    yield row(64, 151_936, torch.float32, "lefthash", "transformers", 35)
    yield row(64, 151_936, torch.float32, "lefthash", "in-place add", 1 / 2)
    yield row(8, 151_936, torch.float32, "lefthash", "transformers", 20)
    yield row(64, 32_000, torch.float32, "lefthash", "transformers", 20)
    yield row(64, 151_936, torch.float32, "minhash", "in-place add", 1 / 2)
    yield row(64, 151_936, torch.bfloat16, "lefthash", "in-place add", 1 / 3)
    yield row(4, 151_936, torch.float32, "selfhash", "transformers", 100)
    yield row(32, 32_000, torch.float32, "selfhash", "transformers", 240)
