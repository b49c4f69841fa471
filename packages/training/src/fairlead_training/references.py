"""The reference that objectives with log-ratios measure against: another model, the same one without its adapters, or
numbers that were computed once and kept on disk.

Scores are kept under a hash of the model's weights and of the tokenised data, so a second run, or a second epoch, pays
nothing for its reference, and another model or another data set can never be answered with them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.files import atomic_write, cache_dir
from fairlead.logprobs import unwrapped
from fairlead.models import logits_width

from .statistics import Row, attention_of, lay_out, packs, token_stats, token_weights
from .tokens import fingerprint

TOKENS_PER_PASS = 4096


class Reference:
    """Log-probabilities under the reference.

    policy: the model that is trained; with adapters and without `model`, the policy without them is the reference.
    model: another causal LM, frozen; InputError when its vocabulary differs.
    """

    def __init__(self, policy: Any, model: Any = None) -> None:
        self.policy, self.model = policy, model
        if model is not None and logits_width(unwrapped(model)) != logits_width(unwrapped(policy)):
            raise InputError(
                f"ref_model: logits of width {logits_width(unwrapped(model))}, the trained model's have {logits_width(unwrapped(policy))}; "
                "the two must share one tokenizer"
            )
        if model is not None:
            model.requires_grad_(False)
            model.eval()

    @property
    def lives(self) -> bool:
        """Whether it can still be asked once training has moved the policy."""
        return self.model is not None or hasattr(self.policy, "disable_adapter")

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model to ask, in eval mode."""
        if self.model is not None:
            yield self.model
            return
        inner = self.policy
        without = inner.disable_adapter() if hasattr(inner, "disable_adapter") else nullcontext()
        training = inner.training
        inner.eval()
        try:
            with without:
                yield inner
        finally:
            inner.train(training)

    @torch.no_grad()
    def sums(self, rows: Sequence[Row], objective: Any = None, completions: str = "completion_ids", temperature: float = 1.0) -> list[float]:
        """Log-probability of every completion of the rows, in order; by passes of at most 4096 tokens, or one row."""
        found: list[float] = []
        with self.active() as model:
            packed = packs(model)
            with attention_of(model, packed):
                for part in by_tokens(rows, completions):
                    stats = token_stats(model, lay_out(part, packed, unwrapped(model).device, completions), temperature)
                    found += stats.sum_S(token_weights(stats, part, objective, completions)).tolist()
        return found


def by_tokens(rows: Sequence[Row], completions: str = "completion_ids", budget: int = TOKENS_PER_PASS) -> Iterator[list[Row]]:
    """Consecutive rows of at most `budget` tokens together."""
    part: list[Row] = []
    size = 0
    for row in rows:
        own = len(row["prompt_ids"]) + sum(map(len, row[completions]))
        if part and size + own > budget:
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part


def cached_sums(
    reference: Reference, rows: Sequence[Row], folder: str | os.PathLike[str] | None = None, objective: Any = None,
    completions: str = "completion_ids", accelerator: Any = None, temperature: float = 1.0,
) -> list[float]:  # fmt: skip
    """`Reference.sums`, read from `folder` when they are there, computed over all processes and written there otherwise.

    folder: default `fairlead.files.cache_dir("reference")`. accelerator: shares the work among its processes. A file that cannot be read is made anew.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    with reference.active() as model:
        weights = model_fingerprint(model, adapters=reference.model is not None)
    kind = f"{type(objective).__name__}{objective.config!r}" if hasattr(objective, "token_weights") else ""
    precision = getattr(accelerator, "mixed_precision", "no")
    key = hashlib.sha256(f"{weights} {fingerprint(rows)} {completions} {temperature} {kind} {precision}".encode()).hexdigest()[:24]
    path = Path(folder or cache_dir("reference")) / f"ref-{key}.safetensors"
    count = sum(len(row[completions]) for row in rows)
    kept: list[float] = []
    try:
        kept = load_file(path)["ref_logp"].tolist()
    except (OSError, KeyError, SafetensorError):  # absent, torn or foreign
        pass
    alone = accelerator is None or accelerator.num_processes == 1
    if not alone:
        from accelerate.utils import gather_object
    here = len(kept) == count
    if here if alone else all(gather_object([here])):  # machines may have caches of their own: either all read or all work
        return kept
    with nullcontext() if accelerator is None else accelerator.autocast():
        if alone:
            values = reference.sums(rows, objective, completions, temperature)
        else:
            size = -(-len(rows) // accelerator.num_processes)
            start = accelerator.process_index * size
            values = gather_object(reference.sums(rows[start : start + size], objective, completions, temperature))
    if accelerator is None or accelerator.is_local_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            stream.write(save({"ref_logp": torch.tensor(values, dtype=torch.float64)}))
    return values


@torch.no_grad()
def model_fingerprint(model: Any, adapters: bool = True) -> str:
    """A hash of the weights, 16 hexadecimal digits. adapters: False leaves out those of PEFT, as when they are switched off."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(unwrapped(model).state_dict().items()):
        if not adapters and any(part in name for part in ("lora_", "ia3_", "ranknum", ".modules_to_save.")):
            continue
        digest.update(f"{name.replace('.base_layer', '').replace('.original_module', '')} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
