"""What the library knows of norms and inner products of per-sample gradients. Their work is matrix products, so there is
no kernel.c."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, CompileCase, Cost, Implementation, OpSpec, Sample
from ..fisher_diag_linear.spec import float64, layouts, row_signature

HERE = "fairlead_kernels.ops.grad_norm_linear"
METHODS = ("auto", "ghost", "direct")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.float16: (2e-5, 2e-5), torch.bfloat16: (2e-5, 2e-5)}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_norm(activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, *_: Any) -> torch.Tensor:
    return activations_NI.new_empty((offsets.shape[0] - 1,), dtype=wide(activations_NI.dtype))


def fake_gram(activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, *_: Any) -> torch.Tensor:
    samples = offsets.shape[0] - 1
    return activations_NI.new_empty((samples, samples), dtype=wide(activations_NI.dtype))


def norm_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for (*args, single), label in layouts(dtype, device, seed):
        for method in METHODS:
            yield Sample((*args, method, single), label=f"{label}-{method}")
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(2, 40, generator=generator).to(dtype).to(device)
    grads = torch.randn(1, 30, generator=generator).to(dtype).to(device).repeat(2, 1)
    grads[1] *= -1  # two tokens that cancel but for a little
    activations[1] = activations[0] + 2**-6 * activations[1]
    for method in METHODS:
        yield Sample((activations, grads, torch.tensor([0, 2], device=device), None, method, False), label="cancels")


def gram_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for (*args, _), label in layouts(dtype, device, seed):
        yield Sample(tuple(args), label=label)


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    blocks = {"MASKED": True, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "TOKENS": 32, "WIDTH": 64}
    signature = {**row_signature(dtype), "blocks": "i64", "square_ptr": "*fp32", "size_ptr": "*fp32"}
    del signature["out_ptr"]
    yield CompileCase(f"{HERE}.triton:ghost_norm_kernel", signature, blocks, "masked")


def cost(activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, *_: Any) -> Cost:
    """The rows once, and the cheaper path's products."""
    (rows, inputs), outputs = activations_NI.shape, grads_NO.shape[1]
    tokens = rows / max(1, offsets.shape[0] - 1)
    each = min(tokens * (inputs + outputs), inputs * outputs)
    return Cost(bytes=rows * (inputs + outputs) * activations_NI.element_size(), flops=int(2 * rows * each))


SPECS = (
    OpSpec(
        name="grad_square_norm_linear",
        schema="(Tensor activations, Tensor grads, Tensor offsets, Tensor? mask, str method, bool single) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:grad_square_norm_linear", ("*",), 0),
            "tiled": Implementation(f"{HERE}.tiled:grad_square_norm_linear", ("cpu", "*"), 10),
            TRITON: Implementation(f"{HERE}.triton:grad_square_norm_linear", ("cuda",), 20, float64),
        },
        fake=fake_norm,
        samples=norm_samples,
        dtypes=DTYPES,
        tolerances=TOLERANCES,
        compile_cases=compile_cases,
        cost=cost,
    ),
    OpSpec(
        name="grad_gram_linear",
        schema="(Tensor activations, Tensor grads, Tensor offsets, Tensor? mask) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:grad_gram_linear", ("*",), 0),
            "tiled": Implementation(f"{HERE}.tiled:grad_gram_linear", ("cpu", "*"), 10),
        },
        fake=fake_gram,
        samples=gram_samples,
        dtypes=DTYPES,
        tolerances={dtype: (1e-4, 2e-4) for dtype in DTYPES},
    ),
)
