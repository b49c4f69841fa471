"""Alignment resampling, its bound, and the audit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.errors import FairleadError, InputError
from fairlead.generation import generate
from fairlead.kinds import Guard, Verdict
from fairlead.testing import tiny_model
from fairlead_watermark import KGW, AlignmentResampling, Gumbel, audit, bounds

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6])]


def count_small(prompts: list[torch.Tensor], responses: list[torch.Tensor]) -> list[float]:
    """More tokens below 16 are better."""
    return [float((r < 16).sum()) for r in responses]


def resample(n: int, mark: object = None, reward: object = count_small, **settings: object) -> object:
    marks = KGW(vocab_size=64, key=1) if mark is None else mark
    decoder = AlignmentResampling(watermark=marks, reward=reward, n=n, **settings)
    return decoder.generate(tiny_model(), None, PROMPTS, seed=3, max_new_tokens=20)


def test_one_candidate_is_plain_marked_generation_id_for_id() -> None:
    plain = generate(tiny_model(), None, PROMPTS, watermark=KGW(vocab_size=64, key=1), seed=3, max_new_tokens=20)
    found = resample(1)
    for group, chosen in zip(plain, found.generations, strict=True):
        assert torch.equal(group[0].ids, chosen.ids)


def test_the_best_candidate_is_returned_with_its_reward_and_all_are_kept() -> None:
    found = resample(8)
    for chosen, group in zip(found.generations, found.candidates, strict=True):
        assert len(group) == 8
        assert chosen.reward == max(g.reward for g in group)
    assert found.kl == pytest.approx(math.log(8) - 7 / 8)
    assert found.cost.reward_calls == 24


def test_a_constant_reward_returns_the_first_candidate() -> None:
    found = resample(4, reward=lambda prompts, responses: [1.0] * len(responses))
    assert [g.provenance["candidate"] for g in found.generations] == [0, 0, 0]


def test_plain_gumbel_candidates_are_equal() -> None:
    found = resample(4, mark=Gumbel(vocab_size=64, key=1))
    for group in found.candidates:
        assert all(torch.equal(g.ids, group[0].ids) for g in group)


def test_the_perplexity_control_returns_the_likeliest() -> None:
    found = resample(4, reward=None, selection="perplexity")
    for chosen, group in zip(found.generations, found.candidates, strict=True):
        assert chosen.reward == max(g.reward for g in group)


class FirstIsLow(Guard):
    """Labels an answer by its first token."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict("low" if int(r.split()[0]) < 32 else "high", unsafe=False, refusal=False) for r in responses]


class Numbers:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids: torch.Tensor, **options: object) -> str:
        return " ".join(str(int(i)) for i in ids)


def pick(seed: int = 3, n: int = 6, **settings: Any) -> Any:
    settings = {"guard": FirstIsLow(), "preferred": "low", **settings}
    decoder = AlignmentResampling(watermark=KGW(vocab_size=64, key=1), n=n, selection="categorical", **settings)
    return decoder.generate(tiny_model(), Numbers(), PROMPTS * 4, seed=seed, max_new_tokens=4)


def test_categorical_selection_picks_any_candidate_with_the_preferred_label() -> None:
    places = []
    for seed in range(5):
        found = pick(seed)
        assert [g.ids.tolist() for g in found.generations] == [g.ids.tolist() for g in pick(seed).generations]
        for chosen, group in zip(found.generations, found.candidates, strict=True):
            if any(int(g.ids[0]) < 32 for g in group):
                assert int(chosen.ids[0]) < 32
                places.append(chosen.provenance["candidate"])
    assert len(set(places)) == 6


def test_without_a_preferred_label_the_reward_decides_and_then_the_first() -> None:
    found = pick(preferred=("neither",))
    assert {g.provenance["candidate"] for g in found.generations} == {0}
    longest = pick(preferred=("neither",), reward=lambda prompts, texts: [float(t.split()[0]) for t in texts])
    for chosen, group in zip(longest.generations, longest.candidates, strict=True):
        assert int(chosen.ids[0]) == max(int(g.ids[0]) for g in group)


@pytest.mark.parametrize("settings", [{"guard": None}, {"preferred": ()}])
def test_categorical_selection_needs_a_guard_and_labels(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="guard"):
        pick(**settings)


def test_every_text_is_scored_once_and_candidates_do_not_depend_on_batching() -> None:
    calls = []

    def reward(prompts: list[Any], responses: list[Any]) -> list[float]:
        calls.append(len(responses))
        return count_small(prompts, responses)

    decoder = AlignmentResampling(watermark=KGW(vocab_size=64, key=1), reward=reward, n=4)
    whole = decoder.generate(tiny_model(), None, PROMPTS, seed=3, max_new_tokens=20)
    small = decoder.generate(tiny_model(), None, PROMPTS, seed=3, max_new_tokens=20, batch_size=4)
    assert calls == [12, 4, 4, 4]  # one batch, then one prompt at a time: every text once
    for a, b in zip(whole.candidates, small.candidates, strict=True):
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(a, b, strict=True))


def test_the_chosen_answer_still_carries_the_mark() -> None:
    mark = KGW(vocab_size=64, key=1)
    decoder = AlignmentResampling(watermark=mark, reward=count_small, n=4)
    found = decoder.generate(tiny_model(), None, [torch.tensor([i]) for i in range(12)], seed=0, max_new_tokens=150)
    ids = torch.stack([g.ids for g in found.generations])
    assert float(mark.detect(ids).p_value.median()) < 1e-3


@pytest.mark.parametrize("bad", [lambda p, r: [0.0], lambda p, r: [float("nan")] * len(r)])
def test_broken_rewards_are_refused(bad: object) -> None:
    with pytest.raises(InputError):
        resample(2, reward=bad)


@pytest.mark.parametrize("settings", [{"n": 0}, {"reward": "no-such-reward"}, {"selection": "luck"}, {"watermark": 3}])
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(FairleadError):
        AlignmentResampling(**{"reward": count_small, **settings})


def test_a_reward_is_required() -> None:
    with pytest.raises(InputError, match="reward"):
        AlignmentResampling(n=2)


def test_gaussian_maxima_and_the_bound_beneath_them() -> None:
    expected = {1: 0.0, 2: 0.56419, 3: 0.84628, 4: 1.02938, 5: 1.16296, 8: 1.42360, 16: 1.76599}
    bound = {1: 0.0, 2: 0.56419, 3: 0.71029, 4: 0.79788, 5: 0.85970, 8: 0.97721, 16: 1.12838}
    for n, value in expected.items():
        assert bounds.expected_maximum(n) == pytest.approx(value, abs=1e-5)
        assert bounds.resampling_gain(n, 1.0) == pytest.approx(bound[n], abs=1e-5)
        assert bounds.resampling_gain(n, 1.0) <= bounds.expected_maximum(n) + 1e-9
        assert bounds.expected_maximum(n) <= math.sqrt(2 * math.log(n)) + 1e-9


def test_candidates_needed_by_the_bound() -> None:
    for eps, n in ((0.25, 2), (0.5, 2), (0.8, 5), (1.0, 9), (1.2, 24)):
        assert bounds.candidates_needed(eps, 1.0) == n
    assert bounds.candidates_needed(0.0, 1.0) == 1
    with pytest.raises(InputError):
        bounds.candidates_needed(0.1, 0.0)


def test_the_simplex_point_is_made_of_rates() -> None:
    assert audit.simplex_point(0.2, 0.0) == pytest.approx((0.8, 0.2, 0.0))
    assert audit.simplex_point(0.2, 0.25) == pytest.approx((0.64, 0.16, 0.2))
    with pytest.raises(InputError):
        audit.simplex_point(1.2, 0.0)


def test_a_shift_of_one_key_is_no_shift_of_alignment() -> None:
    """Keys that move everything up or down at random: the prompts agree within a key, the keys do not."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        unmarked = rng.normal(0, 0.1, (12, 60))
        marked = rng.normal(0, 0.1, (12, 60)) + rng.normal(0, 0.3, (12, 1))
        rejected += audit.shift("reward", unmarked, marked).p_value < 0.05
    assert rejected / 300 < 0.09


def test_a_real_shift_is_found_and_flagged() -> None:
    rng = np.random.default_rng(0)
    unmarked = {"unsafe": rng.normal(0.1, 0.05, (12, 60)), "overrefusal": rng.normal(0.1, 0.05, (12, 60))}
    marked = {"unsafe": rng.normal(0.2, 0.05, (12, 60)), "overrefusal": rng.normal(0.1, 0.05, (12, 60))}
    found = audit.compare("kgw", unmarked, marked)
    assert found.attenuation
    assert not found.amplification
    assert found.verdict == "attenuation"
    s = found.shifts["unsafe"]
    assert s.low < 0.1 < s.high


def test_an_audit_over_other_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="paired"):
        audit.shift("unsafe", np.zeros((2, 5)), np.zeros((2, 6)))
