"""The nouns of the project: one small abstract class per kind of method, the whole contract in its docstring."""

from __future__ import annotations

from .decoder import Decoder
from .evaluation import Evaluation, Metric, Scorecard
from .guard import Guard, Verdict
from .objective import LossOutput, Objective, SequenceStats
from .probe import Probe, Reading
from .protector import Protector
from .recipe import Recipe
from .reward import Reward
from .rewriter import Rewrite, Rewriter
from .selector import Selection, Selector
from .watermark import Detection, TokenSampler, Watermark, WatermarkProfile

__all__ = [
    "Decoder", "Detection", "Evaluation", "Guard", "LossOutput", "Metric", "Objective", "Probe", "Protector", "Reading",
    "Recipe", "Reward", "Rewrite", "Rewriter", "Scorecard", "Selection", "Selector", "SequenceStats", "TokenSampler",
    "Verdict", "Watermark", "WatermarkProfile", "abstract_class",
]  # fmt: skip


def abstract_class(kind: str) -> type:
    """The abstract class of a kind of `registry.KINDS`: "watermark" -> Watermark."""
    return globals()[kind.capitalize()]
