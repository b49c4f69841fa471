"""What the library knows of linear_logprob and its backward.

"tiled" serves CPU without a C library, float64 and other devices: the same tiles as C and Triton, torch's own steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample
from .reference import accumulator, nothing
from .reference import linear_logprob as compute

HERE = "fairlead_kernels.ops.linear_logprob"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.float16: (2**-9, 1e-4), torch.bfloat16: (2**-7, 1e-4)}


def unsupported(hidden_ND: torch.Tensor, *_: Any) -> str | None:
    return None if hidden_ND.dtype in DTYPES else f"{hidden_ND.dtype} hidden states"


def unsupported_backward(grad_N: torch.Tensor, hidden_ND: torch.Tensor, *_: Any) -> str | None:
    return unsupported(hidden_ND)


def implementations(function: str, check: Any) -> dict[str, Implementation]:
    return {
        REFERENCE: Implementation(f"{HERE}.reference:{function}", ("*",), 0),
        "tiled": Implementation(f"{HERE}.tiles:{function}", ("cpu", "*"), 5),
        C: Implementation(f"{HERE}.c:{function}", ("cpu",), 10, check),
        TRITON: Implementation(f"{HERE}.triton:{function}", ("cuda",), 20, check),
    }


def fake(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, bias: Any, temperature: float, unit: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = accumulator(hidden_ND.dtype)
    shape_ND = hidden_ND.shape if unit else (0, hidden_ND.shape[1])
    return (
        hidden_ND.new_empty(target_N.shape, dtype=wide),
        hidden_ND.new_empty(target_N.shape, dtype=wide),
        hidden_ND.new_empty(shape_ND),
    )


def fake_backward(
    grad_N: torch.Tensor,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    lse_N: torch.Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_hidden, d_weight, d_bias = nothing(hidden_ND, weight_VD, bias_V)
    return (
        hidden_ND.new_empty(hidden_ND.shape) if need_hidden else d_hidden,
        weight_VD.new_empty(weight_VD.shape) if need_weight else d_weight,
        bias_V.new_empty(bias_V.shape) if need_bias and bias_V is not None else d_bias,
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden_ND, weight_VD, target_N, bias_V, ctx.temperature, ctx.unit = inputs
    if ctx.unit:
        ctx.save_for_backward(output[2])
    else:
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, bias_V, output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def backward(ctx: Any, grad_N: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if ctx.unit:
        (unit_ND,) = ctx.saved_tensors
        return (unit_ND * grad_N[:, None]).to(unit_ND.dtype), None, None, None, None, None
    hidden_ND, weight_VD, target_N, bias_V, lse_N = ctx.saved_tensors
    hidden, weight, _, bias, *_ = ctx.needs_input_grad
    d_hidden, d_weight, d_bias = torch.ops.fairlead.linear_logprob_backward.default(
        grad_N, hidden_ND, weight_VD, target_N, bias_V, lse_N, ctx.temperature, hidden, weight, bias
    )
    return d_hidden if hidden else None, d_weight if weight else None, None, d_bias if bias else None, None, None


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def targets(count: int, vocabulary: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator).to(device)

    for count, width, vocabulary, unit in ((5, 16, 2000, False), (4, 7, 33, True), (3, 1, 1, True)):
        weight = random(vocabulary, width)
        yield Sample(
            (random(count, width), weight, targets(count, vocabulary), None, 1.0, unit), label=f"{vocabulary}-{unit}"
        )
    bias = random(50)
    bias[3::7] = -float("inf")
    far = torch.tensor([0, 49, 8, 1], device=device)
    for unit in (False, True):
        yield Sample((random(4, 8), random(50, 8), far, bias, 0.7, unit), label=f"bias-{unit}")
    wide = random(6, 40)
    yield Sample((wide[::2, ::2], random(60, 40)[::2, 20:], targets(6, 30)[::2], None, 2.0, True), label="strides")
    yield Sample((random(0, 8), random(9, 8), targets(0, 9), None, 1.0, False), label="empty-batch")
    yield Sample((random(0, 8), random(9, 8), targets(0, 9), None, 1.0, True), label="empty-batch-unit")


def backward_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for sample in samples(dtype, device, seed):
        hidden_ND, weight_VD, target_N, bias_V, temperature, _ = sample.args
        _, lse_N, _ = compute(hidden_ND, weight_VD, target_N, bias_V, temperature, False)
        grad_N = torch.linspace(-1, 2, len(target_N), device=device)
        for need in ((True, True, bias_V is not None), (False, True, False), (True, False, False)):
            yield Sample((grad_N, *sample.args[:4], lse_N, temperature, *need), label=f"{sample.label}-{need}")


def gradcheck(seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    target = torch.tensor([0, 6, 3])
    yield Sample((leaf(3, 4), leaf(7, 4), target, leaf(7), 0.7, False), label="trained")
    yield Sample((leaf(3, 4), leaf(7, 4).detach(), target, None, 1.3, True), label="frozen")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    tile = {"tile_ptr": "*fp32", "count": "i64", "local_ptr": "*i64", "scale": "fp32"}
    rows = dict.fromkeys(("top_ptr", "total_ptr", "chosen_ptr", "rescale_ptr"), "*fp32")
    yield CompileCase(f"{HERE}.triton:tile_forward_kernel", {**tile, **rows}, {"KEEP": True, "BLOCK": 4096}, "frozen")
    del rows["rescale_ptr"]
    yield CompileCase(f"{HERE}.triton:tile_forward_kernel", {**tile, **rows}, {"KEEP": False, "BLOCK": 4096}, "forward")
    more = {"lse_ptr": "*fp32", "factor_ptr": "*fp32"}
    yield CompileCase(f"{HERE}.triton:tile_backward_kernel", {**tile, **more}, {"BLOCK": 4096}, "backward")


def cost(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, *rest: Any) -> Cost:
    """Every product once: two with the unit gradient, else one."""
    bytes_ = (hidden_ND.numel() + weight_VD.numel()) * hidden_ND.element_size()
    return Cost(bytes=bytes_, flops=2 * hidden_ND.shape[0] * weight_VD.numel() * (2 if rest[-1] else 1))


def backward_cost(grad_N: torch.Tensor, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, *rest: Any) -> Cost:
    bytes_ = 2 * (hidden_ND.numel() + weight_VD.numel()) * hidden_ND.element_size()
    return Cost(bytes=bytes_, flops=2 * hidden_ND.shape[0] * weight_VD.numel() * (1 + rest[-3] + rest[-2]))


SPECS = (
    OpSpec(
        name="linear_logprob",
        schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, bool unit)"
        " -> (Tensor, Tensor, Tensor)",
        implementations=implementations("linear_logprob", unsupported),
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
        name="linear_logprob_backward",
        schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor lse,"
        " float temperature, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
        implementations=implementations("linear_logprob_backward", unsupported_backward),
        fake=fake_backward,
        samples=backward_samples,
        dtypes=DTYPES,
        tolerances=TOLERANCES,
        cost=backward_cost,
    ),
)
