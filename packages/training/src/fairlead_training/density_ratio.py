"""Underlying distribution matching: weights that make the prompts of unwanted rows look like those of wanted ones
(BCO, arXiv 2404.04656).

Thumbs-down rows train as if their prompts were drawn like the thumbs-up ones when each counts w(x) = p_up(x) / p_down(x).
A probabilistic classifier of the two sets, both weighing the same, has the logit log w(x). It is fitted on prompts alone,
once, before training; wanted rows keep weight 1. What is done with the weights is left to the objective (`bco`).

Shape suffixes: N prompts, E embedding.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm, softplus

from fairlead.errors import InputError
from fairlead.files import atomic_write
from fairlead.logprobs import hidden_states, unwrapped

from .references import Reference
from .tokens import Row, group

log = logging.getLogger("fairlead")
Embed = Callable[[Sequence[Any]], torch.Tensor]
_NAMES = {"slope", "numbers"}


@dataclass(frozen=True)
class DensityRatio:
    """log p_up(x) / p_down(x) = emb . slope + intercept. slope_E: float64 [E]. low, high: the bounds of a weight."""

    slope_E: torch.Tensor
    intercept: float
    low: float = 0.5
    high: float = 10.0

    def logit(self, emb_NE: torch.Tensor) -> torch.Tensor:
        """Log-ratios float64 [N], not bounded."""
        return _embeddings("emb_NE", emb_NE, len(self.slope_E)) @ self.slope_E + self.intercept

    def weight(self, emb_NE: torch.Tensor) -> torch.Tensor:
        """Weights float64 [N] of unwanted rows, held within low and high."""
        return self.logit(emb_NE).exp().clamp(self.low, self.high)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save

        numbers = torch.tensor([self.intercept, self.low, self.high], dtype=torch.float64)
        with atomic_write(path, "wb") as stream:
            stream.write(save({"slope": self.slope_E, "numbers": numbers}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DensityRatio:
        """What `save` wrote; InputError for another file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: no density ratio can be read from it: {error}") from None
        if set(found) != _NAMES:
            raise InputError(f"{path}: holds {', '.join(sorted(found)) or 'nothing'}, a density ratio has {', '.join(sorted(_NAMES))}")
        return cls(found["slope"], *found["numbers"].tolist())


def fit(emb_up: torch.Tensor, emb_down: torch.Tensor, *, c: float = 1.0, low: float = 0.5, high: float = 10.0) -> DensityRatio:
    """The classifier of wanted [Nu, E] against unwanted prompts [Nd, E], each set weighing (Nu + Nd) / 2.

    Minimises |slope|^2 / 2 + c sum_i s_i softplus(-+logit_i), scikit-learn's balanced logistic regression. c: large fits the
    prompts closely. low, high: bounds of the weights; 0 and inf leave them as they are.
    InputError for an empty set, shapes that do not match, NaN, bounds that are none.
    """
    up_NE, down_NE = _embeddings("emb_up", emb_up), _embeddings("emb_down", emb_down)
    if up_NE.shape[1] != down_NE.shape[1]:
        raise InputError(f"emb_down: width {down_NE.shape[1]}, emb_up has {up_NE.shape[1]}; one embedding must make both")
    if not 0 <= low <= high or not high > 0:
        raise InputError(f"low, high: must be 0 <= low <= high, high above 0, got {low} and {high}")
    if not c > 0:
        raise InputError(f"c: must be above 0, got {c}")
    count = len(up_NE) + len(down_NE)
    centre_E = torch.cat([up_NE, down_NE]).mean(0)  # changes the intercept alone, and makes the steps straight
    up_NE, down_NE = up_NE - centre_E, down_NE - centre_E
    parameters = torch.zeros(up_NE.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-8, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        slope_E, intercept = parameters[:-1], parameters[-1]
        losses = softplus(-(up_NE @ slope_E + intercept)).mean() + softplus(down_NE @ slope_E + intercept).mean()
        loss = losses / 2 + slope_E.square().sum() / (2 * c * count)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        closure()
    assert parameters.grad is not None
    if float(parameters.grad.abs().max()) > 1e-5:
        log.warning("density ratio: the classifier has not settled; a smaller c, or embeddings of a smaller scale, would help")
    slope_E = parameters.detach()[:-1].clone()
    return DensityRatio(slope_E, float(parameters.detach()[-1] - centre_E @ slope_E), low, high)


class MeanPooled:
    """Prompts -> embeddings float64 [N, E]: the mean of a causal LM's final hidden states over a prompt's tokens, layer-normed
    and of length 1.

    model: the reference, or the policy before training (a PEFT model answers without its adapters). tokenizer: a prompt of chat
    messages is written by its template, without the tail that asks for an answer. max_length: tokens read, from the start.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 512, token_budget: int = 4096) -> None:
        self.reference, self.tokenizer = Reference(model), tokenizer
        room = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None) or max_length
        self.max_length, self.token_budget = min(max_length, room), token_budget

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any]) -> torch.Tensor:
        ids = [self._ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: list[torch.Tensor] = [torch.zeros(0)] * len(ids)
        with self.reference.active() as model:
            device = unwrapped(model).device
            while order:
                size = max(1, self.token_budget // len(ids[order[-1]]))
                part, order = order[-size:], order[:-size]
                width = len(ids[part[-1]])
                ids_BT, mask_BT = (
                    torch.tensor([[*f(ids[i]), *[0] * (width - len(ids[i]))] for i in part], device=device)
                    for f in (list, lambda own: [1] * len(own))
                )
                hidden_BTD = hidden_states(model, {"input_ids": ids_BT, "attention_mask": mask_BT}).double()
                mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
                for i, row_D in zip(part, mean_BD.cpu(), strict=True):
                    found[i] = row_D
        mean_NE = torch.stack(found)
        return torch.nn.functional.normalize(layer_norm(mean_NE, mean_NE.shape[1:]), dim=1)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InputError(f"prompt {prompt!r}: has no token to embed")
        return ids[: self.max_length]


@dataclass(frozen=True)
class Matched:
    """What the weights of the unwanted rows are: the classifier, how many there are, their mean, the share that sits on a
    bound, and the effective sample size (sum w)^2 / sum w^2."""

    ratio: DensityRatio
    rows: int
    mean: float
    bounded: float
    effective: float

    def line(self) -> str:
        """One line for a log."""
        return (
            f"{self.rows} unwanted rows weigh {self.mean:.3f} on average, {self.bounded:.0%} sit on a bound; "
            f"effective sample size {self.effective:.0f}"
        )


def add_weights(
    rows: Iterable[Row], embed: Embed, *, sample: int | None = 1024, seed: int = 0, c: float = 1.0, low: float = 0.5, high: float = 10.0
) -> tuple[list[dict[str, Any]], Matched]:
    """Rows {prompt, completion, label} with a column `weight`, which `PreferenceTrainer(objective="bco")` reads, and what it holds.

    embed: prompts -> [N, E], `MeanPooled(model, tokenizer)` for one. sample: prompts of each label that the classifier is
    fitted on, drawn without replacement; None takes all. c, low, high: see `fit`.
    InputError names the row without a label or with a weight already; one label alone.
    """
    made = [dict(row) for row in rows]
    prompts: dict[bool, list[Any]] = {True: [], False: []}
    label = []
    for index, row in enumerate(made):
        where = f"row {index}"
        if "completion" not in row or row.get("label") is None:
            raise InputError(f"{where}: columns {', '.join(row) or 'none'}; needed are prompt, completion and label")
        if row.get("weight") is not None:
            raise InputError(f"{where}: has a weight already; leave the column out")
        prompt, _, numbers = group(row, where)
        label.append(numbers["role"] == [1])
        prompts[label[-1]].append(prompt)
    if not (prompts[True] and prompts[False]):
        raise InputError(f"label: {len(made)} rows, none of them {'wanted' if prompts[False] else 'unwanted'}; a ratio needs both")
    generator = torch.Generator().manual_seed(seed)
    emb_down = _embeddings("embed", embed(prompts[False]))
    if len(emb_down) != len(prompts[False]):
        raise InputError(f"embed: gave {len(emb_down)} rows for {len(prompts[False])} prompts; it must give one for each")
    up, down = (torch.randperm(len(prompts[k]), generator=generator)[:sample].tolist() for k in (True, False))
    ratio = fit(embed([prompts[True][i] for i in up]), emb_down[down], c=c, low=low, high=high)
    weight = ratio.weight(emb_down)
    values = iter(weight.tolist())
    for row, wanted in zip(made, label, strict=True):
        row["weight"] = 1.0 if wanted else next(values)
    bounded = float(((weight <= low) | (weight >= high)).double().mean())
    matched = Matched(ratio, len(weight), float(weight.mean()), bounded, float(weight.sum() ** 2 / weight.square().sum()))
    log.info("density ratio: %s", matched.line())
    return made, matched


def _embeddings(name: str, value: Any, width: int | None = None) -> torch.Tensor:
    """Embeddings as float64 [N, E] on the CPU; InputError where they are none."""
    found = torch.as_tensor(value).detach().to("cpu", torch.float64)
    if found.ndim != 2 or not found.numel():
        raise InputError(f"{name}: must be one row per prompt, [N, E], not empty, got shape {list(found.shape)}")
    if width is not None and found.shape[1] != width:
        raise InputError(f"{name}: width {found.shape[1]}, the ratio was fitted on {width}")
    if not bool(found.isfinite().all()):
        raise InputError(f"{name}: row {int((~found.isfinite()).any(1).nonzero()[0])} is not finite")
    return found
