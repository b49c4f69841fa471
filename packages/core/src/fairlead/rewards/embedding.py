"""Closeness of meaning: the cosine between sentence embeddings of the response and of the prompt, or of reference texts.

The embedding is the mean of an encoder's last hidden states over the tokens, divided by its L2 norm (Reimers and Gurevych,
"Sentence-BERT", arXiv 1908.10084). Leaves length-sorted batches to `scoring`.

Shape suffixes: N pairs, M distinct texts, R references, B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..errors import InputError
from ..kinds.reward import Reward, check_pairs, question
from .loading import check_model, encoder, name_of, room


class EmbeddingConfig(MethodConfig):
    """Settings of the similarity."""

    model: Any = Field(
        "zoo:minilm-l6-v2", description="folder, hub id or zoo:NAME of an encoder (AutoModel), or a loaded (model, tokenizer) pair"
    )
    references: list[str] = Field(default_factory=list, description="texts to come close to; without any, the prompt")
    pool: Literal["max", "mean"] = Field("max", description="over several references: the nearest, or the mean cosine")
    max_length: int = Field(256, ge=4, description="tokens read of a text, from its start")
    token_budget: int = Field(2048, ge=16, description="tokens per micro-batch, padding included")

    @field_validator("model")
    @classmethod
    def _is_model(cls, value: Any) -> Any:
        return check_model(value)


class EmbeddingReward(Reward):
    """Cosine in [-1, 1]; 0 for a text of no tokens. Reference texts are embedded once."""

    Config = EmbeddingConfig
    config: EmbeddingConfig
    bounds = (-1.0, 1.0)

    def setup(self) -> None:
        self._ready: tuple[Any, Any] | None = None
        self._references_RD: torch.Tensor | None = None

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not len(responses):
            return torch.zeros(0)
        answers_ND = self.embed([str(r) for r in responses])
        if not self.config.references:
            cosine_N = (answers_ND * self.embed([str(question(p)) for p in prompts])).sum(1)
        else:
            if self._references_RD is None:
                self._references_RD = self.embed(self.config.references)
            # As sums of products, not as one product of matrices: its rounding depends on the batch.
            cosine_NR = torch.stack([(answers_ND * row_D).sum(1) for row_D in self._references_RD], 1)
            cosine_N = cosine_NR.amax(1) if self.config.pool == "max" else cosine_NR.mean(1)
        return cosine_N.clamp(-1.0, 1.0)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Sentence embeddings float32 [N, D] of norm 1, on the CPU; zeros for a text of no tokens."""
        from ..scoring import classifier_scores

        if self._ready is None:
            model, tokenizer = encoder(self.config.model)
            self._ready = _Embedder(model), tokenizer
        embedder, tokenizer = self._ready
        longest = min(room(embedder.encoder, self.config.max_length), tokenizer.model_max_length)
        # Equal texts are embedded once: no rounding between them.
        ids = {text: tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in dict.fromkeys(texts)}
        some = [text for text, found in ids.items() if found]
        embedded_MD = classifier_scores(embedder, [ids[text] for text in some], self.config.token_budget) if some else torch.zeros(0, 1)
        if bool(embedded_MD.isnan().any()):
            raise InputError(f"embedding {name_of(self.config.model)}: gives NaN for {some[int(embedded_MD.isnan().any(1).nonzero()[0])][:60]!r}")
        row = {text: place for place, text in enumerate(some)}
        nothing_D = torch.zeros(embedded_MD.shape[1])
        return torch.stack([embedded_MD[row[text]] if text in row else nothing_D for text in texts])


class _Embedder:
    """An encoder as a classifier whose logits are the embedding, for the batches of `scoring`. No module: its mode of
    training is the encoder's."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.eval, self.train = encoder.eval, encoder.train

    @property
    def device(self) -> torch.device:
        device: torch.device = self.encoder.device
        return device

    @property
    def training(self) -> bool:
        return bool(self.encoder.training)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        mask_BT1 = attention_mask[..., None].float()
        mean_BD = (found.last_hidden_state.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
        return SequenceClassifierOutput(logits=torch.nn.functional.normalize(mean_BD, dim=-1))
