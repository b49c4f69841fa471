"""Statistics against worked numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead import stats
from fairlead.errors import InputError


def test_clustered_standard_error_of_the_worked_example() -> None:
    values, clusters = [1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]
    assert stats.standard_error(values) == pytest.approx(0.223607, abs=1e-6)
    assert stats.standard_error(values, clusters) == pytest.approx(0.288675, abs=1e-6)
    assert stats.standard_error(values, list(range(6))) == pytest.approx(stats.standard_error(values))


def test_paired_difference_and_mcnemar_of_the_worked_example() -> None:
    a, b = [1, 1, 0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0]
    found = stats.paired_difference(a, b)
    assert found.estimate == 0.25
    assert stats.standard_error(np.subtract(a, b)) == pytest.approx(0.163663, abs=1e-6)
    assert stats.mcnemar([bool(x) for x in a], [bool(x) for x in b]) == 0.5


def test_clustered_t_covers_where_the_plain_interval_does_not() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 5)
    covered = {"plain": 0, "clustered": 0}
    for _ in range(1000):
        values = rng.normal(0, np.sqrt(0.3), 60)[clusters] + rng.normal(0, np.sqrt(0.7), 300)
        plain, clustered = stats.mean(values), stats.mean(values, clusters)
        covered["plain"] += plain.low <= 0 <= plain.high
        covered["clustered"] += clustered.low <= 0 <= clustered.high
    assert covered["plain"] / 1000 < 0.88
    assert 0.93 <= covered["clustered"] / 1000 <= 0.97


@given(n=st.integers(1, 400), data=st.data())
def test_intervals_of_a_proportion_hold_it(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    wilson, exact = stats.wilson(k, n), stats.clopper_pearson(k, n)
    for interval in (wilson, exact):
        assert 0 <= interval.low <= k / n + 1e-12
        assert k / n - 1e-12 <= interval.high <= 1


def test_a_proportion_lies_in_its_own_interval_whatever_is_rounded() -> None:
    for n in range(1, 60):
        for k in (0, 1, n - 1, n):
            found = stats.wilson(k, n)
            assert found.low <= found.estimate <= found.high, (k, n)


def test_wilson_of_ten_of_ten_is_not_certain() -> None:
    assert stats.wilson(10, 10).low == pytest.approx(0.7225, abs=1e-3)


def test_sign_flip_finds_a_shift_and_keeps_its_level() -> None:
    rng = np.random.default_rng(0)
    assert stats.sign_flip(rng.normal(1, 1, 40)) < 0.001
    rate = np.mean([stats.sign_flip(rng.normal(0, 1, 12)) < 0.05 for _ in range(400)])
    assert rate < 0.09
    assert stats.sign_flip([1.0, 1.0, 1.0]) == 0.25


def test_holm_adjusts_in_input_order() -> None:
    np.testing.assert_allclose(stats.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])


def test_bootstrap_intervals_hold_the_mean_and_resample_clusters_whole() -> None:
    values = np.random.default_rng(0).normal(3, 1, 100)
    plain = stats.bootstrap(values, seed=1)
    assert plain.low < 3 < plain.high
    clustered = stats.bootstrap(np.repeat(values[:20], 5), clusters=np.repeat(np.arange(20), 5), seed=1)
    assert clustered.high - clustered.low > 1.5 * (stats.bootstrap(np.repeat(values[:20], 5), seed=1).high - stats.bootstrap(np.repeat(values[:20], 5), seed=1).low)
    assert stats.bootstrap([2.0, 2.0]).low == 2.0


@pytest.mark.parametrize("bad", [[], [[1.0]], [float("nan")]])
def test_empty_and_broken_samples_are_refused(bad: object) -> None:
    with pytest.raises(InputError):
        stats.mean(bad)


def test_bca_and_percentile_agree_with_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).exponential(1, 50)
    for method in ("BCa", "percentile"):
        theirs = bootstrap((values,), np.mean, n_resamples=4000, method=method, rng=np.random.default_rng(0)).confidence_interval
        ours = stats.bootstrap(values, resamples=4000, method=method.lower())  # type: ignore[arg-type]
        assert ours.low == pytest.approx(theirs.low, abs=0.02)
        assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert stats.bootstrap(values, np.mean, seed=5) == stats.bootstrap(values, np.mean, seed=5)


def test_the_bootstrap_of_a_mean_is_the_bootstrap_of_the_function_mean() -> None:
    values, clusters = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0], ["a", "a", "b", "c", "c", "c"]
    fast, slow = stats.bootstrap_mean(values, clusters, seed=1), stats.bootstrap(values, np.mean, clusters, seed=1)
    assert fast.low == pytest.approx(slow.low)
    assert fast.high == pytest.approx(slow.high)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.data())
def test_an_interval_holds_its_estimate_whatever_the_values(values: list[float], data: st.DataObject) -> None:
    clusters = data.draw(st.none() | st.lists(st.sampled_from(["a", "b", 3, None, (1, 2)]), min_size=len(values), max_size=len(values)))
    found = stats.bootstrap(values, clusters=clusters, resamples=50)
    assert found.low <= found.estimate <= found.high
    assert found.n == len(values)
    mean = stats.mean(values, clusters)
    assert mean.low <= mean.estimate <= mean.high


def test_cluster_intervals_cover_at_their_level() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 4)
    covered = 0
    for seed in range(300):
        values = rng.normal(0, 1, 40)[clusters] + rng.normal(0, 1, 160)
        found = stats.bootstrap_mean(values, clusters, seed=seed)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_adjusted_p_values_only_grow_and_holm_is_the_stricter(p_values: list[float]) -> None:
    holm, hochberg = stats.holm(p_values), stats.benjamini_hochberg(p_values)
    assert (hochberg >= np.array(p_values) - 1e-12).all()
    assert (holm >= hochberg - 1e-12).all()
    assert (holm <= 1).all()


def test_benjamini_hochberg_and_exact_binomial_of_worked_examples() -> None:
    np.testing.assert_allclose(stats.benjamini_hochberg([0.01, 0.04, 0.03, 0.005]), [0.02, 0.04, 0.04, 0.02])
    assert stats.binomial_test(8, 10) == pytest.approx(112 / 1024)
    assert stats.binomial_test(8, 10, alternative="greater") == pytest.approx(56 / 1024)
    assert stats.mcnemar([True] * 22, [False] * 22) == pytest.approx(4.8e-7, rel=0.01)


@given(st.integers(2, 10), st.integers(0, 2**31))
def test_sign_flip_is_exact_for_few_items(n: int, seed: int) -> None:
    d = np.random.default_rng(seed).normal(0, 1, n)
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    assert stats.sign_flip(d) == pytest.approx(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson(3, 2),
        lambda: stats.wilson(1, 2, level=95),
        lambda: stats.clopper_pearson(0, 0),
        lambda: stats.mean([1.0, 2.0], clusters=[1]),
        lambda: stats.bootstrap([1.0, 2.0], clusters=[1]),
        lambda: stats.bootstrap([1.0, 2.0], method="basic"),  # type: ignore[arg-type]
        lambda: stats.paired_difference([1.0], [1.0, 2.0]),
        lambda: stats.mcnemar([True], [True, False]),
        lambda: stats.holm([0.5, 1.5]),
        lambda: stats.benjamini_hochberg([-0.1]),
        lambda: stats.binomial_test(1, 2, p=2),
    ],
)
def test_nonsense_is_refused_in_one_line(call: Callable[[], object]) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
