"""What the draft-alignment recipe stands on: losses of a draft, a chain whose optimum is known, characters of real text.

Losses compare next-token laws q (target) and p (draft) over the whole vocabulary (arXiv 2403.00858): ce, kl, rkl, tvd and
tvdpp. The total variation distance TVD = sum |p - q| / 2 is the chance that a proposal is refused. Its gradient is that of a
policy with the reward r = [q > p]; TVD++ puts (r - mean) / deviation in its place, which over a whole vocabulary is the
same gradient over the deviation.

Shape suffixes: T positions, V vocabulary, S pairs of letters, N texts, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fairlead.errors import InputError

LOSSES = ("kl", "rkl", "tvd", "tvdpp")


def draft_loss(kind: str, draft_TV: torch.Tensor, target_TV: torch.Tensor, weight_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean loss of draft logits [T, V] against target logits [T, V]; weight_T sums to 1, default equal weights."""
    logp, logq = draft_TV.log_softmax(-1), target_TV.detach().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    weight = torch.full_like(p[:, 0], 1 / len(p)) if weight_T is None else weight_T
    if kind == "kl":
        each = (q * (logq - logp)).sum(-1)
    elif kind == "rkl":
        each = (p * (logp - logq)).sum(-1)
    elif kind == "tvd":
        each = 0.5 * (p - q).abs().sum(-1)
    elif kind == "tvdpp":
        each = -(p * advantage(p, q, weight)).detach().mul(logp).sum(-1)
    else:
        raise InputError(f"loss: one of {', '.join(LOSSES)} is needed, got {kind!r}")
    return (weight * each).sum()


def advantage(p_TV: torch.Tensor, q_TV: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """(r - mean) / deviation of r = [q > p] over all positions and tokens; 0 where nothing varies."""
    r = (q_TV > p_TV).to(p_TV.dtype)
    mean = (weight_T[:, None] * r).sum() / r.shape[1]
    deviation = ((weight_T[:, None] * (r - mean) ** 2).sum() / r.shape[1]).sqrt()
    return (r - mean) / deviation if float(deviation) > 0 else torch.zeros_like(r)


def acceptance(draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Chance that a proposal is accepted, sum min(p, q) = 1 - TVD, from logits [..., V]."""
    return torch.minimum(draft.softmax(-1), target.softmax(-1)).sum(-1)


def chain_experiment(seed: int, size: int, steps: int) -> dict[str, float]:
    """Acceptance of a first-order draft of a second-order chain: after KL, and after as many steps of each loss from there.

    The draft sees the last letter alone, so no loss brings it to the target; positions are weighted by the target's
    stationary law.
    """
    target_SV, weight_S = draw_chain(size, seed)
    last = torch.arange(size).repeat(size)  # the draft's context of each pair

    def train(table: torch.Tensor, kind: str) -> torch.Tensor:
        table = table.clone().requires_grad_()
        optimizer = torch.optim.Adam([table], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            draft_loss(kind, table[last], target_SV, weight_S).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return table.detach()

    def accepted(table: torch.Tensor) -> float:
        return float((weight_S * acceptance(table[last], target_SV)).sum())

    warm = train(torch.zeros(size, size, dtype=torch.float64), "kl")
    return {"warm": accepted(warm), **{kind: accepted(train(warm, kind)) for kind in LOSSES}}


def draw_chain(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A second-order chain: logits [V^2, V] of letter c after a, b, 2 N(0, 1) of (b, c) plus 2 N(0, 1) of (a, b, c), and the
    stationary law of its pairs [V^2]. A chain that stays with a few pairs for ever (fewer than V of them, by the
    exponential of the law's entropy) is next to a constant, which every draft follows; another is drawn then."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        pair_VV = torch.randn(size, size, generator=generator, dtype=torch.float64)
        triple_VVV = torch.randn(size, size, size, generator=generator, dtype=torch.float64)
        target_SV = (2 * pair_VV + 2 * triple_VVV).flatten(0, 1)
        weight_S = stationary(target_SV.softmax(-1))
        if float(torch.special.entr(weight_S).sum().exp()) >= size:
            return target_SV, weight_S


def stationary(law_SV: torch.Tensor) -> torch.Tensor:
    """Stationary law of the pairs (a, b) of a second-order chain, [V^2], by power iteration."""
    size = law_SV.shape[1]
    weight = torch.full((size, size), 1 / size**2, dtype=law_SV.dtype)
    for _ in range(500):
        weight = (weight[:, :, None] * law_SV.view(size, size, size)).sum(0)
    return weight.flatten()


def fit(net: Any, loss: Callable[[Any, torch.Generator], torch.Tensor], steps: int, rate: float, seed: int, tell: Callable[[int, int], None]) -> Any:
    """AdamW with a warm-up and a cosine; `loss(model, generator)` draws its own batch. The model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, generator).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            tell(step, steps)
    return net.eval()


def next_letter_loss(text: torch.Tensor, batch: int, length: int) -> Callable[[Any, torch.Generator], torch.Tensor]:
    """Cross-entropy on random windows of a text."""

    def loss(net: Any, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(0, len(text) - length - 1, (batch,), generator=generator)
        windows = text[starts[:, None] + torch.arange(length + 1)]
        logits = net(input_ids=windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    return loss


def distillation_loss(kind: str, texts_NL: torch.Tensor, target_NLV: torch.Tensor, start: int, batch: int) -> Callable[[Any, torch.Generator], torch.Tensor]:
    """A draft loss on the answers of texts whose first `start` tokens are the prompt; target_NLV are the target's logits at
    the answers' positions, each predicting the next token."""

    def loss(net: Any, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(0, len(texts_NL), (batch,), generator=generator)
        logits = net(input_ids=texts_NL[rows, :-1], use_cache=False).logits[:, start - 1 :]
        return draft_loss(kind, logits.flatten(0, 1), target_NLV[rows].flatten(0, 1))

    return loss


@torch.inference_mode()
def answer_logits(net: Any, texts_NL: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [N, L - start, V] that predict the answers' tokens."""
    parts = [net(input_ids=part[:, :-1], use_cache=False).logits[:, start - 1 :] for part in texts_NL.split(256)]
    return torch.cat(parts)
