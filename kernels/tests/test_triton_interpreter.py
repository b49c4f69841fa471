"""Triton kernels in Triton's interpreter, on any machine: `TRITON_INTERPRET=1 pytest kernels/tests -m triton`.

The variable must be set before triton is imported, so this is a process of its own. It proves indexing and maths, not
races or shared memory."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from fairlead_kernels import dispatch
from fairlead_kernels.opspec import OpSpec
from fairlead_kernels.testing import assert_agree, check_sample, far_apart, mutated, poisoned, tolerance

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(not dispatch.interpreting(), reason="a process of its own with TRITON_INTERPRET=1"),
]
Case = tuple[OpSpec, torch.dtype]
if dispatch.interpreting() and importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def careless_add(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0)
        tl.store(out_ptr + at, x + x, mask=at < n)

    @triton.jit
    def careful_add(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0).to(tl.float32)
        tl.store(out_ptr + at, (x + x).to(out_ptr.dtype.element_ty), mask=at < n)


def skip_unless_offered(spec: OpSpec) -> None:
    if "triton" not in spec.implementations:
        pytest.skip("no Triton backend")


def test_triton_agrees_with_the_reference_into_poisoned_memory(spec_dtype: Case) -> None:
    spec, dtype = spec_dtype
    skip_unless_offered(spec)
    unsupported = spec.implementations["triton"].unsupported
    for sample in spec.samples(dtype, "cpu", 0):
        if unsupported is None or unsupported(*sample.args, **sample.kwargs) is None:
            with poisoned():
                check_sample(spec, sample, "triton", dtype, interpreted=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
def test_triton_offsets_are_computed_in_64_bits(spec: OpSpec) -> None:
    skip_unless_offered(spec)
    dtype = (spec.dtypes or (torch.int64,))[0]
    unsupported = spec.implementations["triton"].unsupported
    for sample in list(spec.samples(dtype, "cpu", 5))[:6]:
        for i, value in enumerate(sample.args):
            if not isinstance(value, torch.Tensor) or value.dim() < 2 or not 2 <= value.shape[0] <= 4:
                continue
            if value[0].numel() == 0 or i in mutated(spec):
                continue
            args = (*sample.args[:i], far_apart(value), *sample.args[i + 1 :])
            if unsupported is None or unsupported(*args, **sample.kwargs) is None:
                check_sample(spec, sample, "triton", dtype, interpreted=True, seen=type(sample)(args, sample.kwargs))


def test_a_kernel_without_its_cast_to_float32_is_caught() -> None:
    x = torch.linspace(-3, 3, 50, dtype=torch.float32).to(torch.bfloat16)
    spec = next(iter(specs_with_floats()))
    rtol, atol = tolerance(spec, torch.bfloat16, interpreted=True)
    out = torch.empty_like(x)
    careful_add[(1,)](x, out, x.numel(), BLOCK=64)
    assert_agree(out, x.float() * 2, rtol, atol, "careful_add")
    careless_add[(1,)](x, out, x.numel(), BLOCK=64)
    with pytest.raises(AssertionError, match="careless_add"):
        assert_agree(out, x.float() * 2, rtol, atol, "careless_add")


def specs_with_floats() -> list[OpSpec]:
    from fairlead_kernels.library import load_all

    return [spec for spec in load_all().values() if torch.bfloat16 in spec.dtypes]
