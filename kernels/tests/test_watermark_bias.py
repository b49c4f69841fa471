"""Oracles of watermark_bias: lists by definition in plain Python, vectors, and what must not change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import native, prf, use_backend, watermark_bias
from fairlead_kernels.testing import assert_agree, relaid

BACKENDS = ["reference"] + (["c"] if native.why_absent() is None else [])
SCHEMES = ("lefthash", "minhash", "selfhash")


def word(context: list[int], token: int, key: int) -> int:
    row = torch.tensor([context], dtype=torch.int64).reshape(1, len(context))
    return int(prf(row, torch.tensor([[token]]), key=key))


def is_green(context: list[int], token: int, key: int, gamma: float, scheme: str) -> bool:
    """The definitions of the docstring, one token at a time."""
    if scheme == "minhash":
        context = [min(context, key=lambda w: word([], w % 2**32, key))]
    if scheme == "selfhash":
        token = min(word(part, token, key) for part in [[], *([w] for w in context)])
        context = []
    return word(context, token, key) < math.floor(gamma * 2**32)


def greens(context: list[int], vocabulary: int, **settings: object) -> list[int]:
    row = torch.tensor([context], dtype=torch.int64).reshape(1, len(context))
    biased = watermark_bias(torch.zeros(1, vocabulary), row, delta=1.0, **settings)
    return [int(token) for token in biased[0].nonzero()[:, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key", "context", "green"),
    [
        (42, [17], [2, 6, 9, 12, 14, 20, 22]),
        (2**40 + 5, [10, 20, 30, 40, 50], [17, 18, 19, 20]),
        (1, [], [17, 19]),
    ],
)
def test_green_lists_are_those_of_the_vectors(backend: str, key: int, context: list[int], green: list[int]) -> None:
    with use_backend(backend):
        assert greens(context, 24, key=key, gamma=0.25) == green


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lists_follow_their_definition(backend: str, scheme: str) -> None:
    context, key = [5, 17, -1, 3], 1234567
    with use_backend(backend):
        found = greens(context, 60, key=key, gamma=0.3, scheme=scheme)
    assert found == [v for v in range(60) if is_green(context, v, key, 0.3, scheme)]


@given(data=st.data())
def test_backends_agree_bit_for_bit_on_any_shape(data: st.DataObject) -> None:
    batch, vocabulary = (
        data.draw(st.integers(0, 4)),
        data.draw(st.sampled_from([0, 1, 15, 1023, 1024, 1025, 8193, 70001])),
    )
    scheme = data.draw(st.sampled_from(SCHEMES))
    width = data.draw(st.integers(int(scheme == "minhash"), 18))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = (torch.randn(batch, vocabulary, generator=generator) * 100).to(dtype)
    logits[:, 3::5] = data.draw(st.sampled_from([-math.inf, math.inf, math.nan, -0.0, 6e-8, 6e4]))
    context = torch.randint(-1, 200, (batch, width), generator=generator)
    settings = {
        "key": data.draw(st.integers(0, 2**64 - 1)),
        "gamma": data.draw(st.sampled_from([0.25, 0.5, 0.1, 1e-9, 1 - 1e-9])),
        "delta": data.draw(st.sampled_from([0.0, 2.0, 0.3, 1e5, math.inf])),
        "scheme": scheme,
        "rows": data.draw(st.sampled_from([None, torch.arange(batch) % 2 == 0])),
    }
    found = {}
    for backend in BACKENDS:
        given = relaid(logits, (0, 1), (0, data.draw(st.integers(0, 1))), data.draw(st.integers(0, 5)))
        with use_backend(backend):
            found[backend] = watermark_bias(given, context, **settings)
            place = given.clone()
            assert watermark_bias(place, context, out=place, **settings) is place
            assert_agree(place, found[backend], 0, 0, "in place")
        assert_agree(found[backend], found["reference"], 0, 0, backend)
        signs = torch.equal(found[backend].signbit()[~logits.isnan()], found["reference"].signbit()[~logits.isnan()])
        assert signs, "the sign of zero"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_share_of_green_tokens_is_gamma(backend: str, scheme: str) -> None:
    context = torch.randint(0, 50_000, (10, 3), generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        for gamma in (0.1, 0.25, 0.5):
            share = watermark_bias(
                torch.zeros(10, 20_000), context, key=9, gamma=gamma, delta=1.0, scheme=scheme
            ).mean()
            # Under selfhash rows share the minimum of the empty context: neighbours in the batch are not independent.
            sigma = math.sqrt(gamma * (1 - gamma) / 200_000) * (1 if scheme != "selfhash" else 2)
            assert abs(float(share) - gamma) < 4 * sigma


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_must_not_change_does_not(backend: str) -> None:
    logits = torch.randn(3, 2000)
    logits[:, ::3], logits[1, 1] = -math.inf, math.nan
    context = torch.tensor([[1], [2], [3]])
    with use_backend(backend):
        assert_agree(watermark_bias(logits, context, key=1, delta=0.0), logits, 0, 0, "delta 0")
        soft, hard = (watermark_bias(logits, context, key=1, delta=delta) for delta in (2.0, math.inf))
        left = watermark_bias(logits, context, key=1, rows=torch.tensor([False, True, False]))
    for biased in (soft, hard):
        assert bool((biased[:, ::3] == -math.inf).all()) and bool(biased[1, 1].isnan())
    finite = logits.isfinite()
    green = (soft != logits) & finite
    assert_agree(soft[green], logits[green] + 2, 0, 0, "green tokens gain delta")
    assert_agree(hard[green], logits[green], 0, 0, "green tokens of a hard list keep their logits")
    assert bool((hard[finite & ~green] == -math.inf).all())
    assert_agree(left[::2], logits[::2], 0, 0, "rows left alone")
    assert_agree(left[1], soft[1], 0, 0, "chosen row")


def test_out_is_written_and_the_logits_are_not() -> None:
    logits, context = torch.randn(2, 40), torch.tensor([[1], [2]])
    before, buffer = logits.clone(), torch.full((2, 50), 7.0)
    out = buffer[:, 5:45]
    assert watermark_bias(logits, context, key=1, out=out) is out
    assert torch.equal(logits, before) and bool((buffer[:, :5] == 7).all()) and bool((buffer[:, 45:] == 7).all())
    assert torch.equal(out, watermark_bias(logits, context, key=1))


def test_red_tokens_of_a_hard_list_get_no_gradient() -> None:
    logits = torch.randn(2, 30, requires_grad=True)
    biased = watermark_bias(logits, torch.tensor([[1], [2]]), key=1, delta=math.inf, gamma=0.5)
    red = biased == -math.inf
    biased.masked_fill(red, 0.0).sum().backward()
    biased = watermark_bias(logits, torch.tensor([[1], [2]]), key=1, delta=math.inf, gamma=0.5)
    (grad,) = torch.autograd.grad(biased.exp().sum(), logits)
    assert logits.grad is not None and torch.equal(logits.grad, (~red).float()) and torch.equal(grad != 0, ~red)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, r"gamma: a share in \(0, 1\) is needed, not 0.0"),
        ({"gamma": math.nan}, ValueError, "gamma"),
        ({"delta": -1.0}, ValueError, "delta: 0 or more"),
        ({"delta": math.nan}, ValueError, "delta"),
        ({"delta": 1e300}, ValueError, "delta"),
        ({"scheme": "left"}, ValueError, "scheme: one of lefthash, minhash, selfhash is needed, not 'left'"),
        ({"context_BH": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "context_BH has 3 rows, logits_BV has 2"),
        ({"context_BH": torch.zeros(2, 1)}, TypeError, "integer ids"),
        ({"context_BH": torch.zeros(2, 0, dtype=torch.int64), "scheme": "minhash"}, ValueError, "at least one"),
        ({"logits_BV": torch.zeros(5)}, TypeError, "logits_BV"),
        ({"logits_BV": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits_BV"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, ValueError, r"rows: bool \[2\] on cpu is needed, not bool \[3\]"),
        ({"out": torch.zeros(2, 6)}, ValueError, r"out: float32 \[2, 5\] is needed, not float32 \[2, 6\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"logits_BV": torch.zeros(2, 5), "context_BH": torch.zeros(2, 1, dtype=torch.int64), "key": 1, **change}
    with pytest.raises(error, match=message) as raised:
        watermark_bias(**call)
    assert "\n" not in str(raised.value)
