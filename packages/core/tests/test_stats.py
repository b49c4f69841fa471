"""Statistics against worked numbers."""

from __future__ import annotations

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
