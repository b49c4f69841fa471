"""CTRL: reference answers and their cache, the reward they make, the beta to start from, the controller of beta."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.errors import ConfigError, InputError
from fairlead.rewards import CalibrationTable, Transform
from fairlead.testing.tiny import save_tiny_model, tiny_model
from fairlead_training.ctrl import CTRL, BetaController, starting_beta

PROMPTS = [torch.tensor([5, 6]), torch.tensor([7])]


def total(prompts, responses):
    """A reward of ids with many ties: the sum of all, with the prompt's, modulo 7."""
    return [float(int(x.sum() + y.sum()) % 7) for x, y in zip(prompts, responses, strict=True)]


def ctrl(folder, **changes):
    return CTRL(**{"reward": total, "transform": "identity", "samples": 12, "max_new_tokens": 3, "folder": folder} | changes)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


# Calibration


def test_the_reward_is_the_transform_of_the_mid_rank_quantile_among_the_reference_answers(tmp_path):
    method = ctrl(tmp_path, transform="exp:2", samples=25)
    reward, answers = method.calibrate(tiny_model(), None, PROMPTS), method.reference_answers(tiny_model(), None, PROMPTS)
    asked = torch.tensor([3, 8, 9])
    for place, prompt in enumerate(PROMPTS):
        kept = np.array(total([prompt] * 25, answers[25 * place : 25 * (place + 1)]))
        mine = total([prompt], [asked])[0]
        c = ((kept < mine) + 0.5 * (kept == mine)).mean()
        assert float(reward([prompt], [asked])[0]) == pytest.approx((math.exp(2 * c) - 1) / (math.exp(2) - 1), abs=1e-6)
        assert 1 < len(set(kept)) < 25
    assert reward.table.info["samples"] == "25"


def test_the_reference_answers_lie_at_a_half_on_average_whatever_the_ties(tmp_path):
    method = ctrl(tmp_path)
    reward, answers = method.calibrate(tiny_model(), None, PROMPTS), method.reference_answers(tiny_model(), None, PROMPTS)
    c = reward([p for p in PROMPTS for _ in range(12)], answers)
    assert c.reshape(2, 12).mean(1).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_another_reward_uses_the_same_answers_without_running_the_model_again(tmp_path):
    model = copy.deepcopy(tiny_model())
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    ctrl(tmp_path).calibrate(model, None, PROMPTS)
    first, kept = len(calls), files(tmp_path)
    ctrl(tmp_path, transform="exp:10", reward=lambda p, r: [float(len(y)) for y in r]).calibrate(model, None, PROMPTS)
    assert first > 0 and len(calls) == first and files(tmp_path) == kept and len(kept) == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}, {"samples": 13}, {"max_new_tokens": 2}, {"top_k": 3}, {"top_p": 0.5}])
def test_other_sampling_settings_get_other_answers(tmp_path, change):
    model = tiny_model()
    plain, changed = (c.reference_answers(model, None, PROMPTS) for c in (ctrl(tmp_path), ctrl(tmp_path, **change)))
    assert len(files(tmp_path)) == 2 and [a.tolist() for a in plain] != [a.tolist() for a in changed]


def test_another_model_or_other_prompts_are_never_answered_from_the_folder(tmp_path):
    for model, prompts in ((tiny_model(), PROMPTS), (tiny_model(seed=1), PROMPTS), (tiny_model(), PROMPTS[::-1])):
        ctrl(tmp_path).calibrate(model, None, prompts)
    assert len(files(tmp_path)) == 3


def test_a_torn_file_of_answers_is_made_anew(tmp_path):
    before = ctrl(tmp_path).reference_answers(tiny_model(), None, PROMPTS)
    path = tmp_path / files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:40])
    after = ctrl(tmp_path).reference_answers(tiny_model(), None, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and path.stat().st_size > 40


def test_the_reference_of_a_peft_model_is_the_model_without_its_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    policy = peft.get_peft_model(copy.deepcopy(tiny_model()), config)
    (tmp_path / "mine").mkdir(), (tmp_path / "plain").mkdir()
    mine = ctrl(tmp_path / "mine").reference_answers(policy, None, PROMPTS)
    plain = ctrl(tmp_path / "plain").reference_answers(tiny_model(), None, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True)) and files(tmp_path / "mine") == files(tmp_path / "plain")


def test_texts_repeated_in_the_data_are_calibrated_once_and_the_reward_fits_trl(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    method = ctrl(tmp_path / "kept", reward={"name": "keyword", "weights": {"w1": 1.0}}, transform="exp:-2")
    reward = method.calibrate(model, tokenizer, ["w3 w4", "w5", "w3 w4"])
    assert reward.table.prompt_ids == ["w3 w4", "w5"]
    low, high = reward.as_trl()(prompts=["w5", "w5"], completions=["w2", "w1 w1 w1"])
    assert 0 <= low < high <= 1


def test_what_cannot_be_calibrated_is_refused_in_one_line(tmp_path):
    chats = [[{"role": "user", "content": c}, {"role": "user", "content": "go on"}] for c in "ab"]
    for method, prompts, message in (
        (ctrl(tmp_path), [], "none are given"),
        (ctrl(tmp_path), chats, "two of them end with 'go on'"),
        (ctrl(tmp_path, reward="length"), PROMPTS, "LengthReward reads text; give the tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            method.calibrate(tiny_model(), None, prompts)
    for wrong, message in (({"samples": 1}, "samples"), ({"transform": "sqrt"}, "transform"), ({"reward": 3}, "reward")):
        with pytest.raises(ConfigError, match=message):
            CTRL(**wrong)


def test_too_few_answers_for_a_steep_transform_are_warned_of(caplog):
    CTRL(transform="exp:-10", samples=99)
    assert "99 reference answers are coarse for exp:-10" in caplog.text
    caplog.clear()
    CTRL(transform="exp:-10", samples=100)
    assert not caplog.text


# The beta to start from


@pytest.mark.parametrize(
    ("transform", "beta"),
    [
        ("identity", 0.2428), ("log", 0.4321), (Transform.exp(5, normalised=False), 47.95), (Transform.exp(10, normalised=False), 7012),
        (Transform.exp(-5, normalised=False), 0.0703), (Transform.exp(-10, normalised=False), 0.01151), ("exp:10", 0.3184), ("exp:-10", 0.01151),
    ],
)  # fmt: skip
def test_beta_at_half_a_nat_is_the_tabulated_one(transform, beta):
    assert starting_beta(transform, 0.5) == pytest.approx(beta, rel=1.5e-3)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_log_at_the_divergence_of_best_of_n_gives_its_beta(n):
    assert starting_beta("log", math.log(n) - (n - 1) / n) == pytest.approx(1 / (n - 1), rel=2e-3)


def test_the_identity_has_its_closed_form():
    assert starting_beta("identity", 0.1515959) == pytest.approx(0.5, rel=1e-5)
    assert CTRL(transform="identity").starting_beta(0.1515959) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(22025.5, -1.0), (0.001, 1000.0), (3.0, 0.0)])
def test_an_affine_change_of_the_transform_only_rescales_beta(scale, shift):
    assert starting_beta(lambda c: scale * c + shift, 0.5) == pytest.approx(scale * starting_beta("identity", 0.5), rel=1e-6)


def test_budgets_and_transforms_without_a_beta_are_refused():
    for transform, kl, message in (("identity", 0.0, "above 0 nats"), (lambda c: 0 * c, 0.5, "not constant"), ("identity", 12.0, "cannot spend 12")):
        with pytest.raises(InputError, match=message):
            starting_beta(transform, kl)


# The controller


def test_the_controller_waits_and_then_moves_log_beta_in_proportion_and_within_its_rate():
    controller = BetaController(2.0, 0.5, rate=0.1, warmup=2)
    assert [controller.update(9.0), controller.update(9.0)] == [2.0, 2.0]
    assert controller.update(0.75) == pytest.approx(2 * math.exp(0.05))  # half the target too much
    assert controller.update(9.0) == pytest.approx(2 * math.exp(0.15))  # clipped
    assert controller.update(0.0) == pytest.approx(2 * math.exp(0.05))


@given(st.floats(0, 10), st.floats(0.01, 5))
@settings(deadline=None)
def test_beta_rises_exactly_when_the_policy_is_too_far_away(kl, target):
    beta = BetaController(1.0, target, warmup=0).update(kl)
    assert np.sign(beta - 1.0) == np.sign(kl - target) or abs(kl / target - 1) < 1e-13


def test_it_finds_the_beta_of_a_target_divergence():
    controller = BetaController(1.0, 0.5, rate=0.1, warmup=5)
    for _ in range(400):
        controller.update(0.2 / controller.beta)  # a policy whose divergence falls with beta
    assert controller.beta == pytest.approx(0.4, rel=1e-3)


def test_a_controller_goes_on_where_another_stopped():
    first = BetaController(1.0, 0.5, warmup=1)
    first.update(1.0), first.update(1.0)
    second = BetaController(1.0, 0.5, warmup=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(0.7) == first.update(0.7)


def test_attached_to_a_trainer_it_follows_the_divergence_that_is_logged(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Toy(Trainer):
        beta, used = 99.0, ()

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            self.used = (*self.used, self.beta)
            return model(inputs["x"]).square().mean()

        def log(self, logs, *rest):
            super().log(logs | {"kl": 1.0} if "loss" in logs else logs, *rest)

    args = TrainingArguments(str(tmp_path), max_steps=4, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False)
    trainer = Toy(torch.nn.Linear(1, 1), args, train_dataset=[{"x": torch.ones(1)}] * 8)
    controller = BetaController(0.3, 0.5, rate=0.03, warmup=1).attach(trainer)
    trainer.train()
    assert trainer.used == pytest.approx([0.3, 0.3, 0.3 * math.exp(0.03), 0.3 * math.exp(0.06)])
    assert trainer.beta == controller.beta == pytest.approx(0.3 * math.exp(0.09))
    controller.load_state_dict({"beta": 0.5, "updates": 9})
    assert trainer.beta == 0.5
    with pytest.raises(InputError, match="Toy has no kl_coef"):
        BetaController(0.3, 0.5, attribute="kl_coef").attach(trainer)


def test_nonsense_of_the_controller_is_refused():
    for wrong, message in (({"beta": 0.0}, "beta: must be above 0"), ({"target": -1.0}, "target"), ({"rate": -0.1}, "rate and warmup")):
        with pytest.raises(InputError, match=message):
            BetaController(**{"beta": 1.0, "target": 0.5} | wrong)
    with pytest.raises(InputError, match="finite number of nats, got nan"):
        BetaController(1.0, 0.5).update(math.nan)


def test_jensen_of_a_steep_transform_is_as_large_as_the_expansion_says():
    # E e^(t C_hat) / e^(t C) = 1 + t^2 C (1 - C) / (2 K): 12.5 % at C = .5 with K = 100 and t = 10.
    k = 100
    table = CalibrationTable.fit(range(4000), torch.rand(4000, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ratio = torch.exp(10 * (table(range(4000), [0.5] * 4000) - 0.5)).mean()
    assert float(ratio) == pytest.approx(1.125, abs=0.03)
