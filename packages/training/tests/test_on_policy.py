"""OnPolicyTrainer: what it draws, what it learns from it, how it resumes, and what it refuses."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import losses, weights

from fairlead.errors import InputError
from fairlead.testing import save_tiny_model, tiny_model
from fairlead_training.on_policy import OnPolicyConfig, OnPolicyTrainer, _Repeated

PROMPTS = [{"prompt_ids": [3 + i, 5, 7], "wanted": 10 + i % 2} for i in range(8)]


def share(prompts: Any, completions: Any, wanted: Any = None, **_: Any) -> list[float]:
    """The share of a completion's tokens that are even, or the wanted one."""
    return [float((ids % 2 == 0).float().mean()) for ids in completions]


def trainer(folder: Path, objective: Any = "rloo", rows: Any = PROMPTS, model: Any = None, reward: Any = share, **options: Any) -> OnPolicyTrainer:
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "num_generations": 4, "max_completion_length": 5,
        **options.pop("settings", {}),
    }  # fmt: skip
    args = OnPolicyConfig(output_dir=str(folder / "out"), **settings)
    return OnPolicyTrainer(copy.deepcopy(tiny_model()) if model is None else model, objective, args, rows, reward, **options)


def logged(run: OnPolicyTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("objective", ["rloo", "grpo", "gspo"])
def test_the_reward_rises(objective: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, objective, settings={"max_steps": 12, "num_generations": 8})
    run.train()
    rewards = logged(run, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert {"reward_std", "completions/mean_length", "completions/clipped_ratio", "grad_norm"} <= set(run.state.log_history[0])


def test_a_step_has_the_gradient_of_the_dense_rloo_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, settings={"temperature": 0.7})
    dense = copy.deepcopy(run.model)
    run.current_gradient_accumulation_steps = 1
    run.training_step(run.model, run.data_collator(run.train_dataset[:4]))
    total = torch.zeros(())
    for row in run._kept[0]:
        reward = torch.tensor(row["reward"])
        for j, answer in enumerate(row["completion_ids"]):
            ids = torch.tensor([row["prompt_ids"] + answer])
            table = (dense(input_ids=ids, use_cache=False).logits / 0.7).log_softmax(-1)
            logp = sum(table[0, t - 1, ids[0, t]] for t in range(3, ids.shape[1]))
            total = total - (reward[j] - (reward.sum() - reward[j]) / 3) * logp / 16
    total.backward()
    for (name, p), q in zip(run.model.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_the_draw_depends_on_the_prompts_place_and_not_on_the_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    together = run.completions(run.train_dataset[:2], 0, 0, "train")
    alone = run.completions(run.train_dataset[1:2], 0, 1, "train")
    assert together[1] == alone[0]
    assert run.completions(run.train_dataset[:2], 0, 8, "train") != together


def test_steps_on_the_same_completions_clip_the_ratio(tmp_path: Path) -> None:
    for objective in ("grpo", "gspo"):
        run = trainer(tmp_path, objective, settings={"num_iterations": 2, "max_steps": 2, "learning_rate": 3e-2})
        run.train()
        first, second = logged(run, "clip_ratio")
        assert first == 0 < second, objective


def test_each_chunk_of_prompts_comes_as_often_as_it_is_used() -> None:
    order = list(_Repeated(7, 2, 3, 0, lambda: 0))
    chunks = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(order) == len(_Repeated(7, 2, 3, 0, lambda: 0)) == 18
    assert chunks[0] == chunks[1] == chunks[2] != chunks[3]
    assert list(_Repeated(7, 2, 3, 0, lambda: 8)) == order  # nine steps are an epoch
    assert list(_Repeated(7, 2, 3, 0, lambda: 9)) != order


@pytest.mark.parametrize(("objective", "more"), [("rloo", {"beta": 0.1}), ("grpo", {"num_iterations": 2, "gradient_accumulation_steps": 2})])
def test_a_resumed_run_draws_and_ends_the_same(objective: str, more: dict[str, Any], tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2, **more}
    whole = trainer(tmp_path / "a", objective, settings=settings)
    whole.train()
    trainer(tmp_path / "b", objective, settings=settings).train()
    shutil.rmtree(tmp_path / "b" / "out" / "checkpoint-6")
    second = trainer(tmp_path / "b", objective, settings=settings)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(second))
    assert losses(second)[3:] == losses(whole)[3:]


def test_kept_completions_are_not_taken_up_by_other_settings(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    for before, after in (({"num_iterations": 1}, {"num_iterations": 2}), ({"num_iterations": 2}, {"num_iterations": 2, "num_generations": 3})):
        folder = tmp_path / str(len(after))
        trainer(folder, "grpo", settings={**settings, **before}).train()
        other = trainer(folder, "grpo", settings={**settings, "max_steps": 6, **after})
        with pytest.raises(InputError, match=r"was made with num_\w+=\d, now it is \d; resume with the same"):
            other.train(resume_from_checkpoint=True)


def test_a_column_that_some_rows_lack_reaches_the_reward_for_all(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append(columns["answer"])
        return [0.0] * len(completions)

    rows = [{"prompt_ids": [3 + i], **({"answer": i} if i % 2 else {})} for i in range(4)]
    trainer(tmp_path, rows=rows, reward=reward, settings={"max_steps": 1, "num_generations": 2}).train()
    assert sorted(a for a in seen[0] if a is not None) == [1, 1, 3, 3] and seen[0].count(None) == 4


def test_a_large_beta_holds_the_policy_to_its_reference(tmp_path: Path) -> None:
    slow = {"max_steps": 20, "learning_rate": 2e-3}
    free, held = (trainer(tmp_path / str(beta), settings={"beta": beta, **slow}) for beta in (0.001, 1.0))
    free.train()
    held.train()
    assert logged(held, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert abs(logged(held, "kl")[-1]) < 0.5 * logged(free, "kl")[-1]
    assert logged(free, "reward_before_kl")[-1] > logged(held, "reward_before_kl")[-1]


def test_the_estimated_kl_of_grpo_is_measured_against_the_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, "grpo", objective_settings={"beta_kl": 0.1})
    run.train()
    assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-6) and logged(run, "kl")[-1] > 1e-3


def test_adapters_off_are_the_reference(tmp_path: Path) -> None:
    from peft import LoraConfig

    run = trainer(tmp_path, settings={"beta": 0.01}, peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert run.reference is not None and run.reference.model is None
    run.train()
    assert logged(run, "kl")[-1] != 0


def test_text_and_the_other_columns_reach_the_reward(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_model(tmp_path / "model")
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, finished: Any = None, **columns: Any) -> list[float]:
        seen.append((prompts, completions, finished, columns))
        return [float(len(c)) for c in completions]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{i} w1", "answer": i} for i in range(4)]
    run = trainer(tmp_path, "grpo", rows, model, reward, settings={"max_steps": 1, "num_generations": 2}, processing_class=tokenizer)
    run.train()
    prompts, completions, finished, columns = seen[0]
    assert sorted(set(prompts)) == ["w0 w1", "w1 w1", "w2 w1", "w3 w1"] and prompts[0] == prompts[1]
    assert all(isinstance(c, str) for c in completions) and len(finished) == len(completions) == 8
    assert [f"w{i} w1" for i in columns["answer"]] == list(prompts)


def test_evaluation_draws_the_same_completions_every_time(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=PROMPTS[:4])
    first, second = run.evaluate(), run.evaluate()
    assert first["eval_reward"] == second["eval_reward"] and 0 <= first["eval_reward"] <= 1


TWO = """
import torch
import test_on_policy as t
run = t.trainer(folder, "grpo", settings={"per_device_train_batch_size": 2, "max_steps": 3, "num_iterations": 2, "ddp_backend": "gloo"})
run.train()
if run.accelerator.is_main_process:
    torch.save({"losses": t.losses(run), "rewards": t.logged(run, "reward"), "weights": t.weights(run)}, folder / "two.pt")
"""


def test_two_processes_equal_one(tmp_path: Path, on_two_processes: Any) -> None:
    one = trainer(tmp_path, "grpo", settings={"per_device_train_batch_size": 4, "max_steps": 3, "num_iterations": 2})
    one.train()
    on_two_processes(TWO)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert logged(one, "reward") == pytest.approx(two["rewards"], rel=1e-6)
    assert losses(one) == pytest.approx(two["losses"], rel=1e-5, abs=1e-7)
    assert torch.allclose(weights(one), two["weights"], atol=2e-5)


RESUMED = """
import test_on_policy as t
settings = dict(per_device_train_batch_size=2, max_steps=8, num_iterations=2, save_strategy="steps", save_steps=6, eval_strategy="steps",
                eval_steps=6, load_best_model_at_end=True, metric_for_best_model="eval_reward", ddp_backend="gloo")
whole = t.trainer(folder, "grpo", settings=settings, eval_dataset=t.PROMPTS[:4])
whole.train()
assert whole.state.best_model_checkpoint.endswith("out/checkpoint-6"), whole.state.best_model_checkpoint
again = t.trainer(folder, "grpo", settings=dict(settings, load_best_model_at_end=False, eval_strategy="no"))
again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-6"))
assert t.losses(again)[-2:] == t.losses(whole)[-2:], (t.losses(again), t.losses(whole))
"""


def test_two_processes_resume_in_a_later_epoch_with_its_prompts_and_share_the_best_model(on_two_processes: Any) -> None:
    on_two_processes(RESUMED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "objective: DPO needs role; on-policy objectives are reinforce, rloo, grpo and gspo"),
        ({"objective": "sft"}, "has no use for a reward"),
        ({"reward": None}, "reward: on-policy training needs one"),
        ({"settings": {"num_generations": 1}}, "num_generations: RLOO compares completions of a prompt, give 2 or more"),
        ({"settings": {"num_iterations": 2}}, "num_iterations: RLOO knows no ratio to the policy that drew"),
        ({"settings": {"temperature": 0.0}}, "temperature: must be above 0"),
        ({"settings": {"beta": -1.0}}, "beta: must be at least 0, got -1"),
        ({"settings": {"max_length": 512}}, "max_length: is about completions in the data, and here the model writes them"),
        ({"rows": [{"text": "a"}]}, "train_dataset: row 0 has no prompt; its columns are text"),
        ({"rows": [{"prompt_ids": [3], "prompts": 1}]}, "train_dataset: row 0: a column prompts would be taken for the reward's own argument"),
        ({"reward": [share, share]}, "reward: give one"),
        ({"rows": []}, "train_dataset: holds no prompt"),
        ({"settings": {"max_completion_length": 10**6}}, "exceed the model's"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        trainer(tmp_path, **options)
    assert message in str(error.value)
