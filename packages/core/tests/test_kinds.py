"""The kinds: each can be implemented in a few lines, refuses half an implementation, and checks what it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from fairlead import kinds, stats
from fairlead.errors import InputError, UnknownNameError
from fairlead.kinds import (
    Evaluation,
    Metric,
    Objective,
    Protector,
    Rewrite,
    Rewriter,
    Scorecard,
    Selection,
    Selector,
    SequenceStats,
)
from fairlead.registry import KINDS
from fairlead.runs import Run, read


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_an_abstract_class_with_its_contract_written_down(kind: str) -> None:
    found = kinds.abstract_class(kind)
    assert found.__name__ == kind.capitalize()
    assert len(found.__doc__ or "") > 60
    with pytest.raises(TypeError, match="abstract"):
        found()


class PairLoss(Objective):
    """-ln sigma of the difference between chosen and rejected."""

    needs = ("ref_logp", "role")

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.ref_logp is not None and batch.role is not None
        ratio = batch.logp - batch.ref_logp
        margin = ratio[batch.role == 1] - ratio[batch.role == -1]
        return -logsigmoid(margin), {"margin": float(margin.detach().mean())}


def pairs(*logps: float) -> SequenceStats:
    count = len(logps)
    return SequenceStats(
        logp=torch.tensor(logps, dtype=torch.float32), length=torch.ones(count, dtype=torch.int64), ref_logp=torch.zeros(count),
        role=torch.tensor([1, -1] * (count // 2)),
    )  # fmt: skip


def test_an_objectives_gradient_per_sequence_is_that_of_its_loss() -> None:
    found = PairLoss()(pairs(-1.0, -2.0, -3.0, -1.5))
    assert not found.loss.requires_grad and not found.dlogp.requires_grad
    slope = torch.sigmoid(torch.tensor([-1.0, 1.5])) / 2
    torch.testing.assert_close(found.dlogp, torch.stack([-slope, slope], 1).flatten())
    torch.testing.assert_close(found.loss, found.per_item.mean())
    assert found.metrics == {"margin": pytest.approx(-0.25)}


def test_the_loss_is_differentiable_where_the_log_probabilities_are() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    found = PairLoss()(replace(pairs(0, 0), logp=logp))
    found.loss.backward()
    torch.testing.assert_close(logp.grad, found.dlogp)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = PairLoss()(pairs(-1.0, -2.0))
            assert not bool((out.dlogp == 0).any())
            assert not out.loss.requires_grad


def test_chunks_sent_backward_with_the_gradient_per_sequence_equal_the_whole() -> None:
    features, weight = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3, requires_grad=True)
    batch = pairs(0, 0, 0, 0)
    PairLoss()(replace(batch, logp=features @ weight)).loss.backward()
    whole = weight.grad
    weight.grad = None
    dlogp = PairLoss()(replace(batch, logp=(features @ weight).detach())).dlogp
    for chunk in (slice(0, 3), slice(3, 4)):
        (features[chunk] @ weight * dlogp[chunk]).sum().backward()
    torch.testing.assert_close(weight.grad, whole)


def test_roles_are_names_labels_or_numbers() -> None:
    def role(value: Any) -> list[int]:
        found = SequenceStats(torch.zeros(3), torch.ones(3), role=value).role
        assert found is not None and found.dtype == torch.int64
        return found.tolist()

    assert role(["chosen", "rejected", "neither"]) == [1, -1, 0]
    assert role([True, False, False]) == role(torch.tensor([True, False, False])) == [1, -1, -1]
    assert role([1, 0, -1]) == [1, 0, -1]
    for wrong, match in ((["chosen", "best", "x"], "'best'"), ([2, 0, 0], "2 for sequence 0"), ([0.5, 0, 0], "role")):
        with pytest.raises(InputError, match=match):
            role(wrong)


def test_a_batch_that_lacks_a_column_or_has_one_of_another_length_is_refused() -> None:
    bare = SequenceStats(torch.zeros(2), torch.ones(2))
    with pytest.raises(InputError, match="ref_logp, role"):
        PairLoss()(bare)
    with pytest.raises(InputError, match=r"reward.*\[3\].*2 sequences"):
        SequenceStats(torch.zeros(2), torch.ones(2), reward=torch.zeros(3))
    with pytest.raises(InputError, match=r"token_logp.*\[3, 4\].*2 sequences"):
        SequenceStats(torch.zeros(2), torch.ones(2), extra={"token_logp": torch.zeros(3, 4)})
    with pytest.raises(InputError, match=r"\[S\]"):
        SequenceStats(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(InputError, match="whole numbers"):
        SequenceStats(torch.zeros(2), torch.ones(2), group=torch.zeros(2))
    with pytest.raises(InputError, match="float32 or float64"):
        SequenceStats(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2))
    with pytest.raises(InputError, match="keeps no state"):
        PairLoss().load_state_dict({"delta": 1})


def test_numbers_that_no_model_gives_are_refused() -> None:
    good = pairs(-1.0, -2.0)
    for wrong, match in (
        (replace(good, logp=torch.tensor([-1.0, float("nan")])), "logp.*nan for sequence 1"),
        (replace(good, ref_logp=torch.tensor([-float("inf"), 0.0])), "ref_logp.*-inf for sequence 0"),
        (replace(good, length=torch.tensor([3, 0])), "length.*0 for sequence 1"),
    ):
        with pytest.raises(InputError, match=match) as error:
            PairLoss()(wrong)
        assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="above zero"):
        PairLoss()(pairs(0.5, -1.0))


class Nothing(Objective):
    """No item at all."""

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        return batch.logp.new_zeros(0), {}


def test_a_batch_without_an_item_costs_nothing_and_moves_nothing() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    found = Nothing()(SequenceStats(logp, torch.ones(2)))
    found.loss.backward()
    assert found.loss.item() == 0
    assert found.dlogp.tolist() == [0, 0]


class Upper(Rewriter):
    """Capitals."""

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> list[Rewrite]:
        return [Rewrite(p.upper(), p, {"rule": "upper"}) for p in prompts]


def test_a_rewrite_says_whether_it_changed_anything() -> None:
    assert [r.changed for r in Upper()(["please", "NOW"])] == [True, False]


class Frozen(Protector):
    """Puts the first weight back after each step."""

    def prepare(self, model: torch.nn.Module, data: Any = None) -> None:
        self.kept = [p.detach().clone() for p in model.parameters()]

    def restore(self, model: torch.nn.Module, step: int) -> None:
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


def test_a_protector_overrides_what_it_needs_and_the_rest_does_nothing() -> None:
    model = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    protector = Frozen()
    protector.prepare(model)
    assert protector.penalty(model) is None
    model(torch.ones(1, 2)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    protector.project(model)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    protector.restore(model, 0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Longest(Selector):
    """The longest prompts."""

    def __call__(self, dataset: Sequence[Mapping[str, Any]], budget: int, *, seed: int = 0) -> Selection:
        scores = np.array([float(len(row["prompt"])) for row in dataset])
        found = Selection(np.argsort(-scores, kind="stable")[:budget], {"length": scores})
        found.check(len(dataset), budget)
        return found


@given(st.lists(st.text(max_size=5), max_size=20), st.integers(0, 25))
def test_a_selection_holds_at_most_the_budget_and_never_one_example_twice(prompts: list[str], budget: int) -> None:
    found = Longest()([{"prompt": p} for p in prompts], budget)
    assert len(found.indices) == min(budget, len(prompts))


@pytest.mark.parametrize(("indices", "scores"), [([0, 0], {}), ([0, 3], {}), ([-1], {}), ([0, 1, 2], {}), ([0], {"x": np.zeros(2)})])
def test_a_selection_that_cannot_be_is_refused(indices: list[int], scores: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Selection(np.array(indices), scores).check(examples=3, budget=2)


class Length(Evaluation):
    """Mean length of the answers."""

    def __call__(self, subject: Any, *, seed: int = 0) -> Scorecard:
        rows = [{"sample_id": p, "output": subject([p])[0], "words": len(subject([p])[0].split())} for p in ("a b", "c d e", "f")]
        return Scorecard(
            "length", "a function", (Metric("words", stats.mean([r["words"] for r in rows]), higher_is_better=None),), rows, {"seed": seed}
        )


def test_a_scorecard_comes_back_from_json_and_its_metric_from_its_rows() -> None:
    card = Length()(lambda prompts: list(prompts))
    again = Scorecard.from_dict(json.loads(json.dumps(card.as_dict())))
    assert again == card
    assert stats.mean([row["words"] for row in again.rows]) == card["words"]
    with pytest.raises(UnknownNameError, match="did you mean 'words'"):
        card["word"]
    with pytest.raises(InputError, match="no scorecard"):
        Scorecard.from_dict({"evaluation": "x"})
    with pytest.raises(InputError, match="two metrics"):
        Scorecard("x", "y", card.metrics * 2)


def test_a_scorecard_goes_into_a_run(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", "sample", {}, seed=0)
    Length()(lambda prompts: list(prompts)).add_to(run)
    run.finish()
    assert any(block["title"] == "length: a function" for block in read(tmp_path / "r")["blocks"])
    logged = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert logged[0]["name"] == "length: words"
    assert logged[0]["low"] < logged[0]["value"] < logged[0]["high"]
