"""What every decoder is handed: budgets, checked and memoised rewards, one batch at a time, transformers' door."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fairlead.decoding import Answer, Budget, Meter, Request, best, draw
from fairlead.engine import Rules
from fairlead.errors import InputError
from fairlead.generation import generate
from fairlead.kinds import Decoder
from fairlead.kinds.decoder import DecodingError
from fairlead.kinds.reward import as_reward
from fairlead.testing import tiny_model

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6])]


class BestOfThree(Decoder):
    @property
    def rows_per_prompt(self) -> int:
        return 3

    def decode(self, request: Request) -> list[Answer]:
        return [Answer(group, best(group)) for group in draw(request, 3)]


def low(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    return [-float(torch.as_tensor(r).float().mean()) for r in responses]


def request(reward: Any = None, budget: Any = None, room: int = 6, model: Any = None) -> Request:
    meter = Meter(Budget.of(budget), len(PROMPTS))
    return Request(
        model or tiny_model(), None, PROMPTS, PROMPTS, [10, 11, 12], Rules(), meter, max_new_tokens=room,
        given_reward=None if reward is None else as_reward(reward),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, Budget()), (7, Budget(7)), ({"seconds": 2.0}, Budget(seconds=2.0)), (Budget(reward_calls=3), Budget(reward_calls=3))],
)
def test_a_budget_is_made_of_what_people_write(value: Any, expected: Budget) -> None:
    assert Budget.of(value) == expected


@pytest.mark.parametrize("value", ["much", {"tokens": 3}, True, {"model_tokens": -1}, {"seconds": float("nan")}, 0])
def test_a_budget_that_means_nothing_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(InputError, match="budget") as caught:
        Budget.of(value)
    assert "\n" not in str(caught.value)


def test_a_text_is_scored_once_and_counted_to_its_prompt() -> None:
    asked: list[int] = []

    def counted(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
        asked.append(len(responses))
        return low(prompts, responses)

    r = request(counted)
    a, b = torch.tensor([7, 8]), torch.tensor([9])
    assert r.reward is not None
    first = r.reward([0, 0, 1], [a, a, b], [True, True, True])
    again = r.reward([0, 1, 0], [a, b, a], [True, True, False])
    assert first.tolist() == [-7.5, -7.5, -9.0]
    assert again.tolist() == [-7.5, -9.0, -7.5]
    assert asked == [2, 1]  # the unfinished text is another one
    assert r.meter.calls_P.tolist() == [2, 1, 0]


def test_a_reward_of_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="LengthReward reads text, but there is no tokenizer"):
        request("length")


def test_fewer_answers_are_drawn_where_the_budget_does_not_reach() -> None:
    groups = draw(request(low, {"model_tokens": 13}, room=6), 4)
    # Prompts of 3, 2 and 1 tokens leave 10, 11 and 12 for answers that run 5 tokens each through the model.
    assert [len(g) for g in groups] == [2, 2, 2]
    assert [len(g) for g in draw(request(low, {"reward_calls": 3}), 4)] == [3, 3, 3]
    short = draw(request(low, {"model_tokens": 5}, room=6), 4)
    assert [len(g[0].ids) for g in short] == [3, 3, 3]  # what the longest prompt can pay for is the length of all


def test_a_prompt_that_costs_more_than_its_budget_is_named() -> None:
    with pytest.raises(InputError, match="prompt 10: its 3 tokens exceed what is left of the budget of 2 model tokens"):
        draw(request(low, {"model_tokens": 2}), 1)


def test_no_time_left_cuts_the_answers_and_loses_none() -> None:
    groups = draw(request(low, {"seconds": 1e-9}, room=50), 1)
    assert [len(g[0].ids) for g in groups] == [1, 1, 1]
    assert not any(g[0].finished for g in groups)


def test_a_fork_draws_what_a_fresh_engine_draws_and_leaves_its_own() -> None:
    r = request(low)
    engine = r.engine()
    before = engine.logits_BV.clone()
    forked = draw(r, 2, engine=engine, places=[2, 0], first=1)
    whole = draw(request(low), 3)
    assert [[g.ids.tolist() for g in group] for group in forked] == [[g.ids.tolist() for g in whole[p][1:]] for p in (2, 0)]
    assert torch.equal(engine.logits_BV, before)
    assert [g.provenance["candidate"] for g in forked[0]] == [1, 2]


def test_what_was_answered_before_an_error_is_kept() -> None:
    def fragile(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
        if any(int(p[0]) == 1 for p in prompts):
            raise KeyError("no entry")
        return low(prompts, responses)

    with pytest.raises(DecodingError, match="prompt 5: its reward cannot be had: KeyError: 'no entry'") as caught:
        BestOfThree().generate(tiny_model(), None, PROMPTS, reward=fragile, batch_size=3, first_index=5, max_new_tokens=4)
    alone = BestOfThree().generate(tiny_model(), None, PROMPTS[1:], reward=low, first_index=6, max_new_tokens=4)
    assert {i: g.ids.tolist() for i, g in caught.value.finished.items()} == {6: alone.generations[0].ids.tolist(), 7: alone.generations[1].ids.tolist()}


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_sizes() -> None:
    class Large:
        eos_token_id = None

        def __len__(self) -> int:
            return 100

    with pytest.raises(InputError, match="the tokenizer has 100 tokens, the model's logits have 64"):
        BestOfThree().generate(tiny_model(), Large(), PROMPTS, reward=low)


def test_an_unnamed_end_token_can_be_given() -> None:
    made = BestOfThree().generate(tiny_model(), None, PROMPTS, reward=low, max_new_tokens=30, ends=list(range(40)))
    assert all(g.finished and int(g.ids[-1]) < 40 and bool((g.ids[:-1] >= 40).all()) for g in made.generations)


# ---- transformers' door -------------------------------------------------------------------------------------------


def through(model: Any, ids: torch.Tensor, decoder: Decoder | None = None, given: Any = None, **options: Any) -> Any:
    decoder = decoder or BestOfThree()
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=decoder.custom_generate(**(given or {"reward": low, "seed": 3})), **options
    )  # fmt: skip


def test_temperature_and_truncation_of_the_call_are_kept_once() -> None:
    model, ids = tiny_model(), PROMPTS[0][None]
    out = through(model, ids, do_sample=True, temperature=0.7, top_k=5, max_new_tokens=8)
    expected = BestOfThree().generate(model, None, [PROMPTS[0]], reward=low, seed=3, temperature=0.7, top_k=5, max_new_tokens=8)
    assert out[0, 3:].tolist() == expected.generations[0].ids.tolist()


def test_a_call_that_does_not_sample_is_greedy_and_other_processors_stay() -> None:
    model, ids = tiny_model(), PROMPTS[0][None]
    assert torch.equal(through(model, ids, do_sample=False, max_new_tokens=8), model.generate(ids, do_sample=False, max_new_tokens=8))
    banned = through(model, ids, do_sample=True, top_k=0, max_new_tokens=20, suppress_tokens=list(range(1, 64)))
    assert bool((banned[0, 3:] == 0).all())


def test_answers_of_other_lengths_are_padded_and_a_dictionary_is_given_on_request() -> None:
    model = copy.deepcopy(tiny_model())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = list(range(32)), 63
    ids = torch.stack([PROMPTS[0], PROMPTS[0] + 9])
    out = through(model, ids, do_sample=True, top_k=0, max_new_tokens=12, return_dict_in_generate=True)
    rows = out.sequences[:, 3:]
    for row in rows:
        end = int((row < 32).nonzero()[0]) if bool((row < 32).any()) else len(row) - 1
        assert bool((row[end + 1 :] == 63).all())


def test_without_a_seed_torchs_own_decides() -> None:
    model, ids = tiny_model(), PROMPTS[0][None]
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(through(model, ids, given={"reward": low}, do_sample=True, top_k=0, max_new_tokens=8).tolist())
    assert made[0] == made[1] != made[2]


def test_a_stopping_criterion_that_cannot_be_kept_is_refused() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Never(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(InputError, match="not by Never"):
        through(tiny_model(), PROMPTS[0][None], max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Never()]))


def test_best_takes_the_first_of_equal_rewards() -> None:
    groups = generate(tiny_model(), None, PROMPTS[:1], n=3, max_new_tokens=3)
    assert best(groups[0]) == 0
