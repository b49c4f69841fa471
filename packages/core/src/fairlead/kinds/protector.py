"""Kind Protector: keeps what a model has learnt while it is trained on something else."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from ..config import Configurable

if TYPE_CHECKING:
    import torch


class Protector(Configurable):
    """Adds a penalty, a projection or a restore step to a training step.

    A trainer calls, in this order: `prepare` once; then at each step `penalty` (added to the loss), backward,
    `project` (gradients may be changed), the optimiser's step, `restore` (weights may be changed).

    Contract
    --------
    - Overrides `prepare` and at least one of the three; those it leaves alone do nothing and cost nothing.
    - Touches only parameters that require a gradient, in place, keeping dtype and device.
    - Deterministic; what it remembers lives in `state_dict`, as tensors, so that a resumed training goes on equally.
    """

    @abstractmethod
    def prepare(self, model: torch.nn.Module, data: Any = None) -> None:
        """Remember what is to be kept; `data` are batches of the behaviour to protect, where the method needs them."""

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        """A scalar to add to the loss, with gradient; None for none."""
        return None

    def project(self, model: torch.nn.Module) -> None:
        """Change the gradients after backward, before the optimiser's step."""

    def restore(self, model: torch.nn.Module, step: int) -> None:
        """Change the weights after the optimiser's step number `step` (from 0)."""

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
