"""What the library knows of gumbel_score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...opspec import REFERENCE, TRITON, C, CompileCase, Cost, Implementation, OpSpec, Sample

HERE = "fairlead_kernels.ops.gumbel_score"


def fake(ids_BT: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = ids_BT.shape[0]
    return (
        ids_BT.new_empty((batch,), dtype=torch.float64),
        ids_BT.new_empty((batch,), dtype=torch.int64),
        torch.empty(ids_BT.shape, dtype=torch.float64, device=ids_BT.device),
    )


def samples(dtype: torch.dtype, device: str, seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int, tokens: int, low: int = 0, high: int = 7) -> torch.Tensor:
        return torch.randint(low, high, (rows, tokens), generator=generator).to(device)

    lengths = torch.tensor([0, 31, 40], device=device)
    for width in (0, 1, 4, 6):
        for dedup in ("pair", "context", "none"):
            yield Sample((ids(3, 40), None, None, 42, width, dedup, False), label=f"{width}-{dedup}")
        yield Sample((ids(3, 40, -1), lengths, None, -3, width, "context", True), label=f"{width}-gaps")
        wide = ids(6, 50, -1, 50_000)
        args = (wide[::2, 3:43:2], lengths - 5, wide[3:, -2:], 9, width, "pair", False)
        yield Sample(args, label=f"{width}-strided-after-context")
    yield Sample((ids(2, 3), None, ids(2, 9), 1, 4, "none", False), label="long-context")
    yield Sample((ids(2, 3), None, None, 1, 4, "none", False), label="too-short")
    yield Sample((ids(0, 9), None, None, 1, 1, "pair", False), label="empty-batch")
    yield Sample((ids(2, 0), None, None, 1, 1, "pair", False), label="no-tokens")


def compile_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    numbers = ("length", "tokens", "key_low", "key_high")
    signature = {"tokens_ptr": "*i64", "word_ptr": "*i64", "print_ptr": "*i64", **dict.fromkeys(numbers, "i64")}
    for by_context in (False, True):
        constexprs = {"BY_CONTEXT": by_context, "WIDTH": 5, "BLOCK": 1024}
        yield CompileCase(f"{HERE}.triton:gumbel_score_kernel", signature, constexprs, str(by_context))


def cost(ids_BT: torch.Tensor, *_: Any) -> Cost:
    return Cost(bytes=ids_BT.numel() * 16 + ids_BT.shape[0] * 24)


SPECS = (
    OpSpec(
        name="gumbel_score",
        schema="(Tensor ids, Tensor? lengths, Tensor? context, int key, int context_width, str dedup, bool pad_left) "
        "-> (Tensor, Tensor, Tensor)",
        implementations={
            REFERENCE: Implementation(f"{HERE}.reference:gumbel_score", ("*",), 0),
            C: Implementation(f"{HERE}.c:gumbel_score", ("cpu",), 10),
            TRITON: Implementation(f"{HERE}.triton:gumbel_score", ("cuda",), 20),
        },
        fake=fake,
        samples=samples,
        dtypes=(),
        tolerances={torch.float32: (1e-12, 1e-12)},  # counts are exact, sums differ in their order
        compile_cases=compile_cases,
        cost=cost,
    ),
)
