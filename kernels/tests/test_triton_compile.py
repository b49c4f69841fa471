"""Triton kernels compiled for sm_80 and sm_90 without a GPU: type errors that the interpreter forgives stop here."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fairlead_kernels import dispatch
from fairlead_kernels.opspec import CompileCase, OpSpec

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(dispatch.interpreting(), reason="needs real kernels: TRITON_INTERPRET is set"),
]
if importlib.util.find_spec("triton") is not None and not dispatch.interpreting():
    import triton
    import triton.language as tl

    @triton.jit
    def odd_block(out_ptr):
        at = tl.arange(0, 100)
        tl.store(out_ptr + at, at)

    @triton.jit
    def even_block(out_ptr):
        at = tl.arange(0, 128)
        tl.store(out_ptr + at, at)


def compile_for(capability: int, kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> str:
    """PTX of a kernel. Arguments that are neither in signature nor in constexprs are None pointers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {name: value for name, value in constexprs.items()}
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    for name in kernel.arg_names:
        if types[name] == "constexpr":
            values.setdefault(name, None)
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return str(compiled.asm["ptx"])


def find(case: CompileCase) -> Any:
    module, _, name = case.kernel.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(spec: OpSpec, capability: int) -> None:
    if spec.compile_cases is None:
        pytest.skip("no kernel of its own")
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in spec.dtypes] or [torch.int64]
    for dtype in dtypes:
        cases = list(spec.compile_cases(dtype))
        assert cases
        for case in cases:
            assert "ld.global" in compile_for(capability, find(case), case.signature, case.constexprs), case.label


def test_a_block_that_is_no_power_of_two_is_caught() -> None:
    assert "st.global" in compile_for(80, even_block, {"out_ptr": "*i32"}, {})
    with pytest.raises(triton.CompilationError, match="power of 2"):
        compile_for(80, odd_block, {"out_ptr": "*i32"}, {})
