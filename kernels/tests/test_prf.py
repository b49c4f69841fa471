"""Oracles of the keyed functions: published and own vectors, every backend, and the statistics of their bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from fairlead_kernels import native, prf, use_backend
from fairlead_kernels.ops.prf.keys import signed_key, unsigned_key
from fairlead_kernels.ops.prf.reference import context_state, philox4x32

BACKENDS = [
    "reference",
    pytest.param("c", marks=pytest.mark.skipif(native.why_absent() is not None, reason="no C library")),
]
VECTORS = [
    ("mix32", 42, [17], [0, 1, 5, 31999], "f311dfb4 9db8932c 5d1b0966 3314dea1"),
    ("mix32", 2**40 + 5, [10, 20, 30, 40, 50], [0, 1, 5, 31999], "70a6e901 a26388d2 aab9a8ec b6f6e72f"),
    ("mix32", 1, [], [0, 1, 5, 31999], "80b12bfd ec2df074 a1638815 46d8725a"),
    ("philox", 42, [-1] * 4, [0, 1, 2, 3, 7], "fa2f6b05 01b2a14f e1c0616e 7fe6ad3f bbe97cab"),
    ("philox", 42, [1, 2, 3, 4], [0, 5, 31999, 7, 8], "893e53fd 2eb1554c 06988797 195b8912 a14d9f35"),
    ("philox", 42, [4, 5, 6, 7], [7, 8], "94a7fb5f cc18ecc2"),
    ("philox", 2**40 + 5, [10, 20, 30, 40, 50], [123], "0ee45621"),
]


def rows(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int64).reshape(1, len(values))


def hexes(words: torch.Tensor) -> str:
    return " ".join(f"{word:08x}" for word in words.flatten().tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "key", "context", "tokens", "words"), VECTORS)
def test_words_are_those_of_the_vectors(
    backend: str, function: str, key: int, context: list[int], tokens: list[int], words: str
) -> None:
    with use_backend(backend):
        assert hexes(prf(rows(*context), rows(*tokens), key=key, function=function)) == words


def test_philox_gives_the_known_answers_of_its_authors() -> None:
    def block(counter: int, key: int) -> str:
        word = torch.tensor([counter])
        return " ".join(f"{int(out):08x}" for out in philox4x32((word, word, word, word), key, key))

    assert block(0, 0) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert block(0xFFFFFFFF, 0xFFFFFFFF) == "408f276d 41c83b0e a20bc7c6 6d5451fd"


@pytest.mark.parametrize(
    ("key", "context", "state"),
    [
        (42, [17], "468ee6cc f2d897a6"),
        (2**40 + 5, [10, 20, 30, 40, 50], "5c99af1c e43bdd0f"),
        (1, [], "0d12d026 651df015"),
    ],
)
def test_context_states_of_mix32_are_those_of_the_vectors(key: int, context: list[int], state: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in context_state(rows(*context), key, "mix32")[:2]) == state


@given(st.integers(0, 2**64 - 1))
def test_a_key_survives_the_way_through_int64(key: int) -> None:
    assert -(2**63) <= signed_key(key) < 2**63 and unsigned_key(signed_key(key)) == key


@pytest.mark.parametrize("function", ["mix32", "philox"])
@given(data=st.data())
def test_a_word_depends_on_its_row_alone(function: str, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
    context = data.draw(st.lists(st.integers(-1, 2**32 - 2), max_size=9))
    key = data.draw(st.integers(0, 2**64 - 1))
    batch = prf(rows(*context).expand(3, -1), rows(*tokens).expand(3, -1), key=key, function=function)
    alone = torch.cat([prf(rows(*context), rows(token), key=key, function=function) for token in tokens], 1)
    assert torch.equal(batch, alone.expand(3, -1)) and bool(((batch >= 0) & (batch < 2**32)).all())


@pytest.mark.parametrize("function", ["mix32", "philox"])
def test_bits_look_uniform_and_independent(function: str) -> None:
    contexts, tokens = 2000, 1000
    context_BH = torch.arange(contexts)[:, None]  # neighbours: the hardest case for a weak mixer
    words = prf(context_BH, torch.arange(tokens).expand(contexts, -1), key=0xFEED, function=function)
    pairs = contexts * tokens
    for gamma in (0.05, 0.25, 0.5):
        green = (words < int(gamma * 2**32)).double()
        sigma = math.sqrt(gamma * (1 - gamma) / pairs)
        assert abs(float(green.mean()) - gamma) < 4 * sigma
        spread = gamma * (1 - gamma)
        per_context = ((green.sum(1) - gamma * tokens) ** 2 / (tokens * spread)).sum()
        per_token = ((green.sum(0) - gamma * contexts) ** 2 / (contexts * spread)).sum()
        assert 1e-4 < stats.chi2.sf(float(per_context), contexts) < 1 - 1e-4
        assert 1e-4 < stats.chi2.sf(float(per_token), tokens) < 1 - 1e-4
        centred = (green - gamma) / math.sqrt(spread)
        assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 / math.sqrt(pairs)
        assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 4 / math.sqrt(pairs)
    bits = torch.stack([(words >> i) & 1 for i in range(32)]).double().mean((1, 2))
    assert float((bits - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(pairs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": -1}, ValueError, r"key: an integer in \[0, 2\^64\) is needed"),
        ({"key": 2**64}, ValueError, "lies outside"),
        ({"key": "7"}, TypeError, "not str"),
        ({"function": "md5"}, ValueError, "function: one of mix32, philox is needed, not 'md5'"),
        (
            {"tokens": torch.zeros(1, 3)},
            TypeError,
            r"tokens_BN: integer ids of shape \[batch, tokens\] are needed, not float32 \[1, 3\]",
        ),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, TypeError, "tokens_BN: integer ids"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "context_BH has 1 rows, tokens_BN has 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"tokens": rows(1, 2), "key": 3, "function": "mix32", **change}
    with pytest.raises(error, match=message) as raised:
        prf(rows(1), call.pop("tokens"), **call)
    assert "\n" not in str(raised.value) and str(2**64) not in str(raised.value)
