"""Calibration: a reward as its quantile under a reference policy, per prompt, and the maps that are put on top.

Balashankar et al., "InfAlign" (arXiv 2412.19792): C(y) = P(r(z) < r(y)) + P(r(z) = r(y)) / 2 over reference answers z to
the same prompt. E C = 1/2 under the reference, and no strictly increasing map of r changes it; K samples give it the
resolution 1/K, so keep K above 10 t under exp(t). Leaves to others: scoring (`calibrated`), which transform serves which
procedure (fairlead-decoding).

Shape suffixes: B pairs, P prompts, K references of a prompt, N references of all prompts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError, UnknownNameError
from ..files import atomic_write

Array = NDArray[np.float64]
_FORMAT = "fairlead-calibration-1"


class UnknownPromptError(InputError, KeyError):
    """A prompt without references was looked up."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class CalibrationTable:
    """Reference rewards of many prompts, sorted, in one flat buffer: float64 values_N, int64 offsets [P + 1].

    fallback: what a prompt that is not in the table gets: None, an UnknownPromptError, or "pooled", its quantile among
    the references of all prompts (which lets the prompt's difficulty back in). info: text about where the references
    come from (model, sampling settings, reward), kept in the file.
    """

    def __init__(
        self, prompt_ids: Sequence[Any], values_N: torch.Tensor, offsets: torch.Tensor,
        fallback: Literal["pooled"] | None = None, info: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if fallback not in (None, "pooled"):
            raise InputError(f"fallback: must be None or 'pooled', got {fallback!r}")
        self.values_N, self.offsets = values_N, offsets
        self.fallback, self.info = fallback, dict(info or {})
        self._place: dict[Hashable, int] = {}
        for place, prompt in enumerate(prompt_ids):
            if self._place.setdefault(key(prompt), place) != place:
                raise InputError(f"calibration: the prompt {str(prompt)[:60]!r} is there twice; give its references once")
        self._pooled_N: torch.Tensor | None = None

    @classmethod
    def fit(
        cls, prompt_ids: Sequence[Any], ref_rewards: Any, *, least: int = 2,
        fallback: Literal["pooled"] | None = None, info: Mapping[str, str] | None = None,
    ) -> CalibrationTable:  # fmt: skip
        """From reference rewards [P, K], or P lists of any lengths.

        prompt_ids: P texts, numbers or id sequences. least: fewest references of a prompt. InputError for another number
        of rows, a NaN, too few references, a prompt that is there twice.
        """
        if isinstance(ref_rewards, (torch.Tensor, np.ndarray)) and ref_rewards.ndim != 2:
            raise InputError(f"ref_rewards: must be [P, K] or P lists, got the shape {list(ref_rewards.shape)}")
        if len(prompt_ids) != len(ref_rewards):
            raise InputError(f"ref_rewards: {len(prompt_ids)} prompts need as many rows, got {len(ref_rewards)}")
        rows = []
        for prompt, rewards in zip(prompt_ids, ref_rewards, strict=True):
            row_K = _float64(rewards, "ref_rewards")
            if len(row_K) < least:
                raise InputError(f"ref_rewards: the prompt {str(prompt)[:60]!r} has {len(row_K)} references; {least} or more are needed")
            rows.append(row_K.sort().values)
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return cls(prompt_ids, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64), offsets, fallback, info)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, prompt: Any) -> bool:
        return key(prompt) in self._place

    @property
    def prompt_ids(self) -> list[Any]:
        """The prompts, id sequences as tuples."""
        return list(self._place)

    def __call__(self, prompt_ids: Sequence[Any], rewards: Any, *, smoothed: bool = False) -> torch.Tensor:
        """C float64 [B] in [0, 1] of B rewards; smoothed: (K C + 1/2) / (K + 1), within (0, 1), for the log transform.

        Rewards are compared in their own precision: a float32 reward equals a reference that rounds to it. InputError for
        other lengths, a NaN, a prompt without references (UnknownPromptError, a KeyError as well).
        """
        rewards_B = _float64(rewards, "rewards")
        if len(rewards_B) != len(prompt_ids):
            raise InputError(f"rewards: {len(prompt_ids)} prompts need as many, got {len(rewards_B)}")
        if not len(rewards_B):
            return rewards_B
        found = [self._place.get(key(p)) for p in prompt_ids]
        known = [(i, place) for i, place in enumerate(found) if place is not None]
        if None in found and (self.fallback is None or not len(self.values_N)):
            missing = prompt_ids[found.index(None)]
            raise UnknownPromptError(f"calibration: no reference rewards for the prompt {str(missing)[:60]!r}")
        dtype = rewards.dtype if isinstance(rewards, torch.Tensor) and rewards.is_floating_point() else torch.float64
        double_count_B = torch.zeros(len(rewards_B), dtype=torch.int64)
        size_B = torch.full((len(rewards_B),), len(self.values_N))
        at = torch.tensor([i for i, _ in known], dtype=torch.int64)
        places = torch.tensor([place for _, place in known], dtype=torch.int64)
        starts, ends = self.offsets[places], self.offsets[places + 1]
        size_B[at] = ends - starts
        double_count_B[at] = _double_count(self.values_N, starts, ends, rewards_B[at], dtype)
        if len(known) < len(rewards_B):
            rest = torch.ones(len(rewards_B), dtype=torch.bool).index_fill(0, at, False).nonzero()[:, 0]
            whole = torch.zeros_like(rest), torch.full_like(rest, len(self.values_N))
            double_count_B[rest] = _double_count(self._pool(), *whole, rewards_B[rest], dtype)
        count_B = double_count_B.double() / 2
        return (count_B + 0.5) / (size_B + 1) if smoothed else count_B / size_B

    def merged(self, other: CalibrationTable) -> CalibrationTable:
        """The prompts of both tables; InputError where they share one."""
        offsets = torch.cat([self.offsets, self.offsets[-1] + other.offsets[1:]])
        values_N = torch.cat([self.values_N, other.values_N])
        return CalibrationTable([*self.prompt_ids, *other.prompt_ids], values_N, offsets, self.fallback, {**other.info, **self.info})

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file (values, offsets, the prompts as JSON), whole or not there."""
        from safetensors.torch import save

        prompts = bytearray(json.dumps(self.prompt_ids).encode("ascii"))
        tensors = {
            "values": self.values_N.contiguous(), "offsets": self.offsets.contiguous(),
            "prompts": torch.frombuffer(prompts, dtype=torch.uint8),
        }  # fmt: skip
        metadata = {"format": _FORMAT, "fallback": self.fallback or "", "info": json.dumps(self.info)}
        with atomic_write(path, "wb") as stream:
            stream.write(save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """The table in a file of `save`; InputError for anything else."""
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("it is a safetensors file of something else")
                values_N, offsets, prompts = (file.get_tensor(part) for part in ("values", "offsets", "prompts"))
            ids = [tuple(p) if isinstance(p, list) else p for p in json.loads(prompts.numpy().tobytes())]
            info = json.loads(metadata["info"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"calibration table {name!r}: cannot be read: {cause}") from None
        if len(offsets) != len(ids) + 1 or int(offsets[0]) or int(offsets[-1]) != len(values_N) or bool((offsets.diff() <= 0).any()):
            raise InputError(f"calibration table {name!r}: its offsets do not fit its prompts and values")
        return cls(ids, values_N, offsets, "pooled" if metadata.get("fallback") == "pooled" else None, info)

    def _pool(self) -> torch.Tensor:
        if self._pooled_N is None:
            self._pooled_N = self.values_N.sort().values
        return self._pooled_N


def key(prompt: Any) -> Hashable:
    """What a prompt is known by: a text or number as it is, ids (a tensor or list) as a tuple of numbers."""
    if isinstance(prompt, (torch.Tensor, np.ndarray, np.generic)):
        prompt = prompt.tolist()
    if isinstance(prompt, (list, tuple)) and all(isinstance(t, int) for t in prompt):
        return tuple(prompt)
    if not isinstance(prompt, (str, int)):
        raise InputError(f"calibration: a prompt must be text, a number or token ids, got a {type(prompt).__name__}")
    return prompt


def _float64(values: Any, what: str) -> torch.Tensor:
    try:
        flat = torch.as_tensor(values, dtype=torch.float64).detach().cpu().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what}: must be numbers, got a {type(values).__name__} that is not") from None
    if bool(flat.isnan().any()):
        raise InputError(f"{what}: number {int(flat.isnan().nonzero()[0])} is NaN; leave out what cannot be scored")
    return flat


def _double_count(
    values_N: torch.Tensor, starts_B: torch.Tensor, ends_B: torch.Tensor, rewards_B: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """References below plus references up to each reward, int64 [B]: twice the mid-rank count, by two binary searches in
    each segment of the buffer, all at once. References are rounded to dtype, which leaves them sorted."""
    found = []
    for upto in (False, True):
        low, high = starts_B.clone(), ends_B.clone()
        while bool((low < high).any()):
            middle = (low + high) // 2
            value = values_N[middle.clamp(max=len(values_N) - 1)].to(dtype).double()
            right = (low < high) & ((value <= rewards_B) if upto else (value < rewards_B))
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, torch.minimum(middle, high))
        found.append(low - starts_B)
    return found[0] + found[1]


@dataclass(frozen=True)
class Transform:
    """A map of calibrated rewards, called on numbers in [0, 1], float64. An affine change of it only rescales beta.

    monotone: it is increasing. normalised: it maps 0 to 0 and 1 to 1. smoothed: it wants the quantile (K C + 1/2) / (K + 1),
    which is never 0. InputError for a value outside [0, 1].
    """

    name: str
    function: Callable[[Array], Array]
    monotone: bool = True
    normalised: bool = False
    smoothed: bool = False

    def __call__(self, c: ArrayLike) -> Array:
        values = np.asarray(c, dtype=np.float64)
        wrong = ~((values >= 0) & (values <= 1))
        if wrong.any():
            raise InputError(f"C: calibrated rewards lie in [0, 1], got {float(values[wrong].flat[0])}")
        return np.asarray(self.function(values), dtype=np.float64)

    @classmethod
    def identity(cls) -> Transform:
        """C itself: optimal for the win rate of a single sample."""
        return cls("identity", _identity, normalised=True)

    @classmethod
    def log(cls) -> Transform:
        """log C, -inf at 0; beta = 1/(n-1) gives the best-of-n distribution."""
        return cls("log", _log, smoothed=True)

    @classmethod
    def exp(cls, t: float, normalised: bool = True) -> Transform:
        """(e^(t C) - 1) / (e^t - 1), increasing from 0 to 1 for either sign of t, the identity as t -> 0: near the optimum
        for best-of-n (t > 0) and worst-of-n (t < 0); or, not normalised, sign(t) e^(t C), whose beta is |e^t - 1| times as
        large."""
        if not math.isfinite(t):
            raise InputError(f"t: must be a finite number, got {t}")
        if normalised:
            return cls(f"exp:{t:g}", partial(_exp, float(t)), normalised=True)
        if t == 0 or abs(t) > 700:
            raise InputError(f"t: sign(t) exp(t C) needs t other than 0 and of size up to 700, got {t}; use the normalised form")
        return cls(f"exp:{t:g}, raw", partial(_raw_exp, float(t)))

    @classmethod
    def power(cls, n: float) -> Transform:
        """C^n, n > 0."""
        if not 0 < n < math.inf:
            raise InputError(f"n: must be a number above 0, got {n}")
        return cls(f"power:{n:g}", partial(_power, float(n)), normalised=True)


def as_transform(value: Any) -> Any:
    """A transform from itself, any function of C, or "identity", "log", "exp:T", "power:N", as in "exp:10"."""
    if callable(value):
        return value
    name, _, number = str(value).partition(":")
    plain: dict[str, Callable[[], Transform]] = {"identity": Transform.identity, "log": Transform.log}
    makers: dict[str, Callable[[float], Transform]] = {"exp": Transform.exp, "power": Transform.power}
    if isinstance(value, str) and name in plain and not number:
        return plain[name]()
    if isinstance(value, str) and name in makers and number:
        try:
            return makers[name](float(number))
        except ValueError as error:
            raise InputError(f"transform {value!r}: {error}") from None
    raise UnknownNameError("transform", str(value), [*plain, "exp:10", "exp:-10", "power:4"])


def _identity(c: Array) -> Array:
    return c


def _power(n: float, c: Array) -> Array:
    return np.asarray(c**n)


def _log(c: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(c))


def _raw_exp(t: float, c: Array) -> Array:
    return np.asarray(np.sign(t) * np.exp(t * c))


def _exp(t: float, c: Array) -> Array:
    if abs(t) < 1e-8:
        return c + t * c * (c - 1) / 2
    if t > 0:  # the form whose exponents are at most 0
        return np.asarray((np.exp(t * (c - 1)) - np.exp(-t)) / -np.expm1(-t))
    return np.asarray(np.expm1(t * c) / np.expm1(t))
