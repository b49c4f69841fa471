"""What the library knows of green_count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.green_count"


def fake(ids_BT: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = ids_BT.shape[0]
    return (
        ids_BT.new_empty((batch,), dtype=torch.int64),
        ids_BT.new_empty((batch,), dtype=torch.int64),
        torch.empty(ids_BT.shape, dtype=torch.int8, device=ids_BT.device),
    )


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int, tokens: int, low: int = 0, high: int = 7) -> torch.Tensor:
        return torch.randint(low, high, (rows, tokens), generator=generator).to(device)

    for scheme, width in (("lefthash", 1), ("lefthash", 6), ("lefthash", 0), ("minhash", 3), ("selfhash", 4)):
        args: tuple[Any, ...]
        for dedup in ("pair", "context", "none"):
            args = (ids(3, 40), None, None, 42, 0.25, width, scheme, dedup, False)
            yield Sample(args, label=f"{scheme}-{width}-{dedup}")
        lengths = torch.tensor([0, 31, 40], device=device)
        yield Sample(
            (ids(3, 40, -1), lengths, None, -3, 0.5, width, scheme, "pair", True), label=f"{scheme}-{width}-gaps"
        )
        wide = ids(6, 50, -1, 50_000)
        args = (wide[::2, 3:43:2], lengths - 5, wide[3:, -2:], 9, 0.4, width, scheme, "pair", False)
        yield Sample(args, label=f"{scheme}-{width}-strided-after-context")
    yield Sample((ids(2, 3), None, ids(2, 9), 1, 0.5, 4, "minhash", "none", False), label="long-context")
    yield Sample((ids(2, 3), None, None, 1, 0.5, 4, "minhash", "none", False), label="too-short")
    yield Sample((ids(0, 9), None, None, 1, 0.5, 1, "lefthash", "pair", False), label="empty-batch")
    yield Sample((ids(2, 0), None, None, 1, 0.5, 1, "lefthash", "pair", False), label="no-tokens")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    numbers = ("length", "tokens", "key_low", "key_high", "limit")
    signature = {"tokens_ptr": "*i64", "green_ptr": "*i8", "print_ptr": "*i64", **dict.fromkeys(numbers, "i64")}
    for scheme in range(3):
        for by_context in (False, True):
            constexprs = {"SCHEME": scheme, "BY_CONTEXT": by_context, "WIDTH": 3, "BLOCK": 1024}
            yield CompileCase(
                f"{HERE}.triton:green_count_kernel", signature, constexprs, f"scheme{scheme}-{by_context}"
            )


def cost(ids_BT: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=ids_BT.numel() * 9 + ids_BT.shape[0] * 24)


SPECS = (
    OpSpec(
        name="green_count",
        schema="(Tensor ids, Tensor? lengths, Tensor? context, int key, float gamma, int context_width, str scheme, "
        "str dedup, bool pad_left) -> (Tensor, Tensor, Tensor)",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:green_count", ("*",), 0),
            C: Implementation(f"{HERE}.c:green_count", ("cpu",), 10),
            TRITON: Implementation(f"{HERE}.triton:green_count", ("cuda",), 20),
        },
        fake=fake,
        samples=samples,
        dtypes=(),
        exact=True,
        compile_cases=compile_cases,
        cost=cost,
    ),
)
