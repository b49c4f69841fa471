"""Kind Probe: reads something off a model's activations or weights."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import Configurable

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..stats import Interval


@dataclass(frozen=True)
class Reading:
    """What a probe found.

    numbers: named results, with intervals where there are samples behind them. tensors: named arrays for further use
    (directions, scores per layer), on the CPU, each with its axes written in its name: "direction_LD". figures: named
    matplotlib figures. provenance: plain JSON values that say which model, layers and sites were read.
    """

    numbers: dict[str, float | Interval] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


class Probe(Configurable):
    """(model, tokenizer, data) -> Reading.

    Contract
    --------
    - Leaves the model as it was: weights, mode, gradients, and no hooks left behind, also when it fails.
    - Works on any Hugging Face causal LM through forward hooks; layers count from 0, negative ones from the end.
    - Padding never enters a result: equal data give equal readings whatever the batch size and padding side.
    - Deterministic in (model, data, seed).
    """

    @abstractmethod
    def __call__(self, model: Any, tokenizer: Any, data: Any = None, *, seed: int = 0) -> Reading:
        """Read; `data` are the texts or pairs that the method's docstring names, None for probes of weights alone."""
