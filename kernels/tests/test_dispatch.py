"""Who serves a call, what is said about it, and what a forced backend does when it cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import fairlead_kernels
from fairlead_kernels import dispatch, library, native, prf, register_prf, use_backend, watermark_bias
from fairlead_kernels.opspec import Implementation

CONTEXT, TOKENS = torch.tensor([[17]]), torch.tensor([[0, 1, 5, 31999]])
RIGHT = [0xF311DFB4, 0x9DB8932C, 0x5D1B0966, 0x3314DEA1]
needs_c = pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))


def doubled(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    return tokens_BN * 2


@needs_c
def test_c_serves_cpu_tensors_when_nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAIRLEAD_KERNELS", raising=False)
    assert {row["operation"]: row["backend"] for row in dispatch.explain("cpu")}["prf"] == "c"


@pytest.mark.parametrize("name", ["reference", pytest.param("c", marks=needs_c)])
def test_the_environment_forces_a_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_KERNELS", name)
    assert prf(CONTEXT, TOKENS, key=42).tolist() == [RIGHT]
    assert {row["operation"]: row["backend"] for row in dispatch.explain("cpu")}["prf"] == name


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter serves CPU tensors")
def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_KERNELS", "triton")
    with pytest.raises(
        dispatch.KernelUnavailable, match=r"FAIRLEAD_KERNELS=triton cannot serve prf: (it serves|triton is)"
    ):
        prf(CONTEXT, TOKENS, key=42)


def test_an_unknown_backend_is_named_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_KERNELS", "cuda")
    with pytest.raises(dispatch.KernelUnavailable, match="cuda is not a backend; one of c, reference, triton is"):
        prf(CONTEXT, TOKENS, key=42)


def test_float64_is_refused_by_c_and_served_by_the_reference_with_one_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAIRLEAD_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    logits = torch.zeros(1, 5, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "fairlead_kernels"):
        for _ in range(3):
            assert watermark_bias(logits, CONTEXT, key=1).dtype == torch.float64
    if native.why_absent() is None:
        assert [record.getMessage() for record in caplog.records] == [
            "watermark_bias: backend c does not serve here (torch.float64 logits), a slower one does"
        ]


def test_without_the_library_the_reference_serves_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAIRLEAD_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(native, "FILE_NAME", "libfairlead_absent.so")
    native._open.cache_clear()
    dispatch._ranked.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fairlead_kernels"):
            assert prf(CONTEXT, TOKENS, key=42).tolist() == [RIGHT]
        assert "libfairlead_absent.so was not built: no C compiler" in caplog.text
        with use_backend("c"), pytest.raises(dispatch.KernelUnavailable, match="was not built"):
            prf(CONTEXT, TOKENS, key=42)
    finally:
        native._open.cache_clear()
        dispatch._ranked.cache_clear()


def test_a_third_party_backend_serves_by_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAIRLEAD_KERNELS", raising=False)
    fairlead_kernels.register_implementation("prf", "doubler", Implementation(f"{__name__}:doubled", ("cpu",), 99))
    try:
        assert prf(CONTEXT, TOKENS, key=42).tolist() == [[0, 2, 10, 63998]]
        with use_backend("reference"):
            assert prf(CONTEXT, TOKENS, key=42).tolist() == [RIGHT]
        with pytest.raises(ValueError, match="already has a backend 'doubler'"):
            fairlead_kernels.register_implementation("prf", "doubler", Implementation("m:f", ("cpu",), 99))
    finally:
        dispatch._registered.clear()
        dispatch._ranked.cache_clear()


def test_a_backend_of_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no operation 'prff'; there are .*prf"):
        fairlead_kernels.register_implementation("prff", "mine", Implementation("m:f", ("cpu",), 1))


def test_a_registered_prf_is_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairlead_kernels.ops import prf as module

    monkeypatch.setattr(module, "_registered", {})
    register_prf("sum", lambda context_BH, tokens_BN, key: tokens_BN + context_BH.sum(1, keepdim=True) + key)
    assert prf(CONTEXT, TOKENS, key=3, function="sum").tolist() == [[20, 21, 25, 32019]]
    with pytest.raises(ValueError, match="already a PRF 'sum'"):
        register_prf("sum", lambda context_BH, tokens_BN, key: tokens_BN)
    with pytest.raises(ValueError, match="function: one of mix32, philox, sum is needed, not 'aes'"):
        prf(CONTEXT, TOKENS, key=3, function="aes")


def test_every_public_name_is_found_on_the_package() -> None:
    for name in library.public_names():
        assert callable(getattr(fairlead_kernels, name))
    with pytest.raises(AttributeError, match=r"no attribute 'pfr'; operations: .*prf"):
        _ = fairlead_kernels.pfr


@needs_c
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_threads_of_its_own() -> None:
    code = """
import os, torch
from fairlead_kernels import native, prf
context, tokens = torch.zeros(64, 4, dtype=torch.int64), torch.zeros(64, 4096, dtype=torch.int64)
call = lambda: prf(context, tokens, key=1).numpy().tobytes()  # torch's own threads do not survive a fork
torch.set_num_threads(2)
right = call()
child = os.fork()
if child == 0:
    os._exit(0 if call() == right else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
