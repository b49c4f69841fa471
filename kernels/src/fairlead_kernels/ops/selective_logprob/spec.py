"""What the library knows of selective_logprob and its backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample
from .reference import accumulator
from .reference import selective_logprob as compute

HERE = "fairlead_kernels.ops.selective_logprob"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.float16: (1e-5, 2e-5), torch.bfloat16: (1e-5, 2e-5)}
BACKWARD_TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.float16: (2**-9, 1e-6), torch.bfloat16: (2**-6, 1e-6)}


def unsupported(logits_NV: torch.Tensor, *_: Any) -> str | None:
    return None if logits_NV.dtype in DTYPES else f"{logits_NV.dtype} logits"


def unsupported_backward(grad_N: torch.Tensor, logits_NV: torch.Tensor, *_: Any) -> str | None:
    return unsupported(logits_NV)


def implementations(function: str, check: Any) -> dict[str, Implementation]:
    return {
        REFERENCE: Implementation(f"{HERE}.reference:{function}", ("*",), 0),
        C: Implementation(f"{HERE}.c:{function}", ("cpu",), 10, check),
        TRITON: Implementation(f"{HERE}.triton:{function}", ("cuda",), 20, check),
    }


def fake(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = accumulator(logits_NV.dtype)
    return logits_NV.new_empty(ids_N.shape, dtype=wide), logits_NV.new_empty(ids_N.shape, dtype=wide)


def fake_backward(grad_N: torch.Tensor, logits_NV: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NV, ids_N, ctx.temperature = inputs
    ctx.save_for_backward(logits_NV, ids_N, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, grad_N: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
    logits_NV, ids_N, lse_N = ctx.saved_tensors
    run = torch.ops.fairlead.selective_logprob_backward.default
    return run(grad_N, logits_NV, ids_N, lse_N, ctx.temperature), None, None


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def logits(rows: int, vocabulary: int) -> torch.Tensor:
        values = torch.randn(rows, vocabulary, generator=generator) * 5
        values[:, 2::9] = -math.inf
        return values.to(dtype).to(device)

    def ids(rows: int, vocabulary: int) -> torch.Tensor:
        return (
            (torch.randint(0, vocabulary, (rows,), generator=generator) // 9 * 9).clamp(max=vocabulary - 1).to(device)
        )

    for vocabulary in (1, 2, 63, 1000, 2048):
        yield Sample((logits(3, vocabulary), ids(3, vocabulary), 1.0), label=str(vocabulary))
    wide = logits(6, 700)
    yield Sample((wide[::2, 3:500], ids(6, 400)[::2], 0.5), label="row-stride")
    yield Sample((wide[:, ::2], ids(6, 300), 2.0), label="column-stride")
    lone = torch.full((2, 50), -math.inf, dtype=dtype, device=device)
    lone[:, 9] = 3.0
    yield Sample((lone, torch.tensor([9, 9], device=device), 1.0), label="one-finite-logit")
    yield Sample((logits(0, 9), ids(0, 9), 1.0), label="empty-batch")


def backward_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for sample in samples(dtype, device, seed):
        logits_NV, ids_N, temperature = sample.args
        _, lse_N = compute(logits_NV, ids_N, temperature)
        grad_N = torch.linspace(-1, 2, len(ids_N), device=device)
        yield Sample((grad_N, logits_NV, ids_N, lse_N, temperature), label=sample.label)


def gradcheck(seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    yield Sample((logits, torch.tensor([0, 6, 3, 3]), 0.7), label="four-rows")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    strides = dict.fromkeys(("logits_row", "logits_column", "ids_stride", "vocabulary"), "i64")
    common = {"logits_ptr": pointer, "ids_ptr": "*i64", "lse_ptr": "*fp32", "scale": "fp32", **strides}
    yield CompileCase(
        f"{HERE}.triton:selective_logprob_kernel", {**common, "logp_ptr": "*fp32"}, {"BLOCK": 4096}, "forward"
    )
    more = {**common, "grad_ptr": "*fp32", "grad_stride": "i64", "out_ptr": pointer}
    yield CompileCase(f"{HERE}.triton:selective_logprob_backward_kernel", more, {"BLOCK": 4096}, "backward")


def cost(logits_NV: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=logits_NV.numel() * logits_NV.element_size())


def backward_cost(grad_N: torch.Tensor, logits_NV: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * logits_NV.numel() * logits_NV.element_size())


SPECS = (
    OpSpec(
        name="selective_logprob",
        schema="(Tensor logits, Tensor ids, float temperature) -> (Tensor, Tensor)",
        implementations=implementations("selective_logprob", unsupported),
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances=TOLERANCES,
        backward=backward,
        setup_context=setup_context,
        gradcheck=gradcheck,
        compile_cases=compile_cases,
        cost=cost,
    ),
    OpSpec(
        name="selective_logprob_backward",
        schema="(Tensor grad, Tensor logits, Tensor ids, Tensor lse, float temperature) -> Tensor",
        implementations=implementations("selective_logprob_backward", unsupported_backward),
        fake=fake_backward,
        samples=backward_samples,
        dtypes=DTYPES,
        tolerances=BACKWARD_TOLERANCES,
        cost=backward_cost,
    ),
)
