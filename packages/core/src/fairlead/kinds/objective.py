"""Kind Objective: turns log-probabilities of a policy and a reference into a loss.

Shape suffixes: S sequences of the batch, I items of the loss (pairs, groups or sequences).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..config import Configurable
from ..errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SequenceStats:
    """What an objective may know of each of S sequences; groups are the general shape (a pair is a group of two).

    logp: float32 [S], log-probability of the completion under the policy, summed over its tokens; carries the gradient.
    length: int64 [S], completion tokens. ref_logp: float32 [S], the same sum under the reference, no gradient.
    group: int64 [S], equal for sequences that are compared with each other, ascending.
    role: int64 [S], 1 chosen or wanted, -1 rejected or unwanted, 0 neither. rank: int64 [S], 0 the best of its group.
    reward: float32 [S]. weight: float32 [S], importance of the sequence; None means 1.
    """

    logp: torch.Tensor
    length: torch.Tensor
    ref_logp: torch.Tensor | None = None
    group: torch.Tensor | None = None
    role: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    reward: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def __post_init__(self) -> None:
        count = tuple(self.logp.shape)
        if len(count) != 1:
            raise InputError(f"logp: must be one number per sequence, shape [S], got {list(count)}")
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None and tuple(value.shape) != count:
                raise InputError(f"{column.name}: shape {list(value.shape)} for {count[0]} sequences")

    def require(self, *columns: str) -> None:
        """InputError that names the columns an objective needs and the batch lacks."""
        absent = [name for name in columns if getattr(self, name) is None]
        if absent:
            raise InputError(f"the batch lacks {', '.join(absent)}, which this objective needs")


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    loss: scalar, what is minimised. losses: float32 [I], per item, before the reduction. metrics: named numbers to log.
    dlogp: float32 [S], d loss / d logp, filled by `Objective.with_gradient`: chunked backward passes need only this.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    dlogp: torch.Tensor | None = None


class Objective(Configurable):
    """SequenceStats -> LossOutput.

    Contract
    --------
    - Differentiable in `logp`; never reads the model, so the same objective trains dense, packed and chunked batches.
    - Deterministic; the order of the groups in the batch does not change the loss.
    - No NaN for finite input, also at log-ratios of +-1e4 (use logsigmoid, not log of sigmoid).
    - `needs` names the optional columns of SequenceStats that it reads.
    - What it learns while training (a running baseline) lives in `state_dict`, plain numbers and tensors.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, batch: SequenceStats) -> LossOutput:
        """The loss of one batch; InputError when a needed column is absent."""

    def with_gradient(self, batch: SequenceStats) -> LossOutput:
        """The loss with `dlogp` filled and the graph cut: sum(dlogp * logp) has the gradient of the loss, so a trainer
        can send each chunk of the batch backward alone."""
        import torch

        with torch.enable_grad():
            logp = batch.logp.detach().requires_grad_(True)
            found = self(replace(batch, logp=logp))
            (dlogp,) = torch.autograd.grad(found.loss, logp)
        return LossOutput(found.loss.detach(), found.losses.detach(), dict(found.metrics), dlogp)

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with a checkpoint; empty for objectives without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; InputError for entries it does not know."""
        if state:
            raise InputError(f"{type(self).__name__} keeps no state, got {', '.join(sorted(state))}")
