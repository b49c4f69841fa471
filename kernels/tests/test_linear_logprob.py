"""linear_logprob against dense logits: values, gradients, tiles of every shape, and memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead_kernels import dispatch, linear_logprob, native, selective_logprob, use_backend
from fairlead_kernels.ops.linear_logprob import tiles

BACKENDS = [
    "reference",
    "tiled",
    pytest.param("c", marks=pytest.mark.skipif(native.why_absent() is not None, reason="no C library")),
]


def inputs(count: int, width: int, vocabulary: int, bias: bool = False, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    target = torch.randint(0, vocabulary, (count,), generator=generator)
    return [hidden, weight, target, torch.randn(vocabulary, generator=generator).requires_grad_() if bias else None]


def dense(hidden: Any, weight: Any, target: Any, bias: Any, temperature: float = 1.0) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    chosen: torch.Tensor = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return chosen


def with_gradients(function: Any, leaves: list[Any], temperature: float) -> list[torch.Tensor]:
    logp = function(*leaves, temperature=temperature)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    return [logp, *torch.autograd.grad(logp, wanted, torch.linspace(-1, 2, len(logp)))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_dense_logits(
    backend: str, frozen: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TOKENS", 4)
    monkeypatch.setattr(tiles, "CPU_ELEMENTS", 64)  # tiles of 4 x 16
    leaves = inputs(11, 9, 70, bias)
    if frozen:
        leaves[1] = leaves[1].detach()
        leaves[3] = None if leaves[3] is None else leaves[3].detach()
    with use_backend(backend):
        found = with_gradients(linear_logprob, leaves, 0.7)
    for x, y in zip(found, with_gradients(dense, leaves, 0.7), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5)


@settings(max_examples=40)
@given(data=st.data())
def test_the_shape_of_the_tiles_changes_nothing(data: st.DataObject) -> None:
    count, width, vocabulary = (data.draw(st.integers(1, n)) for n in (9, 6, 40))
    leaves = inputs(count, width, vocabulary, data.draw(st.booleans()), data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        leaves[1], leaves[3] = leaves[1].detach(), None
    if leaves[3] is not None and vocabulary > 1:
        with torch.no_grad():
            leaves[3][:: data.draw(st.integers(2, 5))] = -math.inf
    right = with_gradients(dense, leaves, 1.0)
    backend = data.draw(st.sampled_from(["tiled", "c"] if native.why_absent() is None else ["tiled"]))
    with pytest.MonkeyPatch.context() as patch, use_backend(backend):
        patch.setattr(tiles, "TOKENS", data.draw(st.integers(1, 10)))
        patch.setattr(tiles, "CPU_ELEMENTS", data.draw(st.integers(1, 100)))
        found = with_gradients(linear_logprob, leaves, 1.0)
    known = right[0].isfinite()
    torch.testing.assert_close(found[0], right[0], rtol=1e-5, atol=2e-5)
    if bool(known.all()):
        for x, y in zip(found[1:], right[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=5e-5)


def test_a_constant_added_to_the_bias_changes_nothing_and_its_gradient_sums_to_zero() -> None:
    hidden, weight, target, bias = inputs(5, 8, 30, bias=True)
    logp = linear_logprob(hidden, weight, target, bias)
    torch.testing.assert_close(logp, linear_logprob(hidden, weight, target, bias + 5), rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(logp.sum(), bias)
    assert abs(float(slope.sum())) < 1e-5


def test_it_is_selective_logprob_of_the_logits() -> None:
    hidden, weight, target, _ = inputs(5, 8, 30)
    expected = selective_logprob(hidden @ weight.T, target, temperature=0.5)
    torch.testing.assert_close(linear_logprob(hidden, weight, target, temperature=0.5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, target, _ = inputs(6, 64, 300)
    narrow = [hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(), target, None]
    wide = [narrow[0].detach().float().requires_grad_(), narrow[1].detach().float().requires_grad_(), target, None]
    found, right = with_gradients(linear_logprob, narrow, 1.0), with_gradients(dense, wide, 1.0)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0], right[0], rtol=1e-5, atol=2e-5)
    for x, y in zip(found[1:], right[1:], strict=True):
        torch.testing.assert_close(x.float(), y, rtol=2**-7, atol=1e-4)


def test_leading_dimensions_and_a_vocabulary_of_one() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(1, 4)
    assert torch.equal(linear_logprob(hidden, weight, torch.zeros(2, 3, dtype=torch.int64)), torch.zeros(2, 3))
    assert linear_logprob(hidden[:, :0], weight, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_nothing_but_the_scores_is_kept_when_no_gradient_is_wanted() -> None:
    hidden, weight, target, _ = inputs(5, 8, 30)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, target)
    assert not logp.requires_grad
    torch.testing.assert_close(logp, dense(hidden, weight, target, None).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"target_N": torch.tensor([0, 30])}, ValueError, r"ids in \[0, 30\) are needed, not 30"),
        ({"target_N": torch.tensor([-1, 3])}, ValueError, "not -1"),
        ({"target_N": torch.tensor([0.0, 3.0])}, TypeError, "target_N"),
        ({"weight_VD": torch.zeros(30, 7)}, ValueError, r"weight_VD: \[V, 8\]"),
        ({"weight_VD": torch.zeros(30, 8, dtype=torch.bfloat16)}, TypeError, "weight_VD"),
        ({"bias": torch.zeros(29)}, ValueError, r"bias: \[30\]"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"hidden_ND": torch.zeros(2, 8), "weight_VD": torch.zeros(30, 8), "target_N": torch.tensor([0, 3])}
    with pytest.raises(error, match=text):
        linear_logprob(**{**given, **change})


def test_on_cpu_without_a_library_the_tiles_of_torch_serve_and_not_dense_logits() -> None:
    choices = dispatch.implementations(library_spec())
    assert choices["c"].priority > choices["tiled"].priority > choices["reference"].priority
    assert "cpu" in choices["tiled"].devices and choices["tiled"].unsupported is None


def library_spec() -> Any:
    from fairlead_kernels.library import load_all

    return load_all()["linear_logprob"]


MEASURE = """
import re, torch
from pathlib import Path
from fairlead_kernels import linear_logprob
torch.set_num_threads(1)
N, D, V, frozen = 2048, 64, 60_000, {frozen}
hidden = torch.randn(N, D).requires_grad_()
weight = torch.randn(V, D).requires_grad_(not frozen)
target = torch.randint(0, V, (N,))
linear_logprob(hidden[:2], weight[:9], target[:2] % 9).sum().backward()
hidden.grad = weight.grad = None
memory = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
linear_logprob(hidden, weight, target).sum().backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory as Linux counts it")
@pytest.mark.parametrize("frozen", [True, False])
def test_peak_memory_is_d_weight_and_few_tiles(frozen: bool) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE.format(frozen=frozen)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tile, d_weight = 32, 0 if frozen else 60_000 * 64 * 4 / 2**20
    assert float(done.stdout) < 32 + d_weight + 4 * tile  # MiB; the dense logits alone are 469, and twice that in all
