"""The nouns of the project: one small abstract class per kind of method, the whole contract in its docstring."""

from __future__ import annotations

from .guard import Guard, Verdict
from .recipe import Recipe
from .reward import Reward
from .watermark import Detection, TokenSampler, Watermark, WatermarkProfile

__all__ = ["Detection", "Guard", "Recipe", "Reward", "TokenSampler", "Verdict", "Watermark", "WatermarkProfile"]
