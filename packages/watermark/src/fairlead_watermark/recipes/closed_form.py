"""Alignment resampling on a language model whose every probability is known: a bigram table.

The reward is the mean log-likelihood under the unmarked model, close to Gaussian within a prompt, so the bound of
arXiv 2506.04462 (Theorem 4.1) can be held against the measured gain. One key per prompt, shared by its candidates:
under a single key its lists, not the mark, would decide the sign of the shift.

Shape suffixes: P prompts, N candidates, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fairlead_kernels import gumbel_sample

from .. import bounds
from ..gumbel import Gumbel
from ..kgw import KGW
from ..modified_gumbel import ModifiedGumbel

CONTEXT_WIDTH = 2
MARKS = ("kgw", "modified-gumbel", "gumbel")
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Draws:
    """Candidates ids_PNT (answers only), their rewards_PN and the detector's p-values_PN of one way to generate."""

    ids_PNT: torch.Tensor
    rewards_PN: np.ndarray
    p_values_PN: np.ndarray | None = None


def make_mark(name: str, key: int, vocab_size: int) -> Any:
    """The mark under test. Plain Gumbel goes without generation dedup: its candidates are equal either way."""
    if name == "kgw":
        return KGW(
            vocab_size=vocab_size, key=key, gamma=0.25, delta=2.0, context_width=CONTEXT_WIDTH,
            dedup_contexts="single_turn",
        )  # fmt: skip
    if name == "modified-gumbel":
        return ModifiedGumbel(
            vocab_size=vocab_size, key=key, context_width=CONTEXT_WIDTH, dedup_contexts="single_turn"
        )
    return Gumbel(vocab_size=vocab_size, key=key, context_width=CONTEXT_WIDTH)


def keys(seed: int, count: int, stream: str) -> list[int]:
    """Independent 63-bit keys; `stream` separates the uses within a run."""
    root = np.random.SeedSequence([seed, *stream.encode()])
    return [int(k) for k in np.random.default_rng(root).integers(0, 2**63, size=count)]


def rollout(
    table_VV: torch.Tensor, prompts_P2: torch.Tensor, draw: Callable[..., torch.Tensor], seeds_P: torch.Tensor, length: int
) -> torch.Tensor:
    """Extend every prompt by `length` tokens, `draw(logits, ids, seeds, positions)` choosing each."""
    rows, start = prompts_P2.shape
    ids_PT = torch.empty(rows, start + length, dtype=torch.int64)
    ids_PT[:, :start] = prompts_P2
    for t in range(start, start + length):
        positions = torch.full((rows,), t - start, dtype=torch.int64)
        ids_PT[:, t] = draw(table_VV[ids_PT[:, t - 1]], ids_PT[:, :t], seeds_P, positions)
    return ids_PT


def rewards(table_VV: torch.Tensor, ids_PT: torch.Tensor, start: int) -> torch.Tensor:
    """Mean log-likelihood per token of the answers, float64 [P]."""
    return table_VV[ids_PT[:, start - 1 : -1], ids_PT[:, start:]].double().mean(-1)


def draw_plain(table_VV: torch.Tensor, prompts_P2: torch.Tensor, n: int, length: int, seed: int) -> Draws:
    """n unmarked candidates of every prompt."""
    rows = prompts_P2.repeat_interleave(n, 0)
    noise = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 2**62, (rows.shape[0],), generator=noise)
    ids = rollout(
        table_VV, rows, lambda z, _, s, p: gumbel_sample(z, seeds=s, positions=p), seeds, length
    )
    shape = (prompts_P2.shape[0], n)
    return Draws(ids[:, 2:].reshape(*shape, length), rewards(table_VV, ids, 2).reshape(shape).numpy())


def draw_marked(
    name: str, table_VV: torch.Tensor, prompts_P2: torch.Tensor, n: int, length: int, seed: int,
    progress: Callable[[int, int], None],
) -> Draws:  # fmt: skip
    """n marked candidates of every prompt, each prompt under its own key."""
    vocab_size = table_VV.shape[1]
    noise = torch.Generator().manual_seed(seed + 1)
    ids, scores, p_values = [], [], []
    for index, key in enumerate(keys(seed, len(prompts_P2), name)):
        mark = make_mark(name, key, vocab_size)
        sampler = mark.sampler(prompt_length=2)
        seeds = torch.randint(0, 2**62, (n,), generator=noise)
        out = rollout(
            table_VV, prompts_P2[index].expand(n, 2),
            lambda z, i, s, p, sampler=sampler: sampler(z, i, seeds_B=s, positions_B=p), seeds, length,
        )  # fmt: skip
        ids.append(out[:, 2:])
        scores.append(rewards(table_VV, out, 2))
        p_values.append(mark.detect(out[:, 2:]).p_value)
        progress(index + 1, len(prompts_P2))
    return Draws(torch.stack(ids), torch.stack(scores).numpy(), torch.stack(p_values).numpy())


def best_of(rewards_PN: np.ndarray, n: int) -> np.ndarray:
    """Reward of best-of-n per prompt, averaged over the disjoint groups of n candidates, float64 [P]."""
    groups = rewards_PN.reshape(len(rewards_PN), -1, n)
    return groups.max(-1).mean(-1)


def chosen(values_PN: np.ndarray, rewards_PN: np.ndarray, n: int) -> np.ndarray:
    """`values` of the candidates that best-of-n returns, flattened over prompts and groups."""
    count = len(rewards_PN)
    winner = rewards_PN.reshape(count, -1, n).argmax(-1)
    return np.take_along_axis(values_PN.reshape(count, -1, n), winner[..., None], -1).ravel()


def summary(name: str, draws: Draws, plain: Draws) -> dict[str, Any]:
    """eps, gaps with standard errors, bound, detection power and duplicates of one mark: plain JSON."""
    assert draws.p_values_PN is not None
    rewards_PN, base_P = draws.rewards_PN, plain.rewards_PN.mean(-1)
    count = len(base_P)
    sigma = float(rewards_PN.std(-1, ddof=1).mean())
    gaps = {n: best_of(rewards_PN, n) - base_P for n in SIZES}
    eps = -float(gaps[1].mean())
    first = draws.ids_PNT[:, :1]
    return {
        "mark": name,
        "eps": eps,
        "sigma": sigma,
        "gap": {str(n): float(g.mean()) for n, g in gaps.items()},
        "se": {str(n): float(g.std(ddof=1) / np.sqrt(count)) for n, g in gaps.items()},
        "gain": {str(n): float((gaps[n] - gaps[1]).mean()) for n in SIZES},
        "bound": {str(n): bounds.resampling_gain(n, sigma) - eps for n in SIZES},
        "power": {str(n): float((chosen(draws.p_values_PN, rewards_PN, n) < 0.01).mean()) for n in SIZES},
        "evidence": {
            str(n): float(np.median(-np.log10(np.maximum(chosen(draws.p_values_PN, rewards_PN, n), 1e-300))))
            for n in SIZES
        },
        "duplicates": float((draws.ids_PNT[:, 1:] == first).all(-1).double().mean()),
    }


def null_rate(name: str, table_VV: torch.Tensor, texts: int, length: int, seed: int) -> float:
    """Share of unmarked texts with p < 0.01, each text under a key of its own."""
    prompts = torch.randint(0, table_VV.shape[0], (texts, 2), generator=torch.Generator().manual_seed(seed + 2))
    ids = draw_plain(table_VV, prompts, 1, length, seed + 3).ids_PNT[:, 0]
    hits = sum(
        float(make_mark(name, key, table_VV.shape[1]).detect(row[None]).p_value) < 0.01
        for key, row in zip(keys(seed, texts, f"null {name}"), ids, strict=True)
    )
    return hits / texts


def guard_shift(name: str, seed: int, key_count: int = 200, contexts: int = 50) -> dict[str, float]:
    """A two-way first decision (refuse or comply) under a mark: how far both error rates move, exactly per key.

    The unmarked model refuses harmful prompts with probability .95 and benign ones with .05. Best-of-4 draws all
    four from one list, so its error rate is the mean of the fourth power, not the fourth power of the mean.
    """
    width, last = 64, torch.arange(contexts)
    ids = torch.stack([torch.zeros_like(last), last], 1)
    rates: dict[str, list[float]] = {"unsafe": [], "overrefusal": [], "unsafe_best_of_4": []}
    for key in keys(seed, key_count, f"guard {name}"):
        mark = make_mark(name, key, width)
        for side, refuse in (("unsafe", 0.95), ("overrefusal", 0.05)):
            logits = torch.full((contexts, width), -torch.inf)
            logits[:, 0], logits[:, 1] = np.log(refuse), np.log1p(-refuse)  # token 0 refuses, token 1 complies
            law = mark.processor()(ids, logits).softmax(-1)
            wrong = law[:, 1 if side == "unsafe" else 0].double()
            rates[side].append(float(wrong.mean()))
            if side == "unsafe":
                rates["unsafe_best_of_4"].append(float((wrong**4).mean()))
    return {side: float(np.mean(values)) for side, values in rates.items()}


def experiment(
    table_VV: torch.Tensor, prompts: int, length: int, seed: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """The whole experiment as plain JSON."""
    start = torch.Generator().manual_seed(seed)
    prompts_P2 = torch.randint(0, table_VV.shape[0], (prompts, 2), generator=start)
    plain = draw_plain(table_VV, prompts_P2, SIZES[-1], length, seed)
    marks = {}
    for name in MARKS:
        draws = draw_marked(
            name, table_VV, prompts_P2, SIZES[-1], length, seed, partial(progress, name)
        )  # fmt: skip
        marks[name] = summary(name, draws, plain) | {
            "null_rate": null_rate(name, table_VV, 2000, length, seed),
            "guard": guard_shift(name, seed),
        }
    return {"prompts": prompts, "length": length, "marks": marks}


def checks(result: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """The thresholds of the experiment: name, passed, the figures."""
    marks = result["marks"]
    for name, sigmas in (("kgw", 3.0), ("modified-gumbel", 2.0)):
        m = marks[name]
        ratio = m["eps"] / m["se"]["1"]
        yield f"closed form, {name}: the mark costs reward", ratio > sigmas, f"eps {m['eps']:.4f}, {ratio:.1f} SE > {sigmas:g}"
        ratio = m["gap"]["4"] / m["se"]["4"]
        yield f"closed form, {name}: best of 4 repairs it", ratio > 3, f"gap(4) {m['gap']['4']:+.4f}, {ratio:.1f} SE > 3"
        for n in ("2", "4", "8"):
            yield (
                f"closed form, {name}: gain above the bound at n = {n}",
                m["gap"][n] >= m["bound"][n] - 2 * m["se"][n],
                f"gap {m['gap'][n]:+.4f} against bound {m['bound'][n]:+.4f} (2 SE {2 * m['se'][n]:.4f})",
            )
        yield (
            f"closed form, {name}: the mark is still there",
            min(m["power"]["1"], m["power"]["4"]) >= 0.99 and m["power"]["4"] >= m["power"]["1"] - 0.02,
            f"detected at 1 %: n = 1 {m['power']['1']:.3f}, n = 4 {m['power']['4']:.3f}",
        )
    for name in MARKS:
        rate = marks[name]["null_rate"]
        yield f"closed form, {name}: calibrated on unmarked text", 0.003 <= rate <= 0.02, f"p < 0.01 on {rate:.2%} of 2000 texts"
    gains = [abs(marks["gumbel"]["gain"][str(n)]) for n in SIZES]
    yield (
        "closed form, gumbel: all candidates equal, no gain",
        marks["gumbel"]["duplicates"] == 1.0 and max(gains) < 1e-12,
        f"duplicates {marks['gumbel']['duplicates']:.0%}, largest gain {max(gains):.1e}",
    )
    duplicates = max(marks["kgw"]["duplicates"], marks["modified-gumbel"]["duplicates"])
    yield "closed form: KGW and modified Gumbel candidates differ", duplicates == 0.0, f"duplicates {duplicates:.0%}"
    for name, low, high in (("kgw", 0.075, 0.095), ("gumbel", 0.04, 0.06), ("modified-gumbel", 0.056, 0.076)):
        g = marks[name]["guard"]
        yield (
            f"closed form, {name}: shift of a 95 % guard",
            low <= g["unsafe"] <= high and low <= g["overrefusal"] <= high,
            f"unsafe {g['unsafe']:.4f}, over-refusal {g['overrefusal']:.4f}, both within [{low}, {high}]",
        )
