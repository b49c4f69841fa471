"""Token search and its presets: limits, invariances, exact values by enumeration, counted calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fairlead.decoding import Budget, Meter, Request
from fairlead.engine import Rules
from fairlead.errors import ConfigError, InputError
from fairlead.generation import generate
from fairlead.kinds.reward import as_reward
from fairlead.testing import tiny_model
from fairlead.testing.contracts import small_ids
from fairlead_decoding import ARGS, ControlledDecoding, DeAL, GenARM, TransferQStar
from fairlead_decoding.enumerable import (
    RandomTokenReward,
    all_answers,
    answer_logprobs,
    tiny_llama,
    trainable_answer_logprobs,
)
from fairlead_decoding.token_search import likeliest
from fairlead_decoding.values import Rollouts, State, combine

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6])]
VOCAB, LENGTH = 5, 4


def ids(result: Any) -> list[list[int]]:
    return [g.ids.tolist() for g in result.generations]


def run(decoder: Any, model: Any = None, prompts: Sequence[torch.Tensor] = PROMPTS, reward: Any = small_ids, room: int = 8, **options: Any) -> Any:
    return decoder.generate(model or tiny_model(), None, list(prompts), reward=reward, max_new_tokens=room, **options)


def plain(model: Any = None, room: int = 8, prompts: Sequence[torch.Tensor] = PROMPTS, **options: Any) -> list[list[int]]:
    return [g[0].ids.tolist() for g in generate(model or tiny_model(), None, list(prompts), max_new_tokens=room, **options)]


# ---- limits -------------------------------------------------------------------------------------------------------


def test_without_weight_it_is_the_proposal() -> None:
    assert ids(run(TransferQStar(alpha=math.inf, top_k=5))) == plain(temperature=0)
    assert ids(run(DeAL(lam=0, top_k=5))) == plain(temperature=0)
    assert run(TransferQStar(alpha=math.inf)).cost.reward_calls == 3  # one each, of the answer itself


def test_one_candidate_is_greedy_whatever_the_reward() -> None:
    assert ids(run(TransferQStar(alpha=1e-6, top_k=1, horizon=2))) == plain(temperature=0)


def test_no_horizon_is_args_with_the_inverse_weight() -> None:
    assert ids(run(TransferQStar(alpha=0.25, top_k=6, horizon=0))) == ids(run(ARGS(w=4.0, top_k=6)))


def test_the_model_as_its_own_rollout_model_is_controlled_decoding() -> None:
    model = tiny_model()
    star = TransferQStar(alpha=0.2, top_k=4, horizon=3, rollouts=3, rollout=model)
    assert ids(run(star, model)) == ids(run(ControlledDecoding(alpha=0.2, top_k=4, horizon=3, rollouts=3), model))


def test_a_small_alpha_takes_the_candidate_of_the_highest_value() -> None:
    made = run(TransferQStar(alpha=1e-9, top_k=6, horizon=2, trace=True))
    for generation in made.generations:
        for step in generation.provenance["trace"]:
            values = dict(zip(step["candidates"], step["values"], strict=True))
            assert values[step["chosen"]] == max(values.values())


def shifted(by: float) -> Any:
    return lambda prompts, responses: [value + by for value in small_ids(prompts, responses)]


@pytest.mark.parametrize("estimator", ["mean", "self", "soft"])
def test_adding_a_constant_to_the_rewards_changes_nothing(estimator: str) -> None:
    indirect = {} if estimator == "mean" else {"baseline_reward": shifted(0.0), "rollouts": 3, "beta": 0.5}
    settings = {"alpha": 0.05, "top_k": 4, "horizon": 3, "estimator": estimator, **indirect}
    expected = ids(run(TransferQStar(**settings)))
    assert ids(run(TransferQStar(**settings), reward=shifted(3.0))) == expected
    if indirect:
        assert ids(run(TransferQStar(**{**settings, "baseline_reward": shifted(-2.0)}))) == expected


def test_the_papers_estimator_is_moved_by_a_constant_and_so_is_not_the_default() -> None:
    rewards, baseline = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    gain = combine(rewards, baseline, "paper", 1.0) - combine(rewards[:1].repeat(2), baseline, "paper", 1.0)
    moved = combine(rewards - 5, baseline, "paper", 1.0) - combine(rewards[:1].repeat(2) - 5, baseline, "paper", 1.0)
    assert gain > 0 > moved


def test_estimators_of_the_value_by_hand() -> None:
    r, b = torch.tensor([0.2, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.9], dtype=torch.float64)
    w = torch.tensor([math.exp(-0.2), math.exp(0.2)], dtype=torch.float64)
    assert combine(r, b, "mean", 0.5) == pytest.approx(0.6)
    assert combine(r, b, "self", 0.5) == pytest.approx(float((w / w.sum() * r).sum()))
    assert combine(r, b, "paper", 0.5) == pytest.approx(float((w * r).mean()))
    assert combine(r, b, "soft", 0.5) == pytest.approx(0.5 * math.log(float(w.mean())))
    one = torch.full((3,), 0.7, dtype=torch.float64)
    base = torch.full((3,), 0.2, dtype=torch.float64)
    assert combine(one, base, "self", 0.5) == pytest.approx(0.7)
    assert combine(one, base, "paper", 0.5) == pytest.approx(math.exp(1.0) * 0.7)
    assert combine(one, base, "soft", 0.5) == pytest.approx(0.5)


# ---- values against enumeration -----------------------------------------------------------------------------------


def request_of(model: Any, reward: Any, prompts: list[torch.Tensor], room: int = LENGTH) -> Request:
    return Request(
        model, None, prompts, prompts, list(range(len(prompts))), Rules(), Meter(Budget(), len(prompts)), seed=3, max_new_tokens=room,
        given_reward=as_reward(reward),
    )  # fmt: skip


def test_sampled_rollouts_estimate_the_exact_value() -> None:
    model, prompt = tiny_llama(VOCAB, head_scale=10.0, seed=3), torch.tensor([VOCAB])
    reward = RandomTokenReward(vocab=VOCAB, positions=LENGTH, seed=1)
    answers = all_answers(VOCAB, LENGTH)
    p = answer_logprobs(model, prompt, answers).exp()
    r = reward.exact(answers)
    request = request_of(model, reward, [prompt])
    state = State(request, request.engine(), [0], [[]])
    value = Rollouts(LENGTH, 4096, temperature=1.0)
    value.begin(state)
    every = torch.arange(VOCAB)[None]
    estimate = value.estimate(state, [0], every, torch.ones_like(every, dtype=torch.bool))[0]
    for token in range(VOCAB):
        mine = answers[:, 0] == token
        law = p[mine] / p[mine].sum()
        exact = float((law * r[mine]).sum())
        spread = math.sqrt(float((law * (r[mine] - exact) ** 2).sum()) / 4096)
        assert abs(float(estimate[token]) - exact) < 4 * spread + 1e-6


def test_an_ended_candidate_is_worth_its_reward_and_is_not_rolled_out() -> None:
    asked: list[tuple[list[int], bool]] = []

    def spy(prompts: Any, responses: Any, finished: Any) -> list[float]:
        asked.extend((r.tolist(), f) for r, f in zip(responses, finished, strict=True))
        return [float(len(r)) for r in responses]

    made = run(TransferQStar(alpha=1.0, top_k=64, horizon=3), reward=spy, room=1, prompts=PROMPTS[:1], ends=[7])
    assert len(made.generations[0].ids) == 1
    assert made.cost.model_tokens == 3  # the prompt: a last token needs no continuation
    asked.clear()
    run(TransferQStar(alpha=1.0, top_k=64, horizon=3), reward=spy, room=5, prompts=PROMPTS[:1], ends=list(range(1, 64)))
    first = [text for text in asked if len(text[0]) == 1]
    assert sum(end for _, end in first) == 63
    assert all(text[0][0] != 0 for text in first)  # the one open candidate was continued


def test_costs_equal_hand_counts() -> None:
    made = run(TransferQStar(alpha=1.0, top_k=3, horizon=2), prompts=PROMPTS[:1], room=4)
    # The prompt (3), steps 1 to 3 of the answer, and look-aheads of min(2, left) tokens for 3 candidates each.
    assert made.cost.model_tokens == 3 + 3 + 3 * (2 + 2 + 1)
    assert made.cost.reward_calls <= 3 * 4
    args = run(ARGS(top_k=3), prompts=PROMPTS[:1], room=4)
    assert args.cost.model_tokens == 3 + 3
    assert args.cost.reward_calls == 3 * 4


def test_greedy_divergence_is_minus_the_log_probability_of_the_answer() -> None:
    model, prompt = tiny_llama(VOCAB, head_scale=10.0, seed=3), torch.tensor([VOCAB])
    reward = RandomTokenReward(vocab=VOCAB, positions=LENGTH, seed=1)
    made = run(TransferQStar(alpha=0.2, top_k=VOCAB, horizon=LENGTH), model, [prompt], reward, LENGTH)
    logp = trainable_answer_logprobs(model, prompt, made.generations[0].ids[None])
    assert made.kl_kind == "exact"
    assert made.kl == pytest.approx(-float(logp.detach()), abs=1e-4)


def test_the_sampled_law_at_one_step_is_the_regularised_optimum() -> None:
    model, prompt = tiny_llama(VOCAB, head_scale=10.0, seed=3), torch.tensor([VOCAB])
    reward = RandomTokenReward(vocab=VOCAB, positions=1, seed=1)
    n, alpha = 4000, 0.8
    made = run(ARGS(w=1 / alpha, top_k=VOCAB, mode="sample"), model, [prompt] * n, reward, 1, batch_size=8192)
    answers = all_answers(VOCAB, 1)
    logp, r = answer_logprobs(model, prompt, answers), reward.exact(answers)
    law = (logp + r / alpha).softmax(0)
    found = torch.bincount(torch.tensor([g.ids[0] for g in made.generations]), minlength=VOCAB).double()
    from scipy.stats import chisquare

    assert chisquare(found, law * n).pvalue > 1e-3
    assert made.kl_kind == "estimate"
    assert made.kl == pytest.approx(float((law * (law.log() - logp)).sum()), abs=1e-4)


def test_pruning_what_the_reward_cannot_change_changes_no_answer() -> None:
    class Bounded(RandomTokenReward):
        bounds = (-30.0, 30.0)

        def __call__(self, *args: Any, **more: Any) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + len(args[1])
            return super().__call__(*args, **more)

    model, prompt = tiny_llama(VOCAB, head_scale=60.0, seed=3), torch.tensor([VOCAB])
    loose, tight = Bounded(vocab=VOCAB, scale=0.1), Bounded(vocab=VOCAB, scale=0.1)
    tight.bounds = (-1.5, 1.5)
    settings = {"alpha": 1.0, "top_k": 4, "horizon": 2}
    free, pruned = run(TransferQStar(**settings), model, [prompt], loose, 6), run(TransferQStar(**settings), model, [prompt], tight, 6)
    assert ids(free) == ids(pruned)
    assert pruned.cost.model_tokens < free.cost.model_tokens


def test_ties_go_to_the_lower_id() -> None:
    logp = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0], [-1.0, -1.0, -3.0, -1.0, -1.0]])
    values, found = likeliest(logp, 3)
    assert found.tolist() == [[0, 1, 2], [0, 1, 3]]
    assert values.tolist() == [[0.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]


# ---- GenARM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_the_log_ratio_on_top_of_the_reference_is_the_reward_model(mode: str) -> None:
    base, tuned = tiny_model(), tiny_model(seed=5)
    made = run(GenARM(reward_model=tuned, reference=base, beta=1.0, mode=mode), base, seed=4)
    assert ids(made) == plain(tuned, seed=4, **({"temperature": 0} if mode == "greedy" else {}))


def test_models_of_two_vocabularies_are_refused_with_both_named() -> None:
    with pytest.raises(InputError, match=r"reward_model: LlamaForCausalLM has logits of width 32, LlamaForCausalLM of width 64"):
        run(GenARM(reward_model=tiny_model(vocab_size=32)))
    with pytest.raises(InputError, match="rollout: "):
        run(TransferQStar(rollout=tiny_model(vocab_size=32)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0}, "alpha: should be greater than 0"),
        ({"baseline_reward": small_ids}, "rollouts: indirect transfer needs 2 or more"),
        ({"estimator": "self"}, "needs a baseline_reward"),
        ({"rollouts": 2, "rollout_temperature": 0}, "several greedy continuations are one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TransferQStar(**settings)


def test_more_candidates_than_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="top_k: 65 candidates are asked for, the model has 64 tokens"):
        run(TransferQStar(top_k=65))
