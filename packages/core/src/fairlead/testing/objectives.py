"""The contract of kind Objective as a test class, built around a factory of the method under test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from ..errors import FairleadError, InputError
from ..kinds import LossOutput, Objective, SequenceStats


def example_batch(needs: tuple[str, ...], groups: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> SequenceStats:
    """A batch of `groups` pairs with every column of SequenceStats; columns of `needs` that it has not get means below zero."""
    g = torch.Generator().manual_seed(seed)
    count = 2 * groups
    length = torch.randint(2, 9, (count,), generator=g)
    logp = -length * (0.3 + 2 * torch.rand(count, generator=g, dtype=dtype))
    ref_logp = (logp + torch.randn(count, generator=g, dtype=dtype)).clamp(max=-0.1)
    own = {f.name for f in fields(SequenceStats)}
    extra = {name: -0.1 - torch.rand(count, generator=g, dtype=dtype) for name in needs if name not in own}
    role = torch.tensor([1, -1] * groups)
    reward = role + 0.5 * torch.rand(count, generator=g, dtype=dtype)
    return SequenceStats(logp, length, ref_logp, torch.arange(count) // 2, role, (1 - role) // 2, reward, extra=extra)


def reordered(batch: SequenceStats, order: torch.Tensor) -> SequenceStats:
    """The same sequences in another order."""
    columns = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "extra"}
    taken: dict[str, Any] = {name: None if column is None else column[order] for name, column in columns.items()}
    return SequenceStats(**taken, extra={k: v[order] for k, v in batch.extra.items()})


def objective_contract(
    make: Callable[[], Any], batch: Callable[[], SequenceStats] | None = None, *, surrogate: bool = False
) -> type:
    """Tests of kind Objective around `make()`.

    batch: gives a batch that the objective takes, in float64; by default `example_batch`. surrogate: whether the loss has
    the right gradient only (it stops one somewhere), so that finite differences of its value say nothing.
    """

    @pytest.mark.fairlead_contract
    class ObjectiveContract:
        def objective(self) -> Any:
            return make()

        def batch(self) -> SequenceStats:
            return batch() if batch is not None else example_batch(self.objective().needs)

        def test_the_output_has_the_promised_shapes(self) -> None:
            data = self.batch()
            out = self.objective()(data)
            assert isinstance(out, LossOutput) and isinstance(self.objective(), Objective)
            assert out.loss.shape == () and out.per_item.ndim == 1
            assert out.dlogp.shape == data.logp.shape and not out.dlogp.requires_grad
            assert all(isinstance(v, float) for v in out.metrics.values())
            assert not out.loss.requires_grad, "logp asked for no gradient"

        def test_dlogp_is_the_gradient_of_the_loss(self) -> None:
            data = self.batch()
            logp = data.logp.clone().requires_grad_(True)
            out = self.objective()(replace(data, logp=logp))
            (grad,) = torch.autograd.grad(out.loss, logp, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(out.dlogp, grad)

        if not surrogate:

            def test_dlogp_agrees_with_finite_differences(self) -> None:
                data, step = self.batch(), 1e-5
                exact = self.objective()(data).dlogp
                for row in range(len(data.logp)):
                    shift = torch.zeros_like(data.logp)
                    shift[row] = step
                    up, down = (self.objective()(replace(data, logp=data.logp + sign * shift)).loss for sign in (1, -1))
                    assert float((up - down) / (2 * step)) == pytest.approx(float(exact[row]), rel=1e-4, abs=1e-7)

        def test_the_order_of_the_sequences_changes_nothing(self) -> None:
            data = self.batch()
            whole = self.objective()(data)
            order = torch.randperm(len(data.logp), generator=torch.Generator().manual_seed(1))
            other = self.objective()(reordered(data, order))
            torch.testing.assert_close(other.loss, whole.loss)
            torch.testing.assert_close(other.dlogp, whole.dlogp[order])

        def test_it_is_deterministic(self) -> None:
            first, second = self.objective()(self.batch()), self.objective()(self.batch())
            assert torch.equal(first.loss, second.loss) and torch.equal(first.dlogp, second.dlogp)

        @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
        @pytest.mark.parametrize("size", [-1e4, -1e2, 1e2, 1e4])
        def test_extreme_log_ratios_give_finite_numbers(self, size: float, dtype: torch.dtype) -> None:
            data = self.batch()
            for who in (1, -1):
                role = data.role if data.role is not None else torch.ones_like(data.length)
                far = torch.where(role == who, abs(size), 0.0).to(dtype)
                logp, ref = -0.1 - torch.zeros_like(far), -0.1 - torch.zeros_like(far)
                logp, ref = (logp - far, ref) if size < 0 else (logp, ref - far)
                extra = {k: v.to(dtype) if v.dtype.is_floating_point else v for k, v in data.extra.items()}
                columns: dict[str, Any] = {n: None if getattr(data, n) is None else getattr(data, n).to(dtype) for n in ("reward", "weight")}
                out = self.objective()(replace(data, logp=logp, ref_logp=ref, extra=extra, **columns))
                assert math.isfinite(float(out.loss)) and bool(out.dlogp.isfinite().all())

        def test_weights_of_one_change_nothing_and_of_zero_leave_nothing(self) -> None:
            data = self.batch()
            plain = self.objective()(data)
            one = self.objective()(replace(data, weight=torch.ones_like(data.logp)))
            torch.testing.assert_close(one.loss, plain.loss)
            none = self.objective()(replace(data, weight=torch.zeros_like(data.logp)))
            assert float(none.loss) == 0 and not bool(none.dlogp.any())

        def test_each_column_of_needs_is_needed(self) -> None:
            data = self.batch()
            for name in self.objective().needs:
                own = name not in data.extra
                absent: dict[str, Any] = {name: None} if own else {"extra": {k: v for k, v in data.extra.items() if k != name}}
                lacking = replace(data, **absent)
                with pytest.raises(InputError, match=name) as error:
                    self.objective()(lacking)
                assert "\n" not in str(error.value)

        def test_numbers_that_cannot_be_are_refused(self) -> None:
            data = self.batch()
            for wrong in (replace(data, logp=data.logp * math.nan), replace(data, length=data.length * 0)):
                with pytest.raises(FairleadError) as error:
                    self.objective()(wrong)
                assert "\n" not in str(error.value)

        def test_its_state_is_restored(self) -> None:
            first, second, other = self.objective(), self.objective(), self.batch()
            first(replace(other, logp=other.logp - 1))
            second.load_state_dict(first.state_dict())
            assert torch.equal(first(self.batch()).loss, second(self.batch()).loss)

        def test_nothing_is_learnt_outside_training(self) -> None:
            objective = self.objective()
            objective(self.batch())
            before = dict(objective.state_dict())
            objective.training = False
            objective(replace(self.batch(), logp=self.batch().logp - 1))
            assert objective.state_dict() == before

    return ObjectiveContract

