"""KGW: soft and hard green lists, l'_v = l_v + delta * [v in G(context)].

Kirchenbauer et al., "A Watermark for Large Language Models" (arXiv 2301.10226) and "On the Reliability of Watermarks for
Large Language Models" (arXiv 2306.04634). Detection counts green tokens: c of n, P(Bin(n, gamma) >= c).

Two kinds of lists behind one interface: counter-based lists of the `watermark_bias` kernel (lefthash, minhash, selfhash;
sizes are binomial, equal on every device), and transformers' permutation lists (hf-lefthash, hf-selfhash; see hf_lists).
Deviation: lefthash hashes the last `context_width` tokens, where the first paper uses one; the default is one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator

from fairlead.kinds import TokenSampler

from . import contexts, detection
from .contexts import Texts
from .mark import Dedup, Mark, MarkConfig, Score, as_input_errors, check_options

SchemeName = Literal["lefthash", "minhash", "selfhash", "hf-lefthash", "hf-selfhash"]
_DEFAULT_WIDTH = {"lefthash": 1, "minhash": 4, "selfhash": 4, "hf-lefthash": 1, "hf-selfhash": 4}


class KGWConfig(MarkConfig):
    """Settings of KGW; `context_width` counts the candidate for the self-hash schemes."""

    gamma: float = Field(0.25, gt=0, lt=1, description="share of green tokens")
    delta: float = Field(2.0, ge=0, description="logit bonus of green tokens; inf forbids red ones (hard list)")
    scheme: SchemeName = Field("lefthash", description="how the context seeds the list")
    context_width: int | None = Field(
        None, ge=1, le=64, description="tokens that seed the list (default 1 for lefthash, 4 for minhash and selfhash)"
    )
    list_device: Literal["cpu", "cuda"] = Field(
        "cpu", description="device class whose generator draws transformers' lists (hf- schemes)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_width(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("context_width") is None:
            width = _DEFAULT_WIDTH.get(str(values.get("scheme", "lefthash")))
            if width is not None:
                values = {**values, "context_width": width}
        return values

    @model_validator(mode="after")
    def _key_fits(self) -> KGWConfig:
        if self.scheme.startswith("hf-") and self.key.reveal() >= 1 << 63:
            raise ValueError("key: transformers' lists need a key below 2^63")
        return self


class Lists(Protocol):
    """Green lists: what KGW needs of them."""

    width: int

    def bias(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, delta: float) -> torch.Tensor:
        """Logits with delta added to green tokens (delta = inf: red ones become -inf)."""
        ...

    def count(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        """(green_B, scored_B, marks_BT: 1 green, 0 red, -1 not scored)."""
        ...


class CounterLists:
    """Lists of the kernels: one pass over the logits, nothing stored, the same on every device."""

    def __init__(self, config: KGWConfig) -> None:
        assert config.context_width is not None
        self._config = config
        self.width = config.context_width - (config.scheme == "selfhash")

    def bias(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, delta: float) -> torch.Tensor:
        from fairlead_kernels import watermark_bias

        c = self._config
        return watermark_bias(
            logits_BV, contexts.last(ids_BT, self.width), key=c.key.reveal(), gamma=c.gamma, delta=delta, scheme=c.scheme
        )

    def count(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        from fairlead_kernels import green_count

        c = self._config
        return green_count(
            texts.ids_BT, texts.lengths_B, key=c.key.reveal(), gamma=c.gamma, context_width=c.context_width,
            scheme=c.scheme, dedup=dedup, context_BH=context_BH, pad_left=c.context_from == "answer",
        )  # fmt: skip


class KGW(Mark):
    """Green-list watermark of a causal LM."""

    Config = KGWConfig
    config: KGWConfig
    name = "kgw"

    def setup(self) -> None:
        self._lists: Lists
        if self.config.scheme.startswith("hf-"):
            from .hf_lists import PermutationLists

            self._lists = PermutationLists(self.config)
            self.device_class = self.config.list_device
        else:
            self._lists = CounterLists(self.config)
        self.width = self._lists.width

    def _process(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, **options: Any) -> torch.Tensor:
        marked_BV = self._lists.bias(ids_BT, logits_BV, self.config.delta)
        if math.isinf(self.config.delta):  # a row whose green tokens are all forbidden already keeps its red ones
            marked_BV = torch.where((marked_BV == -math.inf).all(1, keepdim=True), logits_BV, marked_BV)
        return marked_BV

    def sampler(  # type: ignore[override]
        self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, prompt_length: int | None = None,
    ) -> TokenSampler:  # fmt: skip
        """Bias, then temperature (so the bonus is delta / temperature), truncation and the draw; temperature 0 takes the
        best biased token."""
        from fairlead.generation import PlainSampler

        check_options(self.name, temperature, top_k, top_p, min_p, greedy=True)
        draw = PlainSampler(temperature, top_k, top_p, min_p)

        def sample(
            logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor
        ) -> torch.Tensor:
            start = self.answer_start(prompt_length, ids_BT, positions_B)
            marked_BV = self._call(start, None, {}, ids_BT, logits_BV)
            with as_input_errors():
                return draw(marked_BV, ids_BT, seeds_B=seeds_B, positions_B=positions_B)

        return sample

    def _score(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        green_B, scored_B, marks_BT = self._lists.count(texts, context_BH, dedup)
        scores_BT = marks_BT.double()
        return green_B, scored_B, scores_BT.masked_fill_(marks_BT < 0, torch.nan)

    def _test(self, statistic_B: torch.Tensor, scored_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gamma = self.config.gamma
        return (
            detection.binomial_p_value(statistic_B, scored_B, gamma),
            detection.binomial_z(statistic_B, scored_B, gamma),
        )
