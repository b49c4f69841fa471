"""Oracles of gumbel_score: the vectors of vLLM's words, a naive detector, and the Gamma law of unmarked text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from fairlead_kernels import gumbel_sample, gumbel_score, gumbel_uniform, native, use_backend

BACKENDS = ["reference"] + (["c"] if native.why_absent() is None else [])
KEY, VOCABULARY = 77, 40


def random_ids(rows: int, tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def p_values(ids: torch.Tensor, keys: list[int], **settings: Any) -> torch.Tensor:
    """One text per row, each scored under a key of its own."""
    rows = [gumbel_score(ids[i : i + 1], key=key, **settings)[:2] for i, key in enumerate(keys)]
    score, scored = (torch.cat(column).double() for column in zip(*rows, strict=True))
    return torch.from_numpy(special.gammaincc(scored.numpy(), score.numpy()))


def score_of(word: int) -> float:
    """-ln(1 - u), u rounded once to float32."""
    u = torch.tensor(((word >> 8) + 1) / (2**24 + 1), dtype=torch.float64).float().double()
    return -math.log1p(-float(u))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_those_of_vllms_words(backend: str) -> None:
    words = {0: 0x893E53FD, 5: 0x2EB1554C, 7: 0x195B8912, 8: 0xA14D9F35, 31_999: 0x06988797}
    with use_backend(backend):
        for token, word in words.items():
            ids = torch.tensor([[1, 2, 3, 4, token]])
            score, scored, marks = gumbel_score(ids, key=42, context_width=4)
            assert int(scored) == 1 and bool(marks[0, :4].isnan().all())
            assert float(score) == float(marks[0, 4]) == pytest.approx(score_of(word), rel=1e-14)
        first = gumbel_score(torch.tensor([[7]]), key=42, context_width=4, pad_left=True)[0]
        assert float(first) == pytest.approx(score_of(0xBBE97CAB), rel=1e-14)
        long = gumbel_score(torch.tensor([[10, 20, 30, 40, 50, 123]]), key=2**40 + 5, context_width=5)[0]
        assert float(long) == pytest.approx(score_of(0x0EE45621), rel=1e-14)


def naive(ids: list[int], width: int, dedup: str, pad_left: bool, known: list[int]) -> list[float]:
    """Scores one token at a time; NaN = not scored."""
    line = [-1] * width + known + ids
    line = line[len(line) - len(ids) - width :]
    seen: set[tuple[int, ...]] = set()
    marks = []
    for t, token in enumerate(ids):
        context = line[t : t + width]
        draw = tuple(context) if dedup == "context" else (*context, token)
        scored = token >= 0 and (pad_left or all(w >= 0 for w in context))
        scored = scored and (dedup == "none" or draw not in seen)
        if scored:
            seen.add(draw)
            row = torch.tensor([context], dtype=torch.int64).reshape(1, width)
            u = float(gumbel_uniform(row, VOCABULARY, key=KEY)[0, token].double())
        marks.append(-math.log1p(-u) if scored else math.nan)
    return marks


@given(data=st.data())
def test_scores_are_those_of_a_naive_detector(data: st.DataObject) -> None:
    width, dedup = data.draw(st.integers(0, 6)), data.draw(st.sampled_from(["pair", "context", "none"]))
    pad_left = data.draw(st.booleans())
    ids = st.lists(st.integers(-1, data.draw(st.sampled_from([1, VOCABULARY - 1]))), min_size=12, max_size=12)
    rows = data.draw(st.lists(ids, min_size=1, max_size=3))
    known = data.draw(st.sampled_from([[], [3], [-1, 5, 9, 1, 2, 7, 8]]))
    lengths = torch.tensor([data.draw(st.integers(-1, 14)) for _ in rows])
    context = torch.tensor([known] * len(rows), dtype=torch.int64).reshape(len(rows), -1) if known else None
    for backend in BACKENDS:
        with use_backend(backend):
            score, scored, marks = gumbel_score(
                torch.tensor(rows), lengths, key=KEY, context_width=width, dedup=dedup, pad_left=pad_left,
                context_BH=context,
            )  # fmt: skip
        for row, line in enumerate(rows):
            right = torch.full((12,), math.nan, dtype=torch.float64)
            taken = line[: max(0, int(lengths[row]))]
            right[: len(taken)] = torch.tensor(naive(taken, width, dedup, pad_left, known), dtype=torch.float64)
            torch.testing.assert_close(marks[row], right, rtol=1e-13, atol=0, equal_nan=True)
            assert int(scored[row]) == int((~right.isnan()).sum())
            assert float(score[row]) == pytest.approx(float(right.nansum()), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_marked_text_scores_high_under_its_key_and_as_chance_under_another(backend: str) -> None:
    ids = random_ids(4, 4, 500)
    for _ in range(80):
        ids = torch.cat([ids, gumbel_sample(torch.zeros(4, 500), ids[:, -4:], key=5)[:, None]], 1)
    with use_backend(backend):
        score, scored, marks = gumbel_score(ids, key=5)
        other, count, _ = gumbel_score(ids, key=6)
    assert scored.tolist() == count.tolist() == [80] * 4 and bool(marks[:, :4].isnan().all())
    harmonic = float(sum(1 / n for n in range(1, 501)))  # the expected score of a draw from 500 equal tokens
    assert bool(((score / 80 - harmonic).abs() < 4 * 1.3 / 80**0.5).all())
    assert bool(((other / 80 - 1).abs() < 4 / 80**0.5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_scored_alike_alone_and_padded_on_either_side(backend: str) -> None:
    ids = random_ids(1, 30, 50)
    with use_backend(backend):
        alone = gumbel_score(ids, key=KEY, context_width=3)
        right = gumbel_score(
            torch.nn.functional.pad(ids, (0, 9), value=7), torch.tensor([30]), key=KEY, context_width=3
        )
        left = gumbel_score(torch.nn.functional.pad(ids, (9, 0), value=-1), key=KEY, context_width=3)
    for padded in (right, left):
        assert float(padded[0]) == pytest.approx(float(alone[0]), rel=1e-12) and int(padded[1]) == int(alone[1])
    assert bool(right[2][:, 30:].isnan().all())
    torch.testing.assert_close(right[2][:, :30], alone[2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(left[2][:, 9:], alone[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_context_continues_the_text(backend: str) -> None:
    ids = random_ids(2, 40, 50)
    with use_backend(backend):
        whole = gumbel_score(ids, key=KEY, dedup="none")[2]
        rest = gumbel_score(ids[:, 10:], key=KEY, dedup="none", context_BH=ids[:, :10])[2]
    torch.testing.assert_close(whole[:, 10:], rest, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_scored_is_a_sum_of_zero_over_no_tokens(backend: str) -> None:
    with use_backend(backend):
        for ids in (random_ids(3, 4, 9), torch.zeros(3, 0, dtype=torch.int64), torch.full((3, 9), -1)):
            score, scored, marks = gumbel_score(ids, key=1)
            assert score.tolist() == [0.0] * 3 and scored.tolist() == [0] * 3 and bool(marks.isnan().all())


def test_p_values_of_unmarked_text_are_uniform() -> None:
    keys = [1_000_003 * i + 17 for i in range(4000)]
    p = p_values(random_ids(4000, 60, 32_000), keys)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    assert int((p < 0.01).sum()) <= stats.binom(4000, 0.01).ppf(0.999)


def test_repetitive_unmarked_text_needs_dedup() -> None:
    phrases = random_ids(2000, 12, 32_000, 3).repeat(1, 6)  # each says the same twelve tokens six times
    keys = [7919 * i + 5 for i in range(2000)]
    assert stats.kstest(p_values(phrases, keys).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(p_values(phrases, keys, dedup="none").numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids_BT": torch.zeros(2, 5)}, TypeError, "ids_BT: integer ids"),
        ({"lengths_B": torch.zeros(3, dtype=torch.int64)}, ValueError, r"lengths_B: integer \[2\]"),
        ({"context_BH": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "context_BH has 1 rows, ids_BT has 2"),
        ({"dedup": "yes"}, ValueError, "dedup: one of pair, context, none is needed, not 'yes'"),
        ({"context_width": -1}, ValueError, "context_width: 0 to 4096 is needed, not -1"),
        ({"context_width": 1.0}, TypeError, "context_width: an integer"),
        ({"key": 2**64}, ValueError, "key: an integer in"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"ids_BT": torch.zeros(2, 5, dtype=torch.int64), "key": 1, **change}
    with pytest.raises(error, match=message) as raised:
        gumbel_score(**call)
    assert "\n" not in str(raised.value)
