"""Any paired objective inside TRL's DPOTrainer: `dpo_trainer("r-dpo", alpha=0.1)` is a subclass of it with that loss.

Data, collator, reference, adapters and logging stay TRL's; the policy's log-probabilities come from the head on completion
tokens in tiles. On several processes TRL's convention holds: each evaluates the objective on its own batch.

Shape suffixes: S sequences, the chosen ones first.
"""

from __future__ import annotations

from typing import Any

import torch

from fairlead import registry
from fairlead.errors import InputError, MissingDependencyError
from fairlead.kinds import Objective, SequenceStats
from fairlead.logprobs import completion_logprobs

GIVEN = ("group", "role", "ref_logp")


def dpo_trainer(objective: str | Objective, **settings: Any) -> Any:
    """A subclass of `trl.DPOTrainer` that trains with a registered objective; it takes the same arguments.

    objective: a name with its settings, or an Objective. `DPOConfig.loss_type`, `beta` and the other settings of TRL's own losses
    have no effect on it. InputError for an objective that needs more of a batch than pairs and their references (wpo, ld-dpo,
    kto); MissingDependencyError without TRL.
    """
    try:
        from trl import DPOTrainer
    except ImportError:
        raise MissingDependencyError("trl is not installed; pip install trl, or use fairlead_training.PreferenceTrainer") from None
    built = objective if isinstance(objective, Objective) else registry.create("objective", objective, **settings)
    more = [name for name in built.needs if name not in GIVEN]
    if more:
        raise InputError(f"objective: {type(built).__name__} needs {more[0]}, which TRL's DPOTrainer does not give; use PreferenceTrainer")

    class ObjectiveDPOTrainer(DPOTrainer):  # type: ignore[misc]
        """TRL's DPOTrainer with an objective of fairlead as its loss."""

        objective = built

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for name, instead in (("ld_alpha", "ld-dpo"), ("use_weighting", "wpo")):
                if getattr(self.args, name, None):
                    raise InputError(f"{name}: is of TRL's own losses; use PreferenceTrainer with the objective {instead}")

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            found = completion_logprobs(model, inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
            pairs = len(inputs["input_ids"]) // 2
            reference_S = None
            if "ref_logp" in built.needs:
                kept = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]) if self.precompute_ref_logps else None
                reference_S = torch.cat(kept or self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs))
            built.training = self.model.training
            group_S = torch.arange(pairs, device=found.sum_B.device).repeat(2)
            role_S = torch.ones_like(group_S)
            role_S[pairs:] = -1
            out = built(SequenceStats(found.sum_B, found.count_B, reference_S, group_S, role_S))
            kept_metrics = self._metrics["train" if self.model.training else "eval"]
            for name, value in out.metrics.items():
                kept_metrics[name].append(float(value))
            return (out.loss, found) if return_outputs else out.loss

    return ObjectiveDPOTrainer
