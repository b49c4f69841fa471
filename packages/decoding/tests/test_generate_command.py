"""`fairlead generate --decoder`: every decoder from the command line, resumable, and clear about what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.errors import FairleadError

REWARD = ["--reward", "keyword", "--reward-set", "weights={w1: 1.0, w7: 0.5, w30: 2.0}"]
DECODERS = {
    "best-of-n": ["n=3"],
    "worst-of-n": ["n=3"],
    "soft-best-of-n": ["n=3"],
    "rejection": ["n=3", "threshold=0.5"],
    "blockwise": ["n=2", "block=4"],
    "transfer-q-star": ["top_k=3", "horizon=2"],
    "controlled-decoding": ["top_k=3", "horizon=2"],
    "args": ["top_k=3"],
    "deal": ["top_k=3", "lookahead=2"],
}


@pytest.fixture()
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("w1 w2 w3\nw4 w5\nw6\nw7 w8\n", encoding="utf-8")
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli, ["generate", *map(str, words)], catch_exceptions=True)


def said(result: Any) -> str:
    """The line that a user would see: the command line prints a FairleadError without its traceback."""
    assert isinstance(result.exception, FairleadError), result.exception
    return str(result.exception)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options(decoder: str) -> list[str]:
    return ["--decoder", decoder, *(word for s in DECODERS[decoder] for word in ("--decoder-set", s)), *REWARD, "--max-new-tokens", "8"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_answers_a_file(decoder: str, asked: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run(asked, "--model", tiny_folder, "--out", out, *options(decoder))
    assert result.exit_code == 0, result.exception
    found = rows(out)
    assert [r["prompt"] for r in found] == ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]
    assert all(isinstance(r["reward"], float) for r in found)
    assert [r["index"] for r in found] == [0, 1, 2, 3]


def test_a_file_that_was_stopped_goes_on_to_the_same_answers(asked: Path, tiny_folder: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    common = ["--model", tiny_folder, "--batch-size", "3", *options("best-of-n")]
    assert run(asked, "--out", whole, *common).exit_code == 0
    first = asked.with_name("first.txt")
    first.write_text("w1 w2 w3\nw4 w5\n", encoding="utf-8")
    assert run(first, "--out", part, *common).exit_code == 0
    assert run(asked, "--out", part, *common, "--resume").exit_code == 0
    assert rows(part) == rows(whole)
    other = run(asked, "--out", part, "--model", tiny_folder, *options("args"), "--resume")
    assert "cannot resume, it was generated with decoder='best-of-n' (now 'args')" in said(other)


def test_the_budget_reaches_the_decoder(asked: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(asked, "--model", tiny_folder, "--out", out, *options("best-of-n"), "--budget", "model_tokens=6").exit_code == 0
    assert max(len(r["ids"]) for r in rows(out)) <= 6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--decoder", "best-of"], "did you mean 'best-of-n'"),
        (["--decoder", "best-of-n"], "reward is required"),
        (["--decoder", "best-of-n", "--decoder-set", "n=0", *REWARD], "n: should be greater than or equal to 1, got 0"),
        (["--decoder", "best-of-n", *REWARD, "--budget", "tokens=9"], "some of model_tokens, reward_calls, seconds is needed"),
        (["--decoder", "best-of-n", *REWARD, "--budget", "model_tokens=0"], "model_tokens must be above 0, got 0"),
        (["--budget", "model_tokens=9"], "belong to a decoder"),
        (["--reward-set", "a=1"], "--reward-set belongs to a reward"),
        (["--decoder", "args", "-n", "2", *REWARD], "leave -n 2 out"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_file_is_made(
    words: list[str], line: str, asked: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    message = said(run(asked, "--model", tiny_folder, "--out", out, *words))
    assert line in message
    assert "\n" not in message
    assert not out.exists()


def test_a_prompt_longer_than_the_context_is_named_and_the_others_are_answered(asked: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    long = asked.with_name("long.txt")
    long.write_text("w1 w2 w3\nw4 w5\n" + "w6 " * 300 + "\n", encoding="utf-8")
    message = said(run(long, "--model", tiny_folder, "--out", out, "--batch-size", "3", *options("best-of-n")))
    assert "1 broken line was left out" in message
    assert len(rows(out)) == 2


def test_an_empty_file_of_prompts_is_said_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.txt", tmp_path / "out.jsonl"
    empty.write_text("", encoding="utf-8")
    assert "empty.txt: holds no prompts" in said(run(empty, "--model", tiny_folder, "--out", out, *options("args")))
    assert not out.exists()
