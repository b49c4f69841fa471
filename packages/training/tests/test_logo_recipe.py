"""The recipe logo at smoke size, and the parts of its toy that must be as described."""

import pytest
import torch

from fairlead.runs import Run
from fairlead_training.recipes.logo import (
    CONTEXT,
    FILLER,
    QUERY,
    Logo,
    LogoConfig,
    answer_logp,
    answers,
    build_documents,
    needle_model,
    needle_rows,
    row_positions,
)  # fmt: skip


def test_the_recipe_reports_every_part_and_threshold(tmp_path):
    recipe = Logo(loss_seeds=1, start_most=2, loss_steps=1, position_steps=2, batch=4, test=4, documents=20, window=60)
    run = Run.open(tmp_path / "run", "logo", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 7 and not run.passed  # two steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()


def test_a_row_has_one_needle_and_the_query_last():
    ids, needle = needle_rows(500, CONTEXT, torch.Generator().manual_seed(0))
    found = (ids >= FILLER) & (ids < QUERY)
    assert found.sum(1).tolist() == [1] * 500 and torch.equal(ids[found], needle) and bool((ids[:, -1] == QUERY).all())
    assert ids.shape == (500, CONTEXT + 1) and len(found.nonzero()[:, 1].unique()) == CONTEXT


def test_the_rejected_answers_are_two_other_needles():
    seen = {}

    def pick(model, ids_BT):
        table = torch.arange(QUERY + 1.0).repeat(len(ids_BT), 1)
        seen["needle"] = ids_BT[(ids_BT >= FILLER) & (ids_BT < QUERY)]
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairlead_training.recipes.logo.answer_logp", pick)
        taken = answers(None, 300, torch.Generator().manual_seed(0)).long()
    assert torch.equal(taken[:, 0], seen["needle"])
    assert bool((taken >= FILLER).all()) and bool((taken < QUERY).all())
    assert all(len(set(row)) == 3 for row in taken.tolist())


def test_the_query_sees_every_token_at_ids_with_gaps():
    config, rng = LogoConfig(grid_share=1.0), torch.Generator().manual_seed(0)
    model = needle_model(0).double()
    ids, _ = needle_rows(1, CONTEXT, rng)
    positions = row_positions(config, rng)[None]
    assert int(positions[0, -1]) == 499 and int(positions.diff().max()) > 1
    with torch.no_grad():
        base = answer_logp(model, ids, positions)
        assert float((base - answer_logp(model, ids)).abs().max()) > 1e-7
        for t in range(CONTEXT):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % FILLER
            assert float((answer_logp(model, other, positions) - base).abs().max()) > 1e-9, t


def test_seven_rows_in_ten_are_spread():
    config, rng = LogoConfig(), torch.Generator().manual_seed(0)
    spread = sum(int(row_positions(config, rng)[-1]) == 499 for _ in range(400))
    assert spread == pytest.approx(280, abs=3 * 9.2)
    assert torch.equal(row_positions(LogoConfig(grid_share=0.0), rng), torch.arange(CONTEXT + 1))


def test_the_builder_is_right_wrong_and_in_between():
    found = build_documents(LogoConfig(documents=60), 0)
    assert found["relevant"] == 1 and found["irrelevant"] == 0 and 0 < found["mixed"] < 1
    assert found["rows"] + found["dropped"] == 60 and found["filled"] == 0
    assert found["dropped"] == round(60 * found["mixed"])
