"""Log-probabilities that a causal LM gives to completions: from the hidden states, never as [B, T, V] logits.

The head is applied to the positions that predict a completion token and to no other, in tiles (`linear_logprob`).
Models whose logits are more than hidden x head (soft-capped, scaled) are found by trying them once and served by their
own logits at those positions. Leaves packing of sequences to `scoring`.

Shape suffixes: B rows, T tokens, N scored positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError

log = logging.getLogger("fairlead")
Head = tuple[torch.Tensor, "torch.Tensor | None"]
_heads: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LogProbs:
    """token_BT: float32 [B, T], log-probability of each completion token, 0 elsewhere, aligned with the ids that were
    passed in. mask_BT: bool [B, T], the tokens that were scored (a first token without a predecessor is not).
    Differentiable in the model's parameters where gradients are on."""

    token_BT: torch.Tensor
    mask_BT: torch.Tensor

    @property
    def count_B(self) -> torch.Tensor:
        """Scored tokens, int64 [B]."""
        return self.mask_BT.sum(-1)

    @property
    def sum_B(self) -> torch.Tensor:
        """Log-probability of each completion, [B]."""
        return self.token_BT.sum(-1)

    @property
    def mean_B(self) -> torch.Tensor:
        """Mean per scored token, [B]; 0 where none was scored."""
        return self.sum_B / self.count_B.clamp(min=1)

    @property
    def perplexity_B(self) -> torch.Tensor:
        """exp(-mean), [B]; NaN where nothing was scored."""
        return torch.where(self.count_B > 0, (-self.mean_B).exp(), torch.nan)


def completion_logprobs(
    model: Any, ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None,
    completion_mask_BT: torch.Tensor | None = None, temperature: float = 1.0,
) -> LogProbs:  # fmt: skip
    """Log-probabilities of the completion tokens of a padded batch.

    ids_BT: int64 [B, T], padding on either side. attention_mask_BT: 1 on real tokens; default all. completion_mask_BT:
    1 on the tokens to score; default every real one. temperature: divides the logits.
    InputError for shapes that differ or a mask that marks padding.
    """
    attention = torch.ones_like(ids_BT) if attention_mask_BT is None else attention_mask_BT.to(ids_BT.device)
    wanted = attention.bool() if completion_mask_BT is None else completion_mask_BT.to(ids_BT.device).bool()
    if ids_BT.dim() != 2 or attention.shape != ids_BT.shape or wanted.shape != ids_BT.shape:
        raise InputError(
            f"ids and masks must share one shape [B, T], got {list(ids_BT.shape)}, {list(attention.shape)}, {list(wanted.shape)}"
        )
    if bool((wanted & ~attention.bool()).any()):
        raise InputError("completion_mask: marks tokens that attention_mask calls padding")
    mask_BT = wanted.clone()
    mask_BT[:, 1:] &= attention[:, :-1].bool()  # the token before it must be real, or nothing predicts it
    mask_BT[:, :1] = False
    token_BT = torch.zeros(ids_BT.shape, dtype=torch.float32, device=ids_BT.device)
    if bool(mask_BT.any()):
        rows, columns = mask_BT.nonzero(as_tuple=True)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        logp_N = position_logprobs(
            model, {"input_ids": ids_BT, "attention_mask": attention, "position_ids": positions},
            rows * ids_BT.shape[1] + columns - 1, ids_BT[rows, columns], temperature,
        )  # fmt: skip
        token_BT = token_BT.index_put((rows, columns), logp_N.float())
    return LogProbs(token_BT, mask_BT)


def position_logprobs(
    model: Any, inputs: dict[str, Any], places_N: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p(target) by the logits at flat positions (row x T + column) of one forward pass over `inputs`: float32 [N]."""
    if linear_head(model) is not None:
        return at_head(model, inputs, lambda hidden_BTD, head: head_logprobs(head, hidden_BTD.flatten(0, 1)[places_N], targets_N, temperature))
    from fairlead_kernels import selective_logprob

    return selective_logprob(position_logits(model, inputs, places_N), targets_N, temperature=temperature)


def position_logits(model: Any, inputs: dict[str, Any], places_N: torch.Tensor) -> torch.Tensor:
    """The model's own logits [N, V] at flat positions (row x T + column) of one forward pass."""
    if inputs["input_ids"].shape[0] == 1 and _keeps_indices(model):
        logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=places_N).logits[0]
        return logits
    width = inputs["input_ids"].shape[1]
    logits = model(**inputs, use_cache=False).logits
    return logits[places_N // width, places_N % width]


def at_head(model: Any, inputs: dict[str, Any], function: Callable[[torch.Tensor, Head], torch.Tensor]) -> torch.Tensor:
    """`function(hidden [B, T, D], (weight, bias))` where the model would apply its head, in one call of the whole model.

    The call goes through every wrapper (adapters, data-parallel and sharded ones), so that gradients are synchronised and
    a sharded head is whole when it is read. For models of `linear_head` only. No cache: with one, transformers lets packed
    segments see each other.
    """
    head = output_head(model)
    before = head.__dict__.get("forward")
    head.forward = lambda hidden_BTD: function(hidden_BTD, (head.weight, getattr(head, "bias", None)))
    try:
        found: torch.Tensor = model(**inputs, use_cache=False).logits
        return found
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def head_logprobs(head: Head, hidden_ND: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(target) from hidden states, in tiles: float32 [N]."""
    from fairlead_kernels import linear_logprob

    weight_VD, bias_V = head
    kind = weight_VD.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        kind = torch.get_autocast_dtype(hidden_ND.device.type)
        weight_VD, bias_V = weight_VD.to(kind), None if bias_V is None else bias_V.to(kind)
    return linear_logprob(hidden_ND.to(kind), weight_VD, targets_N, bias_V, temperature)


def hidden_states(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """Final hidden states [B, T, D], as the head sees them. No cache: with one, transformers lets packed segments see
    each other."""
    hidden: torch.Tensor = backbone(model)(**inputs, use_cache=False, **options).last_hidden_state
    return hidden


def unwrapped(model: Any) -> Any:
    """The Hugging Face model under the wrappers of accelerate, torch.compile and PEFT (adapters stay in place)."""
    while not hasattr(model, "config") or hasattr(model, "_orig_mod"):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inner is None:
            break
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> Any:
    """The module that turns hidden states into logits; PEFT's trained copy of it where there is one. None without one."""
    inner = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    copies = getattr(head, "modules_to_save", None)
    if head is None or copies is None:
        return head
    return head.original_module if head.disable_adapters else copies[head.active_adapters[0]]


def backbone(model: Any) -> Any:
    """The model without its head."""
    inner = unwrapped(model)
    return getattr(inner, getattr(inner, "base_model_prefix", ""), inner)


def linear_head(model: Any) -> Head | None:
    """(weight [V, D], bias [V] or None) when the model's logits are exactly hidden x weight + bias, else None.

    Found out by running four tokens through model and backbone, once per model.
    """
    inner, head = unwrapped(model), output_head(model)
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point() or backbone(model) is inner:
        return None  # a quantised head, or one with an adapter, is more than its weight
    found: Head = (head.weight, head.bias)
    if inner not in _heads:
        _heads[inner] = _is_linear(model, found)
        if not _heads[inner]:
            log.info("%s: its logits are not hidden x head; log-probs come from its own logits", type(inner).__name__)
    return found if _heads[inner] else None


@torch.no_grad()
def _is_linear(model: Any, head: Head) -> bool:
    weight_VD, bias_V = head
    ids = torch.arange(4, device=weight_VD.device)[None] % weight_VD.shape[0]
    training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, {"input_ids": ids})
        logits = model(input_ids=ids, use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    if hidden.shape[-1] != weight_VD.shape[1] or not bool(logits.isfinite().all()):
        return False
    mine = torch.nn.functional.linear(hidden.to(weight_VD.dtype), weight_VD, bias_V).float()
    tolerance = 1e-4 if logits.dtype == weight_VD.dtype else 2e-2
    return mine.shape == logits.shape and torch.allclose(mine, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max() + 1e-6))


def _keeps_indices(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def perplexity(model: Any, sequences: Sequence[Any], starts: Sequence[int] | None = None, token_budget: int | None = None) -> torch.Tensor:
    """Perplexity of each id sequence under the model, float32 [N] on the CPU: the control of every watermark table.

    sequences: 1-D id tensors or lists. starts: where the scored part of each begins (the prompt before it is context);
    default 0. NaN where nothing is scored (a single token has no predecessor).
    """
    from .scoring import RewardBatcher

    cuts = [0] * len(sequences) if starts is None else list(starts)
    if len(cuts) != len(sequences):
        raise InputError(f"perplexity: {len(sequences)} sequences, but {len(cuts)} starts")
    lists = [[int(t) for t in s] for s in sequences]
    scores = RewardBatcher(model, mode="logprob", token_budget=token_budget, allow_oversize=True, advantage=None).score(
        [s[:c] for s, c in zip(lists, cuts, strict=True)], [[s[c:]] for s, c in zip(lists, cuts, strict=True)]
    )
    mean = -scores.sum_logp_S / scores.n_tokens_S.clamp(min=1)
    return torch.where(scores.n_tokens_S > 0, mean.exp(), torch.nan)
