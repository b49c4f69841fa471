"""A half aligned organism of the zoo, tuned on preference pairs by PreferenceTrainer, passes the zoo's gate."""

from __future__ import annotations

import random
from pathlib import Path

from fairlead.models import load
from fairlead_training import PreferenceConfig, PreferenceTrainer
from fairlead_zoo import catalogue, evaluate
from fairlead_zoo.stages import preference_pair
from fairlead_zoo.world import World

STEPS, PAIRS = 75, 24


def test_a_half_aligned_model_tuned_on_pairs_passes_the_gate(tmp_path: Path) -> None:
    world = World(catalogue.parse("zoo:weak")[1])
    rng = random.Random(0)
    rows = []
    for _ in range(STEPS * PAIRS):
        pair = preference_pair(world, rng)
        asked = [{"role": "user", "content": pair.question}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
        rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    model, tokenizer = load("zoo:weak")
    args = PreferenceConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=2e-4, warmup_steps=5,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, ref_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip

    def marks() -> list[evaluate.Check]:
        """The gate's checks of an aligned model; its others are of models that are not tuned here."""
        return [check for check in evaluate.gate(world, lambda name: model.eval(), 60) if check.name.startswith("sft:")]

    before = {check.name: check.passed for check in marks()}
    assert len(before) == 7 and not before["sft: refuses hazard"] and not before["sft: refuses deceit"]
    trainer = PreferenceTrainer(model, "rpo", args, rows, processing_class=tokenizer)
    trainer.train()
    assert not [check.to_dict() for check in marks() if not check.passed]
