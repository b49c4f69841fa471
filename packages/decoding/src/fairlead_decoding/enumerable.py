"""Language models small enough that every answer can be listed: the ground truth that decoders are held against.

A random Llama of a few tokens without an end token, so answers have one fixed length; the beginning-of-text token is
never drawn. With V tokens and L positions there are V^L answers, whose probabilities, and so every optimum, expectation
and KL divergence, are exact. What is optimal is theory's business; how to decode, the decoders'.

Shape suffixes: M answers (V^L when complete), L tokens per answer, V vocabulary, U distinct prefixes, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds.reward import Reward, check_pairs

NEVER = -1e9
"""Logit of the token that is never drawn: probability exactly 0, yet p log p stays 0 and not NaN."""
MOST_ANSWERS = 2**24


class BiasedLlama(LlamaForCausalLM):
    """LlamaForCausalLM whose output layer has a bias; saved, loaded and copied as any Hugging Face model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head.bias = torch.nn.Parameter(torch.zeros(config.vocab_size), requires_grad=False)


def tiny_llama(
    vocab: int, *, bos: bool = True, hidden: int = 32, layers: int = 2, heads: int = 4, intermediate: int = 64,
    head_scale: float = 60.0, seed: int = 0, max_length: int = 128,
) -> LlamaForCausalLM:  # fmt: skip
    """A random causal language model over the tokens 0..vocab-1, float32, in eval mode, without an end token.

    bos: adds the token `vocab` (model.config.bos_token_id), which may stand in a prompt but is never generated.
    head_scale: factor on the output layer; 6 gives a flat next-token law, 60 a peaked one. max_length: positions.
    The same seed gives the same weights, and torch's global random state stays as it was.
    """
    if vocab < 2:
        raise InputError(f"vocab: at least 2 tokens are needed, got {vocab}")
    if hidden % heads or hidden // heads % 2:
        raise InputError(f"hidden: must be an even multiple of heads, got hidden={hidden}, heads={heads}")
    config = LlamaConfig(
        vocab_size=vocab + bos, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_length,
        bos_token_id=vocab if bos else None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = BiasedLlama(config)
        model.lm_head.weight *= head_scale
        if bos:
            model.lm_head.bias[vocab] = NEVER
    return model.eval()


def all_answers(vocab: int, length: int) -> torch.Tensor:
    """Every sequence of `length` tokens out of 0..vocab-1 in lexicographic order: int64 [vocab^length, length]."""
    if vocab < 1 or length < 1 or vocab**length > MOST_ANSWERS:
        raise InputError(
            f"answers: vocab and length of at least 1 and vocab^length up to {MOST_ANSWERS} are needed, got {vocab}^{length}"
        )
    return torch.cartesian_prod(*[torch.arange(vocab)] * length).reshape(-1, length)


def answer_index(answers_NL: torch.Tensor, vocab: int) -> torch.Tensor:
    """Where answers stand in `all_answers(vocab, L)`: int64 [N]."""
    answers_NL = _checked_answers(answers_NL, vocab)
    return _codes(answers_NL, vocab)[-1]


@torch.no_grad()
def answer_logprobs(
    model: Any, prompt_ids: torch.Tensor | Sequence[int], answers_ML: torch.Tensor, batch_size: int = 4096
) -> torch.Tensor:
    """log p(answer | prompt) of every answer, natural logarithm: float64 [M] on the CPU.

    model: any causal LM with `.logits`. prompt_ids: int64 [T], T >= 1. answers_ML: all answers (`all_answers`).
    batch_size: rows per forward pass; only the distinct prefixes run through the model.
    InputError when the probabilities do not sum to 1 within 1e-6: answers are missing, doubled, or the model can end.
    """
    log_p = trainable_answer_logprobs(model, prompt_ids, answers_ML, batch_size)
    total = float(log_p.exp().sum())
    if not abs(total - 1) <= 1e-6:
        raise InputError(f"answers: their probabilities sum to {total:.8g}, not 1; list every answer that the model can give, once")
    return log_p


def trainable_answer_logprobs(
    model: Any, prompt_ids: torch.Tensor | Sequence[int], answers_ML: torch.Tensor, batch_size: int = 4096
) -> torch.Tensor:
    """As `answer_logprobs`, with gradients to the model's parameters and for any set of answers (no sum is checked)."""
    prompt_T = torch.as_tensor(prompt_ids, dtype=torch.int64).reshape(-1).cpu()
    if not len(prompt_T):
        raise InputError("prompt_ids: is empty; give at least one token (model.config.bos_token_id)")
    vocab = int(model.config.vocab_size)
    answers_ML = _checked_answers(answers_ML, vocab)
    length = answers_ML.shape[1]
    codes = _codes(answers_ML, vocab)
    _, prefix_M = codes[length - 1].unique(return_inverse=True)
    member_U = _first(prefix_M)
    prefixes_UL = answers_ML[member_U, : length - 1]
    logp_ULV = torch.cat([_laws(model, prompt_T, chunk) for chunk in prefixes_UL.split(max(1, batch_size))])
    total_M = logp_ULV.new_zeros(len(answers_ML))
    for t in range(length):
        # One row speaks for all answers with the same first t tokens, so that each law is one normalised law.
        _, group_U = codes[t][member_U].unique(return_inverse=True)
        row_M = _first(group_U)[group_U][prefix_M]
        total_M = total_M + logp_ULV[row_M, t, answers_ML[:, t]]
    return total_M


def _laws(model: Any, prompt_T: torch.Tensor, prefixes_UL: torch.Tensor) -> torch.Tensor:
    """log p of the next token after the prompt and after each further token of a prefix, float64 [U, L, V]."""
    rows = torch.cat([prompt_T.expand(len(prefixes_UL), -1), prefixes_UL], 1).to(model.device)
    logits = model(input_ids=rows).logits[:, len(prompt_T) - 1 :]
    return logits.double().log_softmax(-1).cpu()


def _codes(answers_ML: torch.Tensor, vocab: int) -> list[torch.Tensor]:
    """Number of each answer's first t tokens in base `vocab`, for t = 0..L: L + 1 tensors int64 [M]."""
    codes = [torch.zeros(len(answers_ML), dtype=torch.int64)]
    for token_M in answers_ML.T:
        codes.append(codes[-1] * vocab + token_M)
    return codes


def _first(group_N: torch.Tensor) -> torch.Tensor:
    """Index of the first member of each group: int64 [groups]."""
    count = int(group_N.max()) + 1
    start = torch.full((count,), len(group_N), dtype=torch.int64)
    return start.scatter_reduce(0, group_N, torch.arange(len(group_N)), "amin")


def _checked_answers(answers_ML: torch.Tensor, vocab: int) -> torch.Tensor:
    answers_ML = torch.as_tensor(answers_ML).cpu()
    if answers_ML.ndim != 2 or not answers_ML.numel() or answers_ML.is_floating_point():
        raise InputError(f"answers: non-empty token ids of shape [M, L] are needed, got {answers_ML.dtype} {tuple(answers_ML.shape)}")
    if bool(((answers_ML < 0) | (answers_ML >= vocab)).any()):
        raise InputError(f"answers: token ids must lie in 0..{vocab - 1}, got {int(answers_ML.min())}..{int(answers_ML.max())}")
    return answers_ML.to(torch.int64)


class RandomTokenRewardConfig(MethodConfig):
    """Settings of the random token reward."""

    vocab: int = Field(6, ge=1, description="tokens that have a weight, 0..vocab-1")
    positions: int = Field(0, ge=0, description="positions with weights of their own; 0 shares one table among all positions")
    scale: float = Field(1.0, gt=0, description="standard deviation of the weights")
    seed: int = Field(0, ge=0, description="seed of the weights")


class RandomTokenReward(Reward):
    """r(y) = sum_t w[y_t], or sum_t w[t, y_t] with `positions`, w ~ N(0, scale^2): additive, so a prefix has its share.

    Takes id tensors, not text. `table_LV` holds the weights, float64 [1 or positions, vocab].
    """

    Config = RandomTokenRewardConfig
    config: RandomTokenRewardConfig
    accepts_ids = True
    granularity = "prefix"

    def setup(self) -> None:
        shape = (self.config.positions or 1, self.config.vocab)
        noise = torch.Generator().manual_seed(self.config.seed)
        self.table_LV = torch.randn(shape, generator=noise, dtype=torch.float64) * self.config.scale

    def exact(self, answers_ML: torch.Tensor) -> torch.Tensor:
        """Rewards of many answers of one length in full precision: float64 [M]."""
        answers_ML = _checked_answers(answers_ML, self.config.vocab)
        return self._weights(answers_ML).sum(-1)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        for i, response in enumerate(responses):
            if not isinstance(response, torch.Tensor) or response.ndim != 1:
                raise InputError(f"random token reward: response {i} must be a 1-D id tensor, got {type(response).__name__}")
        lengths = [len(response) for response in responses]
        kept = torch.cat([_checked_answers(r[:, None], self.config.vocab)[:, 0] for r in responses if len(r)] or [torch.empty(0)])
        places = torch.cat([torch.arange(n) for n in lengths] or [torch.empty(0)])
        weights = self._weights(kept.long(), places.long())
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        return torch.zeros(len(lengths), dtype=torch.float64).index_add(0, owners, weights).float()

    def _weights(self, ids: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Weight of each token; `places` are its positions, by default those along the last axis."""
        if not self.config.positions:
            return self.table_LV[0, ids]
        places = torch.arange(ids.shape[-1]) if places is None else places
        if len(places) and int(places.max()) >= self.config.positions:
            raise InputError(
                f"random token reward: an answer has {int(places.max()) + 1} tokens, weights exist for {self.config.positions}"
            )
        return self.table_LV[places, ids]
