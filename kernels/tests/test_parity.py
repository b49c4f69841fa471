"""Every backend of every operation gives what the reference gives: samples, other seeds, other memory layouts, far
rows, poisoned memory and several threads. New operations are found by their spec."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead_kernels import dispatch, native
from fairlead_kernels.opspec import Implementation, OpSpec, Sample
from fairlead_kernels.testing import check_parity, check_sample, far_apart, mutated, poisoned, relaid

Case = tuple[OpSpec, torch.dtype]


def backends(spec: OpSpec) -> list[str]:
    """The backends to hold against the reference here (Triton's turn is test_triton_interpreter)."""
    offered = dispatch.implementations(spec).items()
    names = [name for name, one in offered if name not in ("reference", "triton") and "cpu" in one.devices]
    if "c" in names and (reason := native.why_absent()):
        pytest.skip(reason)
    if not names:
        pytest.skip("the reference alone serves this operation on CPU")
    return names


def served(spec: OpSpec, backend: str, sample: Sample) -> bool:
    unsupported = dispatch.implementations(spec)[backend].unsupported
    return unsupported is None or unsupported(*sample.args, **sample.kwargs) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_backends_agree_with_the_reference_on_samples(spec_dtype: Case, seed: int) -> None:
    spec, dtype = spec_dtype
    for backend in backends(spec):
        for sample in spec.samples(dtype, "cpu", seed):
            if served(spec, backend, sample):
                check_sample(spec, sample, backend, dtype)


def test_outputs_are_written_everywhere_when_new_memory_is_poisoned(spec_dtype: Case) -> None:
    spec, dtype = spec_dtype
    served_here = [name for name in ("reference", "tiled", "c") if name in spec.implementations]
    samples = list(spec.samples(dtype, "cpu", 3))
    for backend in served_here:
        if backend == "c" and native.why_absent() is not None:
            continue
        for sample in samples:
            if not served(spec, backend, sample):
                continue
            with poisoned():
                check_sample(spec, sample, backend, dtype)


@settings(max_examples=15)
@given(data=st.data())
def test_backends_agree_in_any_memory_layout(spec: OpSpec, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(spec.dtypes or (torch.int64,)))
    seed = data.draw(st.integers(0, 1000))
    sample = data.draw(st.sampled_from(list(spec.samples(dtype, "cpu", seed))))

    def laid(value: object) -> object:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        order = data.draw(st.permutations(range(value.dim())))
        gaps = data.draw(st.tuples(*[st.integers(0, 2)] * value.dim()))
        return relaid(value, tuple(order), gaps, data.draw(st.integers(0, 3)))

    seen = Sample(tuple(laid(value) for value in sample.args), sample.kwargs, sample.label)
    for backend in ["reference", *backends(spec)]:
        if served(spec, backend, seen):
            check_sample(spec, sample, backend, dtype, seen=seen)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
def test_offsets_are_computed_in_64_bits(spec: OpSpec) -> None:
    dtype = (spec.dtypes or (torch.int64,))[0]
    tried = 0
    for sample in spec.samples(dtype, "cpu", 5):
        for i, value in enumerate(sample.args):
            if not isinstance(value, torch.Tensor) or value.dim() < 2 or not 2 <= value.shape[0] <= 6:
                continue
            if value[0].numel() == 0 or i in mutated(spec):
                continue
            seen = Sample((*sample.args[:i], far_apart(value), *sample.args[i + 1 :]), sample.kwargs, sample.label)
            for backend in backends(spec):
                if served(spec, backend, seen):
                    check_sample(spec, sample, backend, dtype, seen=seen)
                    tried += 1
    if tried == 0:
        pytest.skip("no argument has rows to move apart")


def test_threads_change_nothing(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(native.for_rows, "__kwdefaults__", {"grain": 1})
    for backend in backends(spec):
        for sample in spec.samples((spec.dtypes or (torch.int64,))[0], "cpu", 7):
            if served(spec, backend, sample):
                check_sample(spec, sample, backend, (spec.dtypes or (torch.int64,))[0])


def test_a_wrong_kernel_is_caught() -> None:
    from fairlead_kernels.library import load_all

    spec = load_all()["prf"]
    wrong = Implementation(f"{__name__}:off_by_one", ("cpu",), 1)
    dispatch._registered.setdefault("prf", {})["wrong"] = wrong
    try:
        with pytest.raises(AssertionError, match="prf by wrong"):
            check_parity(spec, "wrong", torch.int64)
    finally:
        del dispatch._registered["prf"]["wrong"]


def off_by_one(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    from fairlead_kernels.ops.prf.reference import prf

    return prf(context_BH, tokens_BN + 1, key, function)
