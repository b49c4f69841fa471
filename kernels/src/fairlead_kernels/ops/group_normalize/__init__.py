"""Rewards of a group of responses made comparable: advantages of policy-gradient methods and calibrated quantiles.

With mean m and unbiased deviation s of a group's n rewards r:
    grpo     (r - m) / (s + eps)                     GRPO, arXiv 2402.03300
    dr-grpo  r - m                                   Dr. GRPO, arXiv 2503.20783
    batch    (r - m) / (s of all rewards + eps)
    rloo     r - mean of the others = n / (n - 1) (r - m)     RLOO, arXiv 2402.14740
    quantile share of the group at or below r;  midrank: ties count half      InfAlign, arXiv 2412.19792
"""

from __future__ import annotations

import warnings

import torch

from ... import checks, library
from .spec import KINDS, SPECS

library.define(SPECS)
_group_normalize = torch.ops.fairlead.group_normalize.default

__all__ = ["group_normalize"]


def group_normalize(
    rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str = "grpo", eps: float = 1e-4, nan: str = "raise"
) -> torch.Tensor:
    """An advantage (or quantile) per reward, group by group.

    rewards_N: floating [N], finite but for NaN = could not be scored. offsets: integer [G + 1], from 0 to N, rising:
    group g is rewards_N[offsets[g] : offsets[g + 1]]. kind: see above. eps: at least 0.
    nan: "raise"; "drop", out of all statistics and 0 itself; "zero", a reward of 0.
    Returns float32 [N] (float64 of float64). A group of equal rewards gets exactly 0. A group with one reward that counts
    gets 0, with a warning (quantile: 1; midrank: 1/2). Not differentiable: advantages are constants of a loss.
    ValueError / TypeError on anything else. Inside torch.compile values are not checked, and "raise" acts as "drop".
    """
    if not isinstance(rewards_N, torch.Tensor) or rewards_N.dim() != 1 or not rewards_N.is_floating_point():
        raise TypeError(f"rewards_N: a floating tensor [N] is needed, not {checks.describe(rewards_N)}")
    checks.one_of(kind, "kind", KINDS)
    checks.one_of(nan, "nan", ("raise", "drop", "zero"))
    if not 0 <= checks.number(eps, "eps") < float("inf"):
        raise ValueError(f"eps: a finite number of at least 0 is needed, not {eps}")
    offsets = checks.offsets(offsets, "offsets", rewards_N.shape[0], rewards_N.device)
    rewards_N = rewards_N.detach()
    if nan == "zero":
        rewards_N = torch.where(rewards_N.isnan(), 0.0, rewards_N)
    if not torch.compiler.is_compiling() and rewards_N.device.type != "meta":
        _check_values(rewards_N, offsets, kind, nan)
    result: torch.Tensor = _group_normalize(rewards_N, offsets, kind, float(eps))
    return result


def _check_values(rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str, nan: str) -> None:
    if bool(rewards_N.isinf().any()):
        raise ValueError("rewards_N: finite rewards are needed, some are infinite")
    unscored_N = rewards_N.isnan()
    if nan == "raise" and bool(unscored_N.any()):
        count = int(unscored_N.sum())
        raise ValueError(f'rewards_N: {count} of {len(rewards_N)} are NaN; nan="drop" or nan="zero" lets them be')
    sizes_G = offsets.diff()
    if bool((sizes_G <= 0).any()):
        raise ValueError("offsets: every group needs a member")
    before = torch.cat([offsets.new_zeros(1), (~unscored_N).cumsum(0)])
    alone = int((before[offsets].diff() == 1).sum())
    if alone and kind not in ("quantile", "midrank"):
        text = f"group_normalize: {alone} of {len(sizes_G)} groups have one reward that counts; its advantage is 0"
        warnings.warn(text, stacklevel=3)
