"""Batches that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fairlead.kinds import SequenceStats

PAIR_A = {"logp": [-10.0, -12.0], "ref_logp": [-11.0, -11.5], "length": [5, 4]}  # u = 1, -0.5
PAIR_B = {"logp": [-22.0, -18.0], "ref_logp": [-20.0, -19.0], "length": [8, 9]}  # u = -2, 1


def stats(logp: Sequence[float], length: Sequence[int] | None = None, dtype: torch.dtype = torch.float64, **columns: Any) -> SequenceStats:
    """A batch in float64 whose logp asks for a gradient; lists of floats become tensors."""
    columns = {k: torch.tensor(v, dtype=dtype) if k in ("ref_logp", "reward", "weight") else v for k, v in columns.items()}
    extra = {k: torch.as_tensor(v, dtype=dtype) if not torch.is_tensor(v) else v for k, v in columns.pop("extra", {}).items()}
    return SequenceStats(
        torch.tensor(logp, dtype=dtype, requires_grad=True), torch.tensor(length or [1] * len(logp)), extra=extra, **columns
    )


def pair(which: dict[str, list[Any]], dtype: torch.dtype = torch.float64, **columns: Any) -> SequenceStats:
    """Pair A or B."""
    return stats(**which, dtype=dtype, group=[0, 0], role=["chosen", "rejected"], **columns)


def both(order: Sequence[int] = (0, 1, 2, 3), **columns: Any) -> SequenceStats:
    """Pairs A and B in one batch, in any order of the rows."""
    whole = {k: [(PAIR_A[k] + PAIR_B[k])[i] for i in order] for k in PAIR_A}
    group, role = [0, 0, 1, 1], ["chosen", "rejected"] * 2
    columns = {k: [v[i] for i in order] for k, v in columns.items()}
    return stats(**whole, group=[group[i] for i in order], role=[role[i] for i in order], **columns)


def random_groups(groups: int = 5, seed: int = 0, members: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Columns of random groups: the first of each chosen, the others rejected; rewards distinct, token log-probs added."""
    g = torch.Generator().manual_seed(seed)
    count = groups * members
    length = torch.randint(2, 9, (count,), generator=g)
    logp = -length * (0.3 + 2 * torch.rand(count, generator=g, dtype=dtype))
    role = torch.full((count,), -1)
    role[::members] = 1
    ref = logp + torch.randn(count, generator=g, dtype=dtype)
    return {
        "logp": logp, "length": length, "ref_logp": ref.clamp(max=-0.1), "group": torch.arange(count) // members, "role": role,
        "reward": torch.randn(count, generator=g, dtype=dtype),
    }  # fmt: skip
