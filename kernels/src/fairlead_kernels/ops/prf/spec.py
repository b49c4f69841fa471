"""What the library knows of prf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.prf"


def fake(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    return torch.empty(tokens_BN.shape, dtype=torch.int64, device=tokens_BN.device)


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int, columns: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (rows, columns), generator=generator).to(device)

    for function in ("mix32", "philox"):
        for rows, width, count in ((3, 4, 17), (2, 5, 1), (1, 1, 1030), (2, 0, 9), (0, 4, 5), (2, 4, 0)):
            args = (ids(rows, width, -1, 1 << 32), ids(rows, count, 0, 1 << 32), (1 << 40) + 5, function)
            yield Sample(args, label=f"{function}-{rows}x{count}-after-{width}")
        wide = ids(4, 12, 0, 50_000)
        yield Sample((wide[:, ::3], wide.t()[:4, :3], -7, function), label=f"{function}-strided")
        yield Sample((wide[:, :4], wide[:1].expand(4, 12), 0, function), label=f"{function}-expanded")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    numbers = ("context_row", "context_column", "token_row", "token_column", "count", "key_low", "key_high")
    signature = {"context_ptr": "*i64", "tokens_ptr": "*i64", "out_ptr": "*i64", **dict.fromkeys(numbers, "i64")}
    for philox in (True, False):
        constexprs = {"PHILOX": philox, "WIDTH": 5, "BLOCK": 1024}
        yield CompileCase(f"{HERE}.triton:prf_kernel", signature, constexprs, "philox" if philox else "mix32")


def cost(context_BH: torch.Tensor, tokens_BN: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=tokens_BN.numel() * 16 + context_BH.numel() * 8)


SPECS = (
    OpSpec(
        name="prf",
        schema="(Tensor context, Tensor tokens, int key, str function) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:prf", ("*",), 0),
            C: Implementation(f"{HERE}.c:prf", ("cpu",), 10),
            TRITON: Implementation(f"{HERE}.triton:prf", ("cuda",), 20),
        },
        fake=fake,
        samples=samples,
        dtypes=(),
        exact=True,
        compile_cases=compile_cases,
        cost=cost,
    ),
)
