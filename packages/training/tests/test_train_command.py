"""`fairlead train`: from files to a model, a report, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.errors import FairleadError, InputError, RunExistsError
from fairlead.testing import save_tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAIRLEAD_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"w{i} w1", "chosen": " w2 w3", "rejected": " w4"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(place: Path, *arguments: str) -> Any:
    fixed = ["--model", str(place / "model"), "--dataset", str(place / "pairs.jsonl"), "--out", str(place / "run")]
    result = CliRunner().invoke(cli, ["train", *fixed, *arguments], catch_exceptions=True)
    if isinstance(result.exception, FairleadError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


SHORT = ("--set", "max_steps=4", "--set", "logging_steps=1", "--set", "learning_rate=1e-3", "--set", "save_steps=2", "--set", "use_cpu=true")


def test_a_file_becomes_a_model_with_curves(place: Path) -> None:
    done = run(place, *SHORT, "--json", "--eval-dataset", str(place / "pairs.jsonl"), "--set", "eval_strategy=steps", "--set", "eval_steps=2")
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert said["rows"] == 8
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(said["model"])
    AutoTokenizer.from_pretrained(said["model"])
    names = {json.loads(line)["name"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()}
    assert {"loss", "rewards/margins", "eval_loss", "logps/chosen"} <= names
    page = (place / "run" / "report.html").read_text()
    assert "<svg" in page
    assert "Where it ended" in page
    with pytest.raises(RunExistsError, match="finished run"):
        run(place, *SHORT)


def test_settings_come_from_a_file_and_the_command_line_wins(place: Path) -> None:
    (place / "settings.yaml").write_text("max_steps: 50\nlearning_rate: 1e-3\nlogging_steps: 1\nuse_cpu: true\n")
    run(place, "--config", str(place / "settings.yaml"), "--set", "max_steps=2", "--objective", "simpo", "--objective-set", "gamma=0.5", "--peft", "lora")
    steps = [json.loads(line).get("step") for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(s for s in steps if s) == 2
    assert (place / "run" / "model" / "adapter_model.safetensors").exists()
    assert json.loads((place / "run" / "run.json").read_text())["config"]["settings"]["gamma"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "max_stepz=3"), "unknown setting 'max_stepz'; did you mean 'max_steps'"),
        (("--objective-set", "beta=-1"), "beta: should be greater than 0"),
        (("--objective", "dop"), "did you mean 'dpop' or 'dpo'"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("--set", "max_steps=many"), "max_steps: must be a number, got 'many'"),
        (("--set", "learning_rate=fast"), "learning_rate: must be a number, got 'fast'"),
        (("--set", "lr_scheduler_type=none-such"), "settings: "),
    ],
)
def test_what_is_wrong_is_one_line(place: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((FairleadError, KeyError), match=message) as caught:
        run(place, *SHORT, *arguments)
    assert "\n" not in str(caught.value)
    assert not (place / "run" / "model").exists()


def test_a_bad_line_of_the_file_is_named(place: Path) -> None:
    with open(place / "pairs.jsonl", "a") as stream:
        stream.write('{"prompt": "w1", "chosen": " w2"}\n')
    with pytest.raises(InputError, match="line 9: column rejected is missing"):
        run(place, *SHORT)


def test_a_reward_trains_on_answers_of_the_model(place: Path) -> None:
    (place / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w1"}) + "\n" for i in range(8)))
    drawn = ("--set", "num_generations=2", "--set", "max_completion_length=4", "--set", "per_device_train_batch_size=2")
    run(place, *SHORT, *drawn, "--objective", "rloo", "--reward", "length", "--reward-set", "target=3", "--set", "max_steps=2")
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "reward_std", "completions/mean_length"} <= {row["name"] for row in rows}
    record = json.loads((place / "run" / "run.json").read_text())
    assert record["config"]["reward"] == "length" and record["status"] == "finished"
    with pytest.raises(InputError, match="--reward-set belongs to a reward"):
        run(place, "--reward-set", "target=3")


def test_two_processes_keep_one_run_directory(place: Path, on_two_processes: Any) -> None:
    fixed = ["--model", str(place / "model"), "--dataset", str(place / "pairs.jsonl"), "--out", str(place / "run")]
    more = [*SHORT, "--set", "ddp_backend=gloo", "--set", "per_device_train_batch_size=2"]
    printed = on_two_processes("-m", "fairlead", "train", *fixed, *more)
    assert printed.count("report:") == 1
    assert json.loads((place / "run" / "run.json").read_text())["status"] == "finished"
    assert (place / "run" / "model" / "config.json").exists()
