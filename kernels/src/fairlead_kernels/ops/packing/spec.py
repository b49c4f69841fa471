"""What the library knows of packing rows. Each of the two is the other's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.packing"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def implementations(function: str) -> dict[str, Implementation]:
    return {
        REFERENCE: Implementation(f"{HERE}.reference:{function}", ("*",), 0),
        C: Implementation(f"{HERE}.c:{function}", ("cpu",), 10),
        TRITON: Implementation(f"{HERE}.triton:{function}", ("cuda",), 20, boolean),
    }


def boolean(values: torch.Tensor, *_: Any) -> str | None:
    return (
        "values that are neither integers nor real floats"
        if values.dtype == torch.bool or values.is_complex()
        else None
    )


def fake_pack(values_BTD: torch.Tensor, offsets: torch.Tensor, total: int, left: bool) -> Any:
    rows_ND = values_BTD.new_empty((total, values_BTD.shape[2]))
    return rows_ND, values_BTD.new_empty((total,), dtype=torch.int64)


def fake_unpack(rows_ND: torch.Tensor, offsets: torch.Tensor, width: int, fill: Any, left: bool) -> torch.Tensor:
    return rows_ND.new_empty((offsets.shape[0] - 1, width, rows_ND.shape[1]))


def pack_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    values_BTD, offsets, _, ctx.left = inputs
    ctx.width = values_BTD.shape[1]
    ctx.save_for_backward(offsets)
    ctx.mark_non_differentiable(output[1])


def pack_backward(ctx: Any, grad_ND: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return (
        torch.ops.fairlead.unpack_rows.default(grad_ND, *ctx.saved_tensors, ctx.width, 0.0, ctx.left),
        None,
        None,
        None,
    )


def unpack_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows_ND, offsets, _, _, ctx.left = inputs
    ctx.total = rows_ND.shape[0]
    ctx.save_for_backward(offsets)


def unpack_backward(ctx: Any, grad_BTD: torch.Tensor) -> tuple[Any, ...]:
    grad_ND, _ = torch.ops.fairlead.pack_rows.default(grad_BTD, *ctx.saved_tensors, ctx.total, ctx.left)
    return grad_ND, None, None, None, None


def cuts(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


SHAPES: tuple[tuple[list[int], int, int], ...] = (
    ([3, 0, 5, 1], 5, 1),
    ([2, 4], 7, 9),
    ([300, 2], 300, 70),
    ([1], 1, 1),
    ([], 4, 3),
    ([0, 0], 0, 2),
)


def pack_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    for lengths, width, depth in SHAPES:
        for left in (False, True):
            values = torch.randn(len(lengths), width, depth, generator=generator).to(dtype).to(device)
            yield Sample((values, cuts(lengths, device), sum(lengths), left), label=f"{lengths}-{left}")
    ids = torch.randint(0, 99, (2, 6, 2), generator=generator)[:, ::2].to(device)
    yield Sample((ids, cuts([2, 3], device), 5, True), label="strided-ids")


def unpack_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    for lengths, width, depth in SHAPES:
        for left in (False, True):
            rows = torch.randn(sum(lengths), depth, generator=generator).to(dtype).to(device)
            yield Sample((rows, cuts(lengths, device), width, -2.5, left), label=f"{lengths}-{left}")
    ids = torch.randint(0, 99, (10, 1), generator=generator)[::2].to(device)
    yield Sample((ids, cuts([2, 3], device), 4, -100, True), label="strided-ids")


def pack_gradcheck(seed: int) -> Iterator[Sample]:
    values = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    yield Sample((values, cuts([3, 2], "cpu"), 5, True), label="left")


def unpack_gradcheck(seed: int) -> Iterator[Sample]:
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    yield Sample((rows, cuts([3, 2], "cpu"), 4, 7.0, False), label="right")


def compile_cases(kernel: str) -> Any:
    def cases(dtype: torch.dtype) -> Iterator[CompileCase]:
        pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
        names = ("batch_stride", "token_stride", "row_stride", "column_stride", "width", "depth", "offsets_stride")
        for kind in (pointer, "*i64"):
            tensors = {"offsets_ptr": "*i64", "position_ptr": "*i64"}
            tensors |= dict.fromkeys(("values_ptr", "rows_ptr", "fill_ptr", "out_ptr"), kind)
            blocks = {"LEFT": True, "TOKENS": 8, "COLUMNS": 256}
            yield CompileCase(f"{HERE}.triton:{kernel}", {**tensors, **dict.fromkeys(names, "i64")}, blocks, kind)

    return cases


def pack_cost(values_BTD: torch.Tensor, offsets: torch.Tensor, total: int, left: bool) -> Cost:
    return Cost(bytes=total * (2 * values_BTD.shape[2] * values_BTD.element_size() + 8))


def unpack_cost(rows_ND: torch.Tensor, offsets: torch.Tensor, width: int, *_: Any) -> Cost:
    out = (len(offsets) - 1) * width * rows_ND.shape[1]
    return Cost(bytes=(rows_ND.numel() + out) * rows_ND.element_size())


SPECS = (
    OpSpec(
        name="pack_rows",
        schema="(Tensor values, Tensor offsets, SymInt total, bool left) -> (Tensor, Tensor)",
        implementations=implementations("pack_rows"),
        fake=fake_pack,
        samples=pack_samples,
        dtypes=DTYPES,
        exact=True,
        backward=pack_backward,
        setup_context=pack_context,
        gradcheck=pack_gradcheck,
        compile_cases=compile_cases("pack_rows_kernel"),
        cost=pack_cost,
    ),
    OpSpec(
        name="unpack_rows",
        schema="(Tensor rows, Tensor offsets, SymInt width, Scalar fill, bool left) -> Tensor",
        implementations=implementations("unpack_rows"),
        fake=fake_unpack,
        samples=unpack_samples,
        dtypes=DTYPES,
        exact=True,
        backward=unpack_backward,
        setup_context=unpack_context,
        gradcheck=unpack_gradcheck,
        compile_cases=compile_cases("unpack_rows_kernel"),
        cost=unpack_cost,
    ),
)
