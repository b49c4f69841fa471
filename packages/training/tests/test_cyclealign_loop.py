"""CycleAlign's loop: with rankers whose order is known, and from end to end with a tiny model."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from fairlead import registry
from fairlead.errors import ConfigError, InputError
from fairlead.generation import generate
from fairlead.kinds import SequenceStats
from fairlead.testing import save_tiny_model
from fairlead_training import PreferenceConfig, agreement
from fairlead_training.cyclealign_loop import (
    CycleAlignLoop,
    CycleAlignLoopConfig,
    DemonstrationPool,
    Interaction,
    WhiteBox,
    chance_agreement,
    cyclealign,
    demonstration,
    length_tau,
    merged,
)
from fairlead_training.rankers import Demonstration

PROMPTS = [f"prompt {k}" for k in range(6)]
WORDS = ["oak", "elm", "ash", "fir"]
SCORES = {"oak": -0.5, "elm": -1.5, "ash": -1.0, "fir": -2.0}  # the white box's order is oak, ash, elm, fir


class World:
    """A white box of four fixed responses, and a ranker that is told its order; keeps what it was shown and what was trained."""

    def __init__(self, order: Any, **settings: Any) -> None:
        self.order, self.trained, self.shown = order, [], []  # type: ignore[var-annotated]
        self.responses = list(WORDS)
        static = settings.pop("static", ())
        self.loop = CycleAlignLoop(
            lambda prompts, n: [self.responses[:n] for _ in prompts], self.rank, self.score, self.train, static,
            CycleAlignLoopConfig(**settings),
        )  # fmt: skip

    def rank(self, prompt: str, responses: Sequence[str], demonstrations: Sequence[Demonstration]) -> Any:
        assert all(d.prompt != prompt for d in demonstrations)
        self.shown.append((prompt, list(demonstrations)))
        order = self.order(responses) if callable(self.order) else self.order
        return [list(responses).index(word) for word in order] if order and isinstance(order[0], str) else order

    def score(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return [SCORES[r] for r in responses]

    def train(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        self.trained.append(rows)
        return {"loss": 0.25}


LIKE_WHITE = ["oak", "ash", "elm", "fir"]


def test_a_ranker_with_the_models_own_order_agrees_on_everything_and_every_prompt_stops() -> None:
    world = World(LIKE_WHITE)
    done = world.loop.run(PROMPTS)
    assert len(done) == 1 and len(world.trained) == 1 and len(world.loop.pool) == len(PROMPTS)
    for interaction, row in zip(done[0].interactions, done[0].rows, strict=True):
        assert interaction.complete and interaction.agreed == (0, 2, 1, 3)
        assert row == {"prompt": interaction.prompt, "completions": LIKE_WHITE, "ranks": [0, 1, 2, 3]}
    assert done[0].metrics["agreement/complete"] == 1 and done[0].metrics["train/loss"] == 0.25


def test_the_reverse_order_agrees_on_one_response_and_trains_nothing() -> None:
    world = World(LIKE_WHITE[::-1], max_interactions=3)
    done = world.loop.run(PROMPTS)
    assert len(done) == 3  # no prompt stops before it had its interactions
    assert not world.trained and len(world.loop.pool) == 0 and not any(d.rows for d in done)
    assert all(len(x.agreed) == 1 and not x.accepted for d in done for x in d.interactions)
    assert math.isnan(done[0].metrics["hinges"]) and done[0].metrics["agreement/length"] == 1


def test_a_row_holds_the_agreement_or_the_whole_order_of_the_black_box() -> None:
    black = ["elm", "oak", "ash", "fir"]
    (agreed,), (whole,) = (World(black, target=t, iterations=1).loop.run(["x"]) for t in ("agreement", "black_box"))
    assert agreed.rows == [{"prompt": "x", "completions": ["oak", "ash", "fir"], "ranks": [0, 1, 2]}]
    assert whole.rows == [{"prompt": "x", "completions": black, "ranks": [0, 1, 2, 3]}]
    assert agreed.metrics["hinges"] == 0 and whole.metrics["hinges"] == pytest.approx(2 / 6)  # elm before oak and before ash
    shifted = World(black, iterations=1, loss_settings={"margin": 0.6}).loop.run(["x"])[0]
    assert shifted.metrics["hinges"] == pytest.approx(1 / 3)  # oak leads ash by 0.5 alone


def test_complete_agreement_can_be_asked_for() -> None:
    assert not World(["elm", "oak", "ash", "fir"], least=4).loop.step(["x"]).rows
    assert World(LIKE_WHITE, least=4).loop.step(["x"]).rows


def test_demonstrations_hold_the_agreed_responses_as_they_were_sampled_and_their_order() -> None:
    world = World(["elm", "oak", "ash", "fir"])
    world.loop.step(["x"])
    (held,) = world.loop.pool.others("another")
    assert held == Demonstration("x", ("oak", "ash", "fir"), (0, 1, 2))
    swapped = demonstration(Interaction("x", ("a", "b", "c", "d"), agreed=(3, 0, 2)))
    assert swapped == Demonstration("x", ("a", "c", "d"), (2, 0, 1))


def test_a_ranker_sees_the_demonstrations_from_before_its_iteration_and_never_its_own_prompts() -> None:
    own = Demonstration("prompt 0", ("a", "b"), (0, 1))
    other = Demonstration("written by hand", ("a", "b"), (1, 0))
    world = World(LIKE_WHITE, static=[own, other], stop_when_agreed=False, iterations=2)
    world.loop.run(PROMPTS)
    first, second = world.shown[:6], world.shown[6:]
    assert [len(shown) for _, shown in first] == [1] + [2] * 5
    assert [len(shown) for _, shown in second] == [3] + [4] * 5
    drawn = {d.prompt for _, shown in second for d in shown} - {"written by hand"}
    assert drawn <= set(PROMPTS) and len(drawn) > 2


def test_prompts_that_are_nearly_the_same_do_not_demonstrate_for_each_other() -> None:
    pool = DemonstrationPool(4, near_duplicate=0.8)
    pool.push(Demonstration("How do I bake a loaf of bread?", ("a", "b"), (0, 1)))
    assert not pool.others("how do I bake  a loaf of BREAD") and not pool.others("Please: how do I bake a loaf of bread?")
    assert pool.others("How do I bake a cake?") and pool.others("") and pool.others("?!")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.integers(0, 8))
def test_the_pool_holds_the_last_that_were_pushed(capacity: int, more: int) -> None:
    pool = DemonstrationPool(capacity)
    for k in range(capacity + more):
        pool.push(Demonstration(f"prompt {k}", ("a", "b"), (0, 1)))
    assert [d.prompt for d in pool.others("x")] == [f"prompt {k}" for k in range(more, capacity + more)]
    drawn = pool.draw(f"prompt {more}", 3, random.Random(0))
    assert len(drawn) == len(set(drawn)) == min(3, max(0, capacity - 1)) and f"prompt {more}" not in {d.prompt for d in drawn}


@pytest.mark.parametrize("bad", [None, [0, 0, 1, 2], [0, 1, 2], [1, 2, 3, 4], ["oak"]])
def test_an_order_that_is_none_is_asked_for_again_and_then_the_prompt_is_skipped(bad: Any) -> None:
    answers = iter([bad, LIKE_WHITE, *[bad] * 3])
    world = World(lambda responses: next(answers), max_parse_retries=2)
    world.loop.ranker = lambda prompt, responses, shown: _places(next(answers), responses)
    done = world.loop.step(["x", "y"][:1])
    assert done.metrics["parse_failures"] == 1 and len(done.rows) == 1
    done = world.loop.step(["y"])
    assert done.metrics["parse_failures"] == 3 and done.metrics["skipped/unread"] == 1
    assert done.interactions[0].black_box is None and not done.rows and len(world.trained) == 1


def _places(order: Any, responses: Sequence[str]) -> Any:
    return [list(responses).index(word) for word in order] if order == LIKE_WHITE else order


def test_equal_and_blank_responses_are_merged_before_ranking_and_one_left_is_skipped() -> None:
    assert merged(["a b", " a  b", "", "\n", "c", "a b"]) == ["a b", "c"]
    world = World(lambda responses: [w for w in LIKE_WHITE if w in responses])
    world.responses = ["oak", "oak ", "", "elm"]
    done = world.loop.step(["x"])
    assert done.interactions[0].responses == ("oak", "elm") and done.interactions[0].complete
    world.responses = ["oak", "oak", "oak", " "]
    done = world.loop.step(["y"])
    assert done.metrics["skipped/responses"] == 1 and not done.rows and len(world.shown) == 1


def test_prompts_take_turns_and_stop_after_their_interactions() -> None:
    world = World(LIKE_WHITE[::-1], iterations=99, max_interactions=2, prompts_per_iteration=4)
    done = world.loop.run(PROMPTS)
    assert [[x.prompt[-1] for x in d.interactions] for d in done] == [list("0123"), list("4501"), list("2345")]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-20, -0.01), min_size=2, max_size=7), st.randoms())
def test_no_hinge_of_rrhf_is_left_on_the_agreement(scores: list[float], rng: random.Random) -> None:
    white = sorted(range(len(scores)), key=lambda i: -scores[i])
    black = rng.sample(range(len(scores)), len(scores))
    agreed = agreement(black, white)
    logp = torch.tensor([scores[i] for i in agreed], dtype=torch.float64)
    count = len(agreed)
    batch = SequenceStats(logp, torch.ones(count, dtype=torch.int64), group=torch.zeros(count, dtype=torch.int64), rank=torch.arange(count))
    assert registry.create("objective", "rrhf", sft_weight=0.0)(batch).loss.item() == 0


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(5)), st.permutations(range(5)))
def test_everything_is_agreed_on_exactly_where_kendalls_tau_is_one(first: list[int], second: list[int]) -> None:
    places = [[order.index(i) for i in range(5)] for order in (first, second)]
    assert (len(agreement(first, second)) == 5) == (kendalltau(*places).statistic > 1 - 1e-12)


def test_two_rankings_by_chance_share_58_24ths_of_four() -> None:
    assert chance_agreement(4) == pytest.approx(58 / 24) and chance_agreement(2) == 1.5
    assert math.isnan(chance_agreement(9))


def test_length_tau_is_minus_one_where_the_model_prefers_what_is_short() -> None:
    short = Interaction("x", ("a", "aaa", "aa"), (-1.0, -3.0, -2.0))
    assert length_tau([short]) == -1 and length_tau([Interaction("x", ("a", "aa"), (-2.0, -1.0)), short]) == pytest.approx(-0.5)
    assert math.isnan(length_tau([Interaction("x", ("a", "b"), (-2.0, -1.0))]))


def test_threads_change_nothing() -> None:
    runs = []
    for threads in (1, 4):
        world = World(["elm", "oak", "ash", "fir"], threads=threads, iterations=3)
        runs.append([d.interactions for d in world.loop.run(PROMPTS)])
    assert runs[0] == runs[1]


def test_a_combination_that_cannot_move_is_refused() -> None:
    with pytest.raises(ConfigError, match="never moves"):
        CycleAlignLoopConfig(loss="rrhf", loss_settings={"sft_weight": 0})
    for chosen in ({"margin": 0.1, "sft_weight": 0}, {}):
        CycleAlignLoopConfig(loss="rrhf", loss_settings=chosen)
    CycleAlignLoopConfig(loss="rrhf", target="black_box", loss_settings={"sft_weight": 0})
    CycleAlignLoopConfig(loss="pro", loss_settings={"sft_weight": 0})
    with pytest.raises(ConfigError, match="unknown setting 'margins'; did you mean 'margin'"):
        World(LIKE_WHITE, loss_settings={"margins": 0.1})
    with pytest.raises(ConfigError, match="n: should be greater than or equal to 2"):
        CycleAlignLoopConfig(n=1)


def test_wrong_numbers_are_refused() -> None:
    world = World(LIKE_WHITE)
    world.loop.score = lambda prompt, responses: [-1.0, math.nan, -1.0, -1.0]
    with pytest.raises(ValueError, match="score: one finite number for each of 4 responses is needed"):
        world.loop.step(["x"])
    world.loop.score = lambda prompt, responses: [-1.0]
    with pytest.raises(InputError, match="one finite number"):
        world.loop.step(["x"])
    world.loop.sample = lambda prompts, n: []
    with pytest.raises(InputError, match="gave responses to 0 prompts, 1 were asked"):
        world.loop.step(["x"])
    with pytest.raises(InputError, match=r"static demonstration 0: ranking must be a permutation of its responses, got \[0\]"):
        World(LIKE_WHITE, static=[Demonstration("x", ("a", "b"), (0,))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_tiny_model(made)
    return made


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def arguments(folder: Path, **settings: Any) -> PreferenceConfig:
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 5e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "ref_cache_dir": str(folder / "cache"),
    }  # fmt: skip
    return PreferenceConfig(output_dir=str(folder / "out"), **{**chosen, **settings})


def odd_words(text: str) -> float:
    """The hidden quality: the share of words with an odd number."""
    words = text.split()
    return sum(int(w[1:]) % 2 for w in words if w[1:].isdigit()) / len(words)


def by_odd_words(prompt: str, responses: Sequence[str], demonstrations: Sequence[Demonstration]) -> list[int]:
    return sorted(range(len(responses)), key=lambda i: -odd_words(responses[i]))


@pytest.mark.parametrize("loss", ["rrhf", "pro", "dpo-list"])
def test_a_tiny_model_learns_from_text_to_text(folder: Path, tmp_path: Path, loss: str) -> None:
    model, tokenizer = load(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = CycleAlignLoopConfig(n=4, loss=loss, target="black_box", iterations=2, loss_settings={"beta": 0.5} if loss == "dpo-list" else {})
    done = cyclealign(
        model, tokenizer, [f"w{k} w{k + 1}" for k in range(1, 6)], by_odd_words, arguments(tmp_path), config=config, max_new_tokens=6
    )
    assert len(done) == 2 and all(d.rows and math.isfinite(d.metrics["train/train_loss"]) for d in done)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    first, second = ({x.prompt: x.responses for x in d.interactions} for d in done)
    assert all(first[prompt] != responses for prompt, responses in second.items())
    assert done[1].metrics["pool"] > 0


def test_labels_of_the_black_box_raise_its_quality(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    config = CycleAlignLoopConfig(n=4, loss="pro", target="black_box", iterations=3, stop_when_agreed=False)
    args = arguments(tmp_path, max_steps=8, learning_rate=1e-2)
    done = cyclealign(model, tokenizer, [f"w{k} w{k + 1}" for k in range(1, 13)], by_odd_words, args, config=config, max_new_tokens=6)
    quality = [sum(odd_words(r) for x in d.interactions for r in x.responses) / sum(len(x.responses) for x in d.interactions) for d in done]
    assert quality[-1] > quality[0] + 0.1, quality


def test_scores_are_those_of_the_tokens_that_were_sampled(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    box = WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig(seed=3), top_p=None, max_new_tokens=4)
    (texts,) = box.sample(["w1 w2"], 5)
    (made,) = generate(model, tokenizer, ["w1 w2"], n=5, seed=3, max_new_tokens=4, return_logprobs=True)
    assert texts == [g.text for g in made]
    found = box.score("w1 w2", texts)
    for value, g in zip(found, made, strict=True):
        assert g.logprobs is not None and value == pytest.approx(float(g.logprobs.mean()), abs=1e-5)


def test_responses_that_were_not_sampled_are_scored_as_text(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    box = WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig())
    for text, value in zip(["w5 w6", "w7"], box.score("w1 w2 ", ["w5 w6", "w7"]), strict=True):
        ids = torch.tensor([tokenizer(f"w1 w2 {text}")["input_ids"] + [tokenizer.eos_token_id]])
        table = model(ids).logits.detach().log_softmax(-1)
        wanted = [float(table[0, t - 1, ids[0, t]]) for t in range(2, ids.shape[1])]
        assert value == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_the_reward_of_dpo_is_nought_until_the_model_has_moved(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    box = WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig(), score_by="dpo_reward")
    assert box.score("w1", ["w5 w6", "w7"]) == pytest.approx([0, 0], abs=1e-6)
    box.train([{"prompt": "w1", "completions": ["w5 w6", "w7"], "ranks": [0, 1]}])
    assert box.score("w1", ["w5 w6", "w7"])[0] > 0.01
    with pytest.raises(InputError, match="score_by: must be 'mean_logp' or 'dpo_reward', got 'sum'"):
        WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig(), score_by="sum")  # type: ignore[arg-type]


def test_prompts_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    plain = WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig()).score("w9 w1", ["w5"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w9 {% endif %}{{ m.content }} {% endfor %}"
    )
    chat = WhiteBox(model, tokenizer, arguments(tmp_path), CycleAlignLoopConfig(), max_new_tokens=3)
    assert chat.score("w1", ["w5"])[0] != plain[0]
    assert len(chat.sample(["w1"], 2)[0]) == 2
    assert set(itertools.chain(*chat.sample(["w1"], 2))) != set(itertools.chain(*chat.sample(["w1"], 2)))
