"""Scores of aligned models: what is averaged, which text is read, how rows and scores are joined, and training on them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import InputError
from fairlead.kinds import SequenceStats
from fairlead.testing import tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer, sequence_stats, tokenize
from fairlead_training.poft_scoring import RULE, AlignedModel, demonstrations, merge, score, score_dataset

ROWS = [
    {"id": "a", "prompt": "w1 w2 ", "completion": "w3 w4 w5"},
    {"id": "b", "prompt": "w7 ", "completion": "w1"},
    {"id": "c", "prompt": "w3 w4 w5 w6 ", "completion": "w9 w2 w8 w8 w1 w0"},
    {"id": "d", "prompt": "w2 w2 ", "completion": "w5 w1"},
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def tokenizer(letters: bool = False, template: str | None = None) -> Any:
    """Words as tokens, or their letters, so that the same text has about twice as many."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", "user", "assistant", *"w0123456789", *(f"w{i}" for i in range(30))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    space = pre_tokenizers.WhitespaceSplit()
    words.pre_tokenizer = pre_tokenizers.Sequence([space, pre_tokenizers.Split(Regex("[w0-9]"), "isolated")]) if letters else space
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = template
    return made


def aligned(name: str = "zephyr", seed: int = 0, **options: Any) -> AlignedModel:
    return AlignedModel(name, tiny_model(seed=seed), tokenizer(**options))


def transformers_loss(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """The loss of transformers, labels -100 outside the response."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    labels = torch.tensor([[-100] * len(prompt_ids) + completion_ids])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels, use_cache=False).loss)


def unpackable() -> Any:
    """A model whose rows are padded."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, attn_logit_softcapping=2.0, pad_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("letters", [False, True])
def test_a_score_is_minus_the_loss_of_transformers_on_the_response(letters: bool) -> None:
    model = copy.deepcopy(tiny_model()).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # the loss of transformers is float32: large logits would cost it the sixth digit
    judge = AlignedModel("zephyr", model, tokenizer(letters))
    ids, _ = tokenize(ROWS, judge.tokenizer)
    for row, found in zip(ids, score(ROWS, judge), strict=True):
        assert found["logp"] == pytest.approx(-transformers_loss(judge.model, row["prompt_ids"], row["completion_ids"][0]), abs=1e-6)
        assert found["tokens"] == len(row["completion_ids"][0]) and row["completion_ids"][0][-1] == judge.tokenizer.eos_token_id


@pytest.mark.parametrize("model", [tiny_model(), unpackable()], ids=["packed", "padded"])
@settings(max_examples=6, deadline=None)
@given(size=st.integers(2, 9), order=st.permutations(ROWS))
def test_a_score_does_not_change_with_batch_and_order(model: Any, size: int, order: list[dict[str, Any]]) -> None:
    judge = AlignedModel("zephyr", model, tokenizer())
    alone = {x["id"]: x["logp"] for x in score(ROWS, judge, batch_size=1)}
    for found in score(order, judge, batch_size=size):
        assert found["logp"] == pytest.approx(alone[found["id"]], abs=1e-6)


def test_a_score_is_that_of_a_batch_padded_on_the_left() -> None:
    judge = aligned()
    made, _ = tokenize(ROWS, judge.tokenizer)
    whole = [row["prompt_ids"] + row["completion_ids"][0] for row in made]
    width = max(map(len, whole)) + 3
    ids = torch.tensor([[0] * (width - len(x)) + x for x in whole])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in whole])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logp = judge.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.log_softmax(-1)
    for i, (row, found) in enumerate(zip(made, score(ROWS, judge), strict=True)):
        count = len(row["completion_ids"][0])
        own = logp[i, -count - 1 : -1].gather(1, ids[i, -count:, None]).mean()
        assert found["logp"] == pytest.approx(float(own), abs=1e-5)


def test_each_model_reads_with_its_own_tokenizer_and_the_mean_is_of_logs() -> None:
    judges = [aligned("words"), aligned("letters", seed=1, letters=True)]
    rows, report = score_dataset(ROWS, judges)
    assert (report.rows, report.dropped) == (4, {})
    for row in rows:
        assert row["ref_logp_mean"] == pytest.approx((row["words.logp"] + row["letters.logp"]) / 2)
        assert row["letters.tokens"] == 2 * row["words.tokens"] - 1  # each word is two letters, the end stays one
        assert row["score_rule"] == RULE
    assert [row["words.logp"] for row in rows] == [x["logp"] for x in score(ROWS, judges[0])]


def test_equal_models_count_as_one() -> None:
    one, _ = score_dataset(ROWS, [aligned("a")])
    three, _ = score_dataset(ROWS, [aligned(name) for name in "abc"])
    assert [r["ref_logp_mean"] for r in three] == pytest.approx([r["ref_logp_mean"] for r in one])


def test_a_template_frames_plain_text_and_an_empty_one_leaves_it() -> None:
    judge = aligned(template=TEMPLATE)
    (found,) = score(ROWS[:1], judge)
    ids = [judge.tokenizer(text)["input_ids"] for text in ("user w1 w2 <eos> assistant", "w3 w4 w5 <eos>")]
    assert found["tokens"] == 4
    assert found["logp"] == pytest.approx(-transformers_loss(judge.model, *ids), abs=1e-6)
    other = AlignedModel("zephyr", judge.model, tokenizer(), TEMPLATE)
    assert score(ROWS, other) == score(ROWS, judge)
    assert other.tokenizer.chat_template is None
    assert score(ROWS, AlignedModel("zephyr", judge.model, judge.tokenizer, "")) == score(ROWS, aligned())


def test_every_turn_of_the_assistant_is_a_row_behind_the_turns_before_it() -> None:
    say = [{"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5"))]
    told = demonstrations([{"id": 7, "messages": say}, {"id": 8, "messages": say[:2]}])
    assert [row["id"] for row in told] == ["7:0", "7:1", 8]
    judge = aligned(template=TEMPLATE)
    rows, _ = score_dataset([{"id": 7, "messages": say}], [judge])
    texts = ("user w1 <eos> assistant", "w2 w3 <eos>"), ("user w1 <eos> assistant w2 w3 <eos> user w4 <eos> assistant", "w5 <eos>")
    for row, pair in zip(rows, texts, strict=True):
        expected = transformers_loss(judge.model, *(judge.tokenizer(text)["input_ids"] for text in pair))
        assert row["zephyr.logp"] == pytest.approx(-expected, abs=1e-6)
    trained, _ = tokenize(rows, judge.tokenizer)
    assert [len(row["completion_ids"][0]) for row in trained] == [row["zephyr.tokens"] for row in rows]
    assert [row["ref_logp_mean"] for row in trained] == [[row["ref_logp_mean"]] for row in rows]


def test_scores_are_joined_by_id_whatever_their_order() -> None:
    judge = aligned()
    entries = score(ROWS, judge)
    rows, _ = merge(ROWS, {"zephyr": entries[::-1]})
    assert rows == score_dataset(ROWS, [judge])[0]


def entry(key: str, logp: Any, **more: Any) -> dict[str, Any]:
    return {"id": key, "logp": logp, "tokens": 3, "rule": RULE, **more}


def test_rows_without_a_finite_score_of_every_model_are_dropped_and_counted() -> None:
    values = {"a": (-1.0, -math.inf), "b": (None, -1.0), "c": (math.nan, -1.0), "d": (0.0, -2.0)}
    scores = {name: [entry(key, pair[j]) for key, pair in values.items()] for j, name in enumerate("mn")}
    rows, report = merge(ROWS, scores)
    assert [(row["id"], row["ref_logp_mean"]) for row in rows] == [("d", -1.0)]
    assert report.dropped == {"without a finite score of n": 1, "too long for m": 1, "without a finite score of m": 1}
    assert report.line() == "1 rows; dropped: 1 without a finite score of n, 1 too long for m, 1 without a finite score of m; truncated: 0"


def test_long_rows_are_dropped_and_never_cut() -> None:
    rows, report = score_dataset(ROWS, [aligned("words"), aligned("letters", letters=True)], max_length=8)
    assert [row["id"] for row in rows] == ["b"]
    assert report.dropped == {"too long for letters": 2, "too long for words": 1}


def test_a_model_that_is_not_finite_scores_nothing() -> None:
    broken = copy.deepcopy(tiny_model())
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    rows, report = score_dataset(ROWS, [aligned("m"), AlignedModel("n", broken, tokenizer())])
    assert rows == [] and report.dropped == {"without a finite score of n": 4}


def test_scoring_leaves_dropout_off_and_the_mode_as_it_was() -> None:
    model = unpackable()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    judge = AlignedModel("zephyr", model, tokenizer())
    assert score(ROWS, judge) == score(ROWS, judge) and model.training


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "w1"}], "row 0: columns id, text; needed are prompt and completion, or messages"),
        ([{"prompt_ids": [1], "completion_ids": [[2]]}], "row 0: columns id, prompt_ids, completion_ids; needed are"),
        ([ROWS[0], {"prompt": "w1", "completion": "w2"}], "row 1: id: is missing; give every row one, or none"),
        ([ROWS[0], ROWS[1], ROWS[0]], "rows: id 'a' repeats"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], "row 0: messages: no turn of the assistant"),
        ([{"id": 1, "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}], "zephyr: id 1 holds chat messages"),
        ([{"prompt": "w1", "completion": " "}], "row 0: completion 0 is empty"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_dataset(rows, [aligned()])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "models: at least one is needed"),
        ({"m": [entry("a", -1.0)]}, "scores of m: id 'b' is missing; scores are joined by id"),
        ({"m": [entry(k, -1.0) for k in "abz"]}, "rows: id 'z' is missing"),
        ({"m": [entry(k, -1.0) for k in "aba"]}, "scores of m: id 'a' repeats"),
        ({"m": [entry("a", -1.0), entry("b", 0.2)]}, "scores of m: id 'b': a mean log-probability is at most 0, got 0.2"),
        ({"m": [entry("a", -1.0), entry("b", -1.0, rule="no end")]}, "id 'b' was scored by rule 'no end', training needs"),
    ],
)
def test_scores_that_do_not_fit_the_rows_are_refused(scores: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge(ROWS[:2], scores)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="models: each needs a name of its own, got m, m"):
        score_dataset(ROWS, [aligned("m"), aligned("m")])
    with pytest.raises(InputError, match="batch_size: must be at least 1, got 0"):
        score(ROWS, aligned(), batch_size=0)


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    score_dataset(ROWS, [aligned()], batch_size=3, progress=lambda *at: seen.append(at))
    assert seen == [("zephyr", 3, 4), ("zephyr", 4, 4)]


def trainer(folder: Path, rows: list[dict[str, Any]], model: Any = None, **options: Any) -> PreferenceTrainer:
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = PreferenceConfig(output_dir=str(folder / "out"), **{**chosen, **options})
    model = copy.deepcopy(tiny_model()) if model is None else model
    return PreferenceTrainer(model, "poft", args, rows, processing_class=tokenizer())


def losses(run: PreferenceTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_target_that_scored_its_own_data_starts_at_log_two_and_gains(tmp_path: Path) -> None:
    rows, _ = score_dataset(ROWS, [aligned()])
    run = trainer(tmp_path, rows)
    run.train()
    first, second = losses(run)
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first
    assert run.state.log_history[0]["poft/tau"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(InputError, match="ref_logp_mean"):
        trainer(tmp_path, ROWS)


def test_micro_batches_take_the_step_of_the_batch(tmp_path: Path) -> None:
    rows, _ = score_dataset(ROWS, [aligned(seed=1)])
    found = []
    for size in (4, 1):
        run = trainer(tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, optim="sgd", max_grad_norm=0)
        run.train()
        found.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.allclose(*found, atol=1e-6)
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert float((found[0] - start).abs().max()) > 1e-3


def test_the_gradient_is_that_of_cross_entropy_weighted_by_tau() -> None:
    model = copy.deepcopy(tiny_model()).double()
    rows, _ = score_dataset(ROWS, [aligned(seed=1)])
    made, _ = tokenize(rows, tokenizer())
    stats = sequence_stats(model, made)
    ours = torch.autograd.grad(registry.create("objective", "poft")(stats).loss, list(model.parameters()), retain_graph=True)
    r_theta = stats.logp / stats.length
    tau = torch.sigmoid(stats.extra["ref_logp_mean"].double() - r_theta.detach())
    weighted = torch.autograd.grad((tau * -r_theta).mean(), list(model.parameters()))
    assert 0.01 < float(tau.min()) < float(tau.max()) < 0.99
    for a, b in zip(ours, weighted, strict=True):
        assert torch.allclose(a, b, atol=1e-6 * float(b.abs().max()))


def test_poft_is_simpo_without_margin_against_a_rejected_of_the_mean_score() -> None:
    logp = torch.tensor([-10.0, -22.0], dtype=torch.float64, requires_grad=True)
    length, r_bar = torch.tensor([5, 8]), torch.tensor([-2.2, -1.0], dtype=torch.float64)
    ours = registry.create("objective", "poft", beta=2.0)(SequenceStats(logp, length, extra={"ref_logp_mean": r_bar}))
    both = torch.stack([logp, r_bar * 3], 1).flatten()
    pair = SequenceStats(both, torch.stack([length, torch.tensor([3, 3])], 1).flatten(), group=[0, 0, 1, 1], role=[1, -1, 1, -1])
    simpo = registry.create("objective", "simpo", beta=2.0, gamma=0.0)(pair)
    assert ours.loss.item() == pytest.approx(simpo.loss.item(), abs=1e-12)
    assert torch.allclose(ours.dlogp, simpo.dlogp[0::2], atol=1e-12)
