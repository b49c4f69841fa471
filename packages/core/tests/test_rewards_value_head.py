"""The value head: equal to the hidden state times the head, fitted in closed form, saved whole, refused where it does not fit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import ConfigError, InputError
from fairlead.rewards import ValueHead, ValueHeadReward, fit_value_head
from fairlead.rewards.value_head import last_states, ridge
from fairlead.testing import registered_contract, reward_contract
from fairlead.testing.tiny import tiny_model

WORDS = ["how", "are", "you", "what", "is", "this", "fine", "thanks", "no", "idea", "user", "answer", *"abcdefgh"]


def tokenizer(chat: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>")
    if chat:
        made.chat_template = "{% for m in messages %}user {{ m.content }} {% endfor %}{% if add_generation_prompt %}answer {% endif %}"
    return made


PAIR = (tiny_model(), tokenizer())
HEAD = ValueHead(torch.linspace(-1, 1, 32)[None], torch.tensor([0.5]))
PROMPTS = ["how are you", "what is this", "how are you", ""]
RESPONSES = ["fine thanks", "no idea", "c d e f g h a b", "a"]

TestContract = reward_contract(lambda: ValueHeadReward(head=HEAD, model=PAIR))
TestChat = reward_contract(lambda: ValueHeadReward(head=HEAD, model=(PAIR[0], tokenizer(chat=True))))
TestRegistered = registered_contract("reward", "value-head")


def state(text: str) -> torch.Tensor:
    with torch.inference_mode():
        return PAIR[0].model(torch.tensor([PAIR[1](text)["input_ids"]])).last_hidden_state[0, -1]


def value(text: str) -> float:
    return float(HEAD.weight[0] @ state(text) + HEAD.bias)


def sampled(prompts: int, answers: int) -> tuple[list[str], list[str]]:
    """Random prompts, each with random answers."""
    made = torch.Generator().manual_seed(3)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=made).tolist())

    asked = [text(4) for _ in range(prompts)]
    return [p for p in asked for _ in range(answers)], [text(2 + i % 5) for i in range(prompts * answers)]


class TestValues:
    """What the reward gives."""

    @pytest.mark.parametrize("packs", [True, False])
    @pytest.mark.parametrize("budget", [16, 4096])
    def test_they_are_head_times_last_hidden_state(self, packs: bool, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
        if not packs:
            monkeypatch.setattr("fairlead.scoring.why_not_packable", lambda model: "it may not")
        scores = ValueHeadReward(head=HEAD, model=PAIR, token_budget=budget)(PROMPTS, RESPONSES)
        expected = [value(f"{p} {r}") for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)

    def test_every_prefix_has_its_value(self) -> None:
        words = RESPONSES[2].split()
        prefixes = [" ".join(words[:n]) for n in range(len(words) + 1)]
        scores = ValueHeadReward(head=HEAD, model=PAIR)(["how are you"] * 9, prefixes, [False] * 8 + [True])
        assert scores.tolist() == pytest.approx([value(f"how are you {p}") for p in prefixes], abs=1e-4)

    def test_ids_are_taken_as_they_are(self) -> None:
        words = PAIR[1]
        asked = [torch.tensor(words(p)["input_ids"], dtype=torch.int64) for p in PROMPTS]
        answers = [torch.tensor(words(r)["input_ids"], dtype=torch.int64) for r in RESPONSES]
        reward = ValueHeadReward(head=HEAD, model=PAIR)
        assert reward.accepts_ids
        assert torch.equal(reward(asked, answers), reward(PROMPTS, RESPONSES))

    def test_the_chat_template_stands_around_the_prompt_alone(self) -> None:
        chat = (PAIR[0], tokenizer(chat=True))
        assert ValueHeadReward(head=HEAD, model=chat)(["how"], ["fine a"]).item() == pytest.approx(value("user how answer fine a"), abs=1e-4)
        plain = ValueHeadReward(head=HEAD, model=chat, template="concatenate")(["how"], ["fine a"])
        assert plain.item() == pytest.approx(value("how fine a"), abs=1e-4)
        fitted_plain = ValueHead(HEAD.weight, HEAD.bias, template="concatenate")
        assert torch.equal(ValueHeadReward(head=fitted_plain, model=chat)(["how"], ["fine a"]), plain)

    def test_nothing_at_all_has_the_value_of_the_first_token(self) -> None:
        assert ValueHeadReward(head=HEAD, model=PAIR)([""], [""]).item() == pytest.approx(value("<bos>"), abs=1e-4)
        bare = tokenizer()
        bare.bos_token = None
        with pytest.raises(InputError, match="both empty"):
            ValueHeadReward(head=HEAD, model=(PAIR[0], bare))([""], [""])

    def test_what_is_too_long_loses_the_start_of_the_prompt(self) -> None:
        reward = ValueHeadReward(head=HEAD, model=PAIR, max_length=4)
        assert reward(["a b c d"], ["e f"]).item() == pytest.approx(value("c d e f"), abs=1e-4)
        assert reward(["a"], ["b c d e f"]).item() == pytest.approx(value("c d e f"), abs=1e-4)

    def test_hidden_states_of_nan_are_refused(self) -> None:
        broken = copy.deepcopy(PAIR[0])
        reward = ValueHeadReward(head=HEAD, model=(broken, PAIR[1]))
        with torch.no_grad():
            broken.model.norm.weight.fill_(float("nan"))
        with pytest.raises(InputError, match="NaN"):
            reward(["a"], ["b"])

    def test_a_head_of_another_width_is_refused(self) -> None:
        with pytest.raises(InputError, match="has width 16, the hidden states of LlamaForCausalLM have 32"):
            ValueHeadReward(head=ValueHead(torch.ones(1, 16)), model=PAIR)(["a"], ["b"])

    def test_a_head_of_another_model_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="fairlead"):
            ValueHeadReward(head=ValueHead(HEAD.weight, model="org/other"), model=PAIR)(["a"], ["b"])
        assert "fitted on org/other" in caplog.text


class TestFit:
    """Ridge regression on hidden states."""

    @given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 1000))
    @settings(deadline=None, max_examples=40)
    def test_ridge_solves_its_normal_equations(self, count: int, width: int, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        x, y = torch.randn(count, width, generator=made).double(), torch.randn(count, generator=made).double()
        penalties = [1e-3, 0.1, 10.0]
        weights, biases = ridge(x, y, penalties)
        for w, b, penalty in zip(weights, biases, penalties, strict=True):
            residual = x @ w + b - y
            torch.testing.assert_close(x.T @ residual / count + penalty * w, torch.zeros(width).double(), atol=1e-9, rtol=0)
            assert float(residual.mean()) == pytest.approx(0.0, abs=1e-10)

    def test_without_a_penalty_it_is_least_squares(self) -> None:
        made = torch.Generator().manual_seed(0)
        x, y = torch.randn(30, 5, generator=made).double(), torch.randn(30, generator=made).double()
        weight, bias = ridge(x, y, [0.0])
        expected = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1).double()], 1), y[:, None]).solution[:, 0]
        torch.testing.assert_close(torch.cat([weight[0], bias]), expected)
        twice, _ = ridge(torch.cat([x, x], 1), y, [0.0])  # a rank of 5 in 10 columns
        torch.testing.assert_close(twice[0], torch.cat([weight[0], weight[0]]) / 2)

    def test_a_linear_value_is_found_and_holds_for_new_pairs(self) -> None:
        prompts, responses = sampled(30, 4)
        targets = [value(f"{p} {r}") for p, r in zip(prompts, responses, strict=True)]
        head = fit_value_head(*PAIR, prompts, responses, targets)
        assert head.info["held_out_r2"] > 0.999
        assert head.weight.dtype == torch.float32
        scores = ValueHeadReward(head=head, model=PAIR)(PROMPTS, RESPONSES)
        expected = [value(f"{p} {r}") for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        assert scores.tolist() == pytest.approx(expected, abs=0.05)
        assert max(expected) - min(expected) > 0.5

    def test_noise_is_met_with_a_large_penalty(self) -> None:
        prompts, responses = sampled(30, 4)
        noise = torch.randn(120, generator=torch.Generator().manual_seed(1)).tolist()
        random, linear = (
            fit_value_head(*PAIR, prompts, responses, t)
            for t in (noise, [value(f"{p} {r}") for p, r in zip(prompts, responses, strict=True)])
        )
        assert random.info["held_out_r2"] < 0.2
        assert random.info["penalty"] > 1e3 * linear.info["penalty"]
        assert float(random.weight.norm()) < 0.1 * float(linear.weight.norm())

    def test_a_constant_target_is_the_bias(self) -> None:
        head = fit_value_head(*PAIR, PROMPTS, RESPONSES, [2.0] * 4)
        assert float(head.weight.abs().max()) < 1e-6
        assert float(head.bias) == pytest.approx(2.0, abs=1e-6)

    def test_the_penalty_may_be_given(self) -> None:
        head = fit_value_head(*PAIR, PROMPTS, RESPONSES, [0.0, 1.0, 2.0, 3.0], penalty=0.7, name="zoo:mine")
        states = torch.stack([state(f"{p} {r}") for p, r in zip(PROMPTS, RESPONSES, strict=True)]).double()
        weight, bias = ridge(states, torch.arange(4.0).double(), [0.7])
        torch.testing.assert_close(head.weight, weight.float(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(head.bias, bias.float(), atol=1e-3, rtol=1e-3)
        assert (head.info["penalty"], head.model) == (0.7, "zoo:mine")

    def test_the_same_seed_gives_the_same_head(self) -> None:
        prompts, responses = sampled(8, 2)
        targets = [float(len(r)) for r in responses]
        first, second = (fit_value_head(*PAIR, prompts, responses, targets, seed=4) for _ in range(2))
        assert torch.equal(first.weight, second.weight)
        assert first.info == second.info

    def test_states_come_in_the_order_asked_for(self) -> None:
        words = PAIR[1]
        ids = [(tuple(words(p)["input_ids"]), tuple(words(r)["input_ids"])) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        found = last_states(PAIR[0], [*ids, ids[0]])
        expected = [state(f"{p} {r}") for p, r in zip([*PROMPTS, PROMPTS[0]], [*RESPONSES, RESPONSES[0]], strict=True)]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)
        assert torch.equal(found[0], found[4])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"targets": [1.0] * 3}, "got 3 for 4 pairs"),
            ({"targets": [1.0, float("nan"), 0.0, 0.0]}, "number 1 is not finite"),
            ({"responses": ["a"]}, "one response per prompt"),
            ({"held_out": 1.0}, "held_out"),
            ({"penalty": -1.0}, "penalty"),
        ],
    )
    def test_what_cannot_be_fitted_is_refused(self, changes: dict[str, Any], message: str) -> None:
        given_ = {"prompts": PROMPTS, "responses": RESPONSES, "targets": [0.0] * 4, **changes}
        with pytest.raises(InputError, match=message):
            fit_value_head(*PAIR, **given_)


class TestFiles:
    """safetensors in, safetensors out."""

    def test_what_is_saved_gives_the_same_values(self, tmp_path: Path) -> None:
        head = ValueHead(HEAD.weight, HEAD.bias, "zoo:mine", "concatenate", {"penalty": 0.1})
        head.save(tmp_path / "head.safetensors")
        back = ValueHead.load(tmp_path / "head.safetensors")
        assert (back.model, back.template, back.info) == ("zoo:mine", "concatenate", {"penalty": 0.1})
        assert torch.equal(back.weight, head.weight)
        reward = ValueHeadReward(head=str(tmp_path / "head.safetensors"), model=PAIR)
        assert torch.equal(reward(PROMPTS, RESPONSES), ValueHeadReward(head=HEAD, model=PAIR)(PROMPTS, RESPONSES))
        assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]

    def test_the_model_is_the_heads_own_by_default(self, tiny_folder: Path) -> None:
        from fairlead.models import load

        model = load(tiny_folder)
        texts = [f"w{i}" for i in range(6)]
        head = fit_value_head(*model, texts, texts, torch.arange(6.0))
        assert head.model == str(tiny_folder)
        assert torch.equal(ValueHeadReward(head=head)(texts, texts), ValueHeadReward(head=head, model=model)(texts, texts))

    def test_a_bias_and_metadata_are_optional(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": HEAD.weight.half()}, tmp_path / "bare.safetensors")
        bare = ValueHead.load(tmp_path / "bare.safetensors")
        assert (bare.weight.dtype, bare.bias.tolist(), bare.model) == (torch.float32, [0.0], "")
        with pytest.raises(InputError, match="model is required"):
            ValueHeadReward(head=bare)

    def test_other_files_are_refused_in_one_line(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"other": torch.zeros(1, 3)}, tmp_path / "other.safetensors")
        save_file({"weight": torch.zeros(2, 3)}, tmp_path / "two.safetensors")
        save_file({"weight": torch.full((1, 3), float("nan"))}, tmp_path / "nan.safetensors")
        save_file({"weight": torch.zeros(1, 3)}, tmp_path / "info.safetensors", metadata={"info": "{"})
        (tmp_path / "text.safetensors").write_text("no tensors")
        for name in ("other", "two", "nan", "info", "text", "absent"):
            with pytest.raises(InputError, match="value head") as error:
                ValueHead.load(tmp_path / f"{name}.safetensors")
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{}, {"head": 3}, {"head": ""}, {"head": HEAD, "model": 3}, {"head": HEAD, "max_length": 0}])
def test_bad_settings_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        registry.create("reward", "value-head", **wrong)
    assert "\n" not in str(error.value)
