"""The judge: equal to the model's own next-token law, whatever the batch; words, templates, limits."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.errors import ConfigError, DataUnavailableError, FairleadError, InputError
from fairlead.rewards import JudgeReward
from fairlead.rewards.judge import TEMPLATES, answer_tokens
from fairlead.testing import registered_contract, reward_contract
from fairlead.testing.tiny import tiny_model

WORDS = ["yes", "Yes", "no", "NO", *"12345", "fine", "thanks", "how", "are", "you", "what", "is", "this", "idea", "good", "?"]
WORDS += [*"abcd", "user", "says", ":", "answer"]


def tokenizer(chat: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    if chat:
        made.chat_template = "{% for m in messages %}user says : {{ m.content }} {% endfor %}{% if add_generation_prompt %}answer : {% endif %}"
    return made


PLAIN = (tiny_model(), tokenizer())
CHAT = (tiny_model(), tokenizer(chat=True))
TEMPLATE = "{prompt} ? {response} good ?"
PROMPTS = ["how are you", "what is this", "how are you", "a b"]
RESPONSES = ["fine thanks", "no idea", "c", "d d d d d d c"]

TestLogOdds = reward_contract(lambda: JudgeReward(model=PLAIN))
TestProbability = reward_contract(lambda: JudgeReward(model=CHAT, value="probability"))
TestScore = reward_contract(lambda: JudgeReward(model=PLAIN, mode="expected-score"))
TestRegistered = registered_contract("reward", "judge")


def law(text: str) -> torch.Tensor:
    """The model's own next-token law after a text, word by word: float64 [V]."""
    model, words = PLAIN
    with torch.inference_mode():
        return model(torch.tensor([words(text)["input_ids"]])).logits[0, -1].double().softmax(-1)


def ids(*words: str) -> list[int]:
    return [2 + WORDS.index(w) for w in words]


def asked(prompt: str, response: str) -> str:
    return f"{prompt} ? {response} good ?"


def test_log_odds_are_those_of_the_models_own_next_token() -> None:
    scores = JudgeReward(model=PLAIN, template=TEMPLATE)(PROMPTS, RESPONSES)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        p = law(asked(prompt, response))
        expected.append(math.log(p[ids("yes", "Yes")].sum() / p[ids("no", "NO")].sum()))
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    chances = JudgeReward(model=PLAIN, template=TEMPLATE, value="probability")(PROMPTS, RESPONSES)
    torch.testing.assert_close(chances, scores.sigmoid())


def test_the_expected_score_is_a_mean_over_the_score_tokens_alone() -> None:
    scores = JudgeReward(model=PLAIN, template=TEMPLATE, mode="expected-score")(PROMPTS, RESPONSES)
    for score, prompt, response in zip(scores.tolist(), PROMPTS, RESPONSES, strict=True):
        p = law(asked(prompt, response))[ids("1", "2", "3", "4", "5")]
        assert score == pytest.approx(float(p @ torch.arange(1.0, 6.0).double() / p.sum()), abs=1e-4)


def test_yes_and_no_changed_over_change_the_sign() -> None:
    there = JudgeReward(model=PLAIN, template=TEMPLATE)(PROMPTS, RESPONSES)
    back = JudgeReward(model=PLAIN, template=TEMPLATE, yes=["no"], no=["yes"])(PROMPTS, RESPONSES)
    torch.testing.assert_close(back, -there)


def test_a_question_that_shows_nothing_of_the_pair_gives_every_pair_one_reward() -> None:
    scores = JudgeReward(model=PLAIN, template="good ? {response}")(PROMPTS, ["c"] * 4)
    assert scores.unique().numel() == 1


@pytest.mark.parametrize("packs", [True, False])
def test_the_batch_changes_nothing(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr("fairlead.scoring.why_not_packable", lambda model: "it may not")
    reward = JudgeReward(model=PLAIN, template=TEMPLATE, token_budget=16)
    together = reward(PROMPTS, RESPONSES)
    alone = torch.cat([reward([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(JudgeReward(model=PLAIN, template=TEMPLATE, token_budget=4096)(PROMPTS, RESPONSES), together, atol=1e-5, rtol=0)


def test_the_question_goes_through_the_chat_template_where_there_is_one() -> None:
    chat = JudgeReward(model=CHAT, template=TEMPLATE)(["how are you"], ["fine"])
    p = law("user says : how are you ? fine good ? answer :")
    assert chat.item() == pytest.approx(math.log(p[ids("yes", "Yes")].sum() / p[ids("no", "NO")].sum()), abs=1e-4)


def test_braces_in_the_texts_are_texts() -> None:
    reward = JudgeReward(model=PLAIN)
    found = reward._ids(tokenizer(), "{response} how", "{prompt} fine {x}", 100)
    assert found == tuple(tokenizer()(TEMPLATES["yes-no"].replace("{prompt}", "zzz how").replace("{response}", "zzz fine zzz"))["input_ids"])


def test_the_last_message_of_a_chat_is_judged() -> None:
    reward = JudgeReward(model=PLAIN, template=TEMPLATE)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "how are you"}]
    assert reward([chat], ["fine"]).item() == reward(["how are you"], ["fine"]).item()


def test_more_than_the_model_can_read_loses_its_start() -> None:
    reward = JudgeReward(model=PLAIN, template="{response} good ?")
    long = reward(["", ""], ["a " * 2000 + "b", "c " * 9 + "a " * 2000 + "b"])  # the model has 512 positions
    assert bool(long.isfinite().all())
    assert long[0] == long[1]
    short = JudgeReward(model=PLAIN, template="{response} good ?", max_length=8)
    p = law("a a a a a b good ?")
    assert short([""], ["c a a a a a b"]).item() == pytest.approx(math.log(p[ids("yes", "Yes")].sum() / p[ids("no", "NO")].sum()), abs=1e-4)


def test_answers_are_single_tokens_in_all_their_spellings() -> None:
    words = tokenizer()
    assert answer_tokens(words, ["yes"]) == ids("yes", "Yes")
    assert answer_tokens(words, ["no", "idea"]) == ids("no", "NO", "idea")
    with pytest.raises(InputError, match="'maybe' is not one token"):
        answer_tokens(words, ["yes", "maybe"])
    with pytest.raises(InputError, match="'7' is not one token"):
        JudgeReward(model=PLAIN, mode="expected-score", scores=[5, 7])(["a"], ["b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model: is required"),
        ({"model": 3}, "model"),
        ({"model": [None, None]}, "model"),
        ({"model": PLAIN, "template": "only {prompt}"}, r"\{response\}"),
        ({"model": PLAIN, "yes": ["Yes"], "no": ["no", "yes "]}, "no word in common"),
        ({"model": PLAIN, "yes": []}, "yes"),
        ({"model": PLAIN, "scores": [1, 1]}, "scores"),
        ({"model": PLAIN, "mode": "maybe"}, "mode"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        registry.create("reward", "judge", **settings)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_said_at_the_first_call() -> None:
    with pytest.raises(FairleadError, match="no such model folder"):
        JudgeReward(model="./nowhere")(["a"], ["b"])


def test_logits_of_nan_are_refused() -> None:
    broken = copy.deepcopy(tiny_model())
    reward = JudgeReward(model=(broken, tokenizer()))
    assert bool(reward(["a"], ["b"]).isfinite())
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        reward(["a"], ["b"])


@pytest.mark.real_models
def test_a_small_chat_model_prefers_answers_to_the_point() -> None:
    from fairlead.models import load

    try:
        model = load("zoo:smollm2-135m-instruct")
    except DataUnavailableError as error:
        if os.environ.get("FAIRLEAD_REQUIRE_REAL_MODELS") == "1":
            raise
        pytest.skip(str(error))
    reward = JudgeReward(model=model)
    prompts = ["What is the capital of France?"] * 2 + ["What is 2+2?"] * 2
    scores = reward(prompts, ["The capital of France is Paris.", "I like turtles and turtles like me.", "4", "Banana split sundae."])
    assert scores[0] > scores[1]
    assert scores[2] > scores[3]
