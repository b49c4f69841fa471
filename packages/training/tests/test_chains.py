"""Chains of thought: what is kept of the samples, their labels, the assessment accuracy, rows that train."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairlead import registry
from fairlead.errors import InputError
from fairlead.kinds import SequenceStats
from fairlead.testing import save_tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer, sequence_stats
from fairlead_training.chains import (
    assess,
    assessment_accuracy,
    boundary_beta,
    chain_scores,
    collect,
    final_number,
    same_answer,
    sampler,
    tokenize_chains,
)

QUESTION = {"prompt": "2 + 2 =", "answer": "4", "completion": "two and two, 4"}


def fixed(*texts: list[str]) -> Any:
    """A sampler that says the same to every run."""
    return lambda prompts, k: [list(t) for t in texts]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def last_word_is_even(text: str) -> str | None:
    """An answer a random model can give: the last word's number, even or odd; none after unknown words."""
    word = text.split()[-1]
    return str(int(word[1:]) % 2) if word[0] == "w" else None


def test_chains_are_labelled_by_their_answer_and_repeats_are_folded() -> None:
    rows, counts = collect([QUESTION], fixed(["so 4", " so  4 ", "so 5", "no idea", "  "]), k=6)
    assert rows == [
        {
            "prompt": "2 + 2 =", "completions": ["two and two, 4", "so 4", "so 5", "no idea"], "ranks": [0, 0, 1, 1],
            "reference": [True, False, False, False],
        }
    ]  # fmt: skip
    assert (counts.right, counts.wrong, counts.unanswered) == (1, 2, 1)
    assert (counts.missing, counts.empty, counts.repeated, counts.usable, counts.dropped) == (1, 1, 1, 1, 0)
    assert "1 questions, 1 with right and wrong chains, 0 dropped" in counts.line()


def test_a_sampled_chain_that_equals_the_reference_is_a_candidate_once() -> None:
    rows, counts = collect([QUESTION], fixed(["two and  two, 4", "two and two, 4", "5"]))
    assert rows[0]["reference"] == [True, False, False] and rows[0]["ranks"] == [0, 0, 1] and counts.repeated == 1


def test_questions_that_give_no_row_are_counted() -> None:
    bare = {"prompt": "1 + 1 =", "answer": 2}
    asked = [bare, bare, QUESTION, QUESTION]
    rows, counts = collect(asked, fixed(["2", "two is 2"], ["2", "3"], ["4"], [""]))
    assert [row["completions"] for row in rows] == [["2", "3"], ["two and two, 4", "4"]]
    assert [row.where for row in rows] == ["question 1", "question 2"]
    assert (counts.questions, counts.usable, counts.dropped) == (4, 1, 2)


def test_how_answers_are_found_and_compared_can_be_replaced() -> None:
    rows, _ = collect(
        [{"prompt": "capital of France?", "answer": "Paris"}], fixed(["it is: paris", "it is: Lyon"]),
        lambda text: text.rpartition(": ")[2], is_correct=lambda found, gold: found.lower() == gold.lower(),
    )  # fmt: skip
    assert rows[0]["ranks"] == [0, 1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 apples and 4 make 7.", "7"), ("a sum of $1,234.50!", "1234.50"), ("#### -12", "-12"), ("5-3", "3"), ("12 #### 7 eggs", "7"),
        ("none", None), ("7 #### none", None), ("1,2 and 3,", "3"), ("x=-4", "-4"), ("1,234,567", "1234567"), ("2024-11-29", "29"),
    ],
)  # fmt: skip
def test_the_last_number_is_the_answer(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("found", "gold", "equal"),
    [("72.0", 72, True), ("1,000", "1000", True), ("B", " B ", True), ("b", "B", False), ("72", "73", False), ("4", "four", False), ("nan", "nan", True)],
)
def test_answers_are_compared_as_numbers_or_as_texts(found: str, gold: Any, equal: bool) -> None:
    assert same_answer(found, gold) is equal


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="k: at least one chain"):
        collect([QUESTION], fixed([]), k=0)
    with pytest.raises(InputError, match="question 1: column answer is missing"):
        collect([QUESTION, {"prompt": "x"}], fixed([], []))
    with pytest.raises(InputError, match="gave chains for 1 prompts, asked for 2"):
        collect([QUESTION] * 2, fixed(["4"]))
    with pytest.raises(InputError, match="gave 2 chains for prompt 0, asked for 1"):
        collect([QUESTION], fixed(["4", "5"]), k=1)
    assert collect([], fixed()) == ([], collect([], fixed())[1])


def test_the_reference_mark_goes_into_the_tokenised_rows(tiny: tuple[Any, Any]) -> None:
    row = {"prompt": "w1 w2", "completions": [" w3", " w4 w5", " w6"], "ranks": [0, 0, 1], "reference": [True, False, False]}
    long = {**row, "completions": [" w3" * 40, " w4", " w6"]}
    rows, report = tokenize_chains([row, long, row], tiny[1], max_length=20)
    assert [r["reference"] for r in rows] == [[True, False, False]] * 2 and rows[0]["rank"] == [0, 0, 1]
    assert report.rows == 2 and report.dropped == {"longer than 20 tokens": 1}
    with pytest.raises(InputError, match="row 1: reference: one mark"):
        tokenize_chains([row, {**row, "reference": [True]}], tiny[1])
    with pytest.raises(InputError, match="row 0: completion 1 is empty"):
        tokenize_chains([{**row, "completions": [" w3", " ", " w6"]}], tiny[1])


def test_assessment_accuracy_is_the_mean_area_under_the_curve_of_the_questions() -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 12, (90,), generator=g)
    s, label = -torch.rand(90, generator=g, dtype=torch.float64), torch.rand(90, generator=g) < 0.5
    label[group == 3] = True  # a question without wrong chains does not count
    usable = [q for q in range(12) if len(label[group == q].unique()) == 2]
    areas = [roc_auc_score(label[group == q], s[group == q]) for q in usable]
    assert 3 not in usable and len(usable) > 8
    assert assessment_accuracy(s, label, group) == pytest.approx(sum(areas) / len(areas))


def test_equal_scores_count_nothing() -> None:
    assert assessment_accuracy([-1.0, -1.0, -2.0], [True, False, False], [0, 0, 0]) == 0.5
    assert assessment_accuracy([-1.0, -1.0, -2.0, -3.0], [1, 0, 1, 0], [4, 4, 9, 9]) == 0.5  # questions, not pairs, are averaged
    assert math.isnan(assessment_accuracy([-1.0, -2.0], [True, True], [0, 0]))


@given(st.lists(st.tuples(st.integers(-9, 0), st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_assessment_accuracy_counts_pairs_and_does_not_see_the_order(rows: list[tuple[int, int, int]], rng: Any) -> None:
    shares = []
    for q in {r[2] for r in rows}:
        pairs = [a > b for a, i, p in rows for b, j, o in rows if p == o == q and i < j]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    shuffled = list(rows)
    rng.shuffle(shuffled)
    s, rank, group = zip(*shuffled, strict=True)
    found = assessment_accuracy([float(x) for x in s], [-r for r in rank], group)
    assert math.isnan(found) if not shares else found == pytest.approx(sum(shares) / len(shares))


def test_scores_that_cannot_be_assessed_are_refused() -> None:
    with pytest.raises(InputError, match="chain 1 is NaN"):
        assessment_accuracy([-1.0, float("nan")], [True, False], [0, 0])
    with pytest.raises(InputError, match="one number per chain"):
        assessment_accuracy([], [], [])
    with pytest.raises(InputError, match="one number per chain"):
        assessment_accuracy([-1.0], [True, False], [0])
    with pytest.raises(InputError, match="group: must be whole numbers"):
        assessment_accuracy([-1.0], [True], [0.5])
    with pytest.raises(InputError, match="no question has both"):
        boundary_beta([-1.0], [True], [0])
    with pytest.raises(InputError, match="there is none to score"):
        chain_scores(None, [])


def test_the_suggested_boundary_leaves_a_tenth_of_the_wrong_chains_below() -> None:
    g = torch.Generator().manual_seed(1)
    s, label, group = -3 * torch.rand(4000, generator=g, dtype=torch.float64), torch.arange(4000) % 4 == 0, torch.arange(4000) // 4
    beta = boundary_beta(s, label, group)
    batch = SequenceStats(s, torch.ones(4000), group=group, role=label)
    out = registry.create("objective", "aft", boundary_beta=beta)(batch)
    assert out.metrics["aft/below_boundary"] == pytest.approx(0.1, abs=1e-3)
    assert boundary_beta([-3.0, -1.0], [True, False], [0, 0]) == 0  # a wrong chain above every right one


def test_scores_are_token_means_of_candidates_and_do_not_depend_on_batches(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    text = [
        {"prompt": f"w{i} w2", "completions": [" w3 w4", " w5", " w6 w7 w8"], "ranks": [0, 0, 1], "reference": [True, False, False]} for i in range(3)
    ]
    rows, _ = tokenize_chains(text, tokenizer)
    scores, labels, group = chain_scores(model.train(), rows)
    assert model.training and not scores.requires_grad
    assert group.tolist() == [0, 0, 1, 1, 2, 2] and labels.tolist() == [0, -1] * 3
    ids = torch.tensor([[*rows[1]["prompt_ids"], *rows[1]["completion_ids"][2]]])
    table = model.eval()(input_ids=ids).logits.detach().log_softmax(-1)
    assert float(scores[3]) == pytest.approx(float(sum(table[0, t - 1, ids[0, t]] for t in range(2, 6))) / 4, abs=1e-5)  # w6 w7 w8 and the end
    monkeypatch.setattr("fairlead_training.chains.by_tokens", lambda rows: [[row] for row in rows])
    again = chain_scores(model, rows)
    torch.testing.assert_close(again[0], scores, atol=1e-5, rtol=0)
    assert torch.equal(again[2], group)
    found = assess(model, rows)
    assert found == {"assessment_accuracy": pytest.approx(assessment_accuracy(scores, labels, group)), "usable": 1.0}


def test_the_sampler_gives_finished_chains_that_tokenise_back_to_what_was_drawn(tiny: tuple[Any, Any]) -> None:
    from fairlead.generation import generate

    model, tokenizer = tiny
    prompts = ["w1 w2", "w3"]
    given = sampler(model, tokenizer, max_new_tokens=20, seed=5)(prompts, 40)
    drawn = generate(model, tokenizer, prompts, n=40, max_new_tokens=20, seed=5)
    finished = [[g for g in made if g.finished] for made in drawn]
    assert [len(texts) for texts in given] == [len(f) for f in finished] and 0 < sum(map(len, given)) < 80
    for prompt, texts, made in zip(prompts, given, finished, strict=True):
        for text, one in zip(texts, made, strict=True):
            whole = tokenizer(prompt + text)["input_ids"]
            words = [i for i in one.ids.tolist() if 2 < i < 63]  # special tokens and the unused id have no text
            assert whole == [*tokenizer(prompt)["input_ids"], *words]


def test_chains_of_a_model_train_it(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    asked = [{"prompt": f"w{i} w{i + 1}", "answer": i % 2, "completion": " w3 w5 w4"} for i in range(4)]
    text, counts = collect(asked, sampler(model, tokenizer, max_new_tokens=30), last_word_is_even, k=24)
    rows, report = tokenize_chains(text, tokenizer)
    assert counts.usable == report.rows == 4 and counts.right and counts.wrong
    before = assess(model, rows)["assessment_accuracy"]
    stats = sequence_stats(model, rows)
    expected = registry.create("objective", "aft")(stats)
    args = PreferenceConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    run = PreferenceTrainer(model, "aft", args, rows, processing_class=tokenizer)
    run.train()
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(float(expected.loss.detach()), abs=1e-4)
    assert first["aft/assessment_accuracy"] == pytest.approx(before) and first["aft/usable"] == 1
    assert second["loss"] < first["loss"]
    assert assess(model, rows)["assessment_accuracy"] > before
