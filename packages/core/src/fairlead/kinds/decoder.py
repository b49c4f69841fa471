"""Kind Decoder: makes answers from a model under a policy (best-of-n, search, value-guided, speculative, resampling)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Configurable

if TYPE_CHECKING:
    from ..generation import DecodeResult


class Decoder(Configurable):
    """(model, tokenizer, prompts) -> one chosen `Generation` per prompt, with what it cost.

    Contract
    --------
    - The model is a Hugging Face causal LM in eval mode, which the decoder leaves as it found it: same weights, same
      mode, no hooks left behind.
    - `prompts` are strings, lists of chat messages, or 1-D id tensors (then tokenizer may be None).
    - Deterministic in (seed, index of the prompt): an answer depends neither on the batch size nor on the prompts
      beside it. `first_index` is the index of the first prompt, for callers that stream a corpus in pieces.
    - `kl` is the divergence to the model's own sampling in nats per answer, and `kl_kind` says what it is: "exact",
      "estimate" or "bound"; None where unknown.
    - `cost` counts every token that went through the model and every reward call, rejected candidates included.
    """

    @abstractmethod
    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Any], *, seed: int = 0, max_new_tokens: int = 64,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        batch_size: int | None = None, first_index: int = 0,
    ) -> DecodeResult:  # fmt: skip
        """Answers in the order of the prompts; arguments as `fairlead.generation.generate`, InputError for bad ones."""
