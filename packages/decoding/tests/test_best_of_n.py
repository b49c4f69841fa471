"""Best-of-n and its kin against theory, on models whose every answer can be listed."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.errors import InputError
from fairlead.generation import generate
from fairlead_decoding import BestOfN, Rejection, SoftBestOfN, WorstOfN, theory
from fairlead_decoding.enumerable import RandomTokenReward, all_answers, answer_index, answer_logprobs, tiny_llama

VOCAB, LENGTH = 4, 3
DRAWS = 3000


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    model = tiny_llama(VOCAB, head_scale=12.0, seed=1)
    prompt = torch.tensor([VOCAB])
    answers = all_answers(VOCAB, LENGTH)
    reward = RandomTokenReward(vocab=VOCAB, positions=LENGTH, seed=2)
    logp = answer_logprobs(model, prompt, answers).double().numpy()
    r = reward([prompt] * len(answers), list(answers)).double().numpy()
    return {"model": model, "prompt": prompt, "reward": reward, "logp": logp, "r": r}


def counts(result: Any) -> np.ndarray:
    index = answer_index(torch.stack([g.ids for g in result.generations]), VOCAB)
    found = Counter(index.tolist())
    return np.array([found[i] for i in range(VOCAB**LENGTH)], dtype=float)


def chi_square(observed: np.ndarray, logp: np.ndarray) -> float:
    from scipy.stats import chi2

    expected = np.exp(logp) * observed.sum()
    common = expected >= 5
    parts = [(observed[common], expected[common]), (observed[~common].sum(keepdims=True), expected[~common].sum(keepdims=True))]
    statistic = sum(float(((o - e) ** 2 / np.maximum(e, 1e-12)).sum()) for o, e in parts if e.sum() > 1)
    return float(chi2.sf(statistic, int(common.sum()) - (0 if parts[1][1].sum() > 1 else 1)))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64])
def test_answers_follow_the_exact_law_of_best_of_n(world: dict[str, Any], n: int) -> None:
    draws = DRAWS if n <= 16 else 600
    made = BestOfN(n=n).generate(
        world["model"], None, [world["prompt"]] * draws, reward=world["reward"], max_new_tokens=LENGTH, batch_size=4096, seed=n
    )
    law = theory.bon_log_pmf(world["logp"], world["r"], n)
    assert chi_square(counts(made), law) > 1e-3
    rewards = np.array([g.reward for g in made.generations])
    expected = float(theory.bon_expected_reward(world["logp"], world["r"], n))
    assert abs(rewards.mean() - expected) < 4 * rewards.std() / math.sqrt(draws) + 1e-6
    exact = float(theory.bon_kl_exact(world["logp"], world["r"], n))
    assert made.kl_kind == "estimate"
    assert exact - 0.02 <= made.kl <= float(theory.bon_kl_bound(n)) + 1e-9  # eq. 8 lies between the exact KL and its bound


def test_one_set_of_draws_tells_every_smaller_n(world: dict[str, Any]) -> None:
    made = BestOfN(n=8).generate(
        world["model"], None, [world["prompt"]] * DRAWS, reward=world["reward"], max_new_tokens=LENGTH, batch_size=8192
    )
    curve = made.figures["reward_by_n"]
    assert len(curve) == 8
    for n in range(1, 9):
        assert curve[n - 1] == pytest.approx(float(theory.bon_expected_reward(world["logp"], world["r"], n)), abs=0.06)
    assert made.figures["kl_bound_by_n"][3] == pytest.approx(math.log(4) - 3 / 4)


def test_the_adversary_follows_the_mirrored_law(world: dict[str, Any]) -> None:
    made = WorstOfN(n=4).generate(
        world["model"], None, [world["prompt"]] * DRAWS, reward=world["reward"], max_new_tokens=LENGTH, batch_size=4096
    )
    assert chi_square(counts(made), theory.bon_log_pmf(world["logp"], world["r"], 4, worst=True)) > 1e-3
    assert made.figures["reward_by_n"][3] < made.figures["reward_by_n"][0]


def test_soft_best_of_n_nears_the_tilt_as_n_grows_and_best_of_n_as_it_cools(world: dict[str, Any]) -> None:
    common = {"reward": world["reward"], "max_new_tokens": LENGTH, "batch_size": 65536}
    tilt = float((np.exp(theory.tilt(world["logp"], world["r"], 1 / 0.7)) * world["r"]).sum())
    hot = SoftBestOfN(n=64, alpha=0.7).generate(world["model"], None, [world["prompt"]] * 1000, **common)
    rewards = np.array([g.reward for g in hot.generations])
    assert abs(rewards.mean() - tilt) < 4 * rewards.std() / math.sqrt(1000) + 0.02
    assert hot.kl <= math.log(64)
    cold = SoftBestOfN(n=8, alpha=1e-6).generate(world["model"], None, [world["prompt"]] * 50, **common)
    best = BestOfN(n=8).generate(world["model"], None, [world["prompt"]] * 50, **common)
    assert [g.reward for g in cold.generations] == [g.reward for g in best.generations]


def test_rejection_returns_the_model_given_the_threshold_and_estimates_its_kl(world: dict[str, Any]) -> None:
    threshold = float(np.quantile(world["r"], 0.5))
    made = Rejection(threshold=threshold, n=200).generate(
        world["model"], None, [world["prompt"]] * 2000, reward=world["reward"], max_new_tokens=LENGTH, batch_size=4096
    )
    passed = world["r"] >= threshold - 1e-6
    mass = float(np.exp(world["logp"])[passed].sum())
    law = np.where(passed, world["logp"] - math.log(mass), -np.inf)
    assert chi_square(counts(made), law) > 1e-3
    assert all(g.provenance["accepted"] for g in made.generations)
    tries = np.array([g.provenance["tries"] for g in made.generations])
    assert tries.mean() == pytest.approx(1 / mass, rel=0.1)
    assert made.kl == pytest.approx(-math.log(mass), abs=0.1)


def test_rejection_that_never_passes_gives_the_best_and_says_so(world: dict[str, Any]) -> None:
    made = Rejection(threshold=1e6, n=5).generate(world["model"], None, [world["prompt"]] * 3, reward=world["reward"], max_new_tokens=LENGTH)
    for answer, group in zip(made.generations, made.candidates, strict=True):
        assert len(group) == 5
        assert answer.reward == max(g.reward for g in group)
        assert not answer.provenance["accepted"]


def test_candidate_j_is_what_plain_generation_draws_as_candidate_j(world: dict[str, Any]) -> None:
    plain = generate(world["model"], None, [world["prompt"]], n=5, max_new_tokens=LENGTH, seed=4)
    made = BestOfN(n=5).generate(world["model"], None, [world["prompt"]], reward=world["reward"], max_new_tokens=LENGTH, seed=4)
    assert [g.ids.tolist() for g in made.candidates[0]] == [g.ids.tolist() for g in plain[0]]


def test_truncated_sampling_gets_a_bound_in_place_of_an_estimate(world: dict[str, Any]) -> None:
    made = BestOfN(n=4).generate(world["model"], None, [world["prompt"]], reward=world["reward"], max_new_tokens=LENGTH, top_k=2)
    assert made.kl_kind == "bound"
    assert made.kl == pytest.approx(math.log(4) - 3 / 4)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda p, r: [math.nan] * len(r), "prompt 7: its reward"),
        (lambda p, r: [math.inf] * len(r), "prompt 7: its reward is inf; a finite number is needed"),
        (lambda p, r: [0.0], "gave 1 values"),
        (lambda p, r: 1 / 0, "prompt 7: its reward cannot be had: ZeroDivisionError"),
        (None, "reward is required"),
    ],
)
def test_a_bad_reward_gets_one_line_that_names_the_prompt(world: dict[str, Any], reward: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        BestOfN(n=3).generate(world["model"], None, [world["prompt"]], reward=reward, max_new_tokens=LENGTH, first_index=7)
    assert "\n" not in str(caught.value)


def test_settings_and_vocabularies_that_cannot_be_are_refused(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="n: should be greater than or equal to 1"):
        BestOfN(n=0)
    with pytest.raises(InputError, match="has the id 9, the model knows ids below 5"):
        BestOfN(n=2).generate(world["model"], None, [torch.tensor([9])], reward=world["reward"])
    with pytest.raises(InputError, match="exceed the model's 128 positions"):
        BestOfN(n=2).generate(world["model"], None, [torch.tensor([1] * 100)], reward=world["reward"], max_new_tokens=64)
    with pytest.raises(InputError, match="budget: model_tokens must be above 0"):
        BestOfN(n=2).generate(world["model"], None, [world["prompt"]], reward=world["reward"], budget={"model_tokens": 0})
