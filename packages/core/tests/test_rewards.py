"""Rewards and the phrase guard: contracts, values, composition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import FairleadError, InputError
from fairlead.guards.refusal import RefusalPhrases
from fairlead.rewards import (
    CachedReward,
    CalibratedReward,
    CallableReward,
    KeywordReward,
    LengthReward,
    MinReward,
    RegexReward,
    WeightedReward,
)
from fairlead.testing import guard_contract, registered_contract, reward_contract

TestCallable = reward_contract(lambda: CallableReward(function=lambda p, r: [float(len(x)) for x in r]))
TestKeyword = reward_contract(lambda: KeywordReward(weights={"thanks": 1.0}))
TestRegex = reward_contract(lambda: RegexReward(pattern="fine"))
TestLength = reward_contract(lambda: LengthReward(target=3))
TestWeighted = reward_contract(lambda: WeightedReward(rewards=["length", {"name": "regex", "pattern": "a"}], weights=[2, 1]))
TestMin = reward_contract(lambda: MinReward(rewards=["length", "regex"]))
TestCached = reward_contract(lambda: CachedReward(reward="length"))
TestCalibrated = reward_contract(lambda: CalibratedReward(reward="length", references={"": ["a", "a b", "a b c"]}))
TestRefusal = guard_contract(RefusalPhrases)
TestKeywordRegistered = registered_contract("reward", "keyword")
TestClassifierRegistered = registered_contract("reward", "sequence-classifier")
TestRefusalRegistered = registered_contract("guard", "refusal-phrases")


def test_keywords_are_whole_words_in_any_case() -> None:
    reward = KeywordReward(weights={"art": 1.0, "good day": -2.0})
    assert reward(["", "", ""], ["Art for art's sake", "start", "Good day, art"]).tolist() == [2.0, 0.0, -1.0]
    assert KeywordReward(weights={"art": 1.0}, once=True)([""], ["art art"]).tolist() == [1.0]


def test_weights_and_minimum_compose() -> None:
    length, ends = LengthReward(target=2), RegexReward(pattern=r"\.$")
    prompts, responses = ["", ""], ["two words", "three words here."]
    total = WeightedReward(rewards=[length, ends], weights=[1.0, 0.5])(prompts, responses)
    assert total.tolist() == [0.0, 0.0]
    assert MinReward(rewards=[length, ends])(prompts, responses).tolist() == [0.0, -0.5]


def test_a_cached_reward_asks_once_per_pair() -> None:
    asked: list[int] = []

    def count(prompts: list[str], responses: list[str]) -> list[float]:
        asked.append(len(responses))
        return [float(len(r)) for r in responses]

    reward = CachedReward(reward=count, size=2)
    assert reward(["p", "p", "p"], ["a", "bb", "a"]).tolist() == [1, 2, 1]
    assert reward(["p"], ["a"]).tolist() == [1]
    assert asked == [2]
    reward(["p"] * 3, ["x", "yy", "zzz"])
    assert reward(["p"], ["a"]).tolist() == [1]  # forgotten at two pairs, asked again
    assert asked == [2, 3, 1]


def test_quantiles_are_mid_ranks() -> None:
    reward = CalibratedReward(reward=lambda p, r: [float(x) for x in r], references={"q": ["0.1", "0.4", "0.4", "0.9"]})
    assert reward(["q"] * 4, ["0.1", "0.4", "0.4", "0.9"]).tolist() == [0.125, 0.5, 0.5, 0.875]
    assert reward(["q"] * 2, ["0.0", "1.0"]).tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="no reference"):
        reward(["other"], ["0.5"])


@given(st.lists(st.text(max_size=30), max_size=8))
def test_any_text_has_a_reward(responses: list[str]) -> None:
    for reward in (KeywordReward(weights={"a": 1.0}), RegexReward(pattern="[a-z]+"), LengthReward()):
        scores = reward([""] * len(responses), responses)
        assert scores.shape == (len(responses),)
        assert not bool(scores.isnan().any())


@pytest.mark.parametrize(
    ("name", "settings"),
    [("regex", {"pattern": "("}), ("length", {"target": 0}), ("weighted", {"rewards": ["length"], "weights": [1, 2]}), ("min", {"rewards": ["lenght"]}), ("callable", {})],
)
def test_bad_settings_are_one_line(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(FairleadError) as error:
        registry.create("reward", name, **settings)
    assert "\n" not in str(error.value)


def test_a_reward_fits_trls_lists() -> None:
    function = LengthReward(target=2).as_trl()
    prompts = [[{"role": "user", "content": "q"}]]
    assert function(prompts=prompts, completions=[[{"role": "assistant", "content": "two words"}]], step=3) == [0.0]
    assert function.__name__ == "LengthReward"


def test_refusals_are_found_whatever_the_apostrophe() -> None:
    guard = RefusalPhrases(harmful=True)
    verdicts = guard(["x"] * 4, ["I\u2019m sorry, no.", "Well, I can't do that", "Sure: first", ""])
    assert [v.refusal for v in verdicts] == [True, True, False, False]
    assert [v.unsafe for v in verdicts] == [False, False, True, False]
    assert verdicts[3].coherent is False


def test_a_function_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="3 values for 2"):
        CallableReward(function=lambda p, r: torch.zeros(3))(["", ""], ["a", "b"])
