"""The Gumbel watermark: y = argmax_v (ln p_v + g_v) with keyed noise g_v = -ln(-ln u_v), u = F_K(context).

Aaronson (2022); as the exponential scheme in Kuditipudi et al. (arXiv 2307.15593). Over keys each token has exactly its
own probability, but the choice is deterministic given key and context: n draws for one prompt are one draw. Detection:
S = sum of -ln(1 - u_y) over distinct contexts, P(Gamma(n, 1) >= S). Text marked by vLLM's native Gumbel watermark
(function "philox4x32-10-v1", h = 4) is this scheme's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from fairlead.kinds import TokenSampler

from . import contexts, detection
from .contexts import Texts
from .mark import Dedup, Mark, MarkConfig, Score, as_input_errors, check_options


class GumbelConfig(MarkConfig):
    """Settings of the Gumbel watermark."""

    context_width: int = Field(4, ge=1, le=64, description="tokens before the candidate that seed the noise")


class Gumbel(Mark):
    """Keyed Gumbel-max sampling."""

    Config = GumbelConfig
    config: GumbelConfig
    name = "gumbel"
    default_dedup: Dedup = "context"

    def setup(self) -> None:
        self.width = self.config.context_width

    def processor(  # type: ignore[override]
        self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, prompt_length: int | None = None, pad_token_id: int | None = None,
    ) -> Any:  # fmt: skip
        """Leaves the chosen token alone finite. Give temperature, top_k, top_p and min_p here: `generate` puts its own
        after custom processors, where they no longer change the choice. Beams and `num_return_sequences` give equal
        texts, since the choice is fixed; with num_beams use do_sample=False."""
        check_options(self.name, temperature, top_k, top_p, min_p)
        return super().processor(
            prompt_length=prompt_length, pad_token_id=pad_token_id, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p,
        )  # fmt: skip

    def _process(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, **options: Any) -> torch.Tensor:
        chosen_B = self._choose(ids_BT, logits_BV, **options)
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def _choose(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, **options: Any) -> torch.Tensor:
        from fairlead_kernels import gumbel_sample

        with as_input_errors():
            return gumbel_sample(logits_BV, contexts.last(ids_BT, self.width), key=self.config.key.reveal(), **options)

    def sampler(  # type: ignore[override]
        self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, prompt_length: int | None = None,
    ) -> TokenSampler:  # fmt: skip
        """Temperature, truncation and the keyed draw in one pass; repeated contexts (dedup_contexts) draw freely."""
        from fairlead.generation import PlainSampler

        check_options(self.name, temperature, top_k, top_p, min_p)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        plain = PlainSampler(temperature, top_k, top_p, min_p)

        def sample(
            logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor
        ) -> torch.Tensor:
            self.check_logits(logits_BV)
            start = self.answer_start(prompt_length, ids_BT, positions_B)
            chosen_B = self._choose(self.visible(ids_BT, start), logits_BV, **options)
            repeated_B = self.repeated(self.visible(ids_BT, start), start)
            if repeated_B is None or not bool(repeated_B.any()):
                return chosen_B
            free_B = plain(logits_BV, ids_BT, seeds_B=seeds_B, positions_B=positions_B)
            return torch.where(repeated_B, free_B, chosen_B)

        return sample

    def _score(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        from fairlead_kernels import gumbel_score

        return gumbel_score(
            texts.ids_BT, texts.lengths_B, key=self.config.key.reveal(), context_width=self.width, dedup=dedup,
            context_BH=context_BH, pad_left=self.config.context_from == "answer",
        )  # fmt: skip

    def _test(self, statistic_B: torch.Tensor, scored_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return detection.gamma_p_value(statistic_B, scored_B), detection.gamma_z(statistic_B, scored_B)
