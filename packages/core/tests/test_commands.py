"""`fairlead generate` and `fairlead detect` as a user runs them: files in, files out, clear ends."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fairlead import cli

PROMPTS = [{"prompt": f"w{i} w{i + 1} w{2 * i}", "id": i} for i in range(7)]


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAIRLEAD_WATERMARK_KEY", raising=False)


@pytest.fixture()
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def fairlead(*arguments: Any, stdin: bytes | None = None) -> Outcome:
    """What a user would see."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    if stdin is not None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
    finally:
        sys.stdin = before
    return Outcome(int(end.value.code or 0), out.getvalue(), err.getvalue())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers(tiny_folder: Path, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ended = fairlead("generate", asked, "--model", tiny_folder, "--out", out, "--max-new-tokens", 9, "-n", 2)
    assert ended.code == 0, ended.err
    made = rows(out)
    assert [(r["index"], r["candidate"]) for r in made] == [(i, j) for i in range(7) for j in range(2)]
    assert [r["prompt"] for r in made[::2]] == [p["prompt"] for p in PROMPTS]
    assert [r["id"] for r in made[::2]] == list(range(7)), "other columns are kept"
    assert all(1 <= len(r["ids"]) <= 9 for r in made)


def test_the_batch_size_changes_nothing(tiny_folder: Path, asked: Path, tmp_path: Path) -> None:
    for size in (1, 3, 50):
        fairlead("generate", asked, "--model", tiny_folder, "--out", tmp_path / f"{size}.jsonl", "--max-new-tokens", 9, "--batch-size", size)
    assert rows(tmp_path / "1.jsonl") == rows(tmp_path / "3.jsonl") == rows(tmp_path / "50.jsonl")


def test_marked_answers_are_detected_from_the_file_alone(tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ended = fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--out", out, "--max-new-tokens", 80)
    assert ended.code == 0, ended.err
    profile = json.loads((tmp_path / "answers.jsonl.profile.json").read_text())
    assert profile["scheme"] == green
    assert profile["vocab_size"] == 64, "the logits' width, not the tokenizer's"
    assert key_file.read_text().strip()[2:] not in json.dumps(profile)
    found = fairlead("detect", out, "--key-file", key_file, "--json")
    assert found.code == 0, found.err
    assert all(json.loads(line)["detected"] for line in found.out.splitlines() if len(rows(out)[json.loads(line)["row"]]["ids"]) > 40)
    assert any(json.loads(line)["detected"] for line in found.out.splitlines())
    text = fairlead("detect", out, "--key-file", key_file)
    assert "texts carry the mark" in text.out


def test_the_key_comes_from_the_environment_too(
    tiny_folder: Path, asked: Path, tmp_path: Path, green: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRLEAD_WATERMARK_KEY", "12345")
    out = tmp_path / "answers.jsonl"
    assert fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--out", out).code == 0
    assert fairlead("detect", out).code == 0


def test_another_key_or_setting_than_the_profiles_is_named(
    tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--out", out, "--max-new-tokens", 4)
    wrong = fairlead("detect", out, "--key-file", key_file, "--set", "delta=1.5")
    assert wrong.code == 2
    assert "delta" in wrong.err
    monkeypatch.setenv("FAIRLEAD_WATERMARK_KEY", "12345")
    other = fairlead("detect", out)
    assert other.code == 2
    assert "key" in other.err
    assert "12345" not in other.err


def test_text_is_tokenized_where_rows_have_no_ids_and_the_command_says_so(
    tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path
) -> None:
    out, plain = tmp_path / "answers.jsonl", tmp_path / "plain.txt"
    fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--out", out, "--max-new-tokens", 80)
    plain.write_text("".join(r["text"] + "\n" for r in rows(out)))
    found = fairlead("detect", plain, "--watermark", green, "--key-file", key_file, "--model", tiny_folder, "--json")
    assert found.code == 0, found.err
    assert "tokenized" in found.err
    assert any(json.loads(line)["detected"] for line in found.out.splitlines())
    without = fairlead("detect", plain, "--watermark", green, "--key-file", key_file, "--set", "vocab_size=64")
    assert without.code == 2
    assert "--model" in without.err


def test_unmarked_answers_have_a_profile_that_says_so(tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path) -> None:
    out = tmp_path / "answers.jsonl"
    fairlead("generate", asked, "--model", tiny_folder, "--out", out, "--max-new-tokens", 4)
    assert fairlead("detect", out, "--key-file", key_file).code == 2
    tested = fairlead("detect", out, "--watermark", green, "--key-file", key_file, "--model", tiny_folder)
    assert tested.code == 0, tested.err


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stopped_file_is_taken_up_to_the_same_rows(tiny_folder: Path, asked: Path, tmp_path: Path, suffix: str) -> None:
    from fairlead.records import read

    whole, part = tmp_path / f"whole.{suffix}", tmp_path / f"part.{suffix}"
    common = ["--model", tiny_folder, "--max-new-tokens", 6, "-n", 2]
    assert fairlead("generate", asked, *common, "--out", whole).code == 0
    expected = [dict(r) for r in read(whole)]
    # Seven rows of fourteen, and a torn eighth: half of the fourth prompt's pair must go.
    working = part if suffix == "jsonl" else part.with_name("part.parquet.part.jsonl")
    lines = [json.dumps(r) for r in expected]
    working.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    assert fairlead("generate", asked, *common, "--out", part).code == 2, "an existing file is never overwritten"
    ended = fairlead("generate", asked, *common, "--out", part, "--resume")
    assert ended.code == 0, ended.err
    assert [dict(r) for r in read(part)] == expected


def test_resuming_under_other_settings_or_other_prompts_is_refused(tiny_folder: Path, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    common = ["--model", tiny_folder, "--out", out, "--max-new-tokens", 6]
    fairlead("generate", asked, *common)
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:3]))
    changed = fairlead("generate", asked, *common, "--temperature", 0.5, "--resume")
    assert changed.code == 2
    assert "temperature" in changed.err
    asked.write_text("".join(json.dumps(p) + "\n" for p in reversed(PROMPTS)))
    other = fairlead("generate", asked, *common, "--resume")
    assert other.code == 2
    assert "not to the prompt" in other.err
    assert len(rows(out)) == 3, "nothing is lost"


def test_broken_lines_are_named_and_the_good_ones_kept(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_bytes(b'{"prompt": "w1"}\n{"prompt": "w2"\n\xff\xfe\n{"other": 1}\n{"prompt": "w3"}\n{"prom')
    ended = fairlead("generate", source, "--model", tiny_folder, "--out", out, "--max-new-tokens", 3)
    assert ended.code == 2
    for number in (2, 3, 4, 6):
        assert f"line {number}" in ended.err
    assert "Traceback" not in ended.err
    assert [r["prompt"] for r in rows(out)] == ["w1", "w3"]
    assert fairlead("generate", source, "--model", tiny_folder, "--out", out, "--force", "--bad-lines", "skip", "--max-new-tokens", 3).code == 0
    stopped = fairlead("generate", source, "--model", tiny_folder, "--out", out, "--force", "--bad-lines", "stop", "--max-new-tokens", 3)
    assert stopped.code == 2
    assert "line 2" in stopped.err


def test_a_prompt_beyond_the_models_positions_is_a_broken_line(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text("w1 w2\n" + "w3 " * 300 + "\nw4\n")
    ended = fairlead("generate", source, "--model", tiny_folder, "--out", out, "--max-new-tokens", 3)
    assert ended.code == 2
    assert "line 2" in ended.err
    assert "positions" in ended.err
    assert len(rows(out)) == 2


def test_stdin_and_stdout_make_a_pipe(tiny_folder: Path, green: str, key_file: Path) -> None:
    made = fairlead(
        "generate", "-", "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--max-new-tokens", 60,
        stdin=b"w1 w2\nw3\n",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert [json.loads(line)["prompt"] for line in made.out.splitlines()] == ["w1 w2", "w3"]
    found = fairlead(
        "detect", "-", "--watermark", green, "--key-file", key_file, "--set", "vocab_size=64", "--json", stdin=made.out.encode()
    )
    assert found.code == 0, found.err
    assert len(found.out.splitlines()) == 2


def test_parquet_goes_in_and_comes_out(tiny_folder: Path, tmp_path: Path, green: str, key_file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(PROMPTS), tmp_path / "prompts.parquet")
    out = tmp_path / "answers.parquet"
    made = fairlead(
        "generate", tmp_path / "prompts.parquet", "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--out", out
    )
    assert made.code == 0, made.err
    assert pq.read_table(out).num_rows == 7
    scored = tmp_path / "scored.parquet"
    assert fairlead("detect", out, "--key-file", key_file, "--out", scored).code == 0
    assert {"prompt", "ids", "p_value", "detected"} <= set(pq.read_table(scored).column_names)


def test_detection_can_be_resumed(tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path) -> None:
    out, scored = tmp_path / "answers.jsonl", tmp_path / "scored.jsonl"
    fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--out", out)
    assert fairlead("detect", out, "--key-file", key_file, "--out", scored).code == 0
    whole = rows(scored)
    scored.write_text("".join(json.dumps(r) + "\n" for r in whole[:4]) + '{"p_val')
    assert fairlead("detect", out, "--key-file", key_file, "--out", scored, "--resume").code == 0
    assert rows(scored) == whole


def test_a_reward_chooses_the_best_of_its_candidates(tiny_folder: Path, asked: Path, tmp_path: Path) -> None:
    one, best = tmp_path / "one.jsonl", tmp_path / "best.jsonl"
    common = ["--model", tiny_folder, "--max-new-tokens", 20]
    fairlead("generate", asked, *common, "-n", 4, "--out", one)
    ended = fairlead("generate", asked, *common, "--reward", "length", "--best-of", 4, "--out", best)
    assert ended.code == 0, ended.err
    groups = [rows(one)[i : i + 4] for i in range(0, 28, 4)]
    for chosen, group in zip(rows(best), groups, strict=True):
        scores = [-abs(len(r["text"].split()) - 100) / 100 for r in group]
        assert chosen["reward"] == pytest.approx(max(scores))
        assert chosen["ids"] == group[scores.index(max(scores))]["ids"]


def test_ids_outside_the_vocabulary_and_rows_too_short_to_test(tmp_path: Path, green: str, key_file: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"ids": []}\n{"ids": [5]}\n{"ids": [5, 99]}\n{"ids": "x"}\n{"other": 1}\n{"ids": [1, 2, 3]}\n')
    found = fairlead("detect", source, "--watermark", green, "--key-file", key_file, "--set", "vocab_size=64", "--json", "--field", "ids")
    made = [json.loads(line) for line in found.out.splitlines()]
    assert [(r["p_value"], r["tokens_scored"]) for r in made] == [(1.0, 0), (1.0, 0), (made[2]["p_value"], 2)]
    assert found.code == 2
    for number in (3, 4, 5):
        assert f"line {number}" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{asked}", "--model", "{tiny}", "--watermark", "test-gren", "--key-file", "{key}"], "did you mean 'test-green'"),
        (["generate", "{asked}", "--model", "{tiny}", "--watermark", "test-green"], "new-key"),
        (["generate", "{asked}", "--model", "{tiny}", "--watermark", "test-green", "--key-file", "{key}", "--set", "delta=-1"], "delta"),
        (["generate", "{asked}", "--model", "{tiny}", "--watermark", "test-green", "--set", "key=5"], "--key-file"),
        (["generate", "{asked}", "--model", "{tiny}", "--set", "delta=1"], "--watermark"),
        (["generate", "{asked}", "--model", "{tiny}", "--top-p", "1.5"], "top_p"),
        (["generate", "{asked}", "--model", "{tiny}", "--top-k", "0"], "top_k"),
        (["generate", "{asked}", "--model", "{tiny}", "--temperature", "-1"], "temperature"),
        (["generate", "{asked}", "--model", "{tiny}", "-n", "0"], "at least 1"),
        (["generate", "{asked}", "--model", "{tiny}", "--out", "answers.csv"], ".jsonl or .parquet"),
        (["generate", "{asked}", "--model", "/no/such/folder"], "no such model folder"),
        (["generate", "no-such.jsonl", "--model", "{tiny}"], "no such file"),
        (["generate", "{asked}", "--model", "{tiny}", "--field", "question", "--out", "answers.jsonl"], "question"),
        (["generate", "{asked}", "--model", "{tiny}", "--chat"], "chat template"),
        (["detect", "{asked}"], "--watermark"),
        (["detect", "{asked}", "--watermark", "test-green", "--key-file", "{key}"], "vocab_size"),
        (["detect", "{asked}", "--watermark", "test-green", "--key-file", "{key}", "--alpha", "2"], "alpha"),
        (["detect", "{asked}", "--watermark", "test-green", "--key-file", "{asked}"], "holds no decimal"),
        (["detect", "{asked}", "--profile", "{asked}"], "profile"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, tiny_folder: Path, asked: Path, key_file: Path, green: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    ended = fairlead(*[a.format(asked=asked, tiny=tiny_folder, key=key_file) for a in arguments])
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing half-written"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_key_file_that_others_can_read_is_warned_of_in_one_line(
    tiny_folder: Path, asked: Path, tmp_path: Path, green: str, key_file: Path
) -> None:
    key_file.chmod(0o644)
    ended = fairlead("generate", asked, "--model", tiny_folder, "--watermark", green, "--key-file", key_file, "--max-new-tokens", 2)
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if "chmod 600" in line] == [
        f"warning: key file {key_file} can be read by others; run: chmod 600 {key_file}"
    ]


def listens() -> None:
    """Ctrl-C reaches the child even where these tests run in the background of a shell that ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_130_and_a_file_that_can_be_resumed(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text("w1 w2 w3\n" * 400)
    common = ["generate", str(source), "--model", str(tiny_folder), "--out", str(out), "--max-new-tokens", "40", "--batch-size", "2"]
    process = subprocess.Popen([sys.executable, "-m", "fairlead", *common], stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    done = rows(out)
    assert 0 < len(done) < 400
    source.write_text("w1 w2 w3\n" * (len(done) + 2))
    assert fairlead(*common, "--resume").code == 0
    assert rows(out)[: len(done)] == done
    assert len(rows(out)) == len(done) + 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file-size limit")
def test_a_full_disk_leaves_whole_rows_and_one_line(tiny_folder: Path, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from fairlead.cli import main; import transformers;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"main(['generate', {str(asked)!r}, '--model', {str(tiny_folder)!r}, '--out', {str(out)!r}, '--max-new-tokens', '20'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "--resume" in ended.stderr
    made = rows(out)
    assert 0 < len(made) < 7, "whole rows only"
