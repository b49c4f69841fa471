"""What the library knows of fisher_diag_linear. There is no kernel.c: its work is matrix products, which are torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.fisher_diag_linear"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def float64(activations_NI: torch.Tensor, *_: Any) -> str | None:
    return "float64" if activations_NI.dtype == torch.float64 else None


def fake(activations_NI: torch.Tensor, grads_NO: torch.Tensor, *_: Any) -> torch.Tensor:
    wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
    return activations_NI.new_empty((grads_NO.shape[1], activations_NI.shape[1]), dtype=wide)


def layouts(dtype: torch.dtype, device: str, seed: int) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(activations, grads, offsets, mask, single): lengths that fill no block, empty samples, odd widths, strides."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def cuts(*edges: int) -> torch.Tensor:
        return torch.tensor(edges, device=device)

    yield (random(9, 5), random(9, 3), cuts(0, 4, 4, 9, 9), None, False), "empty-samples"
    yield (random(80, 70), random(80, 20), cuts(0, 37, 80), None, False), "odd"
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool, device=device)
    yield (random(8, 6)[:, ::2], random(16, 4)[::2], cuts(0, 3, 8), mask, False), "masked-strides"
    dirty = random(8, 3)
    dirty[2] = float("nan")
    yield (dirty, random(8, 4), cuts(0, 3, 8), mask, False), "nan-in-padding"
    yield (random(8, 3), random(8, 4), cuts(*range(9)), mask, True), "single-masked"
    yield (random(6, 17), random(6, 5), cuts(*range(7)), None, True), "single"
    yield (random(0, 3), random(0, 2), cuts(0), None, False), "no-samples"
    yield (random(0, 3), random(0, 2), cuts(0, 0, 0), None, False), "empty-only"


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for args, label in layouts(dtype, device, seed):
        yield Sample(args, label=label)


def row_signature(dtype: torch.dtype) -> dict[str, str]:
    """Triton types of the arguments that kernels over rows share."""
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    strides = dict.fromkeys(("a_row", "a_column", "g_row", "g_column", "mask_stride", "offsets_stride"), "i64")
    types = {"a_ptr": pointer, "g_ptr": pointer, "mask_ptr": "*u8", "offsets_ptr": "*i64", "out_ptr": "*fp32"}
    return {**types, **strides, "inputs": "i64", "outputs": "i64"}


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    blocks = {"MASKED": True, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "BLOCK": 64, "TOKENS": 32}
    signature = {**row_signature(dtype), "samples": "i64"}
    yield CompileCase(f"{HERE}.triton:sq_grad_accum_kernel", signature, blocks, "masked")


def cost(activations_NI: torch.Tensor, grads_NO: torch.Tensor, *_: Any) -> Cost:
    inputs, outputs, size = activations_NI.shape[1], grads_NO.shape[1], activations_NI.element_size()
    rows = activations_NI.shape[0]
    return Cost(bytes=rows * (inputs + outputs) * size + 4 * inputs * outputs, flops=2 * rows * inputs * outputs)


SPECS = (
    OpSpec(
        name="fisher_diag_linear",
        schema="(Tensor activations, Tensor grads, Tensor offsets, Tensor? mask, bool single) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:fisher_diag_linear", ("*",), 0),
            "tiled": Implementation(f"{HERE}.tiled:fisher_diag_linear", ("cpu", "*"), 10),
            TRITON: Implementation(f"{HERE}.triton:fisher_diag_linear", ("cuda",), 20, float64),
        },
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances={torch.float32: (1e-5, 1e-5), torch.float16: (1e-5, 1e-5), torch.bfloat16: (1e-5, 1e-5)},
        compile_cases=compile_cases,
        cost=cost,
    ),
)
