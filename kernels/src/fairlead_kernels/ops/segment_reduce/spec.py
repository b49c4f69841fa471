"""What the library knows of segment_reduce. Gradients are index operations of plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample
from .reference import result_dtype, segment_of

HERE = "fairlead_kernels.ops.segment_reduce"
OPS = ("sum", "mean", "max", "argmax", "last", "logsumexp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(values_ND: torch.Tensor, *_: Any) -> str | None:
    return None if values_ND.dtype in DTYPES else f"{values_ND.dtype} values"


def fake(values_ND: torch.Tensor, offsets: torch.Tensor, op: str) -> torch.Tensor:
    shape_SD = (offsets.shape[0] - 1, values_ND.shape[1])
    return values_ND.new_empty(shape_SD, dtype=result_dtype(values_ND.dtype, op))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values_ND, offsets, ctx.op = inputs
    ctx.shape = values_ND.shape
    ctx.dtype = values_ND.dtype
    if ctx.op == "argmax":
        ctx.mark_non_differentiable(output)
    keep = (values_ND, output) if ctx.op == "logsumexp" else (values_ND,) if ctx.op == "max" else ()
    ctx.save_for_backward(offsets, *keep)


def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
    offsets, *kept = ctx.saved_tensors
    if ctx.op == "argmax":
        return None, None, None
    if ctx.op in ("max", "last"):
        if ctx.op == "max":
            index_SD = torch.ops.fairlead.segment_reduce.default(kept[0], offsets, "argmax")
        else:
            index_SD = torch.where(offsets.diff() > 0, offsets[1:] - 1, -1)[:, None].expand_as(grad_SD)
        out_ND = grad_SD.new_zeros(ctx.shape)
        if ctx.shape[0] == 0:
            return out_ND, None, None
        return out_ND.scatter_add(0, index_SD.clamp(min=0), grad_SD.masked_fill(index_SD < 0, 0.0)), None, None
    segment_N = segment_of(offsets, ctx.shape[0])
    if ctx.op == "mean":
        grad_SD = grad_SD / offsets.diff().clamp(min=1)[:, None]
    grad_ND = grad_SD[segment_N]
    if ctx.op == "logsumexp":
        values_ND, total_SD = kept
        safe_SD = total_SD.masked_fill(total_SD == -math.inf, 0.0)
        grad_ND = grad_ND * (values_ND - safe_SD[segment_N]).exp()
    return grad_ND.to(ctx.dtype), None, None


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def values(rows: int, width: int) -> torch.Tensor:
        drawn = torch.randn(rows, width, generator=generator) * 4
        return drawn.round(decimals=1).to(dtype).to(device)  # ties

    def cuts(*edges: int) -> torch.Tensor:
        return torch.tensor(edges, dtype=torch.int64, device=device)

    special = values(6, 1)
    special[0], special[1], special[2:4] = math.inf, math.nan, -math.inf
    for op in OPS:
        yield Sample((values(9, 1), cuts(0, 3, 3, 5, 9, 9), op), label=f"{op}-empty-segments")
        yield Sample((values(40, 5)[::2], cuts(0, 1, 20), op), label=f"{op}-rows")
        yield Sample((values(10, 300), cuts(0, 4, 10), op), label=f"{op}-wide")
        yield Sample((special, cuts(0, 1, 2, 4, 6), op), label=f"{op}-special")
        yield Sample((values(0, 2), cuts(0, 0), op), label=f"{op}-no-values")
        yield Sample((values(0, 3), cuts(0), op), label=f"{op}-no-segments")
    yield Sample((values(3000, 1), cuts(0, 2900, 3000), "logsumexp"), label="logsumexp-long")
    yield Sample((values(3000, 1), cuts(0, 2900, 3000), "argmax"), label="argmax-long")
    yield Sample((values(3000, 1), cuts(0, 2900, 3000), "mean"), label="mean-long")


def gradcheck(seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    for op in ("sum", "mean", "max", "last", "logsumexp"):  # nothing's result is infinite or NaN but for the sum
        offsets = torch.tensor([0, 3, 3, 4, 9] if op == "sum" else [0, 3, 4, 9])
        values = torch.randn(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        yield Sample((values, offsets, op), label=op)


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    strides = dict.fromkeys(("row_stride", "column_stride", "width", "offsets_stride"), "i64")
    for op in OPS:
        out = {"argmax": "*i64", "max": pointer, "last": pointer}.get(op, "*fp32")
        signature = {"values_ptr": pointer, "offsets_ptr": "*i64", "out_ptr": out, **strides}
        for columns in (1, 128):
            blocks = {"OP": op, "ROWS": 2048 // columns, "COLUMNS": columns}
            yield CompileCase(f"{HERE}.triton:segment_reduce_kernel", signature, blocks, f"{op}-{columns}")


def cost(values_ND: torch.Tensor, offsets: torch.Tensor, op: str) -> Cost:
    return Cost(bytes=values_ND.numel() * values_ND.element_size() + 8 * len(offsets))


SPECS = (
    OpSpec(
        name="segment_reduce",
        schema="(Tensor values, Tensor offsets, str op) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:segment_reduce", ("*",), 0),
            C: Implementation(f"{HERE}.c:segment_reduce", ("cpu",), 10, unsupported),
            TRITON: Implementation(f"{HERE}.triton:segment_reduce", ("cuda",), 20, unsupported),
        },
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances={torch.float32: (1e-5, 1e-5), torch.float16: (1e-5, 1e-5), torch.bfloat16: (1e-5, 1e-5)},
        backward=backward,
        setup_context=setup_context,
        gradcheck=gradcheck,
        compile_cases=compile_cases,
        cost=cost,
    ),
)
