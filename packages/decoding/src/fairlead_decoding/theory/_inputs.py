"""Arrays at the edge of theory: conversion from torch, float64, and errors that name the entry at fault."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError

Array = np.ndarray


def as_float64(values: Any, name: str) -> Array:
    """float64 array of numbers, a numpy array or a torch tensor (detached, on the CPU); NaN is refused by its index."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    wrong = np.isnan(array)
    if wrong.any():
        raise InputError(f"{name}: entry {_place(wrong)} is NaN; numbers are needed")
    return array


def as_finite(values: Any, name: str) -> Array:
    """As `as_float64`, without infinities."""
    array = as_float64(values, name)
    wrong = ~np.isfinite(array)
    if wrong.any():
        raise InputError(f"{name}: entry {_place(wrong)} is {array[wrong].flat[0]}; finite numbers are needed")
    return array


def as_log_distribution(log_p: Any, name: str = "log_p") -> Array:
    """Normalised log-probabilities [M] or [B, M]; what rounding left of the sum is divided out."""
    array = as_float64(log_p, name)
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"{name}: must have shape [M] or [B, M] with M >= 1, got {list(array.shape)}")
    total = logsumexp(array)
    wrong = ~(np.abs(total) < 1e-6)
    if wrong.any():
        raise InputError(
            f"{name}: must be log-probabilities that sum to 1, but their logsumexp is {total[wrong].flat[0]:.6g}"
            + (f" in row {_place(wrong)}" if array.ndim == 2 else "")
        )
    return array - total[..., None]


def as_problem(log_p: Any, r: Any) -> tuple[Array, Array]:
    """A reference distribution and a reward of one shape, [M] or [B, M]; a reward [M] serves every row."""
    log_p, r = as_log_distribution(log_p), as_finite(r, "r")
    if r.shape != log_p.shape:
        if r.ndim == 1 and log_p.ndim == 2 and r.shape[0] == log_p.shape[1]:
            r = np.broadcast_to(r, log_p.shape)
        elif r.ndim == 2 and log_p.ndim == 1 and log_p.shape[0] == r.shape[1]:
            log_p = np.broadcast_to(log_p, r.shape)
        else:
            raise InputError(f"r: must have the shape of log_p, {list(log_p.shape)}, got {list(r.shape)}")
    return log_p, r


def as_letters(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """log p and log q over the letters with p > 0: [A] each. q > 0 there, and need not be normalised."""
    p, q = as_finite(p, "p"), as_finite(q, "q")
    if p.ndim != 1 or p.shape != q.shape or not p.size:
        raise InputError(f"p and q: must be one-dimensional and equally long, got shapes {list(p.shape)} and {list(q.shape)}")
    if (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise InputError(f"p: must be a distribution, got least entry {p.min():.6g} and sum {p.sum():.6g}")
    if (q[p > 0] <= 0).any():
        raise InputError(f"q: must be above 0 where p is; letter {_place((p > 0) & (q <= 0))} is not")
    kept = p > 0
    return np.log(p[kept] / p.sum()), np.log(q[kept])


def as_n(n: float, name: str = "n") -> float:
    """A number of draws, real and at least 1."""
    value = float(n)
    if not 1 <= value < np.inf:
        raise InputError(f"{name}: must be a finite number of at least 1, got {n}")
    return value


def logsumexp(values: Array, keep: bool = False) -> Array:
    """log sum exp over the last axis; -inf where every entry is -inf."""
    top = values.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(values - top).sum(-1, keepdims=True)) + top
    return np.asarray(total if keep else total[..., 0])


def expectation(log_p: Array, values: Array) -> Array:
    """sum p values over the last axis, with 0 times anything 0."""
    p = np.exp(log_p)
    return np.asarray(np.where(p > 0, p * np.where(p > 0, values, 0.0), 0.0).sum(-1))


def divergence(log_a: Array, log_b: Array) -> Array:
    """sum a log(a / b) over the last axis; 0 log 0 is 0, and it is inf where a draws what b never does."""
    with np.errstate(invalid="ignore"):
        ratio = np.where(log_a > -np.inf, log_a - log_b, 0.0)
    return np.asarray(np.maximum(expectation(log_a, ratio), 0.0))


def _place(wrong: Array) -> str:
    """Where the first offending entry is: "3" or "(0, 3)"."""
    index = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.ndim else ()
    return str(index[0]) if len(index) == 1 else str(index)
