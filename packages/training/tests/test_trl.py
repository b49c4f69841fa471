"""Agreement with TRL's DPOTrainer on one batch, and our objectives inside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.errors import InputError
from fairlead.testing import save_tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer
from fairlead_training.trl_adapter import dpo_trainer

trl = pytest.importorskip("trl")
PAIRS = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
    {"prompt": "w7", "chosen": " w8", "rejected": " w9 w10 w11 w12"},
    {"prompt": "w2 w3 w4", "chosen": " w5 w5", "rejected": " w1 w1"},
    {"prompt": "w9", "chosen": " w2 w1 w7", "rejected": " w4 w8"},
]
SAME = [
    ("sigmoid", {}, "dpo", {}), ("sigmoid", {"f_divergence_type": "forward_kl"}, "f-dpo", {"divergence": "forward-kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "f-dpo", {"divergence": "js"}), ("hinge", {}, "hinge", {}), ("ipo", {}, "ipo", {}),
    ("exo_pair", {"label_smoothing": 1e-3}, "exo-pair", {"eps": 1e-3}), ("nca_pair", {}, "nca-pair", {}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"eps": 0.2}), ("bco_pair", {}, "bco-pair", {}), ("aot", {}, "aot", {}),
    ("aot_unpaired", {}, "aot-unpaired", {}), ("apo_zero", {}, "apo-zero", {}), ("apo_down", {}, "apo-down", {}),
    ("discopop", {}, "discopop", {}), ("sigmoid_norm", {}, "sigmoid-norm", {}), ("sft", {}, "sft", {}), ("sppo_hard", {}, "sppo-hard", {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A model, its reference, which differs, and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return model, reference, tokenizer


def in_trl(kind: Any, parts: Any, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset

    model, reference, tokenizer = parts
    args = trl.DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False, max_steps=3, logging_steps=1,
        learning_rate=1e-3, lr_scheduler_type="constant", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    return kind(model=copy.deepcopy(model), ref_model=copy.deepcopy(reference), args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)


@pytest.mark.parametrize(("loss_type", "theirs", "name", "ours"), SAME)
def test_loss_and_gradient_are_trls(loss_type: str, theirs: Any, name: str, ours: Any, parts: Any, tmp_path: Path) -> None:
    peer = in_trl(trl.DPOTrainer, parts, tmp_path, loss_type=loss_type, beta=0.1, **theirs)
    mine = in_trl(dpo_trainer(name, **ours, **({} if name == "sft" else {"beta": 0.1})), parts, tmp_path)
    batch = next(iter(peer.get_train_dataloader()))
    losses = [run.compute_loss(run.model.train(), batch) for run in (peer, mine)]
    for loss in losses:
        loss.backward()
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6, abs=1e-6)
    for p, q in zip(peer.model.parameters(), mine.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


def test_an_objective_that_trl_lacks_trains_in_it_and_logs_its_metrics(parts: Any, tmp_path: Path) -> None:
    run = in_trl(dpo_trainer("dpop", lam=5.0), parts, tmp_path, precompute_ref_log_probs=True)
    run.train()
    first = run.state.log_history[0]
    assert {"loss", "rewards/chosen", "rewards/margins", "logps/rejected"} <= set(first)
    before, after = parts[0].state_dict(), run.model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_our_trainer_takes_the_steps_of_trls(parts: Any, tmp_path: Path) -> None:
    model, reference, tokenizer = parts
    peer = in_trl(trl.DPOTrainer, parts, tmp_path / "trl", beta=0.1)
    peer.train()
    args = PreferenceConfig(
        output_dir=str(tmp_path / "own"), per_device_train_batch_size=4, report_to=[], use_cpu=True, max_steps=3, logging_steps=1,
        learning_rate=1e-3, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, ref_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    own = PreferenceTrainer(
        copy.deepcopy(model), "dpo", args, [dict(row) for row in PAIRS], processing_class=tokenizer, ref_model=copy.deepcopy(reference)
    )
    own.train()
    for name in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected"):
        found = [[e[name] for e in run.state.log_history if name in e] for run in (peer, own)]
        assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4), name


def test_settings_of_trls_own_losses_are_refused(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ld_alpha: is of TRL's own losses; use PreferenceTrainer with the objective ld-dpo"):
        in_trl(dpo_trainer("dpo"), parts, tmp_path, ld_alpha=0.5)


@pytest.mark.parametrize(("name", "needed"), [("wpo", "wpo_weight"), ("ld-dpo", "weighted_length"), ("kto", "mismatched_ratio")])
def test_objectives_that_need_more_than_pairs_are_refused(name: str, needed: str) -> None:
    with pytest.raises(InputError, match=f"needs {needed}, which TRL's DPOTrainer does not give; use PreferenceTrainer"):
        dpo_trainer(name)
