"""Kind Objective: turns log-probabilities of a policy and a reference into a loss.

Shape suffixes: S sequences of the batch, T token positions, I items of the loss (pairs, groups or sequences).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..config import Configurable
from ..errors import InputError

if TYPE_CHECKING:
    import torch

ROLES = {"chosen": 1, "rejected": -1, "neither": 0}


@dataclass(frozen=True)
class SequenceStats:
    """What an objective may know of each of S sequences; groups are the general shape (a pair is a group of two).

    logp: float32 or float64 [S], log-probability of the completion under the policy, summed over its tokens; carries the
    gradient. length: int64 [S], completion tokens. ref_logp: [S], the same sum under the reference, no gradient.
    group: int64 [S], equal for sequences that are compared with each other, in any order.
    role: int64 [S], 1 chosen or wanted, -1 rejected or unwanted, 0 neither; "chosen", "rejected", "neither" and booleans
    (the labels of unpaired data) are turned into it. rank: int64 [S], 0 the best of its group. reward: [S].
    weight: [S], importance of the sequence, no gradient; None means 1.
    extra: further columns by name, [S] or [S, T] (see the objective that needs one).

    Columns may be lists. InputError for a column of another length and for an unknown role.
    """

    logp: torch.Tensor
    length: torch.Tensor
    ref_logp: torch.Tensor | None = None
    group: torch.Tensor | None = None
    role: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    reward: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        logp = torch.as_tensor(self.logp)
        object.__setattr__(self, "logp", logp)
        if logp.ndim != 1:
            raise InputError(f"logp: must be one number per sequence, shape [S], got {list(logp.shape)}")
        if logp.dtype not in (torch.float32, torch.float64):
            raise InputError(f"logp: must be float32 or float64 (a sum in less precision is off by whole nats), got {logp.dtype}")
        for column in fields(self):
            value = getattr(self, column.name)
            if column.name in ("logp", "extra") or value is None:
                continue
            value = _role(value) if column.name == "role" else torch.as_tensor(value)
            if column.name in ("group", "rank") and value.dtype.is_floating_point:
                raise InputError(f"{column.name}: must be whole numbers, got {value.dtype}")
            object.__setattr__(self, column.name, self._fitting(column.name, value))
        object.__setattr__(self, "extra", {k: self._fitting(k, torch.as_tensor(v)) for k, v in self.extra.items()})

    def _fitting(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A column on the device of logp; InputError where it has another length."""
        count = self.logp.shape[0]
        if value.ndim == 0 or value.shape[0] != count or (value.ndim > 1 and name not in self.extra):
            raise InputError(f"{name}: shape {list(value.shape)} for {count} sequences")
        return value.to(self.logp.device)

    def require(self, *columns: str) -> None:
        """InputError that names the columns an objective needs and the batch lacks."""
        absent = [name for name in columns if getattr(self, name, None) is None and name not in self.extra]
        if absent:
            raise InputError(f"the batch lacks {', '.join(absent)}, which this objective needs")

    def check(self) -> None:
        """InputError for numbers no model can give: NaN or infinite log-probabilities, completions without a token.

        Log-probabilities above 1e-3 (rounding may leave them a little above zero) are warned of.
        """
        for name in ("logp", "ref_logp", "reward", "weight"):
            value = getattr(self, name)
            if value is not None and not bool(value.isfinite().all()):
                raise InputError(f"{name}: must be finite, got {_first(value, ~value.isfinite())}")
        if bool((self.length < 1).any()):
            raise InputError(f"length: every completion needs at least one token, got {_first(self.length, self.length < 1)}")
        if self.logp.numel() and float(self.logp.detach().max()) > 1e-3:
            warnings.warn(f"logp: a log-probability of {float(self.logp.detach().max()):.3g} is above zero", stacklevel=3)

    def ordinary(self) -> SequenceStats:
        """The batch with copies of what was made in inference mode, which no gradient can be taken through."""
        if not self.logp.is_inference():
            return self
        columns = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "extra"}
        copied: dict[str, Any] = {name: value if value is None else value.clone() for name, value in columns.items()}
        return SequenceStats(**copied, extra={name: value.clone() for name, value in self.extra.items()})


def _role(value: Any) -> torch.Tensor:
    """Roles as int64 in {-1, 0, 1}, from names, booleans or numbers."""
    import torch

    if not torch.is_tensor(value) and any(isinstance(v, str) for v in value):
        unknown = next((v for v in value if v not in ROLES), None)
        if unknown is not None:
            raise InputError(f"role: must be one of {', '.join(ROLES)}, got {unknown!r}")
        value = [ROLES[v] for v in value]
    role = torch.as_tensor(value)
    role = torch.where(role, 1, -1) if role.dtype == torch.bool else role
    if role.dtype.is_floating_point or bool((role.abs() > 1).any()):
        raise InputError(f"role: must be 1 (chosen), -1 (rejected) or 0 (neither), got {_first(role, role.abs() > 1)}")
    return role.to(torch.int64)


def _first(value: torch.Tensor, wrong: torch.Tensor) -> str:
    """The first wrong entry and where it is."""
    where = wrong.nonzero()
    row = int(where[0, 0]) if len(where) else 0
    return f"{value[row].item():g} for sequence {row}"


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    loss: scalar, what is minimised, differentiable where `logp` is. per_item: [I], before the reduction.
    dlogp: [S], d loss / d logp, detached: a chunked backward pass needs only this (sum(dlogp * logp) has the gradient of
    the loss), and with it come the weights of a pair, d_w = -I dlogp[chosen] and d_l = I dlogp[rejected].
    metrics: named numbers to log.
    dtokens: [S, T], d loss / d extra["token_logp"], for a batch that has this column.
    """

    per_item: torch.Tensor
    loss: torch.Tensor
    dlogp: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    dtokens: torch.Tensor | None = None


class Objective(Configurable):
    """SequenceStats -> LossOutput. A method writes `items`, and `reduce` where its loss is not the mean.

    Contract
    --------
    - Differentiable in `logp`; never reads the model, so the same objective trains dense, packed and chunked batches.
    - Deterministic; the order of the groups in the batch does not change the loss.
    - No NaN for finite input, also at log-ratios of +-1e4 (use logsigmoid, not log of sigmoid).
    - `needs` names the columns of SequenceStats, or of its `extra`, that it reads.
    - What it learns while training (a running baseline) lives in `state_dict`, plain numbers and tensors, and moves only
      while `training` is True.
    """

    needs: tuple[str, ...] = ()
    training: bool = True

    def __call__(self, batch: SequenceStats) -> LossOutput:
        """The loss of one batch; InputError when a needed column is absent or holds what cannot be."""
        import torch

        batch.require(*self.needs)
        batch.check()
        with torch.inference_mode(False), torch.enable_grad():
            batch = batch.ordinary()
            live = batch if batch.logp.requires_grad else replace(batch, logp=batch.logp.detach().requires_grad_(True))
            tokens = batch.extra.get("token_logp")
            if tokens is not None and not tokens.requires_grad:
                tokens = tokens.detach().requires_grad_(True)
                live = replace(live, extra={**live.extra, "token_logp": tokens})
            per_item, metrics = self.items(live)
            loss = self.reduce(per_item, live)
            if not loss.requires_grad:  # a batch without one usable group
                loss = loss + 0 * live.logp.sum()
            leaves = [live.logp] if tokens is None else [live.logp, tokens]
            grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        wanted = batch.logp.requires_grad or (tokens is not None and batch.extra["token_logp"].requires_grad)
        if not wanted:
            loss, per_item = loss.detach(), per_item.detach()
        return LossOutput(per_item, loss, grads[0], metrics, grads[1] if len(grads) > 1 else None)

    @abstractmethod
    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of each item, [I], and the metrics to log; the batch has the columns of `needs`, and finite numbers."""

    def reduce(self, per_item: torch.Tensor, batch: SequenceStats) -> torch.Tensor:
        """The scalar that is minimised: the mean over the items, 0 where there is none."""
        return per_item.sum() / max(1, per_item.numel())

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with a checkpoint; empty for objectives without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; InputError for entries it does not know."""
        if state:
            raise InputError(f"{type(self).__name__} keeps no state, got {', '.join(sorted(state))}")
