"""What the library knows of gumbel_sample and gumbel_uniform."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.gumbel_sample"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(logits_BV: torch.Tensor, *_: Any, **__: Any) -> str | None:
    return None if logits_BV.dtype in DTYPES else f"{logits_BV.dtype} logits"


def fake(logits_BV: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = logits_BV.shape[0]
    return logits_BV.new_empty((batch,), dtype=torch.int64), logits_BV.new_empty((batch,), dtype=torch.float32)


def fake_uniform(context_BH: torch.Tensor, key: int, vocabulary: int) -> torch.Tensor:
    return context_BH.new_empty((context_BH.shape[0], vocabulary), dtype=torch.float32)


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def logits(batch: int, vocabulary: int) -> torch.Tensor:
        values = torch.randn(batch, vocabulary, generator=generator) * 3
        values[:, 1::5] = -math.inf
        return values.to(dtype).to(device)

    def context(batch: int, width: int) -> torch.Tensor:
        return torch.randint(-1, 50_000, (batch, width), generator=generator).to(device)

    def numbers(batch: int) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, (batch,), generator=generator).to(device)

    plain = (1.0, None, 0, 1.0, 0.0, None, True)
    for vocabulary in (1, 2, 255, 256, 257, 2000):
        keyed = (logits(3, vocabulary), context(3, 4), (1 << 40) + 5, None, None)
        yield Sample((*keyed, *plain), label=f"keyed-{vocabulary}")
        seeded = (logits(3, vocabulary), None, 0, numbers(3), numbers(3))
        yield Sample((*seeded, 0.7, None, 0, 1.0, 0.0, None, False), label=f"seeded-{vocabulary}")
    wide = logits(6, 700)
    truncations = {
        "top-k": (7, 1.0, 0.0), "top-k-1": (1, 1.0, 0.0), "top-k-many": (300, 1.0, 0.0), "top-p": (0, 0.8, 0.0),
        "min-p": (0, 1.0, 0.1), "all": (50, 0.9, 0.02),
    }  # fmt: skip
    for name, (k, p, m) in truncations.items():
        yield Sample((wide[::2], context(3, 1), -7, None, None, 0.9, None, k, p, m, None, True), label=name)
    temperatures = torch.tensor([0.2, 1.0, 5.0], device=device)
    chosen = torch.tensor([True, False, True], device=device)
    args = (wide[:3, ::3], None, 0, numbers(6)[::2], numbers(3), 1.0, temperatures, 0, 1.0, 0.0, chosen, True)
    yield Sample(args, label="rows")
    yield Sample((wide.t()[:4], context(4, 0), 3, None, None, *plain), label="transposed")
    odd = logits(4, 300)
    odd[0, 5], odd[1, 7], odd[2] = math.nan, math.inf, -math.inf
    yield Sample((odd, context(4, 2), 3, None, None, *plain), label="bad-rows")
    yield Sample((odd, context(4, 2), 3, None, None, 1.0, None, 9, 0.7, 0.01, None, True), label="bad-rows-truncated")
    yield Sample((logits(0, 9), context(0, 2), 3, None, None, *plain), label="empty-batch")


def uniform_samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-1, 50_000, (6, 20), generator=generator).to(device)
    for vocabulary in (1, 3, 4, 66, 2001):
        yield Sample((wide[:3, :4], 42, vocabulary), label=f"{vocabulary}")
    yield Sample((wide[::2, ::3], -9, 100), label="strided")
    yield Sample((wide[:3, :0], 7, 9), label="no-context")
    yield Sample((wide[:0], 7, 9), label="empty-batch")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    logits = {"logits_ptr": pointer, "logits_row": "i64", "logits_column": "i64"}
    temperature = {"temperature_ptr": "*fp32", "temperature": "fp32"}
    noise = dict.fromkeys(("context_ptr", "seeds_ptr", "positions_ptr"), "*i64")
    noise |= dict.fromkeys(("context_row", "context_column", "key_low", "key_high"), "i64")
    tables = {"score_ptr": "*fp32", "id_ptr": "*i64", "top_ptr": "*fp32", "sum_ptr": "*fp32"}
    sizes = {"vocabulary": "i64", "blocks": "i64"}
    signature = {**logits, **temperature, **noise, "least_ptr": "*fp32", "rows_ptr": "*i1", **sizes, **tables}
    variants = {"plain": (False, False, False), "everything": (True, True, True)}
    for name, (seeded, cut, logprob) in variants.items():
        constexprs = {
            "SEEDED": seeded,
            "WIDTH": 4,
            "PER_ROW": seeded,
            "CUT": cut,
            "MASKED": cut,
            "LOGPROB": logprob,
            "BLOCK": 2048,
        }
        yield CompileCase(f"{HERE}.triton:block_kernel", signature, constexprs, name)
        row = {
            **logits,
            **temperature,
            "rows_ptr": "*i1",
            "blocks": "i64",
            **tables,
            "ids_ptr": "*i64",
            "logprobs_ptr": "*fp32",
        }
        constexprs = {"PER_ROW": seeded, "MASKED": cut, "LOGPROB": logprob, "SPAN": 128}
        yield CompileCase(f"{HERE}.triton:row_kernel", row, constexprs, name)
    cut_signature = {**logits, **temperature, "least_ptr": "*fp32", "vocabulary": "i64"}
    cut_signature |= {"top_k": "i64", "top_p": "fp32", "log_min_p": "fp32"}
    constexprs = {"PER_ROW": True, "TOP_K": True, "TOP_P": True, "MIN_P": True, "BLOCK": 4096}
    yield CompileCase(f"{HERE}.triton:cutoff_kernel", cut_signature, constexprs, "cutoff")


def uniform_compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    numbers = ("context_row", "context_column", "key_low", "key_high", "vocabulary")
    signature = {"context_ptr": "*i64", "out_ptr": "*fp32", **dict.fromkeys(numbers, "i64")}
    yield CompileCase(f"{HERE}.triton:uniform_kernel", signature, {"WIDTH": 4, "BLOCK": 2048})


def cost(logits_BV: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=logits_BV.numel() * logits_BV.element_size())


def uniform_cost(context_BH: torch.Tensor, key: int, vocabulary: int) -> Cost:
    return Cost(bytes=context_BH.shape[0] * vocabulary * 4)


SPECS = (
    OpSpec(
        name="gumbel_sample",
        schema="(Tensor logits, Tensor? context, int key, Tensor? seeds, Tensor? positions, float temperature, "
        "Tensor? temperatures, int top_k, float top_p, float min_p, Tensor? rows, bool want_logprob) -> (Tensor, Tensor)",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:gumbel_sample", ("*",), 0),
            C: Implementation(f"{HERE}.c:gumbel_sample", ("cpu",), 10, unsupported),
            TRITON: Implementation(f"{HERE}.triton:gumbel_sample", ("cuda",), 20, unsupported),
        },
        fake=fake,
        samples=samples,
        dtypes=DTYPES,
        tolerances=dict.fromkeys(DTYPES, (1e-5, 2e-5)),  # the ids agree exactly, the log-probs to these
        compile_cases=compile_cases,
        cost=cost,
    ),
    OpSpec(
        name="gumbel_uniform",
        schema="(Tensor context, int key, int vocabulary) -> Tensor",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:gumbel_uniform", ("*",), 0),
            C: Implementation(f"{HERE}.c:gumbel_uniform", ("cpu",), 10),
            TRITON: Implementation(f"{HERE}.triton:gumbel_uniform", ("cuda",), 20),
        },
        fake=fake_uniform,
        samples=uniform_samples,
        dtypes=(),
        exact=True,
        compile_cases=uniform_compile_cases,
        cost=uniform_cost,
    ),
)
