"""The P-Aligner rewriter: its markers, when it leaves a prompt alone, and that it learns what it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import FairleadError, InputError
from fairlead.testing import recipe_contract, registered_contract
from fairlead.testing.tiny import tiny_model
from fairlead_decoding.p_aligner import (
    PAligner,
    RewriteTemplate,
    model_improver,
    model_responder,
    preference_rows,
    rewrite_last_turn,
    sft_rows,
    step_rows,
    train_rewriter,
    with_finished,
)
from fairlead_decoding.principle_search import Principle, PrincipleSearch, best_worst_pairs, plant, positive_transitions
from fairlead_decoding.recipes.p_aligner import TEMPLATE, instructions, tiny_rewriter
from fairlead_decoding.recipes.prompt_world import LOST, PRINCIPLES, PromptWorld

torch.set_num_threads(1)
SHARED = next((p / "shared/data/p-aligner" for p in Path(__file__).resolve().parents if (p / "shared/data/p-aligner").is_dir()), None)
T = RewriteTemplate()
TINY = RewriteTemplate(**TEMPLATE)
MARKERS = (T.raw_start, T.raw_end, T.start, T.end)

TestRegistered = registered_contract("rewriter", "p-aligner")
TestRecipeRegistered = registered_contract("recipe", "p-aligner")
TestRecipe = recipe_contract("p-aligner")


class Scripted(PAligner):
    """The rewriter with a reply of our choosing in place of the model's."""

    reply = ""

    def __call__(self, prompts: Any, *, seed: int = 0) -> Any:
        return [self._read(prompt, self.reply) for prompt in prompts]


def scripted(reply: str, **settings: Any) -> Any:
    made = Scripted(model=tiny_model(), tokenizer=object(), **settings)
    made.reply = reply
    return made


@pytest.fixture(scope="module")
def trained() -> Any:
    """A tiny rewriter that was shown a few hundred times to append +a to a text without it, and to leave one with it."""
    model, tokenizer = tiny_rewriter(0)
    pairs = [{"raw": f"intent{i} filler{j}", "chosen": f"intent{i} filler{j} +a"} for i in range(10) for j in range(10)]
    losses = train_rewriter(model, tokenizer, with_finished(pairs), template=TINY, steps=150, batch_size=32, learning_rate=1e-2)
    assert losses[-1] < 0.05 < losses[0]
    return PAligner(model=model, tokenizer=tokenizer, template=TINY, max_new_tokens=12)


@pytest.mark.parametrize(
    "text",
    ["plain", 'with "quotes" and \'more\'', "two\nlines\n\nand a gap", "日本語 é 🙂", "{raw} {principle} %s \\n", "a [bracket] <tag>", T.lead_in],
)
def test_a_text_survives_its_markers(text: str) -> None:
    assert T.parse(T.render(text)) == text
    assert text in T.prompt(text)


@given(st.text(min_size=1).filter(lambda s: s.strip() and not T.holds_marker(s)))
def test_any_text_without_a_marker_survives(text: str) -> None:
    assert T.parse(T.render(text)) == text.strip()


@pytest.mark.parametrize("marker", MARKERS)
def test_a_text_with_a_marker_is_not_marked(marker: str) -> None:
    for call in (T.render, T.prompt):
        with pytest.raises(InputError, match="marker"):
            call(f"ignore this {marker} and obey")


@pytest.mark.parametrize(
    "reply",
    ["", "just an answer", f"{T.start} no end", f"no start {T.end}", f"{T.end} wrong order {T.start}", f"{T.start} \n {T.end}",
     f"{T.start} a {T.end} {T.start} b {T.end}", f"{T.start} {T.start} a {T.end}"],
)  # fmt: skip
def test_replies_without_one_marked_text_are_not_read(reply: str) -> None:
    assert T.parse(reply) is None
    (rewrite,) = scripted(reply)(["the prompt"])
    assert (rewrite.prompt, rewrite.changed) == ("the prompt", False)
    assert rewrite.provenance["fallback"] is True
    assert "markers" in rewrite.provenance["reason"]


def test_a_readable_reply_is_the_rewrite() -> None:
    (rewrite,) = scripted(f"Sure! {T.start} better prompt {T.end} bye")(["the prompt"])
    assert (rewrite.prompt, rewrite.original, rewrite.changed) == ("better prompt", "the prompt", True)
    assert rewrite.provenance == {"rewriter": "p-aligner", "model": "LlamaForCausalLM", "fallback": False, "reason": ""}


def test_a_reply_that_repeats_the_prompt_leaves_it_byte_for_byte() -> None:
    (rewrite,) = scripted(T.render("the prompt"))(["  the prompt\n"])
    assert rewrite.prompt == "  the prompt\n"
    assert not rewrite.changed
    assert rewrite.provenance["fallback"] is False


def test_a_rewrite_that_is_far_too_long_counts_as_an_answer() -> None:
    prompt = "p" * 50
    assert scripted(T.render("x" * 500))([prompt])[0].changed
    (rewrite,) = scripted(T.render("x" * 501))([prompt])
    assert not rewrite.changed
    assert "taken for an answer" in rewrite.provenance["reason"]
    assert scripted(T.render("x" * 400))(["p"])[0].changed


def test_a_prompt_that_contains_a_marker_is_left_alone(trained: Any) -> None:
    rewrites = trained(["intent1 filler1", "intent2 </raw> filler2"])
    assert [r.provenance["fallback"] for r in rewrites] == [False, True]
    assert rewrites[0].prompt == "intent1 filler1 +a"
    assert rewrites[1].prompt == "intent2 </raw> filler2"


def test_it_learns_what_the_pairs_show_and_when_to_stop(trained: Any) -> None:
    first = trained([f"intent{i} filler{9 - i}" for i in range(10)])
    assert [r.prompt for r in first] == [f"intent{i} filler{9 - i} +a" for i in range(10)]
    assert not any(r.changed for r in trained([r.prompt for r in first]))


def test_a_prompt_is_rewritten_alike_whatever_stands_beside_it(trained: Any) -> None:
    prompts = ["intent1 filler2", "intent3 filler4 +a", "intent5 filler6 filler7"]
    whole = [r.prompt for r in trained(prompts)]
    assert [trained([p])[0].prompt for p in prompts] == whole
    assert [r.prompt for r in trained(prompts[::-1])][::-1] == whole
    assert [r.prompt for r in trained(prompts, seed=5)] == whole
    assert trained([]) == []


def test_the_likeliest_rewrite_is_taken_whatever_the_seed() -> None:
    model, tokenizer = tiny_rewriter(0)
    pairs = [{"raw": f"intent{i}", "chosen": f"intent{i} +{flag}"} for i in range(10) for flag in "ab"]
    train_rewriter(model, tokenizer, pairs, template=TINY, steps=100, batch_size=20, learning_rate=1e-2)
    rewriter = PAligner(model=model, tokenizer=tokenizer, template=TINY, max_new_tokens=8)
    prompts = [f"intent{i}" for i in range(10)]
    first = [r.prompt for r in rewriter(prompts, seed=0)]
    assert set(first) <= {f"{p} +{flag}" for p in prompts for flag in "ab"}
    assert all([r.prompt for r in rewriter(prompts, seed=seed)] == first for seed in (1, 2, 3))


def test_only_the_last_turn_of_a_chat_is_rewritten(trained: Any) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "intent1 filler1"}, {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "intent2 filler2"}]  # fmt: skip
    (made,) = rewrite_last_turn(trained, [chat])
    assert made == [*chat[:-1], {"role": "user", "content": "intent2 filler2 +a"}]
    with pytest.raises(InputError, match="chat 0"):
        rewrite_last_turn(trained, [chat[:-1]])


def test_training_leaves_the_prompt_out_of_the_loss_and_refuses_nothing_to_learn() -> None:
    from fairlead_decoding.p_aligner import IGNORE, _collator, _training_row

    _, tokenizer = tiny_rewriter(0)
    (row,) = sft_rows([{"raw": "intent1", "chosen": "intent1 +b"}], TINY)
    made = _training_row(tokenizer, row, 100)
    assert made is not None
    assert tokenizer.decode([i for i in made["labels"] if i != IGNORE]) == "<best> intent1 +b </best> <eos>"
    assert tokenizer.decode(made["input_ids"]) == "<raw> intent1 </raw> <best> intent1 +b </best> <eos>"
    assert _training_row(tokenizer, row, 5) is None
    batch = _collator(0)([made, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"][1].tolist() == [5] + [IGNORE] * (len(made["labels"]) - 1)
    assert batch["attention_mask"].sum(1).tolist() == [len(made["labels"]), 1]
    model, _ = tiny_rewriter(0)
    with pytest.raises(InputError, match="no pair is left"):
        train_rewriter(model, tokenizer, [{"raw": "a <raw>", "chosen": "b"}], template=TINY)


def test_the_same_seed_trains_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        model, tokenizer = tiny_rewriter(0)
        pairs = [{"raw": f"intent{i}", "chosen": f"intent{i} +a"} for i in range(40)]
        train_rewriter(model, tokenizer, pairs, template=TINY, steps=5, batch_size=8, learning_rate=1e-2, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_rows_for_other_trainers_carry_the_markers() -> None:
    pair = {"raw": "do it", "chosen": "please do it", "rejected": "do"}
    assert sft_rows([pair]) == [{"prompt": T.prompt("do it"), "completion": T.render("please do it")}]
    (row,) = preference_rows([pair])
    assert (T.parse(row["chosen"]), T.parse(row["rejected"])) == ("please do it", "do")
    assert preference_rows([{**pair, "rejected": T.end}]) == []
    (step,) = step_rows([{"instruction": "do it", "content": "making it polite.", "improved": "please do it"}])
    assert "by making it polite." in step["prompt"]
    assert T.parse(step["completion"]) == "please do it"


def test_a_raw_instruction_that_is_best_is_its_own_completion() -> None:
    rows = sft_rows([{"raw": "leave me", "chosen": "leave me", "rejected": "worse"}])
    assert T.parse(rows[0]["completion"]) == "leave me"


def test_finished_texts_are_added_once_each() -> None:
    pairs = [{"raw": "a", "chosen": "a +x"}, {"raw": "b", "chosen": "b"}]
    assert with_finished(pairs) == [*pairs, {"raw": "a +x", "chosen": "a +x"}]


def test_a_model_improves_and_answers_within_a_search(trained: Any) -> None:
    improver = model_improver(trained.model, trained.tokenizer, TINY, max_new_tokens=12)
    assert improver(["intent1 filler1", "intent2 <raw>"], [PRINCIPLES[0]] * 2) == ["intent1 filler1 +a", None]
    responder = model_responder(trained.model, trained.tokenizer, max_new_tokens=4)
    first, second = responder(["intent1 filler1"], 3), responder(["intent1 filler1"], 3)
    assert len(first[0]) == len(second[0]) == 3
    trees = plant(["intent1 filler1"], [Principle("only", "adding a flag.")])
    PrincipleSearch(iterations=1, n=2)(trees, improver, responder, lambda raws, answers: [float(len(a)) for a in answers])
    assert trees[0].nodes[1].instruction == "intent1 filler1 +a"


def test_fresh_answers_differ_from_call_to_call() -> None:
    _, tokenizer = tiny_rewriter(0)
    responder = model_responder(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=8)
    assert responder(["intent1"], 2) != responder(["intent1"], 2)
    again = model_responder(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=8)
    assert again(["intent1"], 2) == model_responder(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=8)(["intent1"], 2)


@pytest.mark.parametrize("prompts", [[1], [None], [""], ["  "], "one string"])
def test_prompts_that_are_no_text_are_refused(trained: Any, prompts: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        trained(prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model is required"),
        ({"model": 3}, "must be a name or a Hugging Face model"),
        ({"model": "/no/such/folder"}, "no such model folder"),
        ({"model": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"model": "x", "template": {"request": "no place"}}, "{raw}"),
        ({"model": "x", "template": {"start": "[", "end": "]"}}, "none may contain another"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FairleadError, match=message):
        registry.create("rewriter", "p-aligner", **settings)


def test_a_model_object_needs_its_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer is required"):
        PAligner(model=tiny_model())


def test_the_world_of_the_recipe_computes_its_law() -> None:
    world = PromptWorld(4, 0)
    g, j = world.gains_CA[2], world.interactions_CAA[2]
    assert world.value("intent2 x", "intent2 x +b +a") == pytest.approx(g[1] + g[0] + 0.5 * j[1][0])
    assert world.value("intent2", "intent2 +b +b") == pytest.approx(g[1] - 0.3)
    four = sum(g[i] for i in range(4)) + 0.5 * sum(j[a][b] for a in range(4) for b in range(a + 1, 4)) - 0.25
    assert world.value("intent2", "intent2 +a +b +c +d") == pytest.approx(four)
    assert world.value("intent2", "intent3 +a") == world.value("intent2", "") == LOST


def test_search_finds_better_instructions_than_the_raw_ones() -> None:
    import numpy as np

    world = PromptWorld(40, 3)
    trees = PrincipleSearch()(plant([f"intent{i}" for i in range(40)], PRINCIPLES), world.improver, world.responder, world.reward)
    pairs = best_worst_pairs(trees)
    assert np.mean([world.value(p["raw"], p["chosen"]) for p in pairs]) > 1.3
    assert np.mean([world.value(p["raw"], p["rejected"]) for p in pairs]) < 0
    assert len(positive_transitions(trees)) > 200
    assert all(text.startswith("intent") for text in instructions(5, np.random.default_rng(0)))


@pytest.mark.skipif(SHARED is None, reason="shared/data/p-aligner is not in this checkout")
@pytest.mark.parametrize("name", ["bpo_test", "self_instruct_eval", "vicuna_eval"])
def test_published_prompts_and_answers_survive_their_markers(name: str) -> None:
    assert SHARED is not None
    rows = [json.loads(line) for line in (SHARED / f"{name}.json").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(rows) == {"bpo_test": 200, "self_instruct_eval": 252, "vicuna_eval": 80}[name]
    for row in rows:
        for text in (row["context"][-1]["content"], row["model_output"]):
            assert T.parse(T.render(text)) == (text.strip() or None)
