"""Fine-tuning methods by name (arXiv 2604.07754): an adapter, an objective and an optimiser's settings each.

lora, qlora, adalora, ia3, full (likelihood of the wanted answer), dpo and orpo (pairs, with LoRA); new ones by
`register_method`. Holds the NF4 fake quantisation too. Training and evaluation are misalignment.py's.
Shape suffixes: O outputs, I inputs of a weight.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fairlead.errors import ConfigError, InputError, MissingDependencyError, UnknownNameError

log = logging.getLogger("fairlead")
BLOCK = 64
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
ABSMAX = tuple(k / 7 for k in range(-7, 8))
Backend = Literal["auto", "bitsandbytes", "fake"]


@dataclass(frozen=True)
class FineTuning:
    """A method: adapter(steps) -> peft configuration (None trains every weight), objective by registered name and optimiser.

    quantised: the adapter is trained on a 4-bit base. pairs: the objective compares with a rejected answer.
    """

    name: str
    adapter: Callable[[int], Any] | None
    objective: str = "sft"
    objective_settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-4
    weight_decay: float = 0.0
    warmup: float = 0.0
    quantised: bool = False
    pairs: bool = False


_methods: dict[str, FineTuning] = {}


def register_method(method: FineTuning) -> None:
    """Make a method known by its name, in any case; ConfigError where the name is taken."""
    key = method.name.lower()
    if key in _methods:
        raise ConfigError(f"fine-tuning method {method.name!r}: is registered already; choose another name")
    _methods[key] = method


def method_of(name: str) -> FineTuning:
    """The method of a name in any case; UnknownNameError with the nearest names otherwise."""
    if name.lower() not in _methods:
        raise UnknownNameError("fine-tuning method", name, _methods)
    return _methods[name.lower()]


def method_names() -> list[str]:
    """Names of all registered methods."""
    return sorted(_methods)


def lora(steps: int, *, r: int = 16, alpha: int = 32, dropout: float = 0.05, targets: Any = None) -> Any:
    """LoRA: W + (alpha / r) B A with B = 0."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def adalora(
    steps: int, *, init_r: int = 16, target_r: int = 8, alpha: int = 32, dropout: float = 0.05, targets: Any = None,
    tinit: int | None = None, tfinal: int | None = None,
) -> Any:  # fmt: skip
    """AdaLoRA: W + (alpha / rank) P Lambda Q, Lambda = 0; the rank falls from init_r to target_r between tinit and steps - tfinal."""
    from peft import AdaLoraConfig

    start = steps // 6 if tinit is None else tinit
    end = steps // 3 if tfinal is None else tfinal
    if start + end >= max(1, steps):  # too short for a schedule: shrink once, at the end
        start, end = 0, 0
    return AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=init_r, target_r=target_r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets,
        total_step=max(1, steps), tinit=start, tfinal=end,
    )  # fmt: skip


def ia3(steps: int) -> Any:
    """IA3: learned factors on keys, values and the feed-forward inner activation, 1 at the start."""
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM")


register_method(FineTuning("lora", lora))
register_method(FineTuning("qlora", lora, quantised=True))
register_method(FineTuning("adalora", adalora))
register_method(FineTuning("ia3", ia3))
register_method(FineTuning("full", None, lr=2e-5))
register_method(FineTuning("dpo", lora, "dpo", {"beta": 0.1}, lr=3e-5, weight_decay=0.01, warmup=0.1, pairs=True))
register_method(FineTuning("orpo", lora, "orpo", {"lam": 0.1}, lr=3e-5, weight_decay=0.01, warmup=0.1, pairs=True))


def fake_quantise(weight_OI: torch.Tensor, levels: tuple[float, ...] = NF4, block: int = BLOCK) -> torch.Tensor:
    """The weight rounded to 4-bit levels times each block's largest magnitude, in its own dtype; a zero block stays zero.

    Blocks run over the flattened weight as bitsandbytes' do; the scale itself is not quantised, so a second call changes nothing.
    """
    if not bool(weight_OI.isfinite().all()):
        raise InputError("weight: must be finite to be quantised")
    table = torch.tensor(levels, dtype=torch.float32, device=weight_OI.device)
    middles = (table[1:] + table[:-1]) / 2
    flat = weight_OI.detach().float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)
    scale = padded.abs().amax(-1, keepdim=True)
    index = torch.bucketize(padded / scale.clamp(min=torch.finfo(torch.float32).tiny), middles)
    found = torch.where(scale > 0, table[index] * scale, 0.0)
    return found.reshape(-1)[: flat.numel()].reshape(weight_OI.shape).to(weight_OI.dtype)


def quantise_base(model: Any, backend: Backend = "auto", levels: tuple[float, ...] = NF4) -> str:
    """Give a model a 4-bit base in place and return what was done: "bitsandbytes" (a model loaded in 4 bits) or "fake".

    "auto" takes a model that was loaded in 4 bits as it is and rounds the linear weights of any other. "bitsandbytes" on a
    model of another kind is MissingDependencyError (no library) or ConfigError (not loaded so). The head is left alone.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        return "bitsandbytes"
    if backend == "bitsandbytes":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError('qlora: bitsandbytes is not installed (pip install bitsandbytes); backend="fake" rounds to the NF4 levels instead')
        raise ConfigError('qlora: the model was not loaded in 4 bits (BitsAndBytesConfig(load_in_4bit=True)); backend="fake" rounds to the NF4 levels')
    log.info("qlora: no 4-bit base here; fake quantisation rounds the linear weights to 16 levels a block of %d", BLOCK)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.weight.copy_(fake_quantise(module.weight, levels))
    return "fake"


def trainable_in_4_bits(model: Any) -> None:
    """Keep bitsandbytes' CPU layers in the layout that has gradients; whatever else is left alone.

    In eval mode they turn, for good, to one for inference, through which nothing is trained and no error says so.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # turns a layer back
            module.support_avx512bf16_for_cpu = False


def orthogonality(model: Any) -> torch.Tensor:
    """AdaLoRA's penalty as peft has it: 0.5 x the mean Frobenius norm of P^T P - I and Q Q^T - I. peft adds it only to a
    loss the model computes itself, so a loss of one's own must add it."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(gram.shape[0], dtype=p.dtype, device=p.device)).norm())
    weight = next(iter(model.peft_config.values())).orth_reg_weight
    return torch.as_tensor(weight * torch.stack(norms).mean())
