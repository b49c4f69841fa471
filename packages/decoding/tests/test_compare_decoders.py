"""`fairlead compare-decoders`: the exact ceiling, its table, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.errors import FairleadError
from fairlead_decoding import theory
from fairlead_decoding.recipes.compare_decoders import _Enumerable, ceiling, diversity


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli, ["compare-decoders", *map(str, words)])


def test_the_frontier_of_a_tiny_model_lies_under_its_ceiling(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("--decoder", "best-of-n:n=4", "--decoder", "args:w=2,top_k=5,mode=sample", "--samples", 60, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert [c["name"] for c in record["checks"]] == ["no decoder lies above the exact tilt"]
    table = next(b for b in record["blocks"] if b["kind"] == "table")
    assert [row[0] for row in table["rows"]] == ["best-of-n (n 4)", "args (w 2)"]
    assert "exact tilt" in (out / "report.html").read_text(encoding="utf-8")


def test_the_ceiling_grows_from_the_models_own_reward_to_the_best_answers() -> None:
    world = _Enumerable(0)
    assert ceiling(world, 0.0) == pytest.approx(float(np.exp(world.log_p) @ world.r))
    assert ceiling(world, 1e3) == pytest.approx(float(world.r.max()))
    kls = [float(theory.bon_kl_exact(world.log_p, world.r, n)) for n in (2, 4, 8)]
    for n, kl in zip((2, 4, 8), kls, strict=True):
        assert float(theory.bon_expected_reward(world.log_p, world.r, n)) <= ceiling(world, kl) + 1e-9


def test_diversity_falls_with_repetition() -> None:
    assert diversity([[1, 2, 3, 4, 5, 6]]) > diversity([[1, 2, 1, 2, 1, 2]]) > 0
    assert diversity([]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--decoder", "best"], "unknown decoder 'best'"),
        (["--decoder", "best-of-n:n=0"], "n: should be greater than or equal to 1"),
        (["--model", "zoo:weak"], "reward is required with a model of your own"),
        (["--model", "zoo:weak", "--reward", "length"], "prompts is required with a model of your own"),
    ],
)
def test_what_is_missing_is_said_in_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    result = run(*words, "--out", tmp_path / "run")
    assert isinstance(result.exception, FairleadError)
    assert line in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_model_of_ones_own_is_compared_on_a_file_of_prompts(tiny_folder: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_text("w1 w2\nw3\n", encoding="utf-8")
    out = tmp_path / "run"
    words = ["--model", tiny_folder, "--prompts", asked, "--reward", "length", "--held-out", "length", "--decoder", "best-of-n:n=2", "--max-new-tokens", 6]
    result = run(*words, "--out", out)
    assert result.exit_code == 0, result.exception
    table = next(b for b in json.loads((out / "run.json").read_text(encoding="utf-8"))["blocks"] if b["kind"] == "table")
    assert table["rows"][0][0] == "best-of-n (n 2)"
