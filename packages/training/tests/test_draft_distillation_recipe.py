"""The recipe draft-distillation at smoke size, and its chains by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.runs import Run
from fairlead_training.recipes.draft_distillation import (
    LOSSES,
    DraftDistillation,
    DraftDistillationConfig,
    block,
    chain,
    draw_chain,
)


def ran(folder: Path, **sizes: Any) -> Run:
    made = DraftDistillation(**sizes)
    run = Run.open(folder / "run", "draft-distillation", made.config.model_dump(), 0)
    made(run)
    run.finish()
    return run


SMALL = {"chains": 2, "letters": 4, "steps": 3}
TEXT = {"text": True, "target_width": 16, "target_layers": 1, "target_steps": 2, "draft_width": 16, "draft_steps": 1, "rows": 32, "tokens": 8,
        "distillation_steps": 1, "prompts": 8, "answer": 8}  # fmt: skip


def test_the_recipe_reports_chains_and_text(tmp_path: Path) -> None:
    run = ran(tmp_path, **SMALL, **TEXT)
    decodes = any(m.name == "speculative" for m in registry.methods("decoder"))
    assert len(run.checks) == 2 + 3 + (3 if decodes else 0) and not run.passed  # too few steps for the thresholds
    assert (tmp_path / "run" / "report.html").exists()


def test_without_a_registered_decoder_the_text_is_measured_on_drafted_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "methods", lambda kind: [])
    assert len(ran(tmp_path, **SMALL, **TEXT).checks) == 5
    assert "No decoder named speculative" in (tmp_path / "run" / "report.html").read_text()


def test_one_chain_reaches_the_thresholds() -> None:
    found = chain(DraftDistillationConfig(), 0)["acceptance"]
    assert set(found) == {"warm", *LOSSES}
    assert found["tvd"] - found["fkl"] > 0.02 and abs(found["tvdpp"] - found["tvd"]) < 0.002
    assert abs(found["fkl"] - found["warm"]) < 0.005  # KL was at its end already


def test_the_stationary_law_is_kept_by_a_step_of_the_chain() -> None:
    logits_SV, weight_S = draw_chain(5, torch.Generator().manual_seed(1))
    after = (weight_S.view(5, 5, 1) * logits_SV.softmax(-1).view(5, 5, 5)).sum(0).flatten()
    torch.testing.assert_close(after, weight_S)
    assert float(weight_S.sum()) == pytest.approx(1)


def test_the_exact_block_is_that_of_all_drafted_paths() -> None:
    logits_SV, _ = draw_chain(3, torch.Generator().manual_seed(2))
    q = logits_SV.softmax(-1)
    p = torch.rand(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(-1)[torch.arange(3).repeat(3)]
    found = block(torch.minimum(p, q), 2)
    for a, b in itertools.product(range(3), repeat=2):
        expected = 1.0
        for c, d in itertools.product(range(3), repeat=2):
            first, second = (min(1.0, float(q[s, x] / p[s, x])) for s, x in ((3 * a + b, c), (3 * b + c, d)))
            expected += float(p[3 * a + b, c] * p[3 * b + c, d]) * (first + first * second)
        assert float(found[3 * a + b]) == pytest.approx(expected)
