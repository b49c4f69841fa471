"""Exact tests: worked numbers, limits, calibration on text without the key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest
from scipy.stats import gamma as gamma_law

from fairlead.errors import InputError
from fairlead_watermark import KGW, Gumbel, ModifiedGumbel, detection

MARKS = {
    "lefthash": lambda key, v: KGW(vocab_size=v, key=key),
    "minhash": lambda key, v: KGW(vocab_size=v, key=key, scheme="minhash"),
    "selfhash": lambda key, v: KGW(vocab_size=v, key=key, scheme="selfhash"),
    "gumbel": lambda key, v: Gumbel(vocab_size=v, key=key),
    "modified-gumbel": lambda key, v: ModifiedGumbel(vocab_size=v, key=key),
}


def test_eighty_greens_of_two_hundred_give_the_exact_binomial_p_value() -> None:
    green, n = torch.tensor([80]), torch.tensor([200])
    assert float(detection.binomial_p_value(green, n, 0.25)) == pytest.approx(2.225188e-06, rel=1e-6)
    assert float(detection.binomial_p_value(green, n, 0.25, mid_p=True)) == pytest.approx(1.652011e-06, rel=1e-6)
    assert float(detection.binomial_z(green, n, 0.25)) == pytest.approx(4.898979, abs=1e-6)


def test_no_green_token_gives_p_of_one() -> None:
    assert float(detection.binomial_p_value(torch.tensor([0]), torch.tensor([50]), 0.25)) == 1.0


def test_a_gumbel_sum_of_150_over_100_gives_the_exact_gamma_p_value() -> None:
    score, n = torch.tensor([150.0], dtype=torch.float64), torch.tensor([100])
    assert float(detection.gamma_p_value(score, n)) == pytest.approx(5.924540e-06, rel=1e-6)


def test_p_values_equal_scipys_survival_functions() -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(1, 500, 200)
    c = rng.binomial(n, 0.3)
    p = detection.binomial_p_value(torch.from_numpy(c), torch.from_numpy(n), 0.25).numpy()
    np.testing.assert_allclose(p, binom.sf(c - 1, n, 0.25), rtol=1e-9)
    s = rng.gamma(n)
    p = detection.gamma_p_value(torch.from_numpy(s), torch.from_numpy(n)).numpy()
    np.testing.assert_allclose(p, gamma_law.sf(s, n), rtol=1e-9)


def test_nothing_scored_gives_one_and_no_nan() -> None:
    zero = torch.zeros(3, dtype=torch.int64)
    assert detection.binomial_p_value(zero, zero, 0.25).tolist() == [1, 1, 1]
    assert detection.gamma_p_value(zero.double(), zero).tolist() == [1, 1, 1]
    assert detection.binomial_z(zero, zero, 0.25).tolist() == [0, 0, 0]


def _band(level: float, n: int) -> tuple[float, float]:
    return tuple(binom.ppf([0.005, 0.995], n, level) / n)  # type: ignore[return-value]


@pytest.mark.parametrize("name", MARKS)
def test_false_positive_rates_on_a_hundred_thousand_random_sequences(name: str) -> None:
    """Random texts under many keys: at .01 and .001 the rate lies in the binomial 99 % interval. A discrete statistic
    cannot reach every level, so for green counts the level is the largest attainable one below."""
    total, keys, tokens = 100_000, 50, 60
    p_values, levels = [], {0.01: [], 0.001: []}
    for key in range(keys):
        generator = torch.Generator().manual_seed(key)
        ids = torch.randint(0, 32_000, (total // keys, tokens), generator=generator)
        found = MARKS[name](1000 + key, 32_000).detect(ids)
        p_values.append(found.p_value.numpy())
        for level, attained in levels.items():
            attained.append(_attained(found.tokens_scored.numpy(), level) if "gumbel" not in name else level)
    p = np.concatenate(p_values)
    for level, attained in levels.items():
        expected = float(np.mean(np.concatenate([np.atleast_1d(a) for a in attained])))
        low, high = _band(expected, total)
        assert low <= (p <= level).mean() <= high, (level, expected, (p <= level).mean())


def _attained(scored: np.ndarray, level: float) -> np.ndarray:
    """Chance of p <= level for Bin(n, 1/4), per text."""
    unique, inverse = np.unique(scored, return_inverse=True)
    chances = []
    for n in unique:
        tail = binom.sf(np.arange(-1, n), n, 0.25)
        chances.append(tail[tail <= level].max(initial=0.0))
    return np.asarray(chances)[inverse]


@pytest.mark.parametrize("name", MARKS)
def test_repetitive_text_does_not_fire_more_often(name: str) -> None:
    """Texts that repeat one short phrase: dedup keeps the rate at or below the level; without it the test fires."""
    hits, loose, total = 0, 0, 0
    for key in range(40):
        generator = torch.Generator().manual_seed(key)
        phrase = torch.randint(0, 32_000, (250, 12), generator=generator)
        ids = phrase.repeat(1, 8)
        mark = MARKS[name](5000 + key, 32_000)
        hits += int((mark.detect(ids).p_value <= 0.01).sum())
        loose += int((mark.detect(ids, dedup="none").p_value <= 0.01).sum())
        total += len(ids)
    assert hits / total <= _band(0.01, total)[1]
    assert loose / total > 0.03


def test_gumbel_p_values_of_random_text_are_uniform() -> None:
    ids = torch.randint(0, 50_000, (10_000, 40), generator=torch.Generator().manual_seed(1))
    p = Gumbel(vocab_size=50_000, key=7).detect(ids).p_value.numpy()
    assert kstest(p, "uniform").pvalue > 1e-3


def test_p_values_of_texts_that_repeat_themselves_are_uniform_with_dedup_alone() -> None:
    phrases = torch.randint(0, 50_000, (10_000, 12), generator=torch.Generator().manual_seed(2))
    mark = Gumbel(vocab_size=50_000, key=7)
    texts = phrases.repeat(1, 4)
    assert kstest(mark.detect(texts).p_value.numpy(), "uniform").pvalue > 1e-3
    assert kstest(mark.detect(texts, dedup="none").p_value.numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("scheme", ["hf-lefthash", "hf-selfhash"])
def test_transformers_lists_are_calibrated_on_a_hundred_thousand_random_sequences(scheme: str) -> None:
    """A small vocabulary, because each list is a permutation; 24 of 96 tokens are green, a quarter exactly."""
    hits, chances = {0.01: 0, 0.001: 0}, {0.01: 0.0, 0.001: 0.0}
    for key in range(10):
        ids = torch.randint(0, 96, (10_000, 30), generator=torch.Generator().manual_seed(key))
        mark = KGW(vocab_size=96, key=15485863 + 97 * key, scheme=scheme, context_width=1 if scheme == "hf-lefthash" else 2)
        found = mark.detect(ids)
        for level in hits:
            hits[level] += int((found.p_value <= level).sum())
            chances[level] += float(_attained(found.tokens_scored.numpy(), level).mean()) / 10
    for level, count in hits.items():
        low, high = _band(chances[level], 100_000)
        assert low <= count / 100_000 <= high, (level, chances[level], count)


def test_token_scores_stand_where_the_tokens_stand() -> None:
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = KGW(vocab_size=100, key=3).detect(ids, attention_mask=mask)
    scores = found.extra["token_scores"]
    assert scores.shape == ids.shape
    assert bool(scores[0, :6].isnan().all())  # padding, and the first token, which has no context
    assert float(scores[0].nansum()) == float(found.statistic[0])
    assert int((~scores[1].isnan()).sum()) == int(found.tokens_scored[1])


def test_a_known_prompt_lets_the_first_tokens_be_scored() -> None:
    ids = torch.randint(0, 100, (2, 10), generator=torch.Generator().manual_seed(0))
    mark = Gumbel(vocab_size=100, key=3)
    assert mark.detect(ids[:, 4:]).tokens_scored.tolist() == [2, 2]
    assert mark.detect(ids[:, 4:], prompt_ids=ids[:, :4]).tokens_scored.tolist() == [6, 6]


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3), torch.tensor([[1, 100]]), torch.tensor([[-1, 2]])])
def test_bad_ids_are_refused_in_one_line(bad: torch.Tensor) -> None:
    with pytest.raises(InputError) as error:
        KGW(vocab_size=100, key=1).detect(bad)
    assert "\n" not in str(error.value)
