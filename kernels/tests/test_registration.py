"""Operations as torch sees them: opcheck, fakes, gradients, torch.compile."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from fairlead_kernels import dispatch, library, native, prf, use_backend, watermark_bias
from fairlead_kernels.opspec import OpSpec
from fairlead_kernels.testing import copied, operator, results

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def finite(value: Any) -> Any:
    """opcheck compares results by allclose, to which NaN equals nothing; results with NaN are traced instead."""
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.masked_fill_(value.isnan(), 1.0) if floating else value


def test_opcheck_passes_all_four_checks(spec: OpSpec) -> None:
    dtype = (spec.dtypes or (torch.int64,))[0]
    for sample in spec.samples(dtype, "cpu", 0):
        args = tuple(finite(copied(value)) for value in sample.args)
        if any(
            isinstance(x, torch.Tensor) and x.isnan().any() for x in results(spec, args, sample.kwargs, "reference")
        ):
            found = torch.library.opcheck(operator(spec), args, sample.kwargs, test_utils=CHECKS[:3])
            traced: Any = torch.compile(operator(spec), backend="aot_eager", dynamic=True)
            torch.testing.assert_close(
                traced(*args, **sample.kwargs), operator(spec)(*args, **sample.kwargs), equal_nan=True
            )
        else:
            found = torch.library.opcheck(operator(spec), args, sample.kwargs, test_utils=CHECKS)
        assert set(found.values()) == {"SUCCESS"}, sample.label


def test_gradients_match_finite_differences(spec: OpSpec) -> None:
    if spec.gradcheck is None:
        pytest.skip("not differentiable")
    for sample in spec.gradcheck(0):
        assert torch.autograd.gradcheck(lambda *args, s=sample: operator(spec)(*args, **s.kwargs), sample.args)


def test_gradients_agree_between_backends(spec: OpSpec) -> None:
    if spec.backward is None:
        pytest.skip("not differentiable")
    if "c" not in spec.implementations or native.why_absent():
        pytest.skip("no C backend here")
    unsupported = spec.implementations["c"].unsupported
    for sample in spec.samples(torch.float32, "cpu", 2):
        if unsupported is not None and unsupported(*sample.args, **sample.kwargs) is not None:
            continue
        if not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in sample.args):
            continue
        found = {}
        for backend in ("reference", "c"):
            args = [copied(value) for value in sample.args]
            leaves = [v.requires_grad_() for v in args if isinstance(v, torch.Tensor) and v.dtype.is_floating_point]
            with use_backend(backend):
                out = operator(spec)(*args, **sample.kwargs)
                outputs = [out] if isinstance(out, torch.Tensor) else out
                outputs = [one for one in outputs if isinstance(one, torch.Tensor) and one.requires_grad]
                weights = [torch.linspace(0.5, 1.5, one.numel()).view(one.shape).to(one.dtype) for one in outputs]
                found[backend] = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
        for right, other in zip(found["reference"], found["c"], strict=True):
            assert (right is None) == (other is None), sample.label
            if right is not None:
                torch.testing.assert_close(other, right, rtol=1e-4, atol=1e-5, equal_nan=True, msg=sample.label)


def test_importing_an_operation_again_keeps_its_definition() -> None:
    module = importlib.import_module("fairlead_kernels.ops.prf")
    before = torch.ops.fairlead.prf.default
    importlib.reload(module)
    library.define(module.SPECS)
    assert torch.ops.fairlead.prf.default is before


def test_meta_tensors_get_shapes_without_values() -> None:
    logits = torch.empty(3, 50, dtype=torch.bfloat16, device="meta")
    out = watermark_bias(logits, torch.empty(3, 1, dtype=torch.int64, device="meta"), key=1)
    assert out.device.type == "meta" and out.shape == (3, 50) and out.dtype == torch.bfloat16


SLOW = pytest.mark.skipif(
    not os.environ.get("FAIRLEAD_TEST_COMPILE"), reason="set FAIRLEAD_TEST_COMPILE=1: needs a C++ compiler and its time"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_torch_compile_makes_one_graph(backend: str) -> None:
    def step(logits: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        biased = watermark_bias(logits * 2, context, key=5, scheme="minhash")
        watermark_bias(biased, context, key=6, out=biased)
        words: torch.Tensor = prf(context, context, key=7)
        mixed: torch.Tensor = biased.softmax(-1) + words.sum()
        return mixed

    logits, context = torch.randn(2, 300), torch.randint(0, 300, (2, 3))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(logits, context), step(logits, context))


def test_explain_names_a_backend_for_every_operation() -> None:
    rows = {row["operation"]: row for row in dispatch.explain("cpu")}
    assert set(rows) == set(library.load_all())
    for row in rows.values():
        assert row["backend"] in dispatch.implementations(library.specs()[row["operation"]])
        assert row["backend"] not in row["reasons"] and all(row["reasons"].values())
