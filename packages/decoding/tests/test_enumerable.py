"""Small language models whose every answer can be listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from fairlead.errors import InputError
from fairlead.generation import generate
from fairlead_decoding.enumerable import (
    BiasedLlama,
    RandomTokenReward,
    all_answers,
    answer_index,
    answer_logprobs,
    tiny_llama,
    trainable_answer_logprobs,
)  # fmt: skip


def test_all_answers_are_listed_once_in_order() -> None:
    answers = all_answers(3, 2)
    assert answers.tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert all_answers(4, 1).tolist() == [[0], [1], [2], [3]]
    shuffled = torch.randperm(81, generator=torch.Generator().manual_seed(0))
    assert torch.equal(answer_index(all_answers(3, 4)[shuffled], 3), shuffled)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_probabilities_are_the_products_of_the_models_own_laws(length: int) -> None:
    model, answers = tiny_llama(5, seed=3), all_answers(5, length)
    log_p = answer_logprobs(model, [5], answers, batch_size=7)
    assert log_p.dtype == torch.float64 and abs(float(log_p.exp().sum()) - 1) < 1e-12
    with torch.no_grad():
        for i in (0, len(answers) // 2, len(answers) - 1):
            ids = torch.cat([torch.tensor([5]), answers[i]])
            laws = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
            assert float(log_p[i]) == pytest.approx(float(laws[torch.arange(length), answers[i]].sum()), abs=1e-4)


def test_the_batch_size_changes_nothing_of_note() -> None:
    model, answers = tiny_llama(4, seed=1), all_answers(4, 4)
    whole = answer_logprobs(model, [4], answers)
    assert torch.allclose(whole, answer_logprobs(model, [4], answers, batch_size=3), atol=1e-4)


def test_generation_draws_from_the_listed_probabilities_and_never_the_beginning_token() -> None:
    model, answers = tiny_llama(3, head_scale=20.0, seed=2), all_answers(3, 3)
    drawn = generate(model, None, [torch.tensor([3])], n=4000, max_new_tokens=3, seed=5, batch_size=4000)[0]
    ids = torch.stack([g.ids for g in drawn])
    assert int(ids.max()) < 3 and ids.shape == (4000, 3)
    counts = torch.bincount(answer_index(ids, 3), minlength=27).double().numpy()
    expected = 4000 * answer_logprobs(model, [3], answers).exp().numpy()
    rare = expected < 5
    observed = [*counts[~rare], counts[rare].sum()]
    assert chisquare(observed, [*expected[~rare], expected[rare].sum()]).pvalue > 1e-3


def test_transformers_own_generation_takes_the_model() -> None:
    model = tiny_llama(6, seed=0)
    torch.manual_seed(0)
    out = model.generate(torch.full((64, 1), 6), do_sample=True, max_new_tokens=5, pad_token_id=0)
    assert out.shape == (64, 6) and int(out[:, 1:].max()) < 6


def test_a_saved_model_loads_with_its_bias(tmp_path: Path) -> None:
    model = tiny_llama(4, seed=1)
    model.save_pretrained(tmp_path)
    again = BiasedLlama.from_pretrained(tmp_path).eval()
    answers = all_answers(4, 2)
    assert torch.equal(answer_logprobs(model, [4], answers), answer_logprobs(again, [4], answers))


def test_a_seed_is_a_model_and_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one, two, other = tiny_llama(4, seed=1), tiny_llama(4, seed=1), tiny_llama(4, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not one.training


def test_head_scale_makes_the_law_peaked() -> None:
    answers = all_answers(6, 3)
    flat, peaked = (float(answer_logprobs(tiny_llama(6, head_scale=h), [6], answers).max()) for h in (1.0, 60.0))
    assert flat < peaked - 1


def test_a_model_without_a_beginning_token_has_as_many_tokens_as_asked() -> None:
    model = tiny_llama(5, bos=False)
    assert model.config.vocab_size == 5 and model.config.bos_token_id is None
    assert float(answer_logprobs(model, [0, 4], all_answers(5, 3)).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_incomplete_and_doubled_lists_are_refused() -> None:
    model, answers = tiny_llama(3, head_scale=1.0), all_answers(3, 2)
    with pytest.raises(InputError, match="sum to"):
        answer_logprobs(model, [3], answers[1:])
    with pytest.raises(InputError, match="sum to"):
        answer_logprobs(model, [3], torch.cat([answers, answers[:1]]))


def test_trainable_probabilities_have_the_gradient_of_the_model() -> None:
    model, answers = tiny_llama(3, head_scale=20.0), all_answers(3, 2)
    log_p = trainable_answer_logprobs(model, [3], answers)
    # the score function has mean zero: d/dw sum p = sum p d log p / dw = 0, while a single answer's gradient is not
    (log_p.exp().sum()).backward()
    assert float(model.lm_head.weight.grad.abs().max()) < 1e-6
    trainable_answer_logprobs(model, [3], answers[:1]).sum().backward()
    assert float(model.lm_head.weight.grad.abs().max()) > 1e-3
    assert model.lm_head.bias.grad is None


@pytest.mark.parametrize("positions", [0, 4])
def test_the_random_reward_adds_the_weights_of_an_answers_tokens(positions: int) -> None:
    reward = RandomTokenReward(vocab=5, positions=positions, seed=7)
    answers = all_answers(5, 4)
    table = reward.table_LV.expand(4, 5)
    expected = sum(table[t, answers[:, t]] for t in range(4))
    assert torch.allclose(reward.exact(answers), expected, atol=1e-12)
    responses = [answers[17], answers[600, :2], answers[3, :0], answers[44]]
    scores = reward([torch.tensor([5])] * 4, responses)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([float(expected[17]), float(table[0, 4] + table[1, answers[600, 1]]), 0.0, float(expected[44])], abs=1e-6)


def test_the_random_reward_refuses_what_it_has_no_weight_for() -> None:
    reward = RandomTokenReward(vocab=3, positions=2)
    with pytest.raises(InputError, match="3 tokens"):
        reward(["p"], [torch.tensor([0, 1, 2])])
    with pytest.raises(InputError, match=r"0\.\.2"):
        reward(["p"], [torch.tensor([3])])
    with pytest.raises(InputError, match="1-D id tensor"):
        reward(["p"], ["text"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny_llama(1), "at least 2 tokens"),
        (lambda: tiny_llama(4, hidden=30), "even multiple"),
        (lambda: all_answers(64, 8), "16777216"),
        (lambda: answer_logprobs(tiny_llama(3), [], all_answers(3, 1)), "is empty"),
        (lambda: answer_logprobs(tiny_llama(3), [3], torch.tensor([[9]])), r"0\.\.3"),
        (lambda: answer_logprobs(tiny_llama(3), [3], torch.tensor([1, 2])), r"shape \[M, L\]"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
