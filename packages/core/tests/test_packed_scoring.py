"""Packed scoring: equal to one by one, no leak between segments, input order, reductions over groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from fairlead.errors import InputError
from fairlead.packed import Segment, packed_hidden, why_not_packable
from fairlead.scoring import RewardBatcher, classifier_scores

VOCABULARY = 60
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def classifier(kind: str = "llama", labels: int = 1) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=labels))
    elif kind == "mistral":
        model = MistralForSequenceClassification(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, num_labels=labels))
    elif kind == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=labels, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2, initializer_range=0.3)
        )  # fmt: skip
    else:
        model = BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=64, num_labels=labels))
    return model.eval()


@pytest.fixture(scope="module")
def causal() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model: Any, given: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits for s in given]).float()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_decoders_are_packed_and_score_as_one_by_one(kind: str) -> None:
    model, given = classifier(kind), sequences([1, 17, 2, 9, 9, 30, 1, 5])
    assert why_not_packable(model) == ""
    torch.testing.assert_close(classifier_scores(model, given, 40), one_by_one(model, given), rtol=1e-5, atol=1e-5)


def test_an_encoder_is_scored_by_its_own_pooling_in_padded_batches() -> None:
    model, given = classifier("bert", labels=3), sequences([1, 17, 2, 9])
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([s])).logits for s in given])
    torch.testing.assert_close(classifier_scores(model, given, 40), expected, rtol=1e-5, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12), budget=st.integers(25, 80), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_packed_equals_padded_for_any_lengths_and_budget(lengths: list[int], budget: int, seed: int) -> None:
    model, given = _shared(), sequences(lengths, seed)
    packed = RewardBatcher(model, token_budget=budget, advantage=None).score([[]] * len(given), [[s] for s in given])
    padded = RewardBatcher(model, token_budget=budget, advantage=None, pack=False).score([[]] * len(given), [[s] for s in given])
    torch.testing.assert_close(packed.reward_S, padded.reward_S, rtol=1e-5, atol=1e-5)


_MODEL: list[Any] = []


def _shared() -> Any:
    if not _MODEL:
        _MODEL.append(classifier())
    return _MODEL[0]


def test_changing_one_segment_leaves_the_others_alone() -> None:
    model = _shared()
    ids = torch.tensor(sequences([20])[0])
    segments = [Segment(0, 6), Segment(6, 13), Segment(13, 20)]
    changed = ids.clone()
    changed[:6] = (changed[:6] % (VOCABULARY - 1)) + 1
    with torch.no_grad():
        before, after = packed_hidden(model, ids, segments), packed_hidden(model, changed, segments)
    assert float((before[6:] - after[6:]).abs().max()) < 1e-6
    assert float((before[:6] - after[:6]).abs().max()) > 1e-2


def test_a_plain_packed_call_with_a_cache_leaks_which_is_what_the_batcher_avoids() -> None:
    model = _shared()
    given = sequences([6, 7])
    ids, positions = torch.tensor([given[0] + given[1]]), torch.cat([torch.arange(6), torch.arange(7)])[None]
    with torch.no_grad():
        leaking = model.model(input_ids=ids, position_ids=positions, use_cache=True).last_hidden_state[0, -1]
        alone = model.model(input_ids=torch.tensor([given[1]]), use_cache=False).last_hidden_state[0, -1]
        packed = packed_hidden(model, ids[0], [Segment(0, 6), Segment(6, 13)])[-1]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert float((leaking - alone).abs().max()) > 1e-2, "transformers no longer leaks; use_cache=False may be dropped"


def test_the_models_own_attention_is_put_back() -> None:
    model = classifier()
    before = model.config._attn_implementation
    classifier_scores(model, sequences([3, 4]))
    assert model.config._attn_implementation == before


def test_the_training_mode_is_put_back_and_dropout_is_off_while_scoring() -> None:
    model = copy.deepcopy(classifier()).train()
    model.config.attention_dropout = 0.5
    given = sequences([5, 8])
    torch.testing.assert_close(classifier_scores(model, given), classifier_scores(model, given), rtol=0, atol=0)
    assert model.training


def test_padding_ids_that_are_real_tokens_are_scored() -> None:
    model = classifier()
    ends_in_pad = [[5, 6, 0], [7, 8, 9]]
    expected = one_by_one(model, [[7, 8, 9]])
    scores = classifier_scores(model, ends_in_pad)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[5, 6, 0]]), use_cache=False).last_hidden_state[:, -1]
        last_token = model.score(hidden)
    torch.testing.assert_close(scores, torch.cat([last_token, expected]), rtol=1e-5, atol=1e-5)


def test_permuting_the_sequences_permutes_the_scores() -> None:
    model, given = _shared(), sequences([4, 19, 7, 7, 1, 12])
    order = [3, 0, 5, 1, 4, 2]
    scores = classifier_scores(model, given, 24)
    torch.testing.assert_close(classifier_scores(model, [given[i] for i in order], 24), scores[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["reward", "logprob", "both"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_sharing_the_prompt_changes_nothing(causal: Any, mode: Any, pooling: Any) -> None:
    prompts = sequences([7, 1, 0, 12], seed=1)
    responses = [sequences([5, 3, 9, 3], 2), sequences([1], 3), sequences([4, 2], 4), [*sequences([6, 6], 5), []]]
    head = torch.linspace(-1, 1, 32)
    found = [
        RewardBatcher(causal, mode=mode, head=head, pooling=pooling, token_budget=budget, advantage=None, **options).score(
            prompts, responses
        )
        for budget, options in ((64, {}), (21, {}), (64, {"share_prompts": False}), (64, {"pack": False}))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.reward_S, found[0].reward_S, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.sum_logp_S, found[0].sum_logp_S, rtol=1e-5, atol=1e-5)
        assert torch.equal(other.n_tokens_S, found[0].n_tokens_S)
        assert torch.equal(other.winner_P, found[0].winner_P)


def test_log_probabilities_are_those_of_the_response_alone(causal: Any) -> None:
    prompt, response = sequences([5, 4])
    scores = RewardBatcher(causal, mode="logprob", advantage=None).score([prompt, []], [[response], [response]])
    with torch.no_grad():
        logp = causal(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        alone = causal(torch.tensor([response])).logits[0].log_softmax(-1)
    expected = sum(float(logp[4 + i, t]) for i, t in enumerate(response))
    without = sum(float(alone[i, t]) for i, t in enumerate(response[1:]))
    assert scores.sum_logp_S.tolist() == pytest.approx([expected, without], abs=1e-4)
    assert scores.n_tokens_S.tolist() == [4, 3]


def test_winners_are_the_best_of_their_group_lowest_index_on_ties(causal: Any) -> None:
    a, b = sequences([4, 6])
    scores = RewardBatcher(causal, head=torch.randn(32, generator=torch.Generator().manual_seed(0)), advantage=None).score(
        [[1], [2]], [[a, b, a], [b, b]]
    )
    first = scores.reward_S[:3].tolist()
    assert scores.winner_P.tolist() == [int(first[1] > first[0]), 0]


def test_advantages_are_normalised_within_the_group(causal: Any) -> None:
    responses = [sequences([3, 5, 8], 1), sequences([4], 2)]
    scores = RewardBatcher(causal, head=torch.linspace(-1, 1, 32)).score([[1], [2]], responses)
    group = scores.reward_S[:3]
    torch.testing.assert_close(scores.advantage_S[:3], (group - group.mean()) / (group.std() + 1e-4), rtol=1e-4, atol=1e-5)
    assert float(scores.advantage_S[3]) == 0.0


def test_a_nan_reward_is_refused_dropped_or_zeroed(causal: Any) -> None:
    model = copy.deepcopy(causal)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    prompts, responses = [[1], [2]], [[[3, 4], [7]], [[7]]]
    head = torch.ones(32)
    with pytest.raises(InputError, match="sequence 1"):
        RewardBatcher(model, head=head).score(prompts, responses)
    dropped = RewardBatcher(model, head=head, nan="drop").score(prompts, responses)
    assert dropped.winner_P.tolist() == [0, -1]
    assert dropped.valid_S.tolist() == [True, False, False]
    assert dropped.advantage_S.tolist() == [0, 0, 0]
    zeroed = RewardBatcher(model, head=head, nan="zero").score(prompts, responses)
    assert zeroed.reward_S[1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1]], [], "one list of responses per prompt"),
        ([[1]], [[]], "no responses"),
        ([[]], [[[]]], "both empty"),
        ([[1] * 30], [[[2] * 30]], "token_budget"),
    ],
)
def test_bad_groups_are_refused(causal: Any, prompts: Any, responses: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RewardBatcher(causal, head=torch.ones(32), token_budget=40).score(prompts, responses)


def test_an_oversize_sequence_gets_a_row_of_its_own_on_request(causal: Any) -> None:
    given = sequences([50, 3])
    batcher = RewardBatcher(causal, head=torch.ones(32), token_budget=20, allow_oversize=True, advantage=None)
    assert batcher.score([[], []], [[given[0]], [given[1]]]).reward_S.isfinite().all()


def test_a_causal_model_without_a_reward_head_is_refused(causal: Any) -> None:
    with pytest.raises(InputError, match="head"):
        RewardBatcher(causal)


def test_answers_to_one_prompt_share_what_they_begin_with_and_score_as_alone() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from fairlead.scoring import _shared_units, classifier_scores

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval().double()
    made = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 50, (n,), generator=made).tolist() for n in (12, 7, 2)]
    groups = [0, 1, 0, 2, 1, 0, 2, 1, 0]
    tails = [torch.randint(1, 50, (n,), generator=made).tolist() for n in (5, 1, 9, 3, 4, 1, 6, 2, 0)]
    sequences = [prompts[g] + tail for g, tail in zip(groups, tails, strict=True)]  # one answer is empty
    alone = torch.cat([classifier_scores(model, [s]) for s in sequences])
    for budget in (16, 64, 1024):
        torch.testing.assert_close(classifier_scores(model, sequences, budget, groups), alone, rtol=0, atol=1e-6)
    tokens = sum(size for size, _ in _shared_units([([], s) for s in sequences], groups, 1024))
    assert tokens == sum(map(len, sequences)) - 3 * 11 - 2 * 7  # the empty answer keeps the prompt's last token
