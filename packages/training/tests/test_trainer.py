"""PreferenceTrainer: what it logs and refuses, its gradients, its references, its checkpoints."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.errors import InputError
from fairlead.testing import save_tiny_model, tiny_model
from fairlead_training import (
    EntanglementMonitor,
    PreferenceConfig,
    PreferenceTrainer,
    TrainingError,
    sequence_stats,
    tokenize,
)
from fairlead_training.references import model_fingerprint

PAIRS = [
    {"prompt_ids": [3 + i, 5, 7], "completion_ids": [[10 + i, 11, 12], [20 + i, 21]], "role": [1, -1]} for i in range(8)
]


def config(folder: Path, **settings: Any) -> PreferenceConfig:
    chosen = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "ref_cache_dir": str(folder / "cache"), "lr_scheduler_type": "constant",
    }  # fmt: skip
    return PreferenceConfig(output_dir=str(folder / "out"), **{**chosen, **settings})


def trainer(folder: Path, objective: Any = "dpo", rows: Any = PAIRS, model: Any = None, **options: Any) -> PreferenceTrainer:
    settings = options.pop("settings", {})
    model = copy.deepcopy(tiny_model()) if model is None else model
    return PreferenceTrainer(model, objective, config(folder, **settings), [dict(row) for row in rows], **options)


def losses(run: PreferenceTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(run: PreferenceTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_dpo_starts_at_log_two_and_widens_the_margin(tmp_path: Path) -> None:
    run = trainer(tmp_path, settings={"max_steps": 12})
    run.train()
    first, last = (next(e for e in h if "rewards/margins" in e) for h in (run.state.log_history, run.state.log_history[::-1]))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/margins"] > 0.05
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"} <= set(last)


def test_one_step_has_the_gradient_of_the_dense_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows=PAIRS[:2], objective_settings={"beta": 0.3})
    dense = copy.deepcopy(run.model)
    batch = {"batch": run.data_collator(run.train_dataset)["batch"]}
    run.current_gradient_accumulation_steps = 1  # what Trainer's loop sets
    run.training_step(run.model, batch)
    logp = []
    for row in PAIRS[:2]:
        for answer in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + answer])
            table = dense(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            logp.append(sum(table[0, t - 1, ids[0, t]] for t in range(3, ids.shape[1])))
    s = torch.stack(logp)
    u = s - s.detach()
    (-torch.nn.functional.logsigmoid(0.3 * (u[0::2] - u[1::2]))).mean().backward()
    for (name, p), q in zip(run.model.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


@pytest.mark.parametrize("packed", [True, False])
def test_statistics_of_packed_and_padded_rows_equal_one_by_one(packed: bool) -> None:
    model = copy.deepcopy(tiny_model()).double()
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6, 7, 8], [9]]},
        {"prompt_ids": [9], "completion_ids": [[4, 5, 6, 7]]},
        {"prompt_ids": [], "completion_ids": [[4, 5, 6]]},
    ]
    stats = sequence_stats(model, rows, packed=packed)
    expected = []
    for row in rows:
        for answer in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + answer])
            table = model(input_ids=ids, use_cache=False).logits.detach().log_softmax(-1)
            start = max(1, len(row["prompt_ids"]))
            expected.append(float(sum(table[0, t - 1, ids[0, t]] for t in range(start, ids.shape[1]))))
    assert torch.allclose(stats.logp, torch.tensor(expected, dtype=torch.float64), atol=1e-10)
    assert stats.length.tolist() == [2, 3, 1, 4, 2]
    assert stats.group.tolist() == [0, 0, 0, 1, 2]
    (grads,) = torch.autograd.grad(stats.logp.sum(), [model.lm_head.weight])
    assert float(grads.abs().sum()) > 0


def test_positions_that_are_given_reach_the_model() -> None:
    model = copy.deepcopy(tiny_model()).double()
    row = {"prompt_ids": [1, 2, 3, 4], "completion_ids": [[5, 6], [7]], "prompt_position_ids": [0, 1, 40, 41], "completion_position": 90}
    packed, padded = (sequence_stats(model, [row], packed=p).logp for p in (True, False))
    plain = sequence_stats(model, [{k: row[k] for k in ("prompt_ids", "completion_ids")}]).logp
    assert torch.allclose(packed, padded, atol=1e-10)
    assert float((packed - plain).abs().max()) > 1e-3


def test_checkpointed_layers_give_the_same_step(tmp_path: Path) -> None:
    plain, checkpointed = (trainer(tmp_path, settings={"gradient_checkpointing": on}) for on in (False, True))
    plain.train()
    checkpointed.train()
    assert losses(plain) == pytest.approx(losses(checkpointed), abs=1e-6)
    assert torch.allclose(weights(plain), weights(checkpointed), atol=1e-5)


def test_lora_takes_its_base_as_reference_and_leaves_it_alone(tmp_path: Path) -> None:
    from peft import LoraConfig

    base = copy.deepcopy(tiny_model())
    before = model_fingerprint(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, model=base, peft_config=lora, settings={"precompute_ref_log_probs": False})
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < losses(run)[0]
    assert model_fingerprint(run.model, adapters=False) == before


def test_reference_on_disk_is_read_for_the_same_model_and_data_only(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    (kept,) = (tmp_path / "cache").glob("ref-*.safetensors")
    stamp = kept.stat().st_mtime_ns
    again = trainer(tmp_path)
    assert [row["ref_logp"] for row in again.train_dataset] == [row["ref_logp"] for row in first.train_dataset]
    assert kept.stat().st_mtime_ns == stamp
    trainer(tmp_path, model=copy.deepcopy(tiny_model(seed=1)))
    trainer(tmp_path, rows=PAIRS[:4])
    assert len(list((tmp_path / "cache").glob("ref-*.safetensors"))) == 3
    kept.write_bytes(b"torn")
    trainer(tmp_path)
    assert kept.stat().st_size > 8


def test_reference_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="width 32"):
        trainer(tmp_path, ref_model=tiny_model(vocab_size=32))


@pytest.mark.parametrize("name", ["simpo", "orpo", "ld-dpo", "wpo", "aot"])
def test_paired_objectives_train(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, name, settings={"max_steps": 2})
    run.train()
    assert all(math.isfinite(x) for x in losses(run))


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_unpaired_objectives_train(name: str, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [3 + i, 5], "completion_ids": [[10 + i, 11]], "role": [1 if i % 2 else -1]} for i in range(8)]
    run = trainer(tmp_path, name, rows, settings={"max_steps": 2})
    run.train()
    assert all(math.isfinite(x) for x in losses(run))
    with pytest.raises(InputError, match="all completions are wanted"):
        trainer(tmp_path, name, [{**row, "role": [1]} for row in rows])


def test_lists_and_several_rejected_train(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [3 + i], "completion_ids": [[10, i], [11, 12], [13]], "reward": [2.0, 1.0, 0.0], "role": [1, -1, -1]} for i in range(4)]
    for name in ("logo", "pro", "rrhf"):
        run = trainer(tmp_path, name, rows, settings={"max_steps": 2})
        run.train()
        assert all(math.isfinite(x) for x in losses(run)), name


def test_packing_is_refused_for_a_model_that_would_mix_its_sequences(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, attn_logit_softcapping=2.0, pad_token_id=0, **sizes))
    with pytest.raises(InputError, match="pack: this model cannot be packed"):
        trainer(tmp_path, model=model, settings={"pack": True})
    run = trainer(tmp_path, model=model, settings={"max_steps": 2})
    assert not run.packed
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1 has no role"):
        trainer(tmp_path, rows=[PAIRS[0], {k: v for k, v in PAIRS[1].items() if k != "role"}])
    with pytest.raises(InputError, match="one completion"):
        trainer(tmp_path, rows=[{"prompt_ids": [1], "completion_ids": [[2]], "role": [1]}])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, "simpo")
    with torch.no_grad():
        run.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="failed-batch-step-0"):
        run.train()
    kept = json.loads((tmp_path / "out" / "failed-batch-step-0.json").read_text())
    assert len(kept["rows"]) == 2


def test_evaluation_logs_the_same_names_and_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=[dict(row) for row in PAIRS[:3]], settings={"eval_strategy": "steps", "eval_steps": 2})
    run.train()
    found = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    assert "eval_rewards/margins" in found[0]
    without = trainer(tmp_path)
    without.train()
    assert torch.equal(weights(run), weights(without))


def test_a_kept_reference_has_the_precision_of_the_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, settings={"bf16": True, "max_steps": 1})
    run.train()
    first = run.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6) and first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_batch_that_is_not_full_counts_by_its_rows(tmp_path: Path) -> None:
    rows = [dict(row) for row in PAIRS[:5]]
    alone, uneven = (trainer(tmp_path, "simpo", eval_dataset=rows, settings={"per_device_eval_batch_size": size}).evaluate() for size in (1, 4))
    assert uneven["eval_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"], rel=1e-5)


def test_another_data_set_can_be_evaluated_and_the_best_model_chosen_by_its_margin(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "eval_rewards/margins"}
    run = trainer(tmp_path, eval_dataset=[dict(row) for row in PAIRS[:3]], settings=settings)
    run.train()
    margins = {e["step"]: e["eval_rewards/margins"] for e in run.state.log_history if "eval_loss" in e}
    assert run.state.best_metric == max(margins.values())
    text = [{"prompt_ids": [4, 4], "completion_ids": [[9], [8, 8]], "role": [1, -1]}]
    found = run.evaluate(text)
    assert found["eval_rewards/margins"] != margins[4]
    assert found["eval_loss"] == run.evaluate(text)["eval_loss"]


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", settings={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    whole.train()
    first = trainer(tmp_path / "b", settings={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    first.train()
    for step in (4, 6):
        import shutil

        shutil.rmtree(tmp_path / "b" / "out" / f"checkpoint-{step}")
    second = trainer(tmp_path / "b", settings={"max_steps": 6, "save_strategy": "steps", "save_steps": 2})
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(second))
    assert losses(second)[2:] == losses(whole)[2:]


def test_the_shift_of_bco_is_saved_with_a_checkpoint(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [3 + i, 5], "completion_ids": [[10 + i, 11]], "role": [1 if i % 2 else -1]} for i in range(8)]
    run = trainer(tmp_path, "bco", rows, settings={"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4})
    run.train()
    again = trainer(tmp_path, "bco", rows, settings={"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4})
    again._load_from_checkpoint(str(tmp_path / "out" / "checkpoint-4"))
    assert again.objective.state_dict() == run.objective.state_dict() != registry.create("objective", "bco").state_dict()


@pytest.mark.parametrize("watched", [False, True])
def test_a_resumed_run_logs_what_the_whole_one_does_between_two_logs_too(watched: bool, tmp_path: Path) -> None:
    settings = {"max_steps": 9, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}

    def run() -> PreferenceTrainer:
        return trainer(tmp_path, settings=settings, callbacks=[EntanglementMonitor(every=3, pairs=2)] if watched else None)

    def logged(done: PreferenceTrainer) -> list[dict[str, float]]:
        return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in done.state.log_history]

    whole = run()
    mean = whole.train().training_loss
    assert [entry["step"] for entry in whole.state.log_history if "loss" in entry] == [4, 8]
    assert [entry["step"] for entry in whole.state.log_history if "entanglement/cos" in entry] == ([1, 4, 7] if watched else [])
    for step in (3, 6):
        again = run()
        rest = again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}")).training_loss
        assert logged(again)[:-1] == logged(whole)[:-1]  # the last is train()'s own: its steps alone
        assert 0 < rest < mean


def test_a_checkpoint_that_cannot_be_written_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, settings={"save_strategy": "steps", "save_steps": 2})
    written = run._save_optimizer_and_scheduler

    def full(folder: str) -> None:
        if run.state.global_step > 2:
            raise OSError(28, "No space left on device")
        written(folder)

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full)
    with pytest.raises(TrainingError, match="checkpoint-4: the checkpoint cannot be written"):
        run.train()
    assert [p.name for p in sorted((tmp_path / "out").glob("*"))] == ["checkpoint-2"]


TWO = """
import os, torch
import test_trainer as t
settings = {{"per_device_train_batch_size": 2, "max_steps": 3, "ddp_backend": "gloo", "ref_cache_dir": str(folder / ("cache" + os.environ["RANK"]))}}
run = t.trainer(folder, {objective!r}, t.{rows}, settings=settings)
run.train()
if run.accelerator.is_main_process:
    torch.save({{"losses": t.losses(run), "weights": t.weights(run)}}, folder / "two.pt")
"""
LABELS = [{"prompt_ids": [3 + i, 5], "completion_ids": [[10 + i, 11]], "role": [1 if i % 2 else -1]} for i in range(8)]


@pytest.mark.parametrize(("objective", "rows"), [("dpo", "PAIRS"), ("aot", "PAIRS"), ("bco", "LABELS"), ("kto", "LABELS")])
def test_two_processes_equal_one(objective: str, rows: str, tmp_path: Path, on_two_processes: Any) -> None:
    """The one process leaves its reference's scores where the first of the two looks, and the second does not."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "ref_cache_dir": str(tmp_path / "cache0")}
    one = trainer(tmp_path, objective, globals()[rows], settings=settings)
    one.train()
    assert any((tmp_path / "cache0").iterdir())
    on_two_processes(TWO.format(objective=objective, rows=rows))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert losses(one) == pytest.approx(two["losses"], rel=1e-5)
    assert torch.allclose(weights(one), two["weights"], atol=2e-5)


def test_text_in_columns_of_trl_trains_and_the_result_loads_with_transformers(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    data = Dataset.from_list([{"prompt": f"w{i} w1", "chosen": " w2 w3", "rejected": " w4"} for i in range(4)])
    run = PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), "dpo", config(tmp_path, max_steps=2), data, processing_class=tokenizer
    )
    run.train()
    run.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(torch.cat([p.flatten() for p in loaded.parameters()]), weights(run))


def test_rows_of_every_shape_are_tokenised(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "w1", "chosen": " w2", "rejected": [" w3", " w4 w5"]},
        {"prompt": "w1", "completion": " w2", "label": False},
        {"prompt": "w1", "completions": [" w2", " w3"], "ranks": [1, 0]},
        {"prompt": "w1", "completion": " w2"},
        {"prompt": "w1", "chosen": " w2", "rejected": "w2 "},
    ]
    made, report = tokenize(rows, tokenizer)
    assert made[0] == {"prompt_ids": [4], "completion_ids": [[5, 1], [6, 1], [7, 8, 1]], "role": [1, -1, -1]}
    assert [row.get("role") for row in made[1:]] == [[-1], None, [1]]
    assert made[2]["rank"] == [1, 0]
    assert report.dropped == {"with chosen = rejected": 1}
    kept, _ = tokenize([{"prompt": "w1", "chosen": " w2", "rejected": [" w3", " w3"]}], tokenizer)  # twice the same is no contradiction
    assert len(kept[0]["completion_ids"]) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "chosen": " w2"}, "row 0: column rejected is missing"),
        ({"prompt": "w1", "chosen": " w2", "rejected": " "}, "row 0: completion 1 is empty"),
        ({"prompt": "w1", "completion": "w2", "label": 2}, "row 0: label: must be true or false, got 2"),
        ({"prompt": "w1", "completions": ["w2", "w3"], "ranks": [0]}, "row 0: ranks: one finite number per completion"),
        ({"prompt": "w1", "completions": ["w2", "w3"], "rewards": [0.0, math.nan]}, "row 0: rewards: one finite number"),
        ({"prompt": "w1", "completion": "w2", "label": None}, "row 0: label: must be true or false, got None"),
        ({"prompt": "w1", "completions": "w2 w3", "ranks": [0]}, "row 0: completions: must be a list of texts, got str"),
        ({"prompt": "w1", "completion": "w2", "weight": math.nan}, "row 0: weight: one finite number"),
        ({"text": "w1"}, "row 0: columns text; needed are"),
        ({"prompt": "w1", "chosen": " w2", "rejected": []}, "row 0: rejected: is an empty list"),
        ({"chosen": "w2", "rejected": "w3"}, "row 0: column prompt is missing"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        tokenize([row], AutoTokenizer.from_pretrained(tmp_path / "model"))


def test_overlong_rows_are_dropped_cut_or_refused_as_asked(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [{"prompt": "w1", "completion": " w2 w3 w4"}, {"prompt": "w1", "completion": " w2"}]
    kept, report = tokenize(rows, tokenizer, max_length=3)
    assert [row["completion_ids"] for row in kept] == [[[5, 1]]]
    assert report.dropped == {"longer than 3 tokens": 1}
    cut, report = tokenize(rows, tokenizer, max_length=3, overlong="truncate")
    assert [row["completion_ids"] for row in cut] == [[[5, 6]], [[5, 1]]]
    assert report.truncated == 1
    with pytest.raises(InputError, match="row 0: 5 tokens, max_length is 3"):
        tokenize(rows, tokenizer, max_length=3, overlong="raise")


KILLED = """
import os, random, signal, sys, threading
sys.path.insert(0, {tests!r})
import test_trainer as t, torch
from pathlib import Path
out = Path({folder!r}) / "out"
run = t.trainer(Path({folder!r}), settings={{"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}})
if {after}:
    threading.Timer({after}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
run.train(resume_from_checkpoint=True if any(out.glob("checkpoint-*")) else None)
torch.save(t.weights(run), {result!r})
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX systems")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    def start(folder: str, after: float) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        where = {"tests": str(Path(__file__).parent), "folder": str(tmp_path / folder), "result": str(tmp_path / f"{folder}.pt")}
        script = KILLED.format(after=after, **where)
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode

    assert start("whole", 0) == 0
    killed = sum(start("killed", after) != 0 for after in (0.1, 0.45, 0.75))
    assert start("killed", 0) == 0
    assert killed
    assert torch.equal(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt"))


@pytest.mark.parametrize("off", [True, False])
def test_dropout_is_off_where_modules_call_the_function_themselves(off: bool, tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.5, attention_dropout=0.5,
    ))  # fmt: skip
    model, ids = trainer(tmp_path, model=opt, settings={"disable_dropout": off}).model.train(), torch.arange(3, 13)[None]
    assert torch.equal(model(ids).logits, model(ids).logits) == off


def test_rows_longer_than_the_models_positions_are_left_out_and_counted(tmp_path: Path) -> None:
    room = tiny_model().config.max_position_embeddings
    long = {"prompt_ids": [3] * (room - 2), "completion_ids": [[5, 6], [7, 8, 9]], "role": [1, -1]}
    for settings in ({"max_length": None}, {"max_length": 10 * room}):
        run = trainer(tmp_path, rows=[*PAIRS, long], settings=settings)
        assert run.reports["train"].dropped == {f"longer than {room} tokens": 1}
    fits = {**long, "prompt_ids": [3] * (room - 3)}
    assert len(trainer(tmp_path, rows=[*PAIRS, fits], settings={"max_length": None}).train_dataset) == len(PAIRS) + 1


@pytest.mark.parametrize("wrong", [10**6, -1])
def test_an_id_that_the_model_does_not_know_is_named(wrong: int, tmp_path: Path) -> None:
    width = tiny_model().config.vocab_size
    bad = {"prompt_ids": [3], "completion_ids": [[5], [wrong]], "role": [1, -1]}
    with pytest.raises(InputError, match=rf"^train_dataset: row 8 has the id {wrong}, the model knows ids below {width}; use the model's own tokenizer$"):
        trainer(tmp_path, rows=[*PAIRS, bad])
