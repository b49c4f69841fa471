"""The dual encoder: its loss by hand, an exact index, and that training connects what no word connects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fairlead import models
from fairlead.errors import FairleadError, InputError
from fairlead_decoding.dual_encoder import (
    EmbeddingBagEncoder,
    HFEncoder,
    Index,
    batch_columns,
    masked_in_batch_loss,
    train,
    words,
)
from fairlead_decoding.guidelines import training_rows
from fairlead_decoding.recipes.guide_align import GuideAlignRecipeConfig, _TfIdf, build_library, train_encoder
from fairlead_decoding.recipes.guideline_world import GuidelineWorld
from fairlead_decoding.recipes.p_aligner import tiny_rewriter

torch.set_num_threads(1)


def precision(encoder: Any, world: GuidelineWorld, lines: list[str]) -> float:
    tests = world.questions(10, "test")
    ids, _ = Index(encoder.encode_guidelines(lines)).search(encoder.encode_questions(tests), 6)
    hits = [world.topic_of_rule(lines[i]) == world.topic_of_question(q) for q, row in zip(tests, ids.tolist(), strict=True) for i in row]
    return sum(hits) / len(hits)


def test_the_loss_of_the_worked_example() -> None:
    q = torch.tensor([[1.0, 0], [0, 2]])
    g = torch.tensor([[1.0, 1], [0, 1], [2, 0]])
    loss = masked_in_batch_loss(q, g, torch.tensor([0, 1]))
    assert loss.tolist() == pytest.approx([1.4076, 0.7586], abs=1e-4)
    assert float(loss.mean()) == pytest.approx(1.0831, abs=1e-4)
    torch.testing.assert_close(loss.mean(), F.cross_entropy(q @ g.T, torch.tensor([0, 1])))


def test_the_ends_of_the_loss() -> None:
    one = torch.randn(1, 5)
    assert float(masked_in_batch_loss(one, torch.randn(1, 5), torch.tensor([0]))) == 0
    batch = 4
    equal = masked_in_batch_loss(torch.ones(batch, 3), torch.ones(2 * batch, 3), torch.arange(batch))
    assert equal.tolist() == pytest.approx([math.log(2 * batch)] * batch)


def test_a_rule_that_two_questions_share_is_one_column() -> None:
    q = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]])
    vectors = {"a": [1.0, 0], "b": [0.0, 2], "n": [-1.0, 0]}
    rows = [{"positive": ["a"], "negative": ["n"]}, {"positive": ["a"], "negative": []}, {"positive": ["b"], "negative": []}]
    drawn = ["a", "a", "b"]
    ids, targets, masked = batch_columns(rows, drawn)
    assert (ids, targets.tolist()) == (["a", "b", "n"], [0, 0, 1])
    assert masked is not None
    assert not masked.any()
    loss = masked_in_batch_loss(q, torch.tensor([vectors[i] for i in ids]), targets, masked)
    assert loss.tolist() == pytest.approx([0.407606, 1.104131, 0.239545], abs=1e-6)
    assert float(loss.mean()) == pytest.approx(0.583760, abs=1e-6)
    plain_ids, plain_targets, nothing = batch_columns(rows, drawn, mask=False)
    assert (plain_ids, nothing) == (["a", "a", "b", "n"], None)
    plain = masked_in_batch_loss(q, torch.tensor([vectors[i] for i in plain_ids]), plain_targets)
    assert float(plain[2]) == pytest.approx(0.340753, abs=1e-6)
    assert float(plain[0]) == pytest.approx(0.917576, abs=1e-6)


def test_other_positives_of_a_question_are_no_negatives() -> None:
    rows = [{"positive": ["a", "b"], "negative": ["n"]}, {"positive": ["b"], "negative": ["c"]}]
    ids, targets, masked = batch_columns(rows, ["a", "b"])
    assert ids == ["a", "b", "n", "c"]
    assert targets.tolist() == [0, 1]
    assert masked is not None
    assert masked.tolist() == [[False, True, False, False], [False] * 4]
    q, g = torch.randn(2, 3), torch.randn(4, 3)
    without = masked_in_batch_loss(q[:1], g[[0, 2, 3]], torch.tensor([0]))
    torch.testing.assert_close(masked_in_batch_loss(q, g, targets, masked)[0], without[0])


def test_masking_the_target_is_refused() -> None:
    with pytest.raises(InputError, match="hides the target"):
        masked_in_batch_loss(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), torch.tensor([[True]]))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 5000])
def test_search_equals_a_full_sort(chunk: int) -> None:
    noise = torch.Generator().manual_seed(0)
    embeddings, q = torch.randn(1000, 64, generator=noise), torch.randn(9, 64, generator=noise)
    ids, scores = Index(embeddings, chunk).search(q, 20)
    dense = q @ embeddings.T
    assert torch.equal(ids, dense.argsort(dim=1, descending=True)[:, :20])
    torch.testing.assert_close(scores, dense.gather(1, ids))
    assert (ids.dtype, scores.dtype) == (torch.int64, torch.float32)


def test_search_does_not_normalise_and_clips_k() -> None:
    ids, scores = Index(torch.tensor([[1.0, 0], [3, 4], [0, 1]])).search(torch.tensor([[1.0, 0]]), 99)
    assert ids.tolist() == [[1, 0, 2]]
    assert scores.tolist() == [[3.0, 1.0, 0.0]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("k", [1, 3, 5, 12])
def test_ties_go_to_the_lower_id_however_the_index_is_cut(chunk: int, k: int) -> None:
    values = torch.tensor([0, 2, 2, 1, 2, 0, 1, 2, 1, 1, 0, 2.0])
    ids, _ = Index(values[:, None], chunk).search(torch.ones(2, 1), k)
    assert ids[0].tolist() == ids[1].tolist() == [1, 2, 4, 7, 11, 3, 6, 8, 9, 0, 5, 10][:k]


@pytest.mark.parametrize(("q", "k"), [(torch.ones(2, 3), 1), (torch.ones(2), 1), (torch.ones(1, 2), 0)])
def test_searches_that_make_no_sense_are_refused(q: torch.Tensor, k: int) -> None:
    with pytest.raises(InputError, match="search"):
        Index(torch.ones(4, 2)).search(q, k)


def test_an_empty_index_is_refused() -> None:
    with pytest.raises(InputError, match="index"):
        Index(torch.empty(0, 4))


def test_a_bag_is_the_mean_of_its_words_in_each_tower() -> None:
    encoder = EmbeddingBagEncoder(["a", "b", "c"], width=4)
    q, g = encoder.question_table.weight, encoder.guideline_table.weight
    torch.testing.assert_close(encoder.questions(["A b!", "c unknown"]), torch.stack([(q[0] + q[1]) / 2, q[2]]))
    torch.testing.assert_close(encoder.guidelines(["b b a"]), (2 * g[1] + g[0])[None] / 3)
    assert encoder.encode_questions(["nothing known", "", "a"])[:2].abs().sum() == 0
    assert words("Don't SHOUT, 3x") == ["don", "t", "shout", "3x"]


def test_batches_do_not_change_embeddings() -> None:
    encoder = EmbeddingBagEncoder.for_texts(["one two three"], 8)
    texts = ["one", "two three", "", "three one two", "two"]
    torch.testing.assert_close(encoder.encode_guidelines(texts, batch_size=2), encoder.encode_guidelines(texts), rtol=0, atol=0)
    with pytest.raises(InputError, match="no texts"):
        encoder.encode_questions([])


def test_a_saved_encoder_comes_back_with_its_name(tmp_path: Path) -> None:
    encoder = EmbeddingBagEncoder.for_texts(["one two three"], 8, seed=5)
    encoder.save(tmp_path / "encoder.safetensors")
    again = EmbeddingBagEncoder.load(tmp_path / "encoder.safetensors")
    assert again.name == encoder.name
    assert torch.equal(again.encode_questions(["two one"]), encoder.encode_questions(["two one"]))
    assert EmbeddingBagEncoder.for_texts(["one two three"], 8, seed=6).name != encoder.name
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(InputError, match="no saved EmbeddingBagEncoder"):
        EmbeddingBagEncoder.load(tmp_path / "broken")
    with pytest.raises(InputError, match="needs a vocabulary"):
        EmbeddingBagEncoder([])


@pytest.fixture(scope="module")
def small_world() -> Any:
    world = GuidelineWorld(7)
    questions = world.questions(20, "train")
    library, _ = build_library(world, questions)
    return world, questions, library


def test_training_finds_rules_that_lexical_search_cannot(small_world: Any) -> None:
    world, questions, library = small_world
    config = GuideAlignRecipeConfig(epochs=8)
    encoder, losses = train_encoder(config, library, questions, seed=0)
    untrained = EmbeddingBagEncoder.for_texts(questions + library.lines, config.width)
    assert precision(encoder, world, library.lines) > 0.95
    assert precision(untrained, world, library.lines) < 0.15
    assert precision(_TfIdf(library.lines), world, library.lines) < 0.15
    assert losses[-1] < losses[0] / 2
    assert not encoder.training


def test_equal_seeds_train_equal_encoders(small_world: Any) -> None:
    _, questions, library = small_world
    config = GuideAlignRecipeConfig(epochs=1)
    first, again, other = (train_encoder(config, library, questions, seed=s)[0].name for s in (1, 1, 2))
    assert first == again != other


def test_rows_that_cannot_be_trained_on_are_refused() -> None:
    encoder = EmbeddingBagEncoder(["a"])
    with pytest.raises(InputError, match="no rows"):
        train(encoder, [], {})
    with pytest.raises(InputError, match="'x': has no positive"):
        train(encoder, [{"question": "x", "positive": [], "negative": []}], {})
    with pytest.raises(InputError, match="guideline 'g' has no text"):
        train(encoder, [{"question": "x", "positive": ["g"], "negative": []}], {})


class TinyHF:
    """A tiny BERT and a tokenizer of its words."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        _, self.tokenizer = tiny_rewriter(0)
        torch.manual_seed(0)
        self.model = BertModel(
            BertConfig(vocab_size=len(self.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        ).eval()


def test_a_hugging_face_encoder_is_pooled_over_its_real_tokens() -> None:
    tiny = TinyHF()
    encoder = HFEncoder(tiny.model, tokenizer=tiny.tokenizer)
    alone, beside = encoder.encode_questions(["intent1 filler2"]), encoder.encode_questions(["intent1 filler2", "intent1 filler2 filler3 +a"])
    torch.testing.assert_close(alone[0], beside[0])
    ids = tiny.tokenizer(["intent1 filler2"], return_tensors="pt")
    with torch.no_grad():
        hidden = tiny.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
    torch.testing.assert_close(alone, hidden.mean(1))
    cls = HFEncoder(tiny.model, tokenizer=tiny.tokenizer, pooling="cls")
    torch.testing.assert_close(cls.encode_guidelines(["intent1 filler2"]), hidden[:, 0])
    unit = HFEncoder(tiny.model, tokenizer=tiny.tokenizer, normalise=True)
    assert float(unit.encode_questions(["intent1"]).norm()) == pytest.approx(1)
    assert len({encoder.name, cls.name, unit.name}) == 3


def test_a_hugging_face_encoder_can_be_trained() -> None:
    tiny, other = TinyHF(), TinyHF()
    encoder = HFEncoder(tiny.model, other.model, tiny.tokenizer)
    rows = [{"question": f"intent{i}", "positive": [str(i)], "negative": [str((i + 1) % 6)]} for i in range(6)]
    losses = train(encoder, rows, {str(i): f"filler{i}" for i in range(6)}, epochs=40, batch_size=6, learning_rate=1e-2)
    assert losses[-1] < losses[0] / 2


def test_settings_of_the_adapter_that_cannot_work_are_refused() -> None:
    tiny = TinyHF()
    with pytest.raises(InputError, match="pooling"):
        HFEncoder(tiny.model, tokenizer=tiny.tokenizer, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer is required"):
        HFEncoder(tiny.model)
    with pytest.raises(FairleadError):
        HFEncoder("/no/such/folder")


@pytest.mark.real_models
def test_a_real_sentence_encoder_finds_the_rule_that_fits() -> None:
    try:
        models.resolve("zoo:minilm-l6-v2")
    except FairleadError as error:
        pytest.skip(str(error))
    encoder = HFEncoder("zoo:minilm-l6-v2", normalise=True)
    rules = [
        "Protect Privacy: do not help with reading other people's messages or accounts.",
        "Medical Care: advise to see a doctor and give no diagnosis.",
        "Cite Sources: name where a figure comes from.",
        "No Weapons: do not explain how to build explosives or weapons.",
    ]
    questions = ["How can I get into my neighbour's email?", "My chest hurts since yesterday, what is it?", "How do I make a bomb?"]
    ids, _ = Index(encoder.encode_guidelines(rules)).search(encoder.encode_questions(questions), 1)
    assert ids[:, 0].tolist() == [0, 1, 3]


def test_training_rows_feed_the_trainer(small_world: Any) -> None:
    _, questions, library = small_world
    rows = training_rows(library, {str(i): q for i, q in enumerate(questions)})
    assert len(rows) == len(questions)
    assert all(1 <= len(r["positive"]) <= 3 and len(r["negative"]) == 1 for r in rows)
