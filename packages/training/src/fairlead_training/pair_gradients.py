"""Inner products of the gradients of chosen and rejected log-probabilities, without ever putting gradients side by side.

With s_w and s_l the log-probabilities of a pair's sequences and g_w, g_l their gradients (arXiv 2410.13828), `Probe` gives
<g_w, g_l>, |g_w|^2 and |g_l|^2 of pairs and of the whole batch: by autograd, one sequence at a time, or for the head alone
from the hidden states, without a backward pass. What follows from these numbers is entanglement.py's.

Shape suffixes: S sequences, P pairs, N scored tokens, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.logprobs import Head, at_head, head_logprobs, linear_head, output_head, unwrapped

from .statistics import Row, TokenStats, attention_of, evaluated, lay_out, packs, token_stats, token_weights

Products = tuple[float, float, float]  # <g_w, g_l>, |g_w|^2, |g_l|^2
Select = Callable[[str, torch.nn.Parameter], bool]
VOCABULARY_CHUNK = 4096
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


@dataclass(frozen=True)
class PairProducts:
    """layers: products of the gradients of mean s_w and mean s_l, by group of parameters. pairs: those of each pair alone, over
    all of them. stats: the log-probabilities of the same passes."""

    layers: dict[str, Products]
    pairs: list[Products]
    stats: TokenStats


def selected(model: Any, params: str | Select | None = None) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters that are looked at, by name.

    params: "lora", "head", "all", a regular expression that a name must hold, or a function of name and parameter. None: "lora"
    where there are adapters, "head" otherwise. InputError where nothing is left or what is left is frozen.
    """
    named = dict(model.named_parameters())
    if params is None:
        params = "lora" if any("lora_" in name and p.requires_grad for name, p in named.items()) else "head"
    if callable(params):
        found = {name: p for name, p in named.items() if params(name, p)}
    elif params == "all":
        found = named
    elif params == "head":
        head = output_head(model)
        own = set() if head is None else {id(p) for p in head.parameters()}
        found = {name: p for name, p in named.items() if id(p) in own}
    else:
        try:
            pattern = re.compile("lora_" if params == "lora" else params)
        except re.error as error:
            raise InputError(f"params: {params!r} is no regular expression ({error}); or give 'lora', 'head' or 'all'") from None
        found = {name: p for name, p in named.items() if pattern.search(name)}
    trained = {name: p for name, p in found.items() if p.requires_grad}
    if not trained:
        shown = repr(params) if isinstance(params, str) else f"the function {getattr(params, '__name__', '')}".rstrip()
        what = "are frozen" if found else "do not exist"
        raise InputError(f"params: the parameters of {shown} {what}; choose some that are trained, or 'all'")
    return trained


def layer_of(name: str, parameter: torch.nn.Parameter, head: Any = None) -> str:
    """The group a parameter is counted with: embeddings, layer 0, layer 1, ..., head (tied embeddings too) or other."""
    if "lm_head" in name or (head is not None and any(parameter is p for p in head.parameters())):
        return "head"
    block = _BLOCK.search(name)
    if block:
        return f"layer {block[1]}"
    return "embeddings" if any(part in name for part in ("embed", "wte", "wpe")) else "other"


class Probe:
    """Pairs whose gradients are looked at, laid out once.

    model: a causal LM. rows: tokenised rows of one chosen and one rejected completion each. objective: gives token weights where it
    has some. params: see `selected`. accelerator: shares the pairs among its processes, all of which hold the same rows.
    """

    def __init__(
        self, model: Any, rows: Sequence[Row], objective: Any = None, params: str | Select | None = None, *, packed: bool | None = None,
        accelerator: Any = None,
    ) -> None:  # fmt: skip
        for index, row in enumerate(rows):
            if sorted(row.get("role") or []) != [-1, 1]:
                raise InputError(f"row {index}: one chosen and one rejected completion are compared, its roles are {row.get('role')}")
        if not rows:
            raise InputError("rows: no pair to look at")
        self.model, self.rows, self.accelerator = model, list(rows), accelerator
        self.parameters = selected(model, params)
        head = output_head(model)
        self.layers = [layer_of(name, p, head) for name, p in self.parameters.items()]
        self.by_head = params in (None, "head") and set(self.layers) == {"head"} and linear_head(model) is not None
        self.packed = packs(model) if packed is None else packed
        self.squares = "wpo_weight" in getattr(objective, "needs", ())
        self.whole = lay_out(self.rows, self.packed, unwrapped(model).device)
        none_N = torch.zeros(len(self.whole.owner_N), device=self.whole.owner_N.device)
        self.weight_ST = token_weights(TokenStats(none_N, self.whole), self.rows, objective)
        self.chosen_P, self.rejected_P = ([2 * i + row["role"].index(role) for i, row in enumerate(rows)] for role in (1, -1))

    def products(self) -> PairProducts:
        """Inner products and log-probabilities, in eval mode."""
        with evaluated(self.model), attention_of(self.model, self.packed), torch.enable_grad():
            return self._products_of_head() if self.by_head else self._products_by_autograd()

    @torch.no_grad()
    def sums_S(self) -> torch.Tensor:
        """Log-probability of each sequence, [S], by the same passes as `products`: differences are the weights' alone."""
        with evaluated(self.model), attention_of(self.model, self.packed):
            if self.by_head:
                return token_stats(self.model, self.whole, squares=self.squares).sum_S(self.weight_ST)
            found = {place: self._sequence(place) for pair in self._own_pairs() for place in (2 * pair, 2 * pair + 1)}
            return self._joined(found).sum_S(self.weight_ST)

    def _own_pairs(self) -> range:
        first, step = (0, 1) if self.accelerator is None else (self.accelerator.process_index, self.accelerator.num_processes)
        return range(first, len(self.rows), step)

    def _sequence(self, place: int) -> TokenStats:
        row = self.rows[place // 2]
        alone = {**row, "completion_ids": [row["completion_ids"][place % 2]]}
        return token_stats(self.model, lay_out([alone], self.packed, self.whole.owner_N.device), squares=self.squares)

    def _joined(self, found: dict[int, TokenStats]) -> TokenStats:
        """Statistics of all sequences, those of the other processes with them."""
        device = self.whole.owner_N.device

        def whole(values: dict[int, torch.Tensor]) -> torch.Tensor:
            if self._shared():
                values = dict(self._gathered([(place, value.cpu()) for place, value in values.items()]))
            return torch.cat([values[place] for place in sorted(values)]).to(device)

        logp_N = whole({place: own.logp_N.detach() for place, own in found.items()})
        squares = {place: own.log_sum_p2_N for place, own in found.items() if own.log_sum_p2_N is not None}
        return TokenStats(logp_N, self.whole, whole(squares) if self.squares else None)

    def _shared(self) -> bool:
        return self.accelerator is not None and self.accelerator.num_processes > 1

    def _gathered(self, mine: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        every: list[Any] = gather_object(mine)
        return every

    def _products_by_autograd(self) -> PairProducts:
        parameters, count = list(self.parameters.values()), len(self.rows)
        totals = {role: [torch.zeros_like(p, dtype=_wide(p)) for p in parameters] for role in (1, -1)}
        found: dict[int, TokenStats] = {}
        pairs: list[tuple[int, Products]] = []
        for pair in self._own_pairs():
            own: dict[int, list[torch.Tensor]] = {}
            for place in (2 * pair, 2 * pair + 1):
                found[place] = self._sequence(place)
                weight_1T = None if self.weight_ST is None else self.weight_ST[place : place + 1]
                grads = torch.autograd.grad(found[place].sum_S(weight_1T).sum(), parameters, allow_unused=True, materialize_grads=True)
                role = self.rows[pair]["role"][place % 2]
                own[role] = [g.to(t.dtype) for g, t in zip(grads, totals[role], strict=True)]
                for total, grad in zip(totals[role], own[role], strict=True):
                    total.add_(grad, alpha=1 / count)
            pairs.append((pair, _sum(_dots(own[1], own[-1]))))
        if self._shared():
            totals = {role: [self.accelerator.reduce(t, "sum") for t in totals[role]] for role in (1, -1)}
            pairs = self._gathered(pairs)
        by_layer: dict[str, list[Products]] = {}
        for layer, products in zip(self.layers, _dots(totals[1], totals[-1]), strict=True):
            by_layer.setdefault(layer, []).append(products)
        return PairProducts({layer: _sum(each) for layer, each in by_layer.items()}, [p for _, p in sorted(pairs)], self._joined(found))

    @torch.no_grad()
    def _products_of_head(self) -> PairProducts:
        kept: list[tuple[torch.Tensor, Head]] = []

        def scored(hidden_BTD: torch.Tensor, head: Head) -> torch.Tensor:
            hidden_ND = hidden_BTD.flatten(0, 1)[self.whole.places_N]
            kept.append((hidden_ND, head))
            return hidden_ND[None]

        at_head(self.model, self.whole.inputs, scored)
        hidden_ND, (weight_VD, bias_V) = kept[0]
        trained = tuple(p is not None and p.requires_grad for p in (weight_VD, bias_V))
        gram_NN = head_gram(hidden_ND, weight_VD, self.whole.targets_N, bias_V, trained)
        if self.weight_ST is not None:
            weight_N = self.weight_ST[self.whole.owner_N, self.whole.rank_N].to(gram_NN.dtype)
            gram_NN = gram_NN * weight_N[:, None] * weight_N
        owner_N = torch.nn.functional.one_hot(self.whole.owner_N, 2 * len(self.rows)).to(gram_NN.dtype)
        gram_SS = (owner_N.T @ gram_NN @ owner_N).double().cpu()
        w, l = self.chosen_P, self.rejected_P  # noqa: E741
        blocks = [gram_SS[a][:, b] for a, b in ((w, l), (w, w), (l, l))]
        whole = tuple(float(block.mean()) for block in blocks)
        each = zip(*(block.diagonal().tolist() for block in blocks), strict=True)
        found = [_precise(head_logprobs(kept[0][1], hidden_ND, self.whole.targets_N, t)) for t in ((1.0, 0.5) if self.squares else (1.0,))]
        stats = TokenStats(found[0], self.whole, 2 * found[0] - found[1] if self.squares else None)
        return PairProducts({"head": (whole[0], whole[1], whole[2])}, list(each), stats)


def head_gram(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, bias_V: torch.Tensor | None = None,
    trained: tuple[bool, ...] = (True, True),
) -> torch.Tensor:  # fmt: skip
    """Inner products [N, N] of the gradients of token log-probabilities in the head, without a backward pass:
    (R R^T)_ij (H H^T)_ij with R = onehot - p, over chunks of the vocabulary; in float32, or float64 where the head is.

    trained: whether weight and bias count.
    """
    kind = _wide(weight_VD)
    hidden_ND = hidden_ND.to(kind)

    def logits(start: int) -> torch.Tensor:
        part = slice(start, start + VOCABULARY_CHUNK)
        return torch.nn.functional.linear(hidden_ND, weight_VD[part].to(kind), None if bias_V is None else bias_V[part].to(kind))

    starts = range(0, len(weight_VD), VOCABULARY_CHUNK)
    lse_N = torch.stack([logits(start).logsumexp(-1) for start in starts]).logsumexp(0)
    rows_NN = torch.zeros(len(hidden_ND), len(hidden_ND), dtype=kind, device=hidden_ND.device)
    for start in starts:
        rest_NV = -(logits(start) - lse_N[:, None]).exp()
        inside = ((targets_N >= start) & (targets_N < start + rest_NV.shape[1])).nonzero().squeeze(-1)
        rest_NV[inside, targets_N[inside] - start] += 1
        rows_NN += rest_NV @ rest_NV.T
    inputs_NN = hidden_ND @ hidden_ND.T if trained[0] else torch.zeros_like(rows_NN)
    return rows_NN * (inputs_NN + float(bias_V is not None and trained[1]))


def token_gradients(model: Any, prompt: Sequence[int], response: Sequence[int], params: str | Select | None = "head") -> torch.Tensor:
    """Gradients of the response tokens' log-probabilities, [T, P'] over the selected parameters: T backward passes and as many rows
    to hold, for looking at single pairs of small models."""
    row = {"prompt_ids": list(prompt), "completion_ids": [list(response)]}
    packed, parameters = packs(model), list(selected(model, params).values())
    with evaluated(model), attention_of(model, packed), torch.enable_grad():
        logp_N = token_stats(model, lay_out([row], packed, unwrapped(model).device)).logp_N
        each = [torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True, materialize_grads=True) for s in logp_N]
    return torch.stack([torch.cat([g.flatten().to(_wide(g)) for g in grads]) for grads in each])


def token_cosines(
    model: Any, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], params: str | Select | None = "head"
) -> torch.Tensor:
    """Cosines between the gradients of chosen and rejected tokens, [T_w, T_l]; 0 where one of them is zero."""
    unit = [torch.nn.functional.normalize(token_gradients(model, prompt, answer, params), dim=1) for answer in (chosen, rejected)]
    return unit[0] @ unit[1].T


def _precise(logp_N: torch.Tensor) -> torch.Tensor:
    return logp_N if logp_N.dtype in (torch.float32, torch.float64) else logp_N.float()


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _dots(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> Iterator[Products]:
    """The three products of each parameter."""
    for x, y in zip(a, b, strict=True):
        x, y = x.flatten(), y.flatten()
        yield float(torch.dot(x, y)), float(torch.dot(x, x)), float(torch.dot(y, y))


def _sum(products: Any) -> Products:
    each = list(products)
    return sum(p[0] for p in each), sum(p[1] for p in each), sum(p[2] for p in each)
