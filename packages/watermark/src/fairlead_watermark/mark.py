"""What the schemes of this package share: settings, the LogitsProcessor shell, contexts at generation, detection.

A new scheme is a subclass of `Mark` in one file: `_process` (logits after a context), `sampler`, and `_score` with the
test that turns a statistic into a p-value. Contexts are recomputed from the ids at every step; nothing is remembered.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.keys import SecretKey
from fairlead.kinds import Detection, Watermark

from . import contexts
from .contexts import Texts

Dedup = Literal["pair", "context", "none"]
Score = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MarkConfig(MethodConfig):
    """vocab_size: width of the logits. key: the secret. dedup_contexts: a context that stood before gets an unmarked
    token; "single_turn" looks back over the answer, "all" over prompt and answer, None never does."""

    vocab_size: int = Field(ge=2, description="width of the model's logits (not the tokenizer's size)")
    key: SecretKey = Field(repr=False, description="secret key: an int, bytes or a key file")
    dedup_contexts: Literal["single_turn", "all"] | None = Field(
        None, description="give repeated contexts unmarked tokens: single_turn, all, or none"
    )


class Mark(Watermark):
    """A watermark whose context is the last tokens before the candidate."""

    config: MarkConfig
    width: int
    """Tokens before the candidate that the key sees."""

    @abstractmethod
    def _process(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, **options: Any) -> torch.Tensor:
        """Marked logits after ids_BT (-1 = padding): new tensor, same shape."""

    @abstractmethod
    def _score(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        """(statistic_B, scored_B, per-token scores_BT) of left-aligned texts."""

    @abstractmethod
    def _test(self, statistic_B: torch.Tensor, scored_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(p-values, z-scores), float64 [B]."""

    default_dedup: Dedup = "pair"

    def processor(
        self, *, prompt_length: int = 0, pad_token_id: int | None = None, **options: Any
    ) -> Any:
        """A transformers LogitsProcessor, good for any number of `generate` calls.

        prompt_length: columns of the (padded) prompt, where `dedup_contexts="single_turn"` starts to look back.
        pad_token_id: leading tokens with this id are padding and no part of a context, so that a row in a left-padded
        batch is marked as it would be alone. options: the scheme's own.
        """
        return _processor_class()(functools.partial(self._call, prompt_length, pad_token_id, options), repr(self))

    def _call(
        self, prompt_length: int, pad_token_id: int | None, options: dict[str, Any], ids_BT: torch.Tensor,
        logits_BV: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        self.check_logits(logits_BV)
        ids_BT = contexts.hide_padding(ids_BT, pad_token_id)
        marked_BV = self._process(ids_BT, logits_BV, **options)
        repeated_B = self.repeated(ids_BT, prompt_length)
        return marked_BV if repeated_B is None else torch.where(repeated_B[:, None], logits_BV, marked_BV)

    def check_logits(self, logits_BV: torch.Tensor) -> None:
        """InputError when the logits have another width than the vocabulary of the key's lists, or hold NaN in a row
        that is all NaN (a broken model)."""
        if logits_BV.shape[-1] != self.config.vocab_size:
            raise InputError(
                f"vocab_size: the watermark has {self.config.vocab_size}, the model's logits have {logits_BV.shape[-1]}; "
                f"use vocab_size={logits_BV.shape[-1]}"
            )

    def repeated(self, ids_BT: torch.Tensor, start: int) -> torch.Tensor | None:
        """Rows whose next context has stood before (bool [B]), None when the scheme does not care."""
        if self.config.dedup_contexts is None:
            return None
        return contexts.repeats(ids_BT, self.width, start if self.config.dedup_contexts == "single_turn" else 0)

    def detect(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *,
        prompt_ids: torch.Tensor | None = None, dedup: Dedup | None = None,
    ) -> Detection:  # fmt: skip
        """Test the answers `ids` [B, T] (or [T]).

        attention_mask: real tokens, padding on either side. prompt_ids [B, P]: the (right-aligned) prompts, when known;
        the first tokens of the answers are then scored too. dedup: what is scored once, "pair" (context, token) or
        "context"; "none" scores every token and is calibrated on text without repeats only.
        """
        found = contexts.texts(ids, attention_mask, self.config.vocab_size)
        if prompt_ids is not None:
            prompt_ids = torch.as_tensor(prompt_ids).to(torch.int64).reshape(found.ids_BT.shape[0], -1)
        statistic_B, scored_B, scores_BT = self._score(found, prompt_ids, dedup or self.default_dedup)
        p_B, z_B = self._test(statistic_B, scored_B)
        return Detection(
            statistic=statistic_B.double(), p_value=p_B, tokens_scored=scored_B,
            extra={"z": z_B, "token_scores": found.restore(scores_BT)},
        )  # fmt: skip


@functools.cache
def _processor_class() -> type:
    """The LogitsProcessor subclass, made when first needed: transformers takes seconds to import."""
    from transformers import LogitsProcessor

    class MarkProcessor(LogitsProcessor):
        """Calls the mark with (ids, logits); holds no state."""

        def __init__(self, call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shown: str) -> None:
            self._mark_call = call
            self._shown = shown

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:  # type: ignore[override]
            return self._mark_call(input_ids, scores)

        def __repr__(self) -> str:
            return f"<processor of {self._shown}>"

    return MarkProcessor
