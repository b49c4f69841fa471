"""What an operation is: one OpSpec per operation, from which registration, dispatch, tests and benchmarks are made.

A new operation is a folder under `ops/` whose `spec.py` binds `SPECS = (OpSpec(...), ...)`; nothing else lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

REFERENCE, C, TRITON = "reference", "c", "triton"


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    function: "module:attribute", imported on first use; called with exactly the arguments of the schema.
    devices: device types it serves ("*" = any).
    priority: the largest that can serve wins (reference 0, c 10, triton 20).
    unsupported: called with the schema's arguments, returns None when it can serve them, else the reason why not
        (as "bfloat16 weight with float32 bias").
    """

    function: str
    devices: tuple[str, ...]
    priority: int
    unsupported: Callable[..., str | None] | None = None


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, for the generic suites. `label` names the case in test ids."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class CompileCase:
    """One Triton kernel to compile without running: the jitted function ("module:attribute"), its signature
    (argument -> Triton type such as "*bf16", "i64", "fp32") and its constexprs."""

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    label: str = ""


@dataclass(frozen=True)
class Cost:
    """Least bytes that must be moved and floating-point operations that must be done: the floor of a benchmark row."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class OpSpec:
    """Everything the library knows of an operation.

    name: of `torch.ops.fairlead.<name>`. schema: torch.library schema without the name, "(Tensor x, int k) -> Tensor".
    implementations: by backend name. fake: shapes and dtypes of the outputs from meta inputs.
    backward, setup_context: torch.library.register_autograd functions, None where not differentiable.
    samples(dtype, device, seed): small calls (<= 64 Triton programs, vocabulary <= 2048), empty batches and odd
        strides included. dtypes: of the floating inputs (empty = integers only).
    tolerances: dtype -> (rtol, atol) against the reference in float32; missing = exact.
    exact: the outputs are integers or must agree bit for bit. compile_cases(dtype): Triton kernels to compile.
    cost(*args, **kwargs): the floor. gradcheck(seed): float64 samples for gradcheck.
    """

    name: str
    schema: str
    implementations: Mapping[str, Implementation]
    fake: Callable[..., Any]
    samples: Callable[[torch.dtype, str, int], Iterator[Sample]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    tolerances: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    exact: bool = False
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    compile_cases: Callable[[torch.dtype], Iterator[CompileCase]] | None = None
    cost: Callable[..., Cost] | None = None
    gradcheck: Callable[[int], Iterator[Sample]] | None = None
