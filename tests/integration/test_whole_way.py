"""The whole way through the installed packages, in processes of their own, with the zoo's models.

What one command does with good and bad input is tested where the command lives; here packages meet.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from house import environment, fairlead

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")
OPENINGS = (
    "The function returns",
    "This module provides",
    "Return a list of",
    "If the file does not exist",
    "The default value is",
)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: str, cwd: Path) -> str:
    done = fairlead(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A folder with a key and prompts."""
    prompts = "".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(OPENINGS))
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    (tmp_path / "my.key").write_text("0x5eed5eed5eed5eed\n", encoding="ascii")
    (tmp_path / "my.key").chmod(0o600)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["kgw", "gumbel", "modified-gumbel"])
def test_marked_english_is_found_by_its_key_alone(mark: str, folder: Path) -> None:
    """About 10 s each: two processes import torch, one writes 1,000 tokens."""
    shared = ["--watermark", mark, "--key-file", "my.key"]
    run(
        "generate", "prompts.jsonl", "--model", "zoo:english", "--out", "out.jsonl", "--max-new-tokens", "200", *shared, cwd=folder
    )  # fmt: skip
    found = [
        json.loads(line)
        for line in run("detect", "out.jsonl", "--json", "--key-file", "my.key", cwd=folder).splitlines()
    ]
    assert [row["row"] for row in found] == list(range(len(OPENINGS)))
    assert sum(row["p_value"] < 1e-3 for row in found) >= 3
    assert "5eed" not in (folder / "out.jsonl.profile.json").read_text(encoding="utf-8")
    (folder / "other.key").write_text("12345\n", encoding="ascii")
    (folder / "other.key").chmod(0o600)
    refused = fairlead("detect", "out.jsonl", "--key-file", "other.key", cwd=folder)
    assert refused.returncode == 2
    assert "key" in refused.stderr
    assert "Traceback" not in refused.stderr


@posix
@pytest.mark.slow
def test_a_killed_generation_resumes_to_the_rows_of_an_undisturbed_one(folder: Path) -> None:
    """Three processes of the English model, one of them killed without a chance to tidy up."""
    (folder / "many.txt").write_text("".join(f"{OPENINGS[i % 5]}\n" for i in range(16)), encoding="utf-8")
    common = ["generate", "many.txt", "--model", "zoo:english", "--watermark", "kgw", "--key-file", "my.key",
              "--max-new-tokens", "24", "--batch-size", "2", "--seed", "7"]  # fmt: skip
    run(*common, "--out", "whole.jsonl", cwd=folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "fairlead", *common, "--out", "killed.jsonl"], cwd=folder, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    killed = folder / "killed.jsonl"
    while process.poll() is None and not (killed.exists() and killed.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(killed, "ab") as stream:  # as a kill in the middle of a write would leave it
        stream.write(b'{"prompt": "The func')
    run(*common, "--out", "killed.jsonl", "--resume", cwd=folder)
    assert rows(killed) == rows(folder / "whole.jsonl")


@pytest.mark.slow
def test_the_best_of_four_marked_answers_beats_the_first_and_is_still_found(folder: Path) -> None:
    from fairlead import models, registry

    model, tokenizer = models.load("zoo:english")
    mark = registry.create("watermark", "kgw", vocab_size=model.config.vocab_size, key=3)
    reward = registry.create("reward", "length", target=60)
    resampling = registry.create("decoder", "alignment-resampling", watermark=mark, reward=reward, n=4)
    result = resampling.generate(model, tokenizer, list(OPENINGS), seed=0, max_new_tokens=120)
    first = [group[0].reward for group in result.candidates]
    best = [g.reward for g in result.generations]
    assert all(b >= f for b, f in zip(best, first, strict=True))
    assert sum(best) > sum(first)
    assert max(float(mark.detect(g.ids).p_value) for g in result.generations) < 0.05


@posix
@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(folder: Path) -> None:
    """Detection of 20,000 texts may need no more than that of 2,000, give or take what an allocator keeps."""

    def peak(count: int) -> float:
        path = folder / f"{count}.jsonl"
        with open(path, "w", encoding="utf-8") as stream:
            for i in range(count):
                stream.write(json.dumps({"ids": [(i * 31 + t * t) % 1000 for t in range(60)]}) + "\n")
        program = (
            "import resource, sys; from fairlead.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'linux' else 1 << 20), file=sys.stderr)"
        )
        arguments = [
            "detect",
            path.name,
            "--watermark",
            "kgw",
            "--key-file",
            "my.key",
            "--set",
            "vocab_size=1000",
            "--out",
            f"{count}.out.jsonl",
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        assert len((folder / f"{count}.out.jsonl").read_bytes().splitlines()) == count
        return float(done.stderr.split()[-1])

    assert peak(20_000) - peak(2_000) < 20, "MiB"


@posix
@pytest.mark.slow
def test_a_recipe_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """The smallest sizes the recipe accepts; a threshold may fail there (exit code 1), the report must not."""
    small = {
        "bigram_prompts": 20, "bigram_length": 20, "keys": 4, "prompts_per_side": 10, "candidates": 8, "english_rounds": 1,
        "english_tokens": 20, "real": "''",
    }  # fmt: skip
    command = ["run", "watermark-alignment-resampling", "--out", "run", "--seed", "3"]
    command += [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fairlead", *command], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )  # fmt: skip
    stages = tmp_path / "run" / "stages"
    while process.poll() is None and not (stages.exists() and any(stages.glob("*.json"))):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    kept = {p.name: p.read_bytes() for p in stages.glob("*.json")}
    assert kept, err.decode()
    refused = fairlead(*command, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = fairlead(*command, "--resume", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    assert {name: (stages / name).read_bytes() for name in kept} == kept
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script src" not in report
    assert 'href="http' not in report.replace('href="https://arxiv.org', "")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["seed"] == 3


def stranger(folder: Path, name: str, source: str) -> None:
    """A plugin of somebody else's, as an installer would leave it."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    info = folder / f"stranger_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: stranger-{name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[fairlead]\n{name} = {name}\n", encoding="utf-8")


TWIN = """from fairlead import hookimpl
@hookimpl
def fairlead_rewards(register):
    register("twin", "{0}:make", summary="one of two with this name")
"""


def test_strangers_plugins_stand_beside_ours_and_their_faults_are_named(tmp_path: Path) -> None:
    stranger(tmp_path, "first", TWIN.format("first"))
    stranger(tmp_path, "broken", "raise RuntimeError('cannot start')\n")

    def methods(disable: str = "") -> subprocess.CompletedProcess[str]:
        env = {**environment(), "PYTHONPATH": str(tmp_path), "FAIRLEAD_DISABLE": disable}
        command = [sys.executable, "-m", "fairlead", "methods", "--json"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    done = methods()
    assert done.returncode == 0, done.stderr
    assert {"kgw", "world", "length", "twin"} <= {m["name"] for m in json.loads(done.stdout)}
    assert [line for line in done.stderr.splitlines() if "stranger-broken" in line and "cannot start" in line]
    stranger(tmp_path, "second", TWIN.format("second"))
    clash = methods(disable="broken")
    assert clash.returncode == 2
    (line,) = clash.stderr.splitlines()
    assert "twin" in line
    assert "stranger-first" in line
    assert "stranger-second" in line
    assert "twin" in {m["name"] for m in json.loads(methods(disable="second,broken").stdout)}


def test_doctor_says_which_backend_serves_every_operation_and_why(tmp_path: Path) -> None:
    import fairlead_kernels.library as library

    found = json.loads(run("doctor", "--json", cwd=tmp_path))
    assert {row["operation"] for row in found["kernels"]} >= set(library.operation_folders()) & {
        "prf",
        "watermark_bias",
        "gumbel_sample",
    }
    for row in found["kernels"]:
        assert row["backend"], row
    forced = subprocess.run(
        [sys.executable, "-m", "fairlead", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True,
        env={**environment(), "FAIRLEAD_KERNELS": "reference"},
    )  # fmt: skip
    assert {row["backend"] for row in json.loads(forced.stdout)["kernels"]} == {"reference"}
