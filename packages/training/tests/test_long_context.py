"""The data builder of LOGO: chunks and their scores, the contexts built of them, and rows that go on to the trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead.errors import InputError
from fairlead.testing import save_tiny_model, tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer
from fairlead_training.long_context import (
    Chunk,
    choose_chunks,
    entities,
    preference_rows,
    score_chunks,
    split_context,
    tokenized,
    training_chunks,
)  # fmt: skip
from fairlead_training.positions import position_rows
from fairlead_training.recipes.logo import document, stub

SCORED = [Chunk(i, f"c{i}", score) for i, score in enumerate([0, 7, 2, 9, 0, 8, 1, 7])]  # above 6: 3, 5, 1, 7


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(chunks: list[Chunk]) -> list[int]:
    return [c.chunk_id for c in chunks]


def test_entities_are_long_words_capitalised_spans_and_numbers() -> None:
    found = entities("Where did Ada Lovelace see 3.5 of the 12 engines? The sky was red, and they looked.")
    assert found == {"lovelace", "ada lovelace", "engines", "3.5", "12", "looked"}
    assert entities("The of and. Who?") == set()
    assert entities("Ada's dog and Mr O'Brien") == {"ada", "mr o'brien", "brien"}


@given(st.text(alphabet=" \nab.", max_size=60), st.integers(1, 5))
def test_pieces_of_words_are_the_text_and_all_but_the_last_are_full(text: str, size: int) -> None:
    pieces = split_context(text, size)
    words = text.split()
    assert "".join(pieces) == (text if words else "")
    assert [len(p.split()) for p in pieces] == [len(words[i : i + size]) for i in range(0, len(words), size)]


def test_pieces_of_tokens_are_cut_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path)
    assert split_context("w1 w2 w3 w4 w5", 2, tokenizer) == ["w1 w2", "w3 w4", "w5"]
    with pytest.raises(InputError, match="chunk_size: must be 1 or more, got 0"):
        split_context("w1", 0)


def test_a_score_counts_distinct_entities_shared_with_question_and_answer() -> None:
    context = "Ada built engines engines. It rained over the city. Ada moved to Turin early."
    asked = "What engines did Ada build?"
    assert [c.score for c in score_chunks(asked, None, context, 4)] == [2, 0, 1, 0]  # ada, engines; ada; ("early")
    assert [c.score for c in score_chunks(asked, "in Turin", context, 4)] == [2, 0, 1, 1]
    assert [c.score for c in score_chunks(asked, None, context, 4, extract=lambda text: set(text.split()))] == [2, 0, 1, 0]
    assert [c.chunk_id for c in score_chunks(asked, None, context, 4)] == [0, 1, 2, 3]


def test_each_kind_of_context_takes_its_pool_in_document_order() -> None:
    for seed in range(20):
        relevant = choose_chunks(SCORED, 3, 6, "relevant", rng(seed))
        assert ids(relevant.chunks) == [1, 3, 5] and relevant.filled == 0  # of the equal ones the first
        irrelevant = choose_chunks(SCORED, 3, 6, "irrelevant", rng(seed))
        assert set(ids(irrelevant.chunks)) < {0, 2, 4, 6} and irrelevant.filled == 0
        mixed = choose_chunks(SCORED, 3, 6, "mixed", rng(seed))
        assert sum(c.score > 6 for c in mixed.chunks) == 2 and mixed.filled == 0
        for choice in (relevant, irrelevant, mixed):
            assert ids(choice.chunks) == sorted(set(ids(choice.chunks))) and len(choice.chunks) == 3
    assert ids(choose_chunks(SCORED, 2, 6, "relevant", rng()).chunks) == [3, 5]  # the best, not the first
    assert len({tuple(ids(choose_chunks(SCORED, 3, 6, "irrelevant", rng(s)).chunks)) for s in range(20)}) > 1


def test_a_pool_that_is_too_small_is_filled_by_the_nearest_score_and_says_so() -> None:
    assert choose_chunks(SCORED, 6, 6, "relevant", rng()) == ([SCORED[i] for i in (1, 2, 3, 5, 6, 7)], 2)
    assert choose_chunks(SCORED, 5, 6, "irrelevant", rng()) == ([SCORED[i] for i in (0, 2, 4, 6, 7)], 1)
    assert choose_chunks(SCORED, 8, 6, "mixed", rng()) == (SCORED, 0)
    high = [Chunk(0, "", 9), Chunk(1, "", 1), Chunk(2, "", 0), Chunk(3, "", 0)]
    assert choose_chunks(high, 4, 6, "mixed", rng()) == (high, 1)
    assert choose_chunks(high, 3, 6, "relevant", rng()) == (high[:3], 2)
    assert choose_chunks(high, 2, 99, "mixed", rng()).filled == 1
    for seed in range(10):  # no other chunk: the next worst stands in
        assert Chunk(2, "", 7) in choose_chunks([Chunk(0, "", 9), Chunk(1, "", 8), Chunk(2, "", 7)], 2, 6, "mixed", rng(seed)).chunks


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 9), st.integers(0, 5))
def test_every_context_has_its_number_of_chunks_or_is_refused(scores: list[int], count: int, delta: int, seed: int) -> None:
    scored = [Chunk(i, "", s) for i, s in enumerate(scores)]
    if count > len(scored):
        with pytest.raises(InputError, match="give smaller chunks"):
            choose_chunks(scored, count, delta, "mixed", rng())
        return
    high = sum(s > delta for s in scores)
    for kind, wanted, pool in (("relevant", count, high), ("irrelevant", count, len(scores) - high)):
        choice = choose_chunks(scored, count, delta, kind, rng(seed))  # type: ignore[arg-type]
        assert choice.filled == max(0, wanted - pool)
    for chunks in (choose_chunks(scored, count, delta, "mixed", rng(seed)).chunks, training_chunks(scored, count, delta, rng(seed))):
        assert len(set(ids(chunks))) == count and ids(chunks) == sorted(ids(chunks))


def test_the_training_context_holds_the_relevant_chunks_and_some_others() -> None:
    chunks = training_chunks(SCORED, 6, 6, rng())
    assert {1, 3, 5, 7} < set(ids(chunks)) and len(chunks) == 6
    assert ids(training_chunks(SCORED, 2, 6, rng())) == [3, 5]


def test_rows_of_known_documents_prefer_what_is_right() -> None:
    samples = [document(rng(seed)) for seed in range(40)]
    prompts: list[str] = []

    def generate(prompt: str) -> str:
        prompts.append(prompt)
        return stub(prompt)

    rows, report = preference_rows(samples, generate, generator=rng(), chunk_size=24, n_chunks=4, delta=1, system="Read.\n")
    answers = [[stub(p) == s["town"] for p in prompts[3 * i : 3 * i + 3]] for i, s in enumerate(samples)]
    relevant, irrelevant, mixed = (sum(a) / len(samples) for a in zip(*answers, strict=True))
    assert relevant == 1 and irrelevant == 0 and 0.2 < mixed < 0.8
    agreed = round(mixed * 40)
    assert report.dropped == {"with chosen = rejected": agreed} and report.rows == len(rows) == 40 - agreed
    kept = [s for s, a in zip(samples, answers, strict=True) if not a[2]]
    for row, sample in zip(rows, kept, strict=True):
        assert row["chosen"] == sample["town"]
        assert sample["town"] not in row["rejected"] and len(row["rejected"]) == 2
        assert row["prompt"] == "Read.\n" + "".join(c + "\n" for c in row["chunks"]) + row["question"]
        assert stub(row["prompt"]) == row["chosen"]  # the shared context holds the evidence
        assert len(row["chunks"]) == len(row["scores"]) == 4 and max(row["scores"]) >= 4
        assert row["kinds"] == ["relevant", "irrelevant", "mixed"] and row["filled"] == [0, 0, 0]
    assert preference_rows(samples, stub, generator=rng(), chunk_size=24, n_chunks=4, delta=1, system="Read.\n")[0] == rows


def test_a_delta_above_all_scores_shows_in_the_filling() -> None:
    rows, _ = preference_rows([document(rng(3))], stub, generator=rng(), chunk_size=24, n_chunks=4, delta=50, rejected=["irrelevant"] * 3)
    assert all(row["filled"][0] == 4 for row in rows)


def test_answers_that_agree_but_for_blanks_and_empty_ones_are_dropped() -> None:
    sample = {"question": "Who is Ada?", "context": " ".join(f"w{i}" for i in range(40))}

    def said(answers: list[str]) -> dict[str, int]:
        queue: Iterator[str] = iter(answers)
        return preference_rows([sample], lambda _: next(queue), generator=rng(), chunk_size=4, n_chunks=3)[1].dropped

    assert said(["a b", "c", "a\n b "]) == {"with chosen = rejected": 1}
    assert said(["a b", "c", " "]) == {"with an empty answer": 1}
    assert said(["a b", "c", "c"]) == {}


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    save_tiny_model(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_rows_go_on_to_positions_and_the_trainer(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path / "model")
    context = " ".join(f"w{i}" for i in range(3, 35))
    queue = iter(["w1 w2", "w5", "w6 w7", "w2", "w8", "w9"])
    made, _ = preference_rows(
        [{"question": q, "context": context} for q in ("w3", "w9")], lambda _: next(queue), generator=rng(), chunk_size=4, n_chunks=3,
        delta=0, question="\n{question}", extract=lambda text: set(text.split()), tokenizer=tokenizer,
    )  # fmt: skip
    pieces = tokenized(made, tokenizer)
    assert [len(c) for c in pieces[0]["chunk_ids"]] == [4, 4, 4] and pieces[0]["role"] == [1, -1, -1]
    assert pieces[0]["completion_ids"][0] == [*tokenizer("w1 w2")["input_ids"], tokenizer.eos_token_id]
    rows = position_rows(pieces, target_len=200, generator=rng(), samples_per_row=2)
    config = PreferenceConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = PreferenceTrainer(copy.deepcopy(tiny_model()), "logo", config, rows)
    run.train()
    assert [math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry] == [True, True]


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="sample 1: context is missing"):
        preference_rows([document(rng()), {"question": "Who?"}], stub, generator=rng(), chunk_size=24, n_chunks=4)
    with pytest.raises(InputError, match="sample 0: a context of 16 chunks is asked for and the document has 12"):
        preference_rows([document(rng())], stub, generator=rng(), chunk_size=24)
    with pytest.raises(InputError, match="relevant, irrelevant, mixed, got 'best'"):
        choose_chunks(SCORED, 2, 6, "best", rng())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="irrelevant and mixed is needed, got \\[\\]"):
        preference_rows([], stub, generator=rng(), rejected=[])
    with pytest.raises(InputError, match=r"must hold \{question\}, where the question goes, got 'Q:'"):
        preference_rows([], stub, generator=rng(), question="Q:")
