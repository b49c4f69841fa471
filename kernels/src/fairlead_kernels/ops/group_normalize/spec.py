"""What the library knows of group_normalize. Advantages are constants of a loss: no gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample
from .reference import result_dtype

HERE = "fairlead_kernels.ops.group_normalize"
KINDS = ("grpo", "dr-grpo", "batch", "rloo", "quantile", "midrank")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def float64(rewards_N: torch.Tensor, *_: Any) -> str | None:
    return "float64 rewards" if rewards_N.dtype == torch.float64 else None


def fake(rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    return rewards_N.new_empty(rewards_N.shape, dtype=result_dtype(rewards_N))


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def rewards(count: int) -> torch.Tensor:
        return (torch.randn(count, generator=generator) * 3 + 100).round(decimals=1).to(dtype).to(device)

    def cuts(*edges: int) -> torch.Tensor:
        return torch.tensor(edges, dtype=torch.int64, device=device)

    for kind in KINDS:
        holed = rewards(20)[::2]
        holed[4:6], holed[1] = math.nan, math.nan
        yield Sample((holed, cuts(0, 3, 4, 6, 10), kind, 1e-4), label=f"{kind}-nan")
        flat = torch.cat([torch.full((7,), 0.1, dtype=dtype, device=device), rewards(3)])
        yield Sample((flat, cuts(0, 7, 10), kind, 1e-4), label=f"{kind}-flat")
        yield Sample((rewards(300), cuts(0, 1, 280, 300), kind, 0.0), label=f"{kind}-long")
        yield Sample((rewards(0), cuts(0), kind, 1e-4), label=f"{kind}-empty")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    signature = {"rewards_ptr": pointer, "offsets_ptr": "*i64", "deviation_ptr": "*fp64", "eps_ptr": "*fp64"}
    signature |= {"stride": "i64", "offsets_stride": "i64", "out_ptr": "*fp32"}
    for kind in KINDS:
        yield CompileCase(f"{HERE}.triton:group_normalize_kernel", signature, {"KIND": kind, "BLOCK": 128}, kind)


def cost(rewards_N: torch.Tensor, offsets: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=rewards_N.numel() * (rewards_N.element_size() + 4) + 8 * len(offsets))


SPECS = (
    OpSpec(
        name="group_normalize",
        schema="(Tensor rewards, Tensor offsets, str kind, float eps) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:group_normalize", ("*",), 0),
            C: Implementation(f"{HERE}.c:group_normalize", ("cpu",), 10),
            TRITON: Implementation(f"{HERE}.triton:group_normalize", ("cuda",), 20, float64),
        },
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances={torch.float32: (1e-6, 1e-6), torch.float16: (1e-6, 1e-6), torch.bfloat16: (1e-6, 1e-6)},
        compile_cases=compile_cases,
        cost=cost,
    ),
)
