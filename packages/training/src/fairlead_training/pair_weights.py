"""Two remedies of gradient entanglement (arXiv 2410.13828): weights that balance the gradients of chosen and rejected
log-probabilities, and weights that leave out the tokens both completions share. What is wrong, entanglement.py measures.

Shape suffixes: S sequences, P pairs, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from transformers import TrainerCallback

from fairlead.errors import InputError
from fairlead.kinds import SequenceStats

from .objectives.common import grouped
from .pair_gradients import Select, selected
from .statistics import Row


def balanced(d_w: torch.Tensor, d_l: torch.Tensor, norm_w: float, norm_l: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of pairs whose ratio is |g_l| / |g_w|, the centre of the band in which a step moves chosen and rejected apart:
    d_w -> d k/|g_w|, d_l -> d k/|g_l| with d = sqrt(d_w d_l), k = sqrt(|g_w| |g_l|), so that d_w d_l stays.

    d_w, d_l: [P]. norm_w, norm_l: of the gradients of mean s_w and mean s_l. Pairs whose weights are not both above zero, and all
    where a norm is zero, keep theirs.
    """
    if not (norm_w > 0 and norm_l > 0):
        return d_w, d_l
    both = (d_w > 0) & (d_l > 0)
    d, tilt = (d_w * d_l).clamp(min=0).sqrt(), math.sqrt(norm_l / norm_w)
    return torch.where(both, d * tilt, d_w), torch.where(both, d / tilt, d_l)


class NormalizedPairs(TrainerCallback):
    """Balances every training step: PreferenceTrainer(callbacks=[NormalizedPairs()]), with any objective of pairs.

    A plain step with d_w = d_l then moves along g_w/|g_w| - g_l/|g_l|: mean s_w does not fall and mean s_l does not rise, whatever
    the angle. The norms are those of the (micro-)batch, two further backward passes. params: over which they are taken; all that
    are trained, for that promise. smoothing: share that the running norms keep at each step, in the logarithm (0.98 for small
    batches); a resumed training starts them anew.
    """

    def __init__(self, params: str | Select = "all", *, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing: must be at least 0 and below 1, got {smoothing}")
        self.params, self.smoothing = params, smoothing
        self.trainer: Any = None
        self.log_norms: tuple[float, float] | None = None

    def attach(self, trainer: Any) -> None:
        """Become the trainer's `reweight`; called by the trainer."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("NormalizedPairs: needs whole gradients, which FSDP and DeepSpeed split; train with DDP or on one process")
        if not {"group", "role"} <= set(trainer.objective.needs):
            raise InputError(f"NormalizedPairs: {type(trainer.objective).__name__} does not compare pairs; use one that does, such as dpo")
        selected(trainer.model, self.params)
        self.trainer, trainer.reweight = trainer, self

    def __call__(self, dlogp_S: torch.Tensor, stats: SequenceStats) -> torch.Tensor:
        """The weights of this process's sequences, balanced."""
        assert stats.group is not None and stats.role is not None
        index, taken = grouped(stats.group, stats.role)
        if index.shape[1] != 2 or not bool(taken.all()) or bool((stats.role[index] != stats.role.new_tensor([1, -1])).any()):
            raise InputError("NormalizedPairs: works on pairs of one chosen and one rejected completion")
        w, l = index.unbind(1)  # noqa: E741
        norm_w, norm_l = (self._norm(stats.logp[side].sum()) for side in (w, l))
        if norm_w > 0 and norm_l > 0 and self.smoothing:
            norm_w, norm_l = self._smoothed(norm_w, norm_l)
        new_w, new_l = balanced(-dlogp_S[w], dlogp_S[l], norm_w, norm_l)
        out = dlogp_S.clone()
        out[w], out[l] = -new_w, new_l
        return out

    def _norm(self, total: torch.Tensor) -> float:
        """Norm of the gradient over all processes."""
        parameters = list(selected(self.trainer.model, self.params).values())
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return math.sqrt(sum(float(self.trainer.accelerator.reduce(g.float(), "sum").square().sum()) for g in grads))

    def _smoothed(self, norm_w: float, norm_l: float) -> tuple[float, float]:
        new = math.log(norm_w), math.log(norm_l)
        old = self.log_norms or new
        self.log_norms = (self.smoothing * old[0] + (1 - self.smoothing) * new[0], self.smoothing * old[1] + (1 - self.smoothing) * new[1])
        return math.exp(self.log_norms[0]), math.exp(self.log_norms[1])


def sparse_weights(rows: Sequence[Row]) -> torch.Tensor:
    """Weights of the completions' tokens, float32 [S, T] in the order of the sequences: 1 on the tokens in which a pair's
    completions differ, 0 on the blocks they share and beyond the end. `sparse_rows` puts them into the rows.

    rows: tokenised rows of pairs whose prompts are not empty. Completions that share everything but what one of them has more keep
    only that; InputError for a row that is no pair.
    """
    kept: list[list[float]] = []
    for index, row in enumerate(rows):
        if len(row["completion_ids"]) != 2:
            raise InputError(f"row {index}: {len(row['completion_ids'])} completions; the tokens of pairs are compared")
        pair = [[1.0] * len(ids) for ids in row["completion_ids"]]
        a, b = row["completion_ids"]
        for block in SequenceMatcher(a=a, b=b, autojunk=False).get_matching_blocks():
            for weight, start in zip(pair, (block.a, block.b), strict=True):
                weight[start : start + block.size] = [0.0] * block.size
        kept += pair
    width = max(map(len, kept), default=0)
    return torch.tensor([own + [0.0] * (width - len(own)) for own in kept]).reshape(len(kept), width)


def sparse_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `token_weights` of `sparse_weights`: PreferenceTrainer then trains, and measures its reference, on the tokens in
    which a pair's completions differ."""
    weights = iter(sparse_weights(rows).tolist())
    return [{**row, "token_weights": [next(weights)[: len(ids)] for ids in row["completion_ids"]]} for row in rows]
