"""Modified Gumbel: the keyed scores of the Gumbel watermark, sampled instead of maximised.

Verma, Phan, Trivedi (arXiv 2506.04462): y ~ Categorical(u_v^(1/p_v) / sum) with fresh noise, so that the n candidates of
alignment resampling differ. With a temperature (ours): y ~ softmax(ln(u_v) / (p_v tau)); tau = 1 is the paper, tau -> 0
plain Gumbel. Not distortion-free. Detection is Gumbel's: it looks at u of the emitted token alone.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from fairlead.kinds import TokenSampler

from . import contexts
from .gumbel import Gumbel, GumbelConfig
from .mark import as_input_errors, check_options


class ModifiedGumbelConfig(GumbelConfig):
    """Settings of the modified Gumbel watermark."""

    tau: float = Field(1.0, gt=0, description="temperature of the keyed scores: 1 is the paper, towards 0 plain Gumbel")


class ModifiedGumbel(Gumbel):
    """Sampling from the keyed scores."""

    Config = ModifiedGumbelConfig  # type: ignore[assignment]
    config: ModifiedGumbelConfig  # type: ignore[assignment]
    name = "modified-gumbel"

    def _process(  # type: ignore[override]
        self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Log-weights ln(u_v) / (p_v tau), from which `generate` draws with its own, fresh noise: do_sample=True, and
        its own temperature at 1, its top_k and top_p off."""
        from fairlead_kernels import gumbel_uniform

        kept_BV = truncated(logits_BV.float() / temperature, top_k, top_p, min_p)
        u_BV = gumbel_uniform(contexts.last(ids_BT, self.width), logits_BV.shape[1], key=self.config.key.reveal())
        weights_BV = u_BV.log() / (kept_BV.softmax(-1) * self.config.tau)
        # The largest weight is -Exp(1) / tau whatever the probabilities are: moved to 0, no tau and no dtype loses it.
        return (weights_BV - weights_BV.amax(-1, keepdim=True)).to(logits_BV.dtype)

    def sampler(  # type: ignore[override]
        self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, prompt_length: int | None = None,
    ) -> TokenSampler:  # fmt: skip
        """Keyed log-weights, then a free draw; repeated contexts (dedup_contexts) draw from the model itself."""
        from fairlead.generation import PlainSampler

        check_options(self.name, temperature, top_k, top_p, min_p)
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        draw = PlainSampler()

        def sample(
            logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor
        ) -> torch.Tensor:
            self.check_logits(logits_BV)
            start = self.answer_start(prompt_length, ids_BT, positions_B)
            seen_BT = self.visible(ids_BT, start)
            weights_BV = self._process(seen_BT, logits_BV.float(), **options)
            repeated_B = self.repeated(seen_BT, start)
            if repeated_B is not None and bool(repeated_B.any()):
                rows = repeated_B.nonzero()[:, 0]
                plain_BV = truncated(logits_BV[rows].float() / temperature, top_k, top_p, min_p)
                weights_BV.index_copy_(0, rows, plain_BV)
            with as_input_errors():
                return draw(weights_BV, ids_BT, seeds_B=seeds_B, positions_B=positions_B)

        return sample


def truncated(
    scaled_BV: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> torch.Tensor:
    """Logits with -inf where top-k, top-p or min-p cut, in Hugging Face's order."""
    if top_k is not None and top_k < scaled_BV.shape[1]:
        scaled_BV = scaled_BV.masked_fill(scaled_BV < scaled_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        values_BV = scaled_BV.sort(descending=True).values
        last_B1 = (values_BV.softmax(-1).cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=scaled_BV.shape[1] - 1)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < values_BV.gather(-1, last_B1), -torch.inf)
    if min_p:
        shares_BV = scaled_BV.softmax(-1)
        scaled_BV = scaled_BV.masked_fill(shares_BV < min_p * shares_BV.amax(-1, keepdim=True), -torch.inf)
    return scaled_BV
