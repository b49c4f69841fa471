"""The worlds of the deal recipe, the search against one written by hand, and a run in miniature."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.errors import ConfigError
from fairlead.runs import Run
from fairlead.testing import recipe_contract, registered_contract
from fairlead_decoding import DeAL
from fairlead_decoding.recipes.deal import DeALRecipe, GivenWords
from fairlead_decoding.recipes.search_world import (
    INSTRUCTION,
    SLOTS,
    BigramLM,
    RequiredTokens,
    Sentences,
    bigram_prompts,
    prompt_concepts,
    sentence_prompt,
    sentence_tokenizer,
    train_sentence_model,
)

TestRegistered = registered_contract("recipe", "deal")
TestRecipe = recipe_contract("deal")


def test_a_bigram_model_ends_with_one_probability_after_every_token() -> None:
    probs = BigramLM(32, 0.06, 0.05, seed=3).logp_VV.exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(32))
    torch.testing.assert_close(probs[:-1, -1], torch.full((31,), 0.06))
    assert float((probs[:-1, :-1].max(1).values > 0.3).float().mean()) > 0.5  # few successors each


def test_required_tokens_are_those_of_the_prompt_but_its_last() -> None:
    prompts = [torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3, 9])]
    found = RequiredTokens()(prompts, [torch.tensor([3, 3, 1]), torch.tensor([9, 9, 9, 9, 2])])
    assert found.tolist() == pytest.approx([2 / 3, 1 / 3])
    drawn = bigram_prompts(32, 20, 6, seed=0)
    assert all(len(set(p[:-1].tolist())) == 6 and int(p.max()) < 31 for p in drawn)


def search_by_hand(logp: np.ndarray, prompt: list[int], lam: float, k: int, lookahead: int, room: int) -> list[int]:
    """The score of the paper on a table of log-probs, one candidate after another."""
    end, required, answer = len(logp) - 1, set(prompt[:-1]), list[int]()
    last = prompt[-1]
    while len(answer) < room and last != end:
        best, best_score = -1, -np.inf
        for c in np.argsort(-logp[last], kind="stable")[:k]:
            if not np.isfinite(logp[last, c]):
                continue
            text = [*answer, int(c)]
            for _ in range(min(lookahead, room - len(answer) - 1)):
                if text[-1] == end:
                    break
                text.append(int(logp[text[-1]].argmax()))
            score = float(logp[last, c]) + lam * len(required & set(text)) / len(required)
            if score > best_score:
                best, best_score = int(c), score
        answer.append(best)
        last = best
    return answer


@pytest.mark.parametrize("lookahead", [0, 1, 6])
def test_the_search_is_the_one_written_by_hand(lookahead: int) -> None:
    for seed in range(3):
        model, prompts = BigramLM(16, 0.06, 0.05, seed), bigram_prompts(16, 6, 4, seed)
        made = DeAL(heuristics=[RequiredTokens()], lam=20.0, top_k=5, lookahead=lookahead).generate(
            model, None, prompts, max_new_tokens=12
        )
        logp = model.logp_VV.double().numpy()
        for prompt, generation in zip(prompts, made.generations, strict=True):
            assert generation.ids.tolist() == search_by_hand(logp, prompt.tolist(), 20.0, 5, lookahead, 12)


def test_a_bigram_model_runs_each_token_once() -> None:
    model, prompts = BigramLM(32, 0.06, 0.05, 0), bigram_prompts(32, 4, 6, 0)
    made = DeAL(lam=0, top_k=8).generate(model, None, prompts, max_new_tokens=10)
    assert made.cost.model_tokens == sum(
        len(p) + len(g.ids) - 1 for p, g in zip(prompts, made.generations, strict=True)
    )


def test_a_sentence_has_the_words_it_is_told_to_use() -> None:
    world, rng = Sentences(0), np.random.default_rng(0)
    for _ in range(50):
        use = world.concepts(rng, 6)
        assert len(set(use)) == 6
        assert set(use) <= set(world.sentence(rng, use).split())
        assert (
            prompt_concepts(f"{INSTRUCTION}\n\n{sentence_prompt(use)}") == prompt_concepts(sentence_prompt(use)) == use
        )


def test_sentences_obey_the_instruction_more_than_the_bare_words() -> None:
    world, rng = Sentences(0), np.random.default_rng(0)
    share: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(400):
        prompt, sentence = world.document(rng, 6)
        share[prompt.startswith(INSTRUCTION)].append(float(GivenWords()([prompt], [sentence])[0]))
    assert np.mean(share[True]) - np.mean(share[False]) > 0.3


def test_most_words_are_pieces_and_text_comes_back() -> None:
    world = Sentences(0)
    tokenizer = sentence_tokenizer(world, 110, 6, 0)
    words = [w for group in SLOTS.values() for w in group]
    assert np.mean([len(tokenizer.tokenize(w)) > 1 for w in words]) > 0.6
    sentence = world.sentence(np.random.default_rng(1), words[:2])
    assert tokenizer.decode(tokenizer(sentence)["input_ids"], skip_special_tokens=True).strip() == sentence


def test_training_lowers_the_loss_and_depends_on_the_seed_alone() -> None:
    world = Sentences(0)
    tokenizer = sentence_tokenizer(world, 110, 6, 0)
    sizes: dict[str, Any] = {"concepts": 6, "width": 32, "batch": 8}
    losses = [train_sentence_model(tokenizer, world, 0, steps=steps, **sizes)[1] for steps in (1, 25, 25)]
    assert losses[1] == losses[2] < losses[0] - 0.3


def test_every_prompt_has_words_of_its_own() -> None:
    found = GivenWords()(
        [sentence_prompt(["dog", "runs"]), sentence_prompt(["cat", "runs"])], ["the dog runs .", "the dog runs ."]
    )
    assert found.tolist() == [1.0, 0.5]


def test_the_tested_look_ahead_is_among_those_tried() -> None:
    with pytest.raises(ConfigError, match="must be among"):
        DeALRecipe(lookahead=5)
    with pytest.raises(ConfigError, match="must ascend from 0"):
        DeALRecipe(lookaheads=(6, 0))


def test_a_run_in_miniature_writes_its_report_and_resumes_from_its_stages(tmp_path: Any) -> None:
    recipe = DeALRecipe(
        models=3,
        prompts=2,
        length=4,
        lookaheads=(0, 1),
        sentence_lookaheads=(0, 1),
        lookahead=1,
        sentences=8,
        steps=2,
        width=16,
        tokens=8,
    )
    config = recipe.config.public_dict()
    run = Run.open(tmp_path, "deal", config, 0)
    recipe(run)
    run.fail("interrupted", "to be resumed")
    stage = tmp_path / "stages" / "bigram-0.json"
    kept = json.loads(stage.read_text()) | {"same": -1}
    stage.write_text(json.dumps(kept))
    again = Run.open(tmp_path, "deal", config, 0, resume=True)
    recipe(again)
    again.finish()
    assert again.checks[0]["detail"].startswith("3 of 6")  # what the stage kept was read, not worked out again
    assert "What it costs" in (tmp_path / "report.html").read_text(encoding="utf-8")
