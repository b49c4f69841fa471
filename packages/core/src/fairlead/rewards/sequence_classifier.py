"""A Hugging Face sequence classifier as a reward: its score of the pair, on packed or length-sorted batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from ..config import MethodConfig
from ..errors import InputError
from ..kinds.reward import Reward, check_pairs


class SequenceClassifierConfig(MethodConfig):
    """Settings of the classifier reward."""

    model: str = Field("zoo:reward", description="folder, hub id or zoo:NAME of an AutoModelForSequenceClassification")
    label: int | None = Field(None, ge=0, description="class whose log-odds is the reward; needed for more than one class")
    template: Literal["auto", "chat", "concatenate"] = Field(
        "auto", description="how the pair becomes text: the tokenizer's chat template where it has one"
    )
    max_length: int = Field(4096, ge=8, description="longest pair in tokens; longer ones lose the start of the prompt")
    token_budget: int = Field(1024, ge=16, description="tokens per micro-batch")


class SequenceClassifierReward(Reward):
    """Score of (prompt, response): the single logit, or the log-odds of `label`."""

    Config = SequenceClassifierConfig
    config: SequenceClassifierConfig

    def setup(self) -> None:
        self._loaded: tuple[Any, Any] | None = None

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification

            from ..models import load_tokenizer, resolve

            path = resolve(self.config.model)
            try:
                model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
            except (OSError, ValueError) as error:
                raise InputError(f"reward model {self.config.model}: {str(error).splitlines()[0]}") from None
            if model.config.num_labels > 1 and self.config.label is None:
                raise InputError(f"reward model {self.config.model}: has {model.config.num_labels} classes; set label")
            if (self.config.label or 0) >= model.config.num_labels:
                raise InputError(f"reward model {self.config.model}: label {self.config.label} of {model.config.num_labels} classes")
            self._loaded = model.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(self.config.model)
        return self._loaded

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not len(responses):
            return torch.zeros(0)
        from ..scoring import classifier_scores

        model, tokenizer = self._model()
        pairs = [tuple(self._ids(tokenizer, str(p), str(r))) for p, r in zip(prompts, responses, strict=True)]
        # Equal pairs are scored once: candidates often coincide, and their scores must not differ by a rounding.
        asked = dict(zip(pairs, map(str, prompts), strict=True))
        distinct = {pair: place for place, pair in enumerate(asked)}
        budget = max(self.config.token_budget, max(map(len, pairs)))
        scores_MC = classifier_scores(model, [list(pair) for pair in distinct], token_budget=budget, groups=list(asked.values()))
        logits_NC = scores_MC[[distinct[pair] for pair in pairs]]
        if logits_NC.shape[1] == 1:
            return logits_NC[:, 0]
        label = int(self.config.label or 0)
        others_NC = torch.cat([logits_NC[:, :label], logits_NC[:, label + 1 :]], 1)
        return logits_NC[:, label] - others_NC.logsumexp(-1)

    def _ids(self, tokenizer: Any, prompt: str, response: str) -> list[int]:
        chat = self.config.template == "chat" or (self.config.template == "auto" and tokenizer.chat_template)
        if chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(f"{prompt}\n{response}")["input_ids"]
        return ids[-self.config.max_length :]
