"""What the schemes of this package share: settings, the LogitsProcessor shell, contexts at generation, detection.

A new scheme is a subclass of `Mark` in one file: `_process` (logits after a context), `sampler`, and `_score` with the
test that turns a statistic into a p-value. Contexts are recomputed from the ids at every step; nothing is remembered.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import ConfigError, InputError
from fairlead.keys import SecretKey
from fairlead.kinds import Detection, Watermark

from . import contexts
from .contexts import Texts

Dedup = Literal["pair", "context", "none"]
Score = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MarkConfig(MethodConfig):
    """vocab_size: width of the logits. key: the secret. dedup_contexts: a context that stood before gets an unmarked
    token; "single_turn" looks back over the answer, "all" over prompt and answer, None never does. context_from: with
    "text" the first contexts reach into the prompt, so that one key gives every prompt other lists; with "answer" they
    do not, and an engine that hides the prompt (vLLM) and a detector that has not seen it agree on every token."""

    vocab_size: int = Field(ge=2, description="width of the model's logits (not the tokenizer's size)")
    key: SecretKey = Field(repr=False, description="secret key: an int, bytes or a key file")
    dedup_contexts: Literal["single_turn", "all"] | None = Field(
        None, description="give repeated contexts unmarked tokens: single_turn, all, or none"
    )
    context_from: Literal["text", "answer"] = Field(
        "text", description="contexts reach into the prompt (text) or see the answer's tokens alone (answer, as in vLLM)"
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

    def processor(self, *, prompt_length: int | None = None, pad_token_id: int | None = None, **options: Any) -> Any:
        """A transformers LogitsProcessor, good for any number of `generate` calls.

        prompt_length: columns of the (padded) prompt, where the answer starts; `context_from="answer"` needs it, and
        `dedup_contexts="single_turn"` looks back over the prompt as well without it. pad_token_id: leading tokens with
        this id are padding and no part of a context, so that a row in a left-padded batch is marked as it would be
        alone. options: the scheme's own. `generate` calls custom processors before its temperature and truncation.
        """
        if self.config.context_from == "answer" and prompt_length is None:
            raise ConfigError(f"{self.name}: with context_from='answer' the processor needs prompt_length")
        call = functools.partial(self._call_checked, prompt_length or 0, pad_token_id, options)
        return _processor_class()(call, repr(self))

    def _call_checked(
        self, start: int, pad_token_id: int | None, options: dict[str, Any], ids_BT: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """`_call` for logits that no sampler of ours will look at: InputError for a row of NaN. One column is looked
        at: a NaN in the hidden state reaches them all, and a pass over the logits is what marking itself costs."""
        if logits_BV.device.type == "cpu" and bool(logits_BV[:, :1].isnan().any()):
            row = int(logits_BV[:, 0].isnan().nonzero()[0])
            raise InputError(f"logits: row {row} is NaN; the model's numbers have overflowed, try float32 or bfloat16")
        return self._call(start, pad_token_id, options, ids_BT, logits_BV)

    def _call(
        self, start: int | torch.Tensor, pad_token_id: int | None, options: dict[str, Any], ids_BT: torch.Tensor,
        logits_BV: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Logits after marking; `start` is the column where the answer begins, one or one per row."""
        self.check_logits(logits_BV)
        ids_BT = self.visible(contexts.hide_padding(ids_BT, pad_token_id), start)
        marked_BV = self._process(ids_BT, logits_BV, **options)
        repeated_B = self.repeated(ids_BT, start)
        if repeated_B is None or marked_BV is logits_BV:
            return marked_BV
        rows = repeated_B.nonzero()[:, 0]  # few: a copy of these rows, not of all logits
        return marked_BV.index_copy_(0, rows, logits_BV[rows]) if len(rows) else marked_BV

    def answer_start(
        self, prompt_length: int | None, ids_BT: torch.Tensor, positions_B: torch.Tensor
    ) -> int | torch.Tensor:
        """Column where the answer begins: as told, or from the index of the token about to be drawn, per row."""
        return ids_BT.shape[1] - positions_B if prompt_length is None else prompt_length

    def visible(self, ids_BT: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
        """The ids that contexts are made of: all, or with `context_from="answer"` those from column `start` on."""
        return contexts.answers(ids_BT, start) if self.config.context_from == "answer" else ids_BT

    def check_logits(self, logits_BV: torch.Tensor) -> None:
        """InputError when the logits have another width than the vocabulary of the key's lists."""
        if logits_BV.shape[-1] != self.config.vocab_size:
            raise InputError(
                f"vocab_size: the watermark has {self.config.vocab_size}, the model's logits have {logits_BV.shape[-1]}; "
                f"use vocab_size={logits_BV.shape[-1]}"
            )

    def repeated(self, ids_BT: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor | None:
        """Rows whose next context has stood before (bool [B]), None when the scheme does not care."""
        if self.config.dedup_contexts is None:
            return None
        return contexts.repeats(ids_BT, self.width, start if self.config.dedup_contexts == "single_turn" else 0)

    def detect(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *,
        prompt_ids: torch.Tensor | None = None, dedup: Dedup | None = None,
    ) -> Detection:  # fmt: skip
        """Test the answers `ids` [B, T] (or [T]).

        attention_mask: real tokens, padding on either side. prompt_ids [B, P]: the prompts, when known, right-aligned
        with -1 on the left; the first tokens of the answers are then scored too. dedup: what is scored once, "pair"
        (context, token) or "context"; "none" scores every token and is calibrated on text without repeats only.
        """
        found = contexts.texts(ids, attention_mask, self.config.vocab_size)
        if dedup not in (None, "pair", "context", "none"):
            raise InputError(f"dedup: pair, context or none is needed, got {dedup!r}")
        known_BH = None if prompt_ids is None else self._prompts(prompt_ids, found)
        statistic_B, scored_B, scores_BT = self._score(found, known_BH, dedup or self.default_dedup)
        p_B, z_B = self._test(statistic_B, scored_B)
        return Detection(
            statistic=statistic_B.double(), p_value=p_B, tokens_scored=scored_B,
            extra={"z": z_B, "token_scores": found.restore(scores_BT)},
        )  # fmt: skip

    def _prompts(self, prompt_ids: torch.Tensor, found: Texts) -> torch.Tensor | None:
        """The prompts as int64 [B, P] with -1 as padding; None where contexts do not see them."""
        known = contexts.as_tensor(prompt_ids, "prompt_ids")
        known = known[None] if known.dim() == 1 else known
        rows, size = found.ids_BT.shape[0], self.config.vocab_size
        if known.dim() != 2 or known.shape[0] != rows or (known.is_floating_point() and known.numel()):
            raise InputError(f"prompt_ids: integer ids of shape [{rows}, P] are needed, got {known.dtype} {list(known.shape)}")
        if bool(((known < contexts.MISSING) | (known >= size)).any()):
            raise InputError(f"prompt_ids: ids outside the vocabulary of {size}; padding is -1, on the left")
        return None if self.config.context_from == "answer" else known.to(found.ids_BT)


def check_options(
    scheme: str, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, greedy: bool = False
) -> None:
    """ConfigError for sampling options that cannot carry the mark or mean nothing; `greedy` allows temperature 0."""
    if not (temperature > 0 or (greedy and temperature == 0)) or temperature == float("inf"):
        why = "" if greedy else " (greedy text has no room for the mark)"
        raise ConfigError(f"{scheme}: temperature must be {'at least' if greedy else 'above'} 0{why}, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"{scheme}: top_k must be at least 1 (none: off), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"{scheme}: top_p must lie in (0, 1] (none: off), got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"{scheme}: min_p must lie in [0, 1] (none: off), got {min_p}")


@contextmanager
def as_input_errors() -> Iterator[None]:
    """A kernel that refuses logits (NaN, +inf, a row of -inf) does so as an InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


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
