"""A single green list for every context: v is green iff word_K(v) < gamma 2^32, l'_v = l_v + delta [v green].

A fixed list survives editing better than any list that depends on context, and is learnt by an attacker more easily
(Zhao et al., arXiv 2306.17439). Detection: green share of the distinct tokens, exact binomial.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from fairlead import hookimpl
from fairlead_watermark import Mark, MarkConfig, detection


class FixedListConfig(MarkConfig):
    """Settings of the fixed list."""

    gamma: float = Field(0.5, gt=0, lt=1, description="share of green tokens")
    delta: float = Field(2.0, ge=0, description="logit bonus of green tokens")


class FixedList(Mark):
    """Fixed-list watermark."""

    Config = FixedListConfig
    config: FixedListConfig
    name = "example-fixed-list"
    width = 0

    def setup(self) -> None:
        from fairlead_kernels import prf

        tokens_1V = torch.arange(self.config.vocab_size)[None]
        words_1V = prf(tokens_1V[:, :0], tokens_1V, key=self.config.key.reveal())
        self._green_V = words_1V[0] < int(self.config.gamma * 2**32)

    def _process(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, **options: Any) -> torch.Tensor:
        return logits_BV + self.config.delta * self._green_V.to(logits_BV)

    def sampler(self, **options: Any) -> Any:
        from fairlead.generation import PlainSampler

        draw = PlainSampler(**{k: v for k, v in options.items() if k != "prompt_length"})
        return lambda logits_BV, ids_BT, **noise: draw(self._call(0, None, {}, ids_BT, logits_BV), ids_BT, **noise)

    def _score(self, texts: Any, context_BH: torch.Tensor | None, dedup: str) -> Any:
        ids_BT = texts.ids_BT
        inside_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < texts.lengths_B[:, None]
        if dedup != "none":  # with no context, a pair (context, token) is a token
            sorted_BT, order_BT = ids_BT.masked_fill(~inside_BT, -1).sort(dim=1, stable=True)
            first_BT = torch.ones_like(inside_BT)
            first_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
            inside_BT = inside_BT & torch.zeros_like(inside_BT).scatter_(1, order_BT, first_BT)
        green_BT = self._green_V.to(ids_BT.device)[ids_BT.clamp(min=0)] & inside_BT
        return green_BT.sum(1), inside_BT.sum(1), green_BT.double().masked_fill(~inside_BT, torch.nan)

    def _test(self, statistic_B: torch.Tensor, scored_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gamma = self.config.gamma
        return (
            detection.binomial_p_value(statistic_B, scored_B, gamma),
            detection.binomial_z(statistic_B, scored_B, gamma),
        )


@hookimpl
def fairlead_watermarks(register: Any) -> None:
    register(
        "example-fixed-list",
        "fairlead_example_fixed_list:FixedList",
        paper="2306.17439",
        summary="one green list for every context, exact binomial test over distinct tokens",
        tags=("stage.decoding", "access.logprobs", "modality.text", "paradigm.governance"),
    )
