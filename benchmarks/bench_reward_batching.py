"""segment_reduce, group_normalize and packing against torch's own index operations and loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead_kernels import group_normalize, pack, segment_reduce, unpack

SEGMENTS, LONGEST, DEPTH, PADDED = 4096, 512, 64, 64
Setup = Callable[[], Callable[[], Any]]


@functools.lru_cache(maxsize=1)
def lengths() -> torch.Tensor:
    return torch.randint(1, LONGEST, (SEGMENTS,), generator=torch.Generator().manual_seed(0))


def cuts(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


@functools.lru_cache(maxsize=1)
def values() -> torch.Tensor:
    return torch.randn(int(lengths().sum()), generator=torch.Generator().manual_seed(1))


@functools.lru_cache(maxsize=1)
def padded() -> torch.Tensor:
    return torch.randn(PADDED, LONGEST, DEPTH, generator=torch.Generator().manual_seed(2))


def reduce_ours(op: str) -> Callable[[], Any]:
    x, offsets = values(), cuts(lengths())
    return lambda: segment_reduce(x, offsets, op)


def reduce_torch(op: str) -> Callable[[], Any]:
    x, sizes, offsets = values(), lengths(), cuts(lengths())
    if op != "logsumexp":
        return lambda: torch.segment_reduce(x, op, offsets=offsets, initial=None)

    def logsumexp() -> torch.Tensor:
        top = torch.segment_reduce(x, "max", offsets=offsets)
        shares = (x - top.repeat_interleave(sizes)).exp()
        return torch.segment_reduce(shares, "sum", offsets=offsets).log() + top

    return logsumexp


def groups() -> tuple[torch.Tensor, torch.Tensor]:
    count = 4096 * 8
    return torch.randn(count, generator=torch.Generator().manual_seed(3)), torch.arange(0, count + 1, 8)


def normalize_ours() -> Callable[[], Any]:
    rewards, offsets = groups()
    return lambda: group_normalize(rewards, offsets, "grpo")


def normalize_loop() -> Callable[[], Any]:
    rewards, offsets = groups()
    parts = rewards.split(offsets.diff().tolist())
    return lambda: torch.cat([(part - part.mean()) / (part.std() + 1e-4) for part in parts])


def pack_ours() -> Callable[[], Any]:
    x, sizes = padded(), lengths()[:PADDED]
    return lambda: pack(x, sizes)


def pack_mask() -> Callable[[], Any]:
    x, sizes = padded(), lengths()[:PADDED]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(LONGEST).expand(PADDED, LONGEST)
        mask = place < sizes[:, None]
        return x[mask], place[mask]

    return call


def unpack_ours() -> Callable[[], Any]:
    batch = pack(padded(), lengths()[:PADDED])
    return lambda: unpack(batch.input_ids, batch, width=LONGEST)


def unpack_mask() -> Callable[[], Any]:
    x, sizes = pack_ours()().input_ids, lengths()[:PADDED]

    def call() -> torch.Tensor:
        out = x.new_zeros(PADDED, LONGEST, DEPTH)
        out[torch.arange(LONGEST)[None, :] < sizes[:, None]] = x
        return out

    return call


def first(result: Any) -> torch.Tensor:
    result = getattr(result, "input_ids", result)
    return result[0] if isinstance(result, tuple) else result


def agree(ours: Setup, peer: Setup) -> None:
    torch.testing.assert_close(first(ours()()), first(peer()()), rtol=1e-4, atol=1e-4)


def rows() -> Iterator[Row]:
    cases: list[tuple[str, str, Setup, str, Setup, float]] = [
        (f"segment_reduce {op}", f"{SEGMENTS} segments of 1-{LONGEST}", functools.partial(reduce_ours, op), "torch",
         functools.partial(reduce_torch, op), at_least)
        for op, at_least in (("sum", 1.0), ("max", 1.0), ("logsumexp", 2.0))
    ]  # fmt: skip
    cases.append(("group_normalize grpo", "4096 groups of 8", normalize_ours, "loop", normalize_loop, 20.0))
    cases.append(("pack", f"{PADDED} x {LONGEST} x {DEPTH}", pack_ours, "mask", pack_mask, 1.5))
    cases.append(("unpack", f"{PADDED} x {LONGEST} x {DEPTH}", unpack_ours, "mask", unpack_mask, 1.0))
    for operation, shape, ours, name, peer, at_least in cases:
        check = functools.partial(agree, ours, peer)
        yield Row(operation, shape, "float32", ours, {name: peer}, name, at_least, check=check)
