"""The readability reward: syllables, the two formulas by hand, targets, texts without words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import FairleadError
from fairlead.rewards import ReadabilityReward
from fairlead.rewards.readability import counts, syllables
from fairlead.testing import registered_contract, reward_contract

TestReadability = reward_contract(ReadabilityReward)
TestGrade = reward_contract(lambda: ReadabilityReward(measure="grade", target=6.0))
TestRegistered = registered_contract("reward", "readability")

SYLLABLES = {
    1: "the make whole jumped failed makes rules clothes guard yes style sea queue eyes danced smiled flies shoes don't",
    2: "table wanted titled boxes tables lately careful being dying nation playing people lion needed houses quiet didn't",
    3: "beautiful syllable alignment radio usual idea computer elephant serious religion oxygen everyone",
    4: "previously continuous",
    5: "university readability individual",
}


@pytest.mark.parametrize(("count", "words"), SYLLABLES.items())
def test_syllables_are_those_of_speech(count: int, words: str) -> None:
    assert {w: syllables(w) for w in words.split()} == dict.fromkeys(words.split(), count)


def test_words_sentences_and_syllables_are_counted() -> None:
    assert counts("The cat sat on the mat. It cost 3.14 euros!") == (11, 2, 13)
    assert counts('He said "go." Then\n\nnothing') == (5, 3, 6)
    assert counts(" ... !? ") == (0, 0, 0)


def test_the_formulas_are_those_of_flesch_and_kincaid() -> None:
    text = "The cat sat on the mat."  # 6 words, 1 sentence, 6 syllables
    assert ReadabilityReward()([""], [text]).item() == pytest.approx(206.835 - 1.015 * 6 - 84.6, abs=1e-4)
    assert ReadabilityReward(measure="grade")([""], [text]).item() == pytest.approx(0.39 * 6 + 11.8 - 15.59, abs=1e-5)


def test_a_target_is_best_where_it_is_met() -> None:
    easy, hard = "The cat sat on the mat.", "Institutional considerations necessitate deliberate international negotiation."
    grades = ReadabilityReward(measure="grade")(["", ""], [easy, hard])
    assert grades[0] < 0 < 15 < grades[1]
    for best, grade in enumerate(grades.tolist()):
        scores = ReadabilityReward(measure="grade", target=grade)(["", ""], [easy, hard])
        assert scores[best].item() == pytest.approx(0.0, abs=1e-5)
        assert scores[1 - best].item() == pytest.approx(-float(grades[1] - grades[0]), abs=1e-4)
    ease = ReadabilityReward()(["", ""], [easy, hard])
    assert ease[0] > ease[1]


@pytest.mark.parametrize("settings", [{}, {"measure": "grade"}, {"target": 60.0}])
def test_a_text_without_a_word_gets_its_own_reward(settings: dict[str, object]) -> None:
    reward = ReadabilityReward(**settings)
    assert reward(["", "", ""], ["", " \n", "?!"]).tolist() == [-100.0] * 3
    assert ReadabilityReward(empty=-7.0, **settings)([""], [""]).tolist() == [-7.0]


@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_text_has_a_finite_score_that_does_not_depend_on_its_company(texts: list[str]) -> None:
    reward = ReadabilityReward()
    scores = reward([""] * len(texts), texts)
    assert bool(scores.isfinite().all())
    assert torch.equal(scores, torch.tensor([float(reward([""], [t])[0]) for t in texts]))


def test_bad_settings_are_one_line() -> None:
    for settings in ({"measure": "fog"}, {"target": float("nan")}, {"empty": float("inf")}):
        with pytest.raises(FairleadError, match="Readability"):
            registry.create("reward", "readability", **settings)
