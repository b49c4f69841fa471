"""What the generic suites do to an operation, for ours and for backends registered by others.

    from fairlead_kernels.testing import check_parity
    check_parity(spec, "mine", torch.float32)

Knows OpSpecs only; needs pytest nowhere.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .dispatch import use_backend
from .opspec import REFERENCE, OpSpec, Sample

HALVES = (torch.float16, torch.bfloat16)


def operator(spec: OpSpec) -> Any:
    """The torch operator of a spec."""
    return getattr(torch.ops.fairlead, spec.name).default


def mutated(spec: OpSpec) -> list[int]:
    """Positions of the arguments that the operation writes."""
    arguments = operator(spec)._schema.arguments
    return [
        i for i, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    ]


def relaid(value: torch.Tensor, order: tuple[int, ...], gaps: tuple[int, ...], offset: int) -> torch.Tensor:
    """The same values in another memory layout: dimensions from the slowest to the fastest, gaps between elements of
    each (0 = dense), and a start within the storage."""
    strides, span = [0] * value.dim(), 1
    for dimension in reversed(order):
        strides[dimension] = span * (1 + gaps[dimension])
        span = strides[dimension] * max(1, value.shape[dimension])
    storage = torch.zeros(span + offset, dtype=value.dtype, device=value.device)
    laid = storage.as_strided(value.shape, strides, offset)
    laid.copy_(value.detach())
    return laid.requires_grad_(value.requires_grad)


def copied(value: Any) -> Any:
    """A tensor with its strides kept, so that a call may write it; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if 0 in value.stride():
        return value.detach().clone()
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value.detach())


def results(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str) -> list[Any]:
    """Outputs and written arguments of one call under one backend; the arguments given stay untouched."""
    written = mutated(spec)
    args = tuple(copied(value) if i in written else value for i, value in enumerate(args))
    with use_backend(backend):
        out = operator(spec)(*args, **kwargs)
    outputs = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
    return outputs + [args[i] for i in written]


def widened(sample: Sample) -> Sample:
    """The sample with 16-bit floats as float32, on which the reference says what is right."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value

    kwargs = {name: wide(value) for name, value in sample.kwargs.items()}
    return Sample(tuple(map(wide, sample.args)), kwargs, sample.label)


def assert_agree(found: Any, right: Any, rtol: float, atol: float, what: str) -> None:
    """AssertionError unless two results agree: integers and bools exactly, floats within tolerance, infinities and
    NaN in the same places. rtol = atol = 0: the values are equal."""
    if not isinstance(right, torch.Tensor):
        if found != right:
            raise AssertionError(f"{what}: {found!r}, {right!r} is right")
        return
    if found.shape != right.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, {tuple(right.shape)} is right")
    if not right.dtype.is_floating_point:
        wrong = found != right
    else:
        x, y = found.detach().double(), right.detach().double()
        close = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= atol + rtol * y.abs()) & y.isfinite()
        wrong = ~close
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {first}: "
            f"{found[first].item()!r}, {right[first].item()!r} is right"
        )


def tolerance(
    spec: OpSpec, dtype: torch.dtype, interpreted: bool = False, result: torch.dtype | None = None
) -> tuple[float, float]:
    """(rtol, atol) of an operation at a dtype. Triton's interpreter truncates to bfloat16, hardware rounds: 2^-6.
    An operation on integers alone has the tolerance of its result's dtype, or else the one given for float32."""
    key = dtype
    if not spec.dtypes:
        key = result if result is not None and result in spec.tolerances else torch.float32
    rtol, atol = (0.0, 0.0) if spec.exact else spec.tolerances.get(key, (0.0, 0.0))
    return (max(rtol, 2.0**-6), max(atol, 2.0**-9)) if interpreted and dtype == torch.bfloat16 else (rtol, atol)


def check_sample(
    spec: OpSpec,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    interpreted: bool = False,
    seen: Sample | None = None,
) -> None:
    """One call of a backend against the reference. seen: what the backend is given instead (another layout)."""
    seen = seen or sample
    truth = sample if spec.exact else widened(sample)
    right = results(spec, truth.args, truth.kwargs, REFERENCE)
    found = results(spec, seen.args, seen.kwargs, backend)
    if len(found) != len(right):
        raise AssertionError(f"{spec.name} by {backend}: {len(found)} results, {len(right)} are right")
    for i, (x, y) in enumerate(zip(found, right, strict=True)):
        rtol, atol = tolerance(spec, dtype, interpreted, y.dtype if isinstance(y, torch.Tensor) else None)
        assert_agree(x, y, rtol, atol, f"{spec.name} by {backend}, {dtype}, {sample.label or 'sample'}, result {i}")


def check_parity(spec: OpSpec, backend: str, dtype: torch.dtype, seed: int = 0, interpreted: bool = False) -> None:
    """Every sample of an operation under a backend against the reference."""
    for sample in spec.samples(dtype, "cpu", seed):
        check_sample(spec, sample, backend, dtype, interpreted)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory of torch holds NaN, or the largest integer: what a kernel forgets to write shows."""

    def spoil(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
            value = function(*args, **kwargs)
            if value.device.type == "meta":
                return value
            floating = value.dtype.is_floating_point
            worst = float("nan") if floating else 1 if value.dtype == torch.bool else torch.iinfo(value.dtype).max
            with torch.no_grad():
                return value.fill_(worst)

        return spoiled

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, spoil(getattr(owner, name))))
        yield


def far_apart(value: torch.Tensor, stride: int = (1 << 31) + 64) -> torch.Tensor:
    """The same values with rows `stride` elements apart in address space that is reserved but not used (Linux), so that
    an offset computed in 32 bits points elsewhere. OSError where the system reserves no such span."""
    size = ((value.shape[0] - 1) * stride + value[0].numel()) * value.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=value.dtype)
    dense = value.detach().contiguous()
    return storage.as_strided(value.shape, (stride, *dense.stride()[1:])).copy_(dense)
