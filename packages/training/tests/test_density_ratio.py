"""Density ratios of prompts: the classifier, the embedding, and the column `weight` on its way into a training step."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fairlead import registry
from fairlead.errors import InputError
from fairlead.kinds import SequenceStats
from fairlead.logprobs import hidden_states
from fairlead.models import load
from fairlead.testing import save_tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer
from fairlead_training.density_ratio import DensityRatio, MeanPooled, add_weights, fit

UNBOUNDED = {"low": 0.0, "high": math.inf}


def column(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)[:, None]


def gaussians(seed: int = 0, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, count), rng.normal(1, 1, count)


def test_the_ratio_of_two_gaussians_is_found() -> None:
    up, down = gaussians()
    ratio = fit(column(up), column(down))
    # The true log-ratio of N(0, 1) to N(1, 1) is 1/2 - x.
    assert float(ratio.slope_E[0]) == pytest.approx(-1.018, abs=2e-3) and ratio.intercept == pytest.approx(0.509, abs=2e-3)
    weight = ratio.weight(column(down))
    assert float(weight.min()) == 0.5 and float(weight.max()) <= 10 and float(weight.mean()) == pytest.approx(1.09, abs=0.01)


def test_weighted_downs_have_the_means_of_the_ups_and_bounds_bias_them() -> None:
    up, down = gaussians()
    ups, downs = (np.sin(x) + x**2 for x in (up, down))
    free, bounded = (fit(column(up), column(down), **b).weight(column(down)).numpy() * downs for b in (UNBOUNDED, {}))
    error = math.hypot(ups.std(), free.std()) / math.sqrt(len(up))
    assert abs(free.mean() - ups.mean()) < 4 * error
    assert [ups.mean(), free.mean(), bounded.mean()] == pytest.approx([0.98, 1.01, 1.56], abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_equal_laws_of_prompts_give_weights_near_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(2, 4000))
    weight = fit(column(up), column(down)).weight(column(down))
    assert float(weight.mean()) == pytest.approx(1, abs=1e-3)
    assert float(((weight > 0.9) & (weight < 1.1)).double().mean()) >= 0.85
    assert float(weight.min()) > 0.7 and float(weight.max()) < 1.4
    logp = torch.as_tensor(rng.normal(size=8000)) - 50
    role = torch.arange(8000) < 4000

    def loss(w: torch.Tensor | None) -> float:
        batch = SequenceStats(logp, torch.ones(8000), torch.full_like(logp, -50), role=role, weight=w)
        return float(registry.create("objective", "bco", delta="batch")(batch).loss)

    assert loss(torch.cat([torch.ones(4000), weight.float()])) == pytest.approx(loss(None), rel=0.01)


@pytest.mark.parametrize(("width", "ups", "downs", "scale", "c"), [(1, 200, 50, 1.0, 1.0), (5, 300, 900, 2.0, 0.1), (40, 80, 60, 1.0, 10.0)])
def test_the_classifier_is_balanced_logistic_regression(width: int, ups: int, downs: int, scale: float, c: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    up, down = rng.normal(3.0, scale, (ups, width)), rng.normal(3.2, scale, (downs, width))
    ratio = fit(torch.tensor(up), torch.tensor(down), c=c)
    theirs = linear.LogisticRegression(class_weight="balanced", C=c, tol=1e-10, max_iter=5000)
    theirs.fit(np.concatenate([up, down]), [1] * ups + [0] * downs)
    np.testing.assert_allclose(ratio.logit(torch.tensor(down)), theirs.decision_function(down), atol=1e-4)


def test_how_many_rows_each_label_has_does_not_shift_the_ratio() -> None:
    up, down = gaussians(count=500)
    once, often = fit(column(up), column(down)), fit(column(up), column(np.tile(down, 6)))
    assert once.intercept == pytest.approx(often.intercept, abs=0.01)
    assert float(once.slope_E) == pytest.approx(float(often.slope_E), abs=0.01)


def test_a_saved_ratio_comes_back_and_other_files_are_refused(tmp_path: Path) -> None:
    up, down = gaussians(count=50)
    made = fit(column(up), column(down), low=0.25, high=4)
    made.save(tmp_path / "ratio.safetensors")
    back = DensityRatio.load(tmp_path / "ratio.safetensors")
    assert torch.equal(back.slope_E, made.slope_E) and (back.intercept, back.low, back.high) == (made.intercept, 0.25, 4)
    save_file({"slope": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds slope, a density ratio has numbers, slope"):
        DensityRatio.load(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_text("torn")
    for name in ("torn", "absent"):
        with pytest.raises(InputError, match=f"{name}.safetensors: no density ratio can be read"):
            DensityRatio.load(tmp_path / f"{name}.safetensors")


def test_what_cannot_be_fitted_is_refused_in_one_line() -> None:
    x, other = torch.randn(5, 2), torch.randn(5, 3)
    for arguments, settings, message in (
        ((x, other), {}, "emb_down: width 3, emb_up has 2"),
        ((x[:0], x), {}, r"emb_up: must be one row per prompt, \[N, E\], not empty, got shape \[0, 2\]"),
        ((x, x[:, 0]), {}, r"emb_down: .*got shape \[5\]"),
        ((x, x.log()), {}, "emb_down: row . is not finite"),
        ((x, x), {"low": 2, "high": 1}, "low, high: must be 0 <= low <= high, high above 0, got 2 and 1"),
        ((x, x), {"c": 0}, "c: must be above 0, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            fit(*arguments, **settings)
    with pytest.raises(InputError, match="emb_NE: width 3, the ratio was fitted on 2"):
        fit(x, x).weight(other)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return load(folder, device="cpu")


PROMPTS = ["w1 w2", "w9 w8 w7 w6 w5", "w3", "w1 w2 w3 w4"]


def test_the_embedding_is_the_mean_over_the_tokens_of_a_prompt_and_no_padding(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    found = MeanPooled(model, tokenizer)(PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        hidden_TD = hidden_states(model, {"input_ids": torch.tensor([tokenizer(prompt)["input_ids"]])})[0].detach().double()
        mean = hidden_TD.mean(0)
        expected = (mean - mean.mean()) / (mean - mean.mean()).norm()
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(MeanPooled(model, tokenizer, token_budget=6)(PROMPTS), found, atol=1e-5, rtol=0)
    torch.testing.assert_close(MeanPooled(model, tokenizer, max_length=2)(PROMPTS)[[0, 3]], found[[0, 0]], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="prompt '': has no token"):
        MeanPooled(model, tokenizer)([""])


def test_a_chat_prompt_is_embedded_without_the_tail_that_asks_for_an_answer(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    embed = MeanPooled(model, tokenizer)
    torch.testing.assert_close(embed([[{"role": "user", "content": "w1 w2"}]]), embed(["w1 w2"]))


def logs(ups: int = 30, downs: int = 40) -> list[dict[str, Any]]:
    """Ups ask of w1 and w2 alike; nine downs in ten ask of w2."""
    made: list[dict[str, Any]] = [{"prompt": f"w{1 + i % 2} w5", "completion": "w7", "label": True} for i in range(ups)]
    return made + [{"prompt": f"w{1 + (i % 10 > 0)} w5", "completion": "w8", "label": False} for i in range(downs)]


def of_word(prompts: Any) -> torch.Tensor:
    return torch.tensor([[1.0 if "w1" in str(p) else 0.0] for p in prompts])


def test_rows_get_the_ratio_of_their_prompt_and_ups_keep_one() -> None:
    rows = logs()
    made, found = add_weights(rows, of_word, c=1e6)
    assert "weight" not in rows[0] and [{k: v for k, v in row.items() if k != "weight"} for row in made] == rows
    weight = {(row["prompt"], row["label"]): row["weight"] for row in made}
    assert weight[("w1 w5", True)] == weight[("w2 w5", True)] == 1
    assert weight[("w1 w5", False)] == pytest.approx(0.5 / 0.1, rel=1e-2) and weight[("w2 w5", False)] == pytest.approx(0.5 / 0.9, rel=1e-2)
    values = np.array([row["weight"] for row in made if not row["label"]])
    assert found.rows == 40 and found.mean == pytest.approx(values.mean()) and found.bounded == 0
    assert found.effective == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert "40 unwanted rows weigh 1.000 on average, 0% sit on a bound; effective sample size 14" in found.line()
    assert add_weights(rows, of_word, c=1e6, high=2)[1].bounded == pytest.approx(0.1)


def test_the_classifier_sees_a_sample_without_repeats_and_every_down_gets_a_weight() -> None:
    seen: list[int] = []

    def embed(prompts: Any) -> torch.Tensor:
        seen.append(len(prompts))
        return of_word(prompts)

    made, found = add_weights(logs(), embed, sample=20, seed=3)
    assert seen == [40, 20] and all(math.isfinite(row["weight"]) for row in made)
    again, other = (add_weights(logs(), of_word, sample=20, seed=s)[1].ratio.intercept for s in (3, 4))
    assert found.ratio.intercept == again != other


def test_rows_that_cannot_be_weighed_are_refused_by_number() -> None:
    row = {"prompt": "w1", "completion": "w2", "label": True}
    for rows, message in (
        ([row, {"prompt": "w1", "completion": "w2"}], "row 1: columns prompt, completion; needed are prompt, completion and label"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}], "row 0: columns prompt, chosen, rejected; needed are"),
        ([row, {**row, "label": 0.5}], "row 1: label: must be true or false, got 0.5"),
        ([{**row, "weight": 2.0}], "row 0: has a weight already"),
        ([row, row], "label: 2 rows, none of them unwanted; a ratio needs both"),
        ([{**row, "label": False}], "label: 1 rows, none of them wanted"),
    ):
        with pytest.raises(InputError, match=message):
            add_weights(rows, of_word)
    with pytest.raises(InputError, match="embed: gave 1 rows for 40 prompts"):
        add_weights(logs(), lambda prompts: torch.ones(1, 1))


def test_the_weights_reach_the_loss_of_a_training_step(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    weighted, _ = add_weights(logs(6, 10), MeanPooled(model, tokenizer))
    downs = [row["weight"] for row in weighted if not row["label"]]
    assert max(downs) - min(downs) > 0.2

    def train(rows: Any, **settings: Any) -> tuple[list[float], torch.Tensor]:
        args = PreferenceConfig(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", ref_cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        trainer = PreferenceTrainer(copy.deepcopy(model), "bco", args, rows, processing_class=tokenizer, objective_settings=settings)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    (first, second), ended = train(weighted)
    # Every reward is 0 before the first step, so each item costs log 2.
    assert first == pytest.approx(math.log(2) * (1 + sum(downs) / len(downs)), rel=1e-5)
    assert second < first
    (plain, _), unweighted = train(logs(6, 10))
    assert plain == pytest.approx(2 * math.log(2), rel=1e-5) and not torch.allclose(ended, unweighted)
    assert train(weighted, self_normalised=True)[0][0] == pytest.approx(2 * math.log(2), rel=1e-5)
