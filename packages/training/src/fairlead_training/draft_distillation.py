"""Aligning a draft with its target for speculative decoding: distillation on the target's own answers.

"Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs" (arXiv 2403.00858): the target answers
prompts, the draft is trained on these answers with TVD = 1/2 sum |p - q|, the chance that its proposal is refused, or with
TVD++. `chunked_distillation` takes the losses of `objectives.distillation` from hidden states, a tile of tokens at a time:
values, and in the same pass the gradients of hidden states and head, so logits of all tokens never exist together.
Left out: tvdpp-sampled in tiles (a tile holds the whole vocabulary, so the exact sum costs the same and has no noise).
Decoding is the decoder `speculative`'s, reached through the registry.

Shape suffixes: N scored tokens, C of a tile, V vocabulary, K kept tokens, B bins (V, or K and one for the rest), D hidden width.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import Trainer, TrainingArguments

from fairlead.errors import InputError
from fairlead.generation import DEFAULT_ROWS, encode, generate
from fairlead.logprobs import Head, at_head, completion_logprobs, linear_head, position_logits, unwrapped
from fairlead.models import logits_width
from fairlead_kernels.ops.linear_logprob.tiles import narrowed, product

from .objectives.distillation import DISTILLATION, tvd
from .references import model_fingerprint
from .statistics import Layout, Row, lay_out
from .trainer import collate

Loss = Literal["fkl", "rkl", "gkd", "tvd", "tvdpp"]
CHUNK = 256
LEAST = 1e-8  # of the missing mass, which rounding may lose


class FromHead(NamedTuple):
    """A target given by its hidden states [..., D] and its head (weight [V, D], bias [V] or None); no gradient."""

    hidden: torch.Tensor
    head: Head


class TopK(NamedTuple):
    """A stored target: ids int [..., K] and log-probabilities float [..., K] of its likeliest tokens at `temperature`.

    What they lack of 1 is one bin, on the draft's side too. A loss of bins is a lower bound of the loss; for TVD it is equal
    where q - p has one sign in the rest."""

    ids: torch.Tensor
    logp: torch.Tensor
    temperature: float = 1.0


class Distilled(NamedTuple):
    """loss: scalar with gradient. acceptance: sum min(p, q) at each position, float [...], 0 where masked.
    ahead: share of the vocabulary where q > p, mean over positions."""

    loss: torch.Tensor
    acceptance: torch.Tensor
    ahead: float


def chunked_distillation(
    hidden: torch.Tensor, head: Head, target: FromHead | TopK, mask: torch.Tensor | None = None, *, loss: Loss = "tvd",
    temperature: float = 1.0, beta: float = 0.5, reduction: Literal["token_mean", "sequence_mean"] = "token_mean", chunk: int = CHUNK,
) -> Distilled:  # fmt: skip
    """A distillation loss from hidden states, at most `chunk` tokens x V logits of each model at a time.

    hidden: the draft's states float [..., T, D], gradient. head: its weight [V, D] and bias, gradient where they ask for it.
    target: FromHead with the same V, or TopK. mask: bool [..., T], positions that count; others cost nothing. loss, temperature,
    beta, reduction: as in `objectives.distillation`; "none" has the dense functions alone, for the gradient is made on the way.
    Sums are float32, float64 where the states are. InputError for shapes, widths or settings that do not fit, and NaN.
    """
    if loss not in BINS:
        raise InputError(f"loss: must be one of {', '.join(BINS)}, got {loss!r}")
    if temperature <= 0 or chunk < 1 or not 0 <= beta <= 1:
        raise InputError(f"temperature above 0, chunk at least 1, beta in [0, 1] are needed, got {temperature}, {chunk}, {beta}")
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
    given = target.hidden if isinstance(target, FromHead) else target.ids
    if mask.shape != hidden.shape[:-1] or given.shape[:-1] != hidden.shape[:-1]:
        raise InputError(f"hidden: positions {list(hidden.shape[:-1])}, target {list(given.shape[:-1])}, mask {list(mask.shape)}; they must agree")
    width = len(head[0])
    if isinstance(target, FromHead) and len(target.head[0]) != width:
        raise InputError(f"target: its head has {len(target.head[0])} tokens, the draft's {width}; cut both to the tokens that they share")
    if isinstance(target, TopK) and (target.temperature != temperature or int(target.ids.max()) >= width):
        raise InputError(f"target: stored at temperature {target.temperature} with ids to {int(target.ids.max())}; needed: {temperature}, ids below {width}")
    flat_ND = hidden[mask]
    acceptance = torch.zeros(mask.shape, dtype=_wide(hidden), device=hidden.device)
    if not len(flat_ND):
        warnings.warn("mask: no position counts, the loss is 0", stacklevel=2)
        return Distilled(flat_ND.sum(), acceptance, 0.0)
    scale_N = _scale(mask.to(acceptance.dtype), reduction)[mask]
    if isinstance(target, TopK):
        chosen: FromHead | TopK = TopK(target.ids[mask].long(), target.logp[mask].detach(), temperature)
    else:
        chosen = FromHead(target.hidden[mask].detach(), target.head)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (flat_ND, *head)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        value, acceptance_N, ahead, slopes = _tiles(flat_ND, head, chosen, scale_N, loss, temperature, beta, chunk, need)
    if not bool(value.isfinite()):
        raise InputError(f"loss: {float(value)}; the states or heads are not finite, or {loss} meets tokens that the target rules out")
    acceptance[mask] = acceptance_N
    carried = _Carried.apply(value, slopes, flat_ND, *head) if any(need) else value  # type: ignore[no-untyped-call]
    return Distilled(carried, acceptance, ahead)


class _Carried(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, slopes: Sequence[torch.Tensor | None], *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*(None if s is None or x is None else s.to(x.dtype) for s, x in zip(slopes, inputs, strict=True)))
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if s is None else grad.to(s.dtype) * s for s in ctx.saved_tensors)


def _tiles(
    hidden_ND: torch.Tensor, head: Head, target: FromHead | TopK, scale_N: torch.Tensor, loss: str, temperature: float, beta: float,
    chunk: int, need: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor | None]]:  # fmt: skip
    """(loss, acceptance [N], share of bins with q > p, gradients of states, weight and bias)."""
    weight_VD = head[0]
    slopes = [torch.zeros_like(x, dtype=scale_N.dtype) if n and x is not None else None for n, x in zip(need, (hidden_ND, *head), strict=True)]
    value, pull, entropy = (scale_N.new_zeros(()) for _ in range(3))
    parts, ahead, entries = [], 0, 0
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        lp_CV = _log_law(hidden_ND[part], head, temperature)
        lp_CB, lq_CB = _both_laws(lp_CV, target, part, temperature)
        p_CB = lp_CB.exp()
        value_C, slope_CB = BINS[loss](lp_CB, lq_CB, p_CB, beta)
        value += (value_C * scale_N[part]).sum()
        parts.append(torch.minimum(p_CB, lq_CB.exp()).sum(-1))
        reward_CB = lq_CB > lp_CB
        ahead, entries = ahead + int(reward_CB.sum()), entries + reward_CB.numel()
        if loss == "tvdpp":
            each_CB = torch.where(p_CB == 0, 0.0, p_CB * lp_CB)
            pull += ((each_CB * reward_CB).sum(-1) * scale_N[part]).sum()
            entropy += (each_CB.sum(-1) * scale_N[part]).sum()
        if not any(need):
            continue
        slope_CB.mul_((scale_N[part] / temperature)[:, None])
        slope_CV = _spread(slope_CB, lp_CV, lp_CB, target.ids[part]) if isinstance(target, TopK) and lp_CB is not lp_CV else slope_CB
        factor_CV = narrowed(slope_CV, weight_VD)
        if slopes[0] is not None:
            product(factor_CV, weight_VD, slopes[0][part])
        if slopes[1] is not None:
            product(factor_CV.T, hidden_ND[part].to(weight_VD.dtype), slopes[1], add=True)
        if slopes[2] is not None:
            slopes[2] += slope_CV.sum(0)
    share = ahead / entries
    if loss == "tvdpp":  # rewards are 0 or 1, so their number gives their mean and deviation
        sigma = math.sqrt(share * (1 - share))
        value = -(pull - share * entropy) / sigma if sigma else torch.zeros_like(value)
        for slope in slopes:
            if slope is not None:
                slope.mul_(1 / sigma if sigma else 0.0)
    return value, torch.cat(parts), share, slopes


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """The factor of each position in the loss; mask holds 0 and 1."""
    if reduction == "token_mean":
        return mask / mask.sum()
    if reduction == "sequence_mean":
        count = mask.sum(-1, keepdim=True)
        return mask / count.clamp(min=1) / (count > 0).sum()
    raise InputError(f"reduction: must be token_mean or sequence_mean, got {reduction!r}")


def _log_law(hidden_CD: torch.Tensor, head: Head, temperature: float) -> torch.Tensor:
    """Log-probabilities [C, V] of a tile of tokens."""
    weight_VD, bias_V = head
    out = torch.empty(len(hidden_CD), len(weight_VD), dtype=_wide(hidden_CD), device=hidden_CD.device)
    logits_CV = product(hidden_CD.to(weight_VD.dtype), weight_VD.detach().T, out)
    if bias_V is not None:
        logits_CV.add_(bias_V)
    return torch.log_softmax(logits_CV.div_(temperature), -1)


def _both_laws(lp_CV: torch.Tensor, target: FromHead | TopK, part: slice, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [C, B] of draft and target over the vocabulary, or over the kept tokens and the rest."""
    if isinstance(target, FromHead):
        return lp_CV, _log_law(target.hidden[part], target.head, temperature)
    ids_CK, logp_CK = target.ids[part], target.logp[part].to(lp_CV.dtype)
    if ids_CK.shape[1] == lp_CV.shape[1]:
        return lp_CV, torch.empty_like(lp_CV).scatter_(1, ids_CK, logp_CK)
    rest_C1 = lp_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    missing_C1 = (1 - logp_CK.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([lp_CV.gather(1, ids_CK), rest_C1], 1), torch.cat([logp_CK, missing_C1], 1)


def _spread(slope_CB: torch.Tensor, lp_CV: torch.Tensor, lp_CB: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits from that of the bins: the rest's goes to its tokens in proportion to their chances."""
    share_CV = torch.where(lp_CB[:, -1:] == -torch.inf, 0.0, (lp_CV - lp_CB[:, -1:]).exp())
    return share_CV.mul_(slope_CB[:, -1:]).scatter_(1, ids_CK, slope_CB[:, :-1])


Slope = tuple[torch.Tensor, torch.Tensor]


def _fkl(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    q = lq.exp()
    return torch.where(q == 0, 0.0, q * (lq - lp)).sum(-1), p - q


def _rkl(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    gap = torch.where(p == 0, 0.0, lp - lq)
    value = (p * gap).sum(-1)
    return value, p * (gap - value[..., None])


def _gkd(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    """d/dp = (1 - beta) log(p / m) up to a constant: what m moves cancels."""
    if beta in (0, 1):
        return (_rkl if beta else _fkl)(lp, lq, p, beta)
    lm = torch.logaddexp(lq + math.log(beta), lp + math.log(1 - beta))
    q, gap = lq.exp(), torch.where(p == 0, 0.0, lp - lm)
    from_draft = (p * gap).sum(-1)
    value = beta * torch.where(q == 0, 0.0, q * (lq - lm)).sum(-1) + (1 - beta) * from_draft
    return value, (1 - beta) * p * (gap - from_draft[..., None])


def _tvd(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    """p_i (sum_j p_j r_j - r_i), with r 1 where q > p, 0 where q < p and 1/2 at ties, as autograd has it."""
    gap = p - lq.exp()
    value = 0.5 * gap.abs().sum(-1)
    pull = gap.sign_().mul_(0.5).mul_(p)
    return value, pull - p * pull.sum(-1, keepdim=True)


BINS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Slope]] = {
    "fkl": _fkl, "rkl": _rkl, "gkd": _gkd, "tvd": _tvd, "tvdpp": _tvd,
}  # fmt: skip
"""Value [C] and gradient in the logits [C, B] of laws over bins; tvdpp's is divided by sigma in the end."""


# -- the data -------------------------------------------------------------------------------------------------------------


def make_distillation_set(
    target: Any, tokenizer: Any, prompts: Sequence[Any], *, temperatures: Sequence[float] = (0.0, 0.3, 0.7, 1.0), top_p: float | None = 0.95,
    n: int = 1, max_new_tokens: int = 128, seed: int = 0, batch_size: int = DEFAULT_ROWS, path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The target's own answers, as rows {"prompt_ids", "completion_ids": [ids], "temperature"}, equal ones once.

    prompts: strings, chats or id tensors, as `fairlead.generate` takes them. n: answers per prompt and temperature. path: a file of
    JSON lines that is added to batch by batch; a killed call goes on there, and a finished one is read. progress: called with
    (batches done, batches). InputError for a file of another target, other prompts or settings.
    """
    if not prompts or not temperatures or n < 1 or batch_size < n:
        raise InputError(f"prompts, temperatures, n of at least 1 and batch_size of at least n are needed, got {len(prompts)}, {len(temperatures)}, {n}, {batch_size}")
    encoded = [encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    step = batch_size // n
    work = [(place, start) for place in range(len(temperatures)) for start in range(0, len(prompts), step)]
    settings = {"temperatures": list(temperatures), "top_p": top_p, "n": n, "max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    blocks, file = _kept(Path(path), settings, target, encoded) if path is not None else ([], None)
    for place, start in work[len(blocks) :]:
        made = generate(
            target, tokenizer, encoded[start : start + step], n=n, max_new_tokens=max_new_tokens, temperature=temperatures[place], top_p=top_p,
            seed=seed * len(temperatures) + place, first_index=start, batch_size=batch_size,
        )  # fmt: skip
        blocks.append(
            [{"prompt_ids": encoded[start + i].tolist(), "completion_ids": [g.ids.tolist()], "temperature": temperatures[place]}
             for i, group in enumerate(made) for g in group]
        )  # fmt: skip
        if file is not None:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(blocks[-1]) + "\n")
        if progress is not None:
            progress(len(blocks), len(work))
    unique = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"][0])): row for block in reversed(blocks) for row in reversed(block)}
    return list(reversed(unique.values()))


def _kept(path: Path, settings: dict[str, Any], target: Any, encoded: Sequence[torch.Tensor]) -> tuple[list[Any], Path]:
    """Whole batches of an earlier call; what a kill left of a line is cut off."""
    asked = hashlib.blake2b(json.dumps([ids.tolist() for ids in encoded]).encode(), digest_size=8).hexdigest()
    head = {**settings, "prompts": asked, "target": model_fingerprint(target)}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if whole and json.loads(whole[0]) != head:
        raise InputError(f"{path}: holds answers of another target, other prompts or other settings; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(whole) or json.dumps(head) + "\n", encoding="utf-8")
    return [json.loads(line) for line in whole[1:]], path


@torch.no_grad()
def top_k_targets(target: Any, rows: Sequence[Row], k: int, *, temperature: float = 1.0, batch_size: int = 8) -> list[dict[str, Any]]:
    """The rows with the target's k likeliest tokens at each answer token: "top_ids" int32 [tokens, k], "top_logp" float32 and
    "top_temperature". Logits of `batch_size` rows' answers exist at a time. InputError for a k beyond the vocabulary."""
    check_rows(rows)
    if not 1 <= k <= logits_width(target):
        raise InputError(f"k: must be between 1 and the vocabulary's {logits_width(target)}, got {k}")
    made: list[dict[str, Any]] = []
    for part in _batches(rows, batch_size):
        layout = lay_out(part, False, unwrapped(target).device)
        law_NV = (position_logits(target, layout.inputs, layout.places_N).float() / temperature).log_softmax(-1)
        logp_NK, ids_NK = law_NV.topk(k, -1)
        lengths = torch.bincount(layout.groups[layout.owner_N], minlength=len(part)).tolist()
        for row, ids, logp in zip(part, ids_NK.int().cpu().split(lengths), logp_NK.cpu().split(lengths), strict=True):
            made.append({**row, "top_ids": ids.clone(), "top_logp": logp.clone(), "top_temperature": temperature})
    return made


def check_rows(rows: Sequence[Row]) -> None:
    """InputError unless every row holds prompt and completion ids."""
    if not rows:
        raise InputError("rows: none are given; make_distillation_set makes them")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row.get("prompt_ids") or not row.get("completion_ids") or not all(row["completion_ids"]):
            raise InputError(f"row {i}: needs prompt_ids and completion_ids (a list of id lists), each with a token at least")


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def shared_vocabulary(draft: Any, target: Any, tokenizer: Any = None, draft_tokenizer: Any = None) -> int:
    """Tokens that both heads know. Heads may differ by padding rows, which the tokenizer shows.

    InputError for two tokenizers, or for widths that differ without a tokenizer that fits into both."""
    mine, theirs = logits_width(unwrapped(draft)), logits_width(unwrapped(target))
    if draft_tokenizer is not None and tokenizer is not None and draft_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError("draft_tokenizer: has other tokens than the target's tokenizer; draft and target must share one")
    if mine != theirs and (tokenizer is None or len(tokenizer) > min(mine, theirs)):
        size = "give it, where only the padding of the heads differs" if tokenizer is None else f"it has {len(tokenizer)} tokens"
        raise InputError(f"draft: has a vocabulary of {mine}, the target one of {theirs}; both need the same tokenizer ({size})")
    return min(mine, theirs)


# -- training and measures ------------------------------------------------------------------------------------------------


def distillation_loss(
    draft: Any, target: Any, rows: Sequence[Row], *, loss: str = "tvd", temperature: float = 1.0, beta: float = 0.5, width: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Distilled, Layout]:  # fmt: skip
    """A loss on the answers of tokenised rows, token mean, and the layout of their tokens; acceptance is [N].

    target: a model, which reads the rows too, or None where the rows hold top-k targets. width: tokens that both heads know.
    Models whose logits are not hidden x head are read through their own logits at the answers' positions.
    """
    layout = lay_out(rows, False, unwrapped(draft).device)
    head = linear_head(draft)
    if target is None:
        ids_NK, logp_NK = (torch.cat([torch.as_tensor(row[c]) for row in rows]).to(layout.places_N.device) for c in ("top_ids", "top_logp"))
        known = TopK(ids_NK, logp_NK, rows[0]["top_temperature"])
        if head is None:
            raise InputError("draft: its logits are not hidden x head, so stored targets cannot be used; give the target model")
        return _at_draft(draft, layout, known, width, loss=loss, temperature=temperature, beta=beta, chunk=chunk), layout
    other = linear_head(target)
    with torch.no_grad():
        if head is None or other is None:
            target_NV = position_logits(target, layout.inputs, layout.places_N)[:, :width]
        else:
            target_ND = at_head(target, layout.inputs, lambda hidden_BTD, _: hidden_BTD.flatten(0, 1)[layout.places_N])
    if head is None or other is None:
        draft_NV = position_logits(draft, layout.inputs, layout.places_N)[:, :width]
        value = DISTILLATION[loss](draft_NV, target_NV, temperature=temperature, **({"beta": beta} if loss == "gkd" else {}))
        with torch.no_grad():
            accepted_N = 1 - tvd(draft_NV, target_NV, temperature=temperature, reduction="none")
            ahead = float(((target_NV / temperature).log_softmax(-1) > (draft_NV / temperature).log_softmax(-1)).float().mean())
        return Distilled(value, accepted_N, ahead), layout
    known_head = FromHead(target_ND, (other[0][:width], None if other[1] is None else other[1][:width]))
    return _at_draft(draft, layout, known_head, width, loss=loss, temperature=temperature, beta=beta, chunk=chunk), layout


def _at_draft(draft: Any, layout: Layout, target: FromHead | TopK, width: int | None, **settings: Any) -> Distilled:
    found: list[Distilled] = []

    def measured(hidden_BTD: torch.Tensor, head: Head) -> torch.Tensor:
        cut = (head[0][:width], None if head[1] is None else head[1][:width])
        found.append(chunked_distillation(hidden_BTD.flatten(0, 1)[layout.places_N], cut, target, **settings))
        return found[-1].loss

    value = at_head(draft, layout.inputs, measured)  # through the wrappers of the draft, so not found[-1].loss
    return found[-1]._replace(loss=value)


class DistillationTrainer(Trainer):
    """Trains a draft on rows of prompts and the target's answers; loop, optimiser and checkpoints are Trainer's.

    target: a causal LM, kept in eval mode, or None for rows of `top_k_targets`. loss: "tvd", "tvdpp", "fkl", "rkl", "gkd".
    processing_class: the tokenizer. Logs `acceptance` and `target_ahead` (share of the vocabulary with q > p) beside the loss.
    Batches are padded; a batch's loss is the mean over its answers' tokens. InputError for rows or models that do not fit.
    """

    def __init__(
        self, draft: Any, target: Any, args: TrainingArguments, train_dataset: Sequence[Row], *, loss: str = "tvd", temperature: float = 1.0,
        beta: float = 0.5, chunk: int = CHUNK, processing_class: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if loss not in BINS:
            raise InputError(f"loss: must be one of {', '.join(BINS)}, got {loss!r}")
        check_rows(train_dataset)
        if target is None and not all("top_ids" in row for row in train_dataset):
            raise InputError("target: None goes with rows of top_k_targets; give the target model")
        args.remove_unused_columns = False
        if target is not None and unwrapped(target).device != args.device:
            target.to(args.device)
        if args.n_gpu > 1:
            args._n_gpu = 1  # `accelerate launch` uses all of them
        self._width = None if target is None else shared_vocabulary(draft, target, processing_class)
        self.target = None if target is None else target.eval()
        self._settings: dict[str, Any] = {"loss": loss, "temperature": temperature, "beta": beta, "chunk": chunk}
        self._sums: dict[str, list[float]] = {}
        super().__init__(model=draft, args=args, data_collator=collate, train_dataset=list(train_dataset), processing_class=processing_class, **options)
        self.model_accepts_loss_kwargs = False
        self.label_names: list[str] = []
        linear_head(draft)  # found out now: a wrapped or sharded model cannot be tried

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of a batch of rows."""
        found, _ = distillation_loss(model, self.target, inputs["batch"].rows, width=self._width, **self._settings)
        if model.training:
            for name, value in (("acceptance", float(found.acceptance.mean())), ("target_ahead", found.ahead)):
                self._sums.setdefault(name, []).append(value)
        return (found.loss, found) if return_outputs else found.loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of one batch of evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the measures since the last log."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._sums.items()}}
            self._sums.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: batches hold rows, not tensors."""
        return 0


def distill(
    draft: Any, target: Any, rows: Sequence[Row], *, loss: str = "tvd", args: TrainingArguments | None = None, tokenizer: Any = None, **settings: Any
) -> DistillationTrainer:
    """Train the draft in place on the target's answers and leave it in eval mode; the trainer, with its log.

    args: TrainingArguments; by default one epoch at rate 3e-4 without checkpoints. tokenizer: needed where the heads' widths differ.
    settings: temperature, beta, chunk, and options of Trainer (callbacks, optimizers, ...). See `DistillationTrainer`.
    """
    if args is None:
        args = TrainingArguments(
            output_dir="trainer_output", num_train_epochs=1, learning_rate=3e-4, per_device_train_batch_size=8, save_strategy="no", report_to=[]
        )
    trainer = DistillationTrainer(draft, target, args, rows, loss=loss, processing_class=tokenizer, **settings)
    trainer.train()
    draft.eval()
    return trainer


@torch.no_grad()
def acceptance(draft: Any, target: Any, rows: Sequence[Row], *, temperature: float = 1.0, batch_size: int = 32, tokenizer: Any = None) -> torch.Tensor:
    """Chance that a proposal of the draft is accepted, sum min(p, q), mean over each row's answer tokens: float64 [rows]."""
    check_rows(rows)
    width = shared_vocabulary(draft, target, tokenizer)
    means = []
    for part in _batches(rows, batch_size):
        found, layout = distillation_loss(draft, target, part, temperature=temperature, width=width)
        owner_N, value_N = layout.groups[layout.owner_N], found.acceptance.double()
        total = torch.zeros(len(part), dtype=torch.float64, device=value_N.device).index_add(0, owner_N, value_N)
        means.append((total / torch.bincount(owner_N, minlength=len(part))).cpu())
    return torch.cat(means)


def path_tokens(draft_logp: torch.Tensor, target_logp: torch.Tensor) -> torch.Tensor:
    """1 + sum_i prod_(j <= i) min(1, q_j / p_j): tokens that a call writes on average, given the drafted path.

    draft_logp, target_logp: log-probabilities [..., gamma] of the drafted tokens; -inf for the target's after an end."""
    return 1 + (target_logp - draft_logp).clamp(max=0).exp().cumprod(-1).sum(-1)


@torch.no_grad()
def expected_tokens(
    draft: Any, target: Any, contexts: Sequence[torch.Tensor], *, gamma: int = 4, temperature: float = 1.0, seed: int = 0,
    batch_size: int = DEFAULT_ROWS,
) -> torch.Tensor:  # fmt: skip
    """Tokens that one call of the target writes after each context (1-D id tensors), from one drafted path: float64 [contexts].

    Unbiased for these contexts. The mean over a text's places is not tau, whose calls begin where the last one ended."""
    if gamma < 1 or not contexts:
        raise InputError(f"gamma of at least 1 and a context are needed, got {gamma} and {len(contexts)}")
    shared_vocabulary(draft, target)
    made = generate(draft, None, contexts, max_new_tokens=gamma, temperature=temperature, seed=seed, batch_size=batch_size, return_logprobs=True)
    found = []
    for start in range(0, len(contexts), batch_size):
        group = [m[0] for m in made[start : start + batch_size]]
        whole = [torch.cat([c.reshape(-1).cpu(), g.ids]) for c, g in zip(contexts[start : start + batch_size], group, strict=True)]
        width = max(map(len, whole))
        ids, real, drafted = (torch.zeros(len(group), width, dtype=torch.int64) for _ in range(3))
        draft_logp, target_logp = torch.zeros(len(group), gamma, dtype=torch.float64), torch.full((len(group), gamma), -torch.inf, dtype=torch.float64)
        for i, (row, g) in enumerate(zip(whole, group, strict=True)):
            ids[i, : len(row)], real[i, : len(row)], drafted[i, len(row) - len(g.ids) : len(row)] = row, 1, 1
        device = unwrapped(target).device
        scored = completion_logprobs(target, ids.to(device), real.to(device), drafted.to(device), temperature).token_BT.double().cpu()
        for i, g in enumerate(group):
            draft_logp[i, : len(g.ids)] = g.logprobs.double()  # type: ignore[union-attr]
            target_logp[i, : len(g.ids)] = scored[i][drafted[i].bool()]
        found.append(path_tokens(draft_logp, target_logp))
    return torch.cat(found)
