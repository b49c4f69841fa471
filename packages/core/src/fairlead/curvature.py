"""Fisher information and gradient norms of any model's linear layers, without per-sample gradients.

Hooks record each layer's input a and the gradient g of the loss at its output; a sample's gradient is G_i = sum_t g_it a_it^T
and the kernels reduce (a, g) without storing it. The loss is per sample: a mean over the batch must be declared and is
undone. A weight that is used more than once (tied embedding and head, a layer called twice) gets the sum of its gradients
before squaring. The sequence Fisher and the token Fisher are different quantities; the result says which it is.

Shape suffixes: B samples, T tokens, I inputs, O outputs, V vocabulary, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .errors import InputError

Kind = Literal["empirical", "true", "enumerated", "token"]
Layers = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
Loss = Callable[[Any, Mapping[str, Any]], torch.Tensor]
KINDS = ("empirical", "true", "enumerated", "token")


@dataclass(frozen=True)
class Fisher:
    """A diagonal Fisher: parameter name -> float tensor of the parameter's shape, mean over samples.

    kind: "empirical" (labels of the data), "true" (labels drawn from the model), "enumerated" (all labels, weighted) or
    "token" (each token a sample of its own). samples: sequences seen. draws: label draws per sample (kind "true").
    """

    diagonal: dict[str, torch.Tensor]
    kind: str
    samples: int
    draws: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)


def fisher(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], kind: Kind = "empirical", *, layers: Layers = None,
    loss: Loss | None = None, reduction: Literal["sum", "mean"] | None = None, draws: int = 1, seed: int = 0,
    bias: bool = True,
) -> Fisher:  # fmt: skip
    """Diagonal Fisher of the model's linear layers (nn.Linear, transformers' Conv1D), frozen ones and LoRA's included.

    batches: mappings for `model(**batch)` with input_ids or another input, attention_mask (0 = padding) and labels:
    [B, T] next-token ids (-100 is ignored; default: input_ids) for logits [B, T, V], or [B] classes for logits [B, C].
    kind: see `Fisher`; "true" draws every next token at its own position, teacher forced; "enumerated" is for classes.
    layers: a regular expression, names, or a predicate (name, module); default all.
    loss: (model output, batch) -> per-sample losses [B] (kinds "empirical" and "token") instead of the negative
    log-likelihood summed over tokens; a scalar loss needs `reduction`, "sum" or "mean" over samples.
    draws, seed: label draws of kind "true". bias: biases too.

    InputError for an unknown kind, layers that match nothing, labels of another shape, an undeclared scalar loss,
    inputs whose first dimension is not the batch's.
    """
    if kind not in KINDS:
        raise InputError(f"kind: must be one of {', '.join(KINDS)}, got {kind!r}")
    if loss is not None and kind not in ("empirical", "token"):
        raise InputError(f"loss: kind {kind!r} needs the labels' probabilities; leave loss out")
    if draws < 1:
        raise InputError(f"draws: must be at least 1, got {draws}")
    from fairlead_kernels import fisher_diag_linear, token_fisher_diag_linear

    totals: dict[str, torch.Tensor] = {}
    samples = 0
    generator = torch.Generator().manual_seed(seed)
    with _recording(model, layers) as record:
        for batch in batches:
            count, mask_BT = _batch_size(batch), batch.get("attention_mask")
            samples += count
            for weight, value, divisor in _losses(model, batch, kind, loss, reduction, draws, generator, record):
                for name, conv, activations, grads in record.collect(value, count, mask_BT):
                    grads = grads * (divisor * (weight.reshape(-1, 1, 1).to(grads) if isinstance(weight, torch.Tensor) else weight))
                    if kind == "token":
                        squares_OI = token_fisher_diag_linear(activations, grads)
                        sums_O = grads.square().sum((0, 1))
                    else:
                        squares_OI, sums_O = fisher_diag_linear(activations, grads, bias=True)
                    _add(totals, f"{name}.weight", squares_OI.T if conv else squares_OI)
                    if bias and name in record.biased:
                        _add(totals, f"{name}.bias", sums_O)
    if not samples:
        raise InputError("batches: there is none; give at least one")
    return Fisher(
        {name: total / samples for name, total in totals.items()}, kind, samples, draws if kind == "true" else 1,
        {"loss": "sum over tokens, mean over samples" if loss is None else "given", "seed": seed},
    )  # fmt: skip


def gradient_norms(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, layers: Layers = None, loss: Loss | None = None,
    reduction: Literal["sum", "mean"] | None = None, bias: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Norm of each sample's gradient over the chosen linear layers, float32 [N]; arguments as `fisher`."""
    from fairlead_kernels import grad_norm_linear

    found: list[torch.Tensor] = []
    with _recording(model, layers) as record:
        for batch in batches:
            count, mask_BT = _batch_size(batch), batch.get("attention_mask")
            square_B = torch.zeros(count)
            for _, value, divisor in _losses(model, batch, "empirical", loss, reduction, 1, torch.Generator(), record):
                for name, _, activations, grads in record.collect(value, count, mask_BT):
                    norm_B = grad_norm_linear(activations, grads * divisor, bias=bias and name in record.biased)
                    square_B += norm_B.square().float().cpu()
            found.append(square_B.sqrt())
    return torch.cat(found) if found else torch.zeros(0)


def _add(totals: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    totals[name] = value if name not in totals else totals[name] + value


def _batch_size(batch: Mapping[str, Any]) -> int:
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return int(value.shape[0])
    raise InputError("batches: a mapping holds no tensor")


def _losses(
    model: nn.Module, batch: Mapping[str, Any], kind: str, loss: Loss | None, reduction: str | None, draws: int,
    generator: torch.Generator, record: _Record,
) -> Iterator[tuple[Any, torch.Tensor, float]]:  # fmt: skip
    """(weight, scalar loss summed over samples, what its gradients are to be multiplied by) for each backward pass."""
    count = _batch_size(batch)
    labels = batch.get("labels", batch.get("input_ids"))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if loss is not None:
        value = loss(record.run(model, inputs), batch)
        if value.dim() == 0:
            if reduction is None:
                raise InputError("loss: is one number for the whole batch; return one per sample, or declare reduction='sum' or 'mean'")
            yield 1.0, value, float(count) if reduction == "mean" else 1.0
        else:
            if value.shape != (count,):
                raise InputError(f"loss: must be one number per sample, [{count}], got {list(value.shape)}")
            yield 1.0, value.sum(), 1.0
        return
    passes = draws if kind == "true" else 1
    step = 0
    while step < passes:
        logits = getattr(out := record.run(model, inputs), "logits", out)
        if kind == "enumerated":
            if logits.dim() != 2:
                raise InputError("kind 'enumerated': needs a classifier's logits [B, C]; use 'true' for sequences")
            passes = logits.shape[1]
            targets = torch.full((count,), step, device=logits.device)
            weight: Any = logits.detach().float().softmax(-1)[:, step].sqrt()
        else:
            targets = _targets(logits, labels, batch, generator if kind == "true" else None)
            weight = draws**-0.5 if kind == "true" else 1.0
        yield weight, _nll(logits, targets), 1.0
        step += 1


def _targets(logits: torch.Tensor, labels: Any, batch: Mapping[str, Any], generator: torch.Generator | None) -> torch.Tensor:
    """Labels aligned with the logits ([B, T - 1] or [B]), -100 where nothing is scored; drawn with a generator."""
    if logits.dim() == 3:
        if labels is None or labels.shape != logits.shape[:2]:
            raise InputError(f"labels: shape {list(logits.shape[:2])} is needed, as the logits have it")
        wanted = labels[:, 1:].clone()
        attention = batch.get("attention_mask")
        if attention is not None:
            wanted[(attention[:, 1:] * attention[:, :-1]) == 0] = -100
        scores = logits[:, :-1]
    else:
        if "labels" not in batch and generator is None:
            raise InputError("labels: classes [B] are needed for kind 'empirical'")
        wanted = batch.get("labels", torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)).clone()
        scores = logits
    if generator is not None:
        flat = scores.detach().float().cpu().flatten(0, -2)
        # argmax(logits - ln(-ln u)) draws from the softmax
        noise = torch.rand(flat.shape, generator=generator).clamp(min=1e-20)
        drawn = (flat - (-noise.log()).clamp(min=1e-20).log()).argmax(-1).reshape(wanted.shape).to(wanted.device)
        wanted = torch.where(wanted == -100, wanted, drawn)
    return wanted


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    scores = (logits[:, :-1] if logits.dim() == 3 else logits).flatten(0, -2)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return nn.functional.cross_entropy(wide, targets.reshape(-1), ignore_index=-100, reduction="sum")


@dataclass
class _Call:
    """One use of a weight: what went in, and (after backward) the gradient at what came out."""

    activations: torch.Tensor
    grads: torch.Tensor | None = None
    ignored: int | None = None  # the embedding's padding index, whose row gets no gradient


class _Record:
    """Hooks of the chosen layers and what they saw since the last `run`."""

    def __init__(self, chosen: dict[str, nn.Module], owners: dict[str, list[nn.Embedding]]) -> None:
        self.calls: dict[str, list[_Call]] = {name: [] for name in chosen}
        self.chosen, self.owners = chosen, owners
        self.biased = {name for name, module in chosen.items() if getattr(module, "bias", None) is not None}

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        for calls in self.calls.values():
            calls.clear()
        return model(**inputs, **({"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}))

    def saw_linear(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._watch(name, output, _Call(inputs[0].detach()))

    def saw_embedding(self, name: str, module: nn.Embedding, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        # Row v of the embedding's gradient sums the gradients where token v stood. As a linear layer with the head's
        # weight [V, D] that is onehot(token) as output gradient and the gradient as activation: see `collect`.
        self._watch(name, output, _Call(inputs[0].detach(), ignored=module.padding_idx))

    def _watch(self, name: str, output: torch.Tensor, call: _Call) -> None:
        if not torch.is_grad_enabled():
            return  # the first, unrecorded pass of reentrant checkpointing
        if not output.requires_grad:
            output.requires_grad_(True)
        self.calls[name].append(call)
        output.register_hook(lambda grad: setattr(call, "grads", grad.detach()))

    def collect(
        self, loss: torch.Tensor, count: int, mask_BT: torch.Tensor | None
    ) -> Iterator[tuple[str, bool, torch.Tensor, torch.Tensor]]:
        """Backward, then (layer, whether it is a Conv1D, activations [B, T, I], output gradients [B, T, O]); several
        uses of one weight lie behind each other along T, which sums their gradients before they are squared."""
        loss.backward()  # type: ignore[no-untyped-call]
        for name, module in self.chosen.items():
            width = module.get_parameter("weight").shape[1 if type(module).__name__ == "Conv1D" else 0]
            parts = []
            for call in self.calls[name]:
                if call.grads is None:
                    continue  # the unused copy of a checkpointed pass
                if call.activations.dtype.is_floating_point:
                    parts.append((self._shaped(name, call.activations, count), self._shaped(name, call.grads, count)))
                else:
                    onehot = nn.functional.one_hot(call.activations, int(width)).to(call.grads.dtype)
                    if call.ignored is not None:
                        onehot[call.activations == call.ignored] = 0
                    parts.append((self._shaped(name, call.grads, count), self._shaped(name, onehot, count)))
            if not parts:
                continue
            masked = [(a, g if mask_BT is None or mask_BT.shape != g.shape[:2] else g * mask_BT[..., None].to(g)) for a, g in parts]
            yield name, type(module).__name__ == "Conv1D", torch.cat([a for a, _ in masked], 1), torch.cat([g for _, g in masked], 1)
            self.calls[name].clear()

    def _shaped(self, name: str, value: torch.Tensor, count: int) -> torch.Tensor:
        if value.shape[0] != count:
            raise InputError(f"{name}: its input has {value.shape[0]} rows, the batch {count}; layers that mix samples are left out with layers=")
        wide = value if value.dtype == torch.float64 else value.float()
        return wide.reshape(count, -1, wide.shape[-1])


@contextmanager
def _recording(model: nn.Module, layers: Layers) -> Iterator[_Record]:
    """Hooks in place, all parameters frozen (their gradients are not wanted), dropout off; undone at the end."""
    chosen, owners = _choose(model, layers)
    record = _Record(chosen, owners)
    handles = []
    for name, module in chosen.items():
        handles.append(module.register_forward_hook(lambda m, i, o, name=name: record.saw_linear(name, m, i, o)))  # type: ignore[misc]
        for embedding in owners.get(name, []):
            handles.append(embedding.register_forward_hook(lambda m, i, o, name=name: record.saw_embedding(name, m, i, o)))  # type: ignore[misc,arg-type]
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):  # so that gradients reach checkpointed blocks though every weight is frozen
        handles.append(embeddings.register_forward_hook(lambda m, i, o: o.requires_grad_(True) if torch.is_grad_enabled() and not o.requires_grad else o))
    trained = [p for p in model.parameters() if p.requires_grad]
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    for module in model.modules():  # a block checkpoints in training mode only; what is inside stays without dropout
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for name, module in model.named_modules():
            module.training = training[name]


def _choose(model: nn.Module, layers: Layers) -> tuple[dict[str, nn.Module], dict[str, list[nn.Embedding]]]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    if layers is None:
        chosen = dict(linear)
    elif isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise InputError(f"layers: {layers!r} is no regular expression ({error})") from None
        chosen = {n: m for n, m in linear.items() if pattern.search(n)}
    elif callable(layers):
        chosen = {n: m for n, m in linear.items() if layers(n, m)}
    else:
        missing = [name for name in layers if name not in linear]
        if missing:
            raise InputError(f"layers: {missing[0]!r} is no linear layer of this model; it has {', '.join(list(linear)[:5])}, ...")
        chosen = {name: linear[name] for name in layers}
    if not chosen:
        raise InputError("layers: no linear layer matches")
    first: dict[int, str] = {}
    for name, module in chosen.items():
        if id(module.weight) in first:
            raise InputError(f"layers: {name} and {first[id(module.weight)]} are two modules with one weight; choose one of them")
        first[id(module.weight)] = name
    elsewhere = [n for n, m in linear.items() if n not in chosen and id(m.weight) in first]
    if elsewhere:
        raise InputError(f"layers: {elsewhere[0]} shares its weight with a chosen layer; its gradient would be missing")
    owners: dict[str, list[nn.Embedding]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in first:
            owners.setdefault(first[id(module.weight)], []).append(module)
    return chosen, owners
