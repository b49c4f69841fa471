"""Kind Watermark: marks what a causal language model says, and proves later that the mark is there.

Shape suffixes: B rows, T tokens, V vocabulary (the width of the logits, not of the tokenizer), H context tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Configurable
from ..errors import ProfileMismatchError

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor


@dataclass(frozen=True)
class Detection:
    """What a detector found, one entry per row.

    statistic: float64 [B], the test statistic (green count, sum of Gumbel scores, ...).
    p_value: float64 [B], exact under the null hypothesis "written without the key"; 1 where nothing was scored.
    tokens_scored: int64 [B], tokens that entered the test: each distinct (context, token) once.
    extra: named tensors that a method adds: "z" float64 [B], "token_scores" float64 [B, T] with NaN where the
        position is not scored, aligned with the ids that were passed in.
    """

    statistic: torch.Tensor
    p_value: torch.Tensor
    tokens_scored: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WatermarkProfile:
    """Everything but the key that generator and detector must agree on; saved as JSON beside generations.

    scheme: registered name. settings: the config's `public_dict()` (the key appears as fingerprint).
    vocab_size: width of the logits. tokenizer: hash of the tokenizer's vocabulary ("" when unknown).
    device_class: "any" for counter-based lists, "cpu" or "cuda" for lists that depend on a device's generator.
    """

    scheme: str
    settings: dict[str, Any]
    vocab_size: int
    tokenizer: str = ""
    device_class: str = "any"
    version: int = 1

    def check(self, other: WatermarkProfile) -> None:
        """ProfileMismatchError that names every field in which `other` (the detector's) differs from this one."""
        differences = []
        for name in ("version", "scheme", "vocab_size", "device_class"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                differences.append(f"{name} {mine!r} at generation, {theirs!r} at detection")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            differences.append(f"tokenizer {self.tokenizer} at generation, {other.tokenizer} at detection")
        for name in sorted(set(self.settings) | set(other.settings)):
            mine, theirs = self.settings.get(name), other.settings.get(name)
            if mine != theirs and name != "vocab_size":
                differences.append(f"{name} {mine!r} at generation, {theirs!r} at detection")
        if differences:
            raise ProfileMismatchError("the text was marked under other settings: " + "; ".join(differences))


class TokenSampler(Protocol):
    """Chooses the next token of every row in one fused pass."""

    def __call__(
        self, logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor
    ) -> torch.Tensor:
        """Next ids int64 [B] from raw logits [B, V] (any float dtype) and all ids so far, prompt included; -1 stands
        for left padding. `seeds_B` (one per sequence) and `positions_B` (index of the token about to be drawn, 0 for
        the answer's first), both int64 [B], are the sampling noise: counter-based, so a row's draw does not depend on its batch mates. They
        never touch the key's stream."""
        ...


class Watermark(Configurable):
    """Marks and detects.

    Contract
    --------
    - Stateless between steps: the context is recomputed from the ids at every step, so beams, batch reordering,
      left padding and `num_return_sequences` change nothing.
    - The key's stream and the sampling noise never share randomness.
    - `detect` scores each distinct (context, token) once; rows too short to score give p = 1, tokens_scored = 0.
    - Equal results on every device, batch size and padding side (except where `device_class` says otherwise).
    - The config has `vocab_size: int` and `key: SecretKey`; ids outside [0, vocab_size) and logits of another width
      raise InputError.
    """

    device_class: str = "any"

    @abstractmethod
    def processor(self, **options: Any) -> LogitsProcessor:
        """A transformers LogitsProcessor for `model.generate(logits_processor=[...], do_sample=True)`."""

    @abstractmethod
    def sampler(self, **options: Any) -> TokenSampler:
        """The fused path: bias or keyed noise, temperature, truncation and the draw in as few passes as possible.
        Options common to all: temperature=1.0, top_k=None, top_p=None, min_p=None."""

    @abstractmethod
    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        """Test ids int64 [B, T] (or [T]) of the answer alone; attention_mask [B, T] marks real tokens, padding on
        either side. Raises InputError for ids outside the vocabulary."""

    def profile(self, tokenizer: Any = None) -> WatermarkProfile:
        """The profile to save beside generations."""
        from ..records import tokenizer_fingerprint

        settings = self.config.public_dict()
        return WatermarkProfile(
            scheme=self.name,
            settings={k: v for k, v in settings.items() if k != "vocab_size"},
            vocab_size=settings["vocab_size"],
            tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else "",
            device_class=self.device_class,
        )

    @property
    @abstractmethod
    def name(self) -> str:
        """The registered name."""
