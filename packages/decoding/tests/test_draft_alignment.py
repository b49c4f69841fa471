"""The draft-alignment recipe: its losses to the last digit, its chain, and a small run of the whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fairlead.runs import Run
from fairlead.testing.contracts import recipe_contract
from fairlead_decoding.recipes import draft_world as world
from fairlead_decoding.recipes.draft_alignment import DraftAlignment

P, Q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([[0.2, 0.25, 0.55]], dtype=torch.float64)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(kind: str, draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    draft = draft.clone().requires_grad_()
    world.draft_loss(kind, draft, target).backward()
    assert draft.grad is not None
    return draft.grad


def test_the_published_example() -> None:
    assert float(world.draft_loss("tvd", P.log(), Q.log())) == pytest.approx(0.35, abs=1e-15)
    assert float(world.acceptance(P.log(), Q.log())) == pytest.approx(0.65, abs=1e-15)
    assert gradient("tvd", P.log(), Q.log())[0].tolist() == pytest.approx([0.10, 0.06, -0.16], abs=1e-12)
    reward = (Q > P).double()
    assert (P * ((P * reward).sum() - reward))[0].tolist() == pytest.approx([0.10, 0.06, -0.16], abs=1e-12)


def test_tvd_plus_plus_has_the_gradient_of_tvd_over_the_deviation_of_the_reward() -> None:
    draft, target = random_logits(6, 7), random_logits(6, 7, seed=1)
    reward = (target.softmax(-1) > draft.softmax(-1)).double()
    deviation = reward.std(unbiased=False)
    torch.testing.assert_close(gradient("tvdpp", draft, target), gradient("tvd", draft, target) / deviation, atol=1e-12, rtol=0)
    assert float(deviation) <= 0.5


def test_a_draft_that_is_the_target_has_nothing_to_learn() -> None:
    logits = random_logits(4, 5)
    for kind in world.LOSSES:
        assert float(gradient(kind, logits, logits).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["kl", "rkl", "tvd"])
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    target = random_logits(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: world.draft_loss(kind, z, target), (random_logits(3, 5).requires_grad_(),))


def test_total_variation_is_symmetric_bounded_and_below_pinskers_bound() -> None:
    for seed in range(20):
        a, b = random_logits(1, 9, seed=seed) * 2, random_logits(1, 9, seed=seed + 100) * 2
        tvd = float(world.draft_loss("tvd", a, b))
        assert tvd == pytest.approx(float(world.draft_loss("tvd", b, a)), abs=1e-14)
        assert 0 <= tvd <= 1
        assert tvd == pytest.approx(1 - float(world.acceptance(a, b)), abs=1e-14)
        for kl in (world.draft_loss("kl", a, b), world.draft_loss("kl", b, a)):
            assert tvd <= (float(kl) / 2) ** 0.5


def test_tvd_and_tvd_plus_plus_walk_one_path_under_signs_of_gradients() -> None:
    target = random_logits(5, 6, seed=1)
    tables = {kind: random_logits(5, 6) for kind in ("tvd", "tvdpp")}
    for _ in range(30):
        for kind in tables:
            tables[kind] = tables[kind] - 0.01 * gradient(kind, tables[kind], target).sign()
    assert torch.equal(tables["tvd"], tables["tvdpp"])


def test_the_stationary_law_of_a_chain_stays_when_the_chain_moves() -> None:
    law = (2 * random_logits(16, 4)).softmax(-1)
    weight = world.stationary(law).view(4, 4)
    moved = torch.zeros(4, 4, dtype=torch.float64)
    for a, b, c in itertools.product(range(4), repeat=3):
        moved[b, c] += weight[a, b] * law[4 * a + b, c]
    torch.testing.assert_close(moved, weight, atol=1e-12, rtol=0)
    assert float(weight.sum()) == pytest.approx(1)


def test_a_chain_that_is_next_to_a_constant_is_not_drawn() -> None:
    for seed in (0, 1002):  # the first chain of the second seed spends four fifths of its time in one pair
        _, weight = world.draw_chain(12, seed)
        assert float(torch.special.entr(weight).sum().exp()) >= 12
        assert float(weight.max()) < 0.5


class TestContract(recipe_contract("draft-alignment")):  # type: ignore[misc]
    pass


def test_a_small_run_writes_its_report_and_resumes_without_work(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "chains": 2, "chain_letters": 4, "chain_steps": 20, "target_layers": 1, "target_width": 16, "target_steps": 20, "draft_width": 8,
        "draft_steps": 20, "distillation_texts": 64, "distillation_tokens": 8, "distillation_steps": 20, "batch_size": 8, "prompts": 16,
        "tokens": 8,
    }  # fmt: skip
    recipe = DraftAlignment(**small)
    run = Run.open(tmp_path / "run", slug="draft-alignment", config=recipe.config.public_dict(), seed=0)
    recipe(run)
    assert {c["name"] for c in run.checks if c["passed"]} >= {"greedy answers are the target's, letter for letter"}
    assert len(run.checks) == 9
    monkeypatch.setattr(world, "chain_experiment", lambda *a: pytest.fail("a kept stage ran again"))
    monkeypatch.setattr(world, "fit", lambda *a, **k: pytest.fail("a kept stage ran again"))
    again = DraftAlignment(**small)
    run.fail("interrupted", "test")
    resumed = Run.open(tmp_path / "run", slug="draft-alignment", config=recipe.config.public_dict(), seed=0, resume=True)
    again(resumed)
    resumed.finish()
    assert "Letters of real text" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
