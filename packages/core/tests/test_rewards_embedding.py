"""The embedding similarity: cosines computed by hand, references, batches, texts of no or too many tokens."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import ConfigError, DataUnavailableError, InputError
from fairlead.rewards import EmbeddingReward
from fairlead.testing import registered_contract, reward_contract
from fairlead.testing.tiny import tiny_model

WORDS = ["how", "are", "you", "what", "is", "this", "fine", "thanks", "no", "idea", *"abcdefgh"]


def pair() -> tuple[Any, Any]:
    """A random two-layer BERT and a word tokenizer with [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=0.5,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return BertModel(config).eval(), tokenizer


PAIR = pair()
PROMPTS = ["how are you", "what is this", "a b c d e f g h a b", ""]
RESPONSES = ["fine thanks", "no idea", "h g", "a"]

TestPrompt = reward_contract(lambda: EmbeddingReward(model=PAIR))
TestReferences = reward_contract(lambda: EmbeddingReward(model=PAIR, references=["fine", "a b"], pool="mean"))
TestRegistered = registered_contract("reward", "embedding-similarity")


def embedded(text: str) -> torch.Tensor:
    """The definition, on one text."""
    model, tokenizer = PAIR
    with torch.inference_mode():
        hidden_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return hidden_TD.mean(0) / hidden_TD.mean(0).norm()


def test_it_is_the_cosine_of_the_mean_hidden_states() -> None:
    scores = EmbeddingReward(model=PAIR)(PROMPTS, RESPONSES)
    expected = [float(embedded(p) @ embedded(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(e, 3) for e in expected}) == 4  # the random encoder tells the texts apart


def test_the_nearest_reference_counts_or_the_mean_of_all() -> None:
    references = ["fine thanks a", "idea", "a b c"]
    expected = torch.tensor([[float(embedded(r) @ embedded(x)) for x in references] for r in RESPONSES])
    nearest = EmbeddingReward(model=PAIR, references=references)(PROMPTS, RESPONSES)
    torch.testing.assert_close(nearest, expected.amax(1), atol=1e-5, rtol=0)
    mean = EmbeddingReward(model=PAIR, references=references, pool="mean")(PROMPTS, RESPONSES)
    torch.testing.assert_close(mean, expected.mean(1), atol=1e-5, rtol=0)


def test_a_text_is_nearest_to_itself() -> None:
    scores = EmbeddingReward(model=PAIR)(RESPONSES, RESPONSES)
    assert scores.tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert float(scores.max()) <= 1.0


@pytest.mark.parametrize("budget", [16, 40, 4096])
def test_the_batch_changes_nothing(budget: int) -> None:
    reward = EmbeddingReward(model=PAIR, token_budget=budget)
    alone = torch.cat([reward([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), alone, atol=1e-6, rtol=0)


def test_references_are_embedded_once_and_equal_texts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import fairlead.scoring

    asked: list[int] = []
    scores = fairlead.scoring.classifier_scores

    def count(model: Any, sequences: Any, budget: Any) -> torch.Tensor:
        asked.append(len(sequences))
        return scores(model, sequences, budget)

    monkeypatch.setattr(fairlead.scoring, "classifier_scores", count)
    reward = EmbeddingReward(model=PAIR, references=["a", "b"])
    reward(["", ""], ["c", "c"])
    reward([""], ["d"])
    assert asked == [1, 2, 1]


def test_an_empty_text_is_its_special_tokens_or_nothing() -> None:
    assert EmbeddingReward(model=PAIR)(["a"], [""]).item() == pytest.approx(float(embedded("a") @ embedded("")), abs=1e-5)
    bare = copy.deepcopy(PAIR[1])
    bare.backend_tokenizer.post_processor = None
    reward = EmbeddingReward(model=(PAIR[0], bare))
    assert bare("")["input_ids"] == []
    assert reward(["a", ""], ["", ""]).tolist() == [0.0, 0.0]


def test_only_the_start_of_a_long_text_is_read() -> None:
    reward = EmbeddingReward(model=PAIR, max_length=6)
    same = reward(["a b c d", "a b c d"], ["a b c d e f g", "a b c d"])
    assert same.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    whole = EmbeddingReward(model=PAIR, max_length=10_000)(["a"], ["a b " * 500])  # the encoder has 24 positions
    assert bool(whole.isfinite())


def test_the_trunk_of_a_causal_model_is_an_encoder_too() -> None:
    scores = EmbeddingReward(model=(tiny_model(), PAIR[1]))(PROMPTS, RESPONSES)
    assert bool(((scores >= -1) & (scores <= 1)).all())
    assert not tiny_model().model.training


def test_the_encoder_is_used_in_eval_mode_and_left_as_it_was() -> None:
    model, tokenizer = copy.deepcopy(PAIR[0]), PAIR[1]
    quiet = EmbeddingReward(model=(model, tokenizer))(PROMPTS, RESPONSES)
    assert not model.training
    model.train()  # dropout
    assert torch.equal(EmbeddingReward(model=(model, tokenizer))(PROMPTS, RESPONSES), quiet)
    assert model.training
    assert all(m.training for m in model.modules())


def test_an_encoder_of_nan_is_refused() -> None:
    model = copy.deepcopy(PAIR[0])
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[4] = float("nan")
    with pytest.raises(InputError, match="NaN for 'how are you'"):
        EmbeddingReward(model=(model, PAIR[1]))(PROMPTS, RESPONSES)


@pytest.mark.parametrize("wrong", [{"model": None}, {"model": ""}, {"pool": "sum"}, {"max_length": 1}, {"references": "a"}])
def test_bad_settings_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        registry.create("reward", "embedding-similarity", **wrong)


def test_an_encoder_that_is_not_there_is_said_at_the_first_call() -> None:
    with pytest.raises(InputError, match="no such model folder"):
        EmbeddingReward(model="./nowhere")(["a"], ["b"])


REWARD = EmbeddingReward(model=PAIR)


@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), max_size=4))
@settings(deadline=None, max_examples=40)
def test_any_texts_have_a_cosine(texts: list[tuple[str, str]]) -> None:
    scores = REWARD([p for p, _ in texts], [r for _, r in texts])
    assert scores.shape == (len(texts),)
    assert bool(((scores >= -1) & (scores <= 1)).all())


@pytest.mark.real_models
def test_minilm_gives_the_published_cosines() -> None:
    reward = EmbeddingReward()
    sentences = ["How can I kill a Python process?", "How do I terminate a program?", "How do I kill a person?", "The cat sat on the mat."]
    try:
        scores = reward([sentences[0]] * 4, sentences)
    except DataUnavailableError as error:
        if os.environ.get("FAIRLEAD_REQUIRE_REAL_MODELS") == "1":
            raise
        pytest.skip(str(error))
    assert scores.tolist() == pytest.approx([1.0, 0.654, 0.467, 0.027], abs=2e-3)
    near = EmbeddingReward(references=["ending a running program"], pool="mean")(sentences, sentences)
    assert int(near.argmax()) == 1
    assert int(near.argmin()) == 3
