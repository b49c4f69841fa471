"""What the library knows of kron_sketch. Its work is matrix products, so there is no kernel.c; prf draws its bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, CompileCase, Cost, Implementation, OpSpec, Sample
from ..fisher_diag_linear.spec import float64, layouts, row_signature

HERE = "fairlead_kernels.ops.kron_sketch"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask: Any,
    seed: int,
    layer: int,
    rows: int,
    columns: int,
    single: bool,
) -> torch.Tensor:
    wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
    return activations_NI.new_empty((offsets.shape[0] - 1, rows * columns), dtype=wide)


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    shapes = ((3, 5), (33, 2), (32, 32), (1, 1))
    for i, ((*args, single), label) in enumerate(layouts(dtype, device, seed)):
        yield Sample((*args, 7 - (1 << 62) * (i % 2), i, *shapes[i % 4], single), label=label)


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    signature = {**row_signature(dtype), "scale": "fp32"}
    signature |= dict.fromkeys(("rows", "columns", "key_low", "key_high", "layer"), "i64")
    blocks = {"MASKED": True, "TOKENS": 32, "WIDTH": 32, "TILE": 32}
    yield CompileCase(f"{HERE}.triton:kron_sketch_kernel", signature, blocks, "masked")


def cost(activations_NI: torch.Tensor, grads_NO: torch.Tensor, *rest: Any) -> Cost:
    (count, inputs), outputs, rows, columns = activations_NI.shape, grads_NO.shape[1], rest[4], rest[5]
    flops = 2 * count * (rows * outputs + columns * inputs + rows * columns)
    return Cost(bytes=count * (inputs + outputs) * activations_NI.element_size(), flops=flops)


SPECS = (
    OpSpec(
        name="kron_sketch",
        schema="(Tensor activations, Tensor grads, Tensor offsets, Tensor? mask, int seed, int layer, int rows,"
        " int columns, bool single) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:kron_sketch", ("*",), 0),
            TRITON: Implementation(f"{HERE}.triton:kron_sketch", ("cuda",), 20, float64),
        },
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances={torch.float32: (1e-5, 2e-5), torch.float16: (1e-5, 2e-5), torch.bfloat16: (1e-5, 2e-5)},
        compile_cases=compile_cases,
        cost=cost,
    ),
)
