"""What the library knows of watermark_bias: a functional operation and its in-place and out= twins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.watermark_bias"
SETTINGS = "Tensor context, int key, float gamma, float delta, str scheme, Tensor? rows"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(logits_BV: torch.Tensor, *_: Any, **__: Any) -> str | None:
    return None if logits_BV.dtype in DTYPES else f"{logits_BV.dtype} logits"


def implementations(function: str) -> dict[str, Implementation]:
    return {
        REFERENCE: Implementation(f"{HERE}.reference:{function}", ("*",), 0),
        C: Implementation(f"{HERE}.c:{function}", ("cpu",), 10, unsupported),
        TRITON: Implementation(f"{HERE}.triton:{function}", ("cuda",), 20, unsupported),
    }


def fake(logits_BV: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(logits_BV.shape, dtype=logits_BV.dtype, device=logits_BV.device)


def fake_nothing(*_: Any) -> None:
    return None


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.hard = math.isinf(inputs[4])
    if ctx.hard:
        ctx.save_for_backward(output)


def backward(ctx: Any, grad_BV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.hard:
        grad_BV = grad_BV.masked_fill(ctx.saved_tensors[0] == -math.inf, 0.0)
    return grad_BV, None, None, None, None, None, None


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def logits(batch: int, vocabulary: int) -> torch.Tensor:
        values = torch.randn(batch, vocabulary, generator=generator) * 4
        values[:, ::7] = -math.inf
        if vocabulary > 3 and batch:
            values[0, 3] = math.nan
        return values.to(dtype).to(device)

    def context(batch: int, width: int) -> torch.Tensor:
        return torch.randint(-1, 50_000, (batch, width), generator=generator).to(device)

    for scheme, width in (("lefthash", 1), ("lefthash", 5), ("lefthash", 0), ("minhash", 4), ("selfhash", 3)):
        name = f"{scheme}-{width}"
        yield Sample((logits(3, 257), context(3, width), 42, 0.25, 2.0, scheme, None), label=name)
        yield Sample((logits(2, 65), context(2, width), -9, 0.5, math.inf, scheme, None), label=f"{name}-hard")
    chosen = torch.tensor([True, False, True], device=device)
    yield Sample((logits(3, 1), context(3, 1), 1, 0.5, 1.0, "lefthash", chosen), label="rows-and-one-token")
    yield Sample((logits(3, 100), context(3, 3), 1, 0.5, 1.0, "selfhash", chosen), label="rows")
    wide, long = logits(4, 130), context(4, 6)
    yield Sample((wide[::2, 5:120], long[::2, ::3], 7, 0.1, 3.0, "minhash", None), label="row-stride")
    yield Sample((wide[:, ::2], long[:, 3:], 7, 0.9, 3.0, "selfhash", None), label="column-stride")
    yield Sample((wide.t()[:6], context(6, 2), 7, 0.9, 0.0, "lefthash", None), label="transposed")
    yield Sample((logits(0, 32), context(0, 1), 7, 0.5, 2.0, "lefthash", None), label="empty-batch")
    yield Sample((logits(2, 0), context(2, 1), 7, 0.5, 2.0, "lefthash", None), label="empty-vocabulary")


def out_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    for sample in samples(dtype, device, seed):
        batch, vocabulary = sample.args[0].shape
        buffer = torch.full((batch, vocabulary + 3), 5.0, dtype=dtype, device=device)
        yield Sample((*sample.args, buffer[:, :vocabulary]), label=sample.label)
        if sample.label == "rows":
            across = torch.full((vocabulary, batch), 5.0, dtype=dtype, device=device)
            yield Sample((*sample.args, across.t()), label="out-by-columns")


def gradcheck(seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    context = torch.randint(0, 100, (2, 2), generator=generator)
    for scheme in ("lefthash", "minhash", "selfhash"):
        yield Sample((logits, context, 5, 0.5, 2.0, scheme, torch.tensor([True, False])), label=scheme)


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    numbers = (
        "logits_row",
        "logits_column",
        "context_row",
        "context_column",
        "key_low",
        "key_high",
        "limit",
        "rows_stride",
        "out_row",
        "out_column",
        "vocabulary",
    )
    signature = {
        "logits_ptr": pointer,
        "out_ptr": pointer,
        "context_ptr": "*i64",
        "rows_ptr": "*u8",
        "delta": "fp32",
        **dict.fromkeys(numbers, "i64"),
    }
    for scheme in range(3):
        for hard in (False, True):
            constexprs = {"SCHEME": scheme, "HARD": hard, "WIDTH": 3, "BLOCK": 1024}
            yield CompileCase(f"{HERE}.triton:watermark_bias_kernel", signature, constexprs, f"scheme{scheme}-{hard}")


def cost(logits_BV: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * logits_BV.numel() * logits_BV.element_size())


def _spec(name: str, schema: str, fake: Callable[..., Any], **others: Any) -> OpSpec:
    made: dict[str, Any] = {"samples": samples, "dtypes": DTYPES, "exact": True, "cost": cost, **others}
    return OpSpec(name=name, schema=schema, implementations=implementations(name), fake=fake, **made)


SPECS = (
    _spec(
        "watermark_bias",
        f"(Tensor logits, {SETTINGS}) -> Tensor",
        fake,
        backward=backward,
        setup_context=setup_context,
        gradcheck=gradcheck,
        compile_cases=compile_cases,
    ),
    _spec("watermark_bias_", f"(Tensor(a!) logits, {SETTINGS}) -> ()", fake_nothing),
    _spec(
        "watermark_bias_out", f"(Tensor logits, {SETTINGS}, Tensor(a!) out) -> ()", fake_nothing, samples=out_samples
    ),
)
