"""Aligning a draft with its target for speculative decoding: distillation on the target's own answers.

"Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs" (arXiv 2403.00858): the target answers
prompts, the draft is trained on these answers with TVD = 1/2 sum |p - q|, the chance that its proposal is refused, or with
TVD++. The losses come from hidden states in tiles (`objectives.chunked_distillation`). Decoding is the decoder `speculative`'s,
reached through the registry.

Shape suffixes: N scored tokens, V vocabulary, K kept tokens, D hidden width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from fairlead.errors import InputError
from fairlead.files import atomic_write
from fairlead.generation import DEFAULT_ROWS, encode, generate
from fairlead.logprobs import Head, at_head, completion_logprobs, linear_head, position_logits, unwrapped
from fairlead.models import logits_width

from .objectives.chunked_distillation import BINS, CHUNK, Distilled, FromHead, TopK, chunked_distillation
from .objectives.distillation import DISTILLATION, tvd
from .references import model_fingerprint
from .statistics import Layout, Row, evaluated, lay_out
from .trainer import collate

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
    if len(whole) != len(lines) or not whole:  # new, or its last line was torn
        with atomic_write(path) as stream:
            stream.write("".join(whole) or json.dumps(head) + "\n")
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
        with evaluated(target):
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


def _check_stored(rows: Sequence[Row], temperature: float) -> None:
    """InputError for a row whose stored target is of another temperature or size than the first one's."""
    k = torch.as_tensor(rows[0]["top_ids"]).shape[-1]
    for i, row in enumerate(rows):
        if row["top_temperature"] != temperature or torch.as_tensor(row["top_ids"]).shape[-1] != k:
            found = f"{torch.as_tensor(row['top_ids']).shape[-1]} tokens at temperature {row['top_temperature']}"
            raise InputError(f"row {i}: its stored target has {found}; all must have {k}, at the loss's temperature {temperature}")


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
        if target is None:
            _check_stored(train_dataset, temperature)
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
        with evaluated(draft), evaluated(target):
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
    with evaluated(draft):
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
        with evaluated(target):
            scored = completion_logprobs(target, ids.to(device), real.to(device), drafted.to(device), temperature).token_BT.double().cpu()
        for i, g in enumerate(group):
            draft_logp[i, : len(g.ids)] = g.logprobs.double()  # type: ignore[union-attr]
            target_logp[i, : len(g.ids)] = scored[i][drafted[i].bool()]
        found.append(path_tokens(draft_logp, target_logp))
    return torch.cat(found)
