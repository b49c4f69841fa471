"""The command line: what a person reads, what a script reads, and every way to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fairlead import cli, registry
from fairlead.config import MethodConfig
from fairlead.errors import FairleadError, InputError
from fairlead.keys import SecretKey
from fairlead.kinds import Recipe
from fairlead.registry import Method

TAGS = ("stage.evaluation", "access.blackbox", "goal.preferences")


class TryConfig(MethodConfig):
    """Settings of the test's recipe."""

    rounds: int = Field(2, ge=1, le=9, description="how often")
    ending: Literal["well", "short", "mistake", "bug", "ctrl-c", "disk"] = Field("well", description="how it ends")
    key: SecretKey = Field(SecretKey(7), repr=False, description="the mark's key")


class Try(Recipe):
    """A recipe that ends as it is told."""

    Config = TryConfig
    config: TryConfig

    def __call__(self, run: Any) -> None:
        run.stage("work", lambda: {"rounds": self.config.rounds, "seed": run.seed})
        endings: dict[str, BaseException] = {
            "mistake": InputError("the data are wrong; mend them"),
            "bug": ZeroDivisionError("ours"),
            "ctrl-c": KeyboardInterrupt(),
            "disk": OSError(28, "No space left on device", "samples.parquet"),
        }
        if self.config.ending in endings:
            raise endings[self.config.ending]
        run.check("ends well", self.config.ending == "well", f"rounds {self.config.rounds}")


@pytest.fixture(autouse=True)
def recipe() -> Iterator[None]:
    registry.methods()
    registry.add(Method("try-it", "recipe", Try, "0000.00000", "a recipe of the tests", TAGS, "tests"))
    yield
    registry.default._methods.pop(("recipe", "try-it"))


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fairlead ARGUMENTS`, through the guard that users meet."""
    found: Result
    code = 0

    def guarded(args: list[str]) -> None:
        nonlocal code
        code = cli._guarded(lambda: cli.cli.main(args=args, prog_name="fairlead", standalone_mode=False))

    import click

    wrapper = click.Command("wrapper", callback=lambda args: guarded(list(args)), params=[click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)])
    wrapper.context_settings = {"ignore_unknown_options": True, "help_option_names": []}
    found = CliRunner().invoke(wrapper, list(arguments))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return code, found.stdout, found.stderr


def test_methods_are_filtered_by_kind_package_paper_and_tag() -> None:
    def names(*options: str) -> set[str]:
        code, out, _ = call("methods", "--json", *options)
        assert code == 0
        return {m["name"] for m in json.loads(out)}

    assert {"length", "try-it"} <= names()
    assert names("--kind", "recipe", "--package", "tests") == {"try-it"}
    assert names("--paper", "0000.0") == {"try-it"}
    assert "try-it" in names("--tag", "stage", "--tag", "goal.preferences")
    assert "try-it" not in names("--tag", "stage.decoding")
    assert "no method fits" in call("methods", "--paper", "9999.99999")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("methods", "--tag", "stage.decodin"), "did you mean 'stage.decoding'"),
        (("methods", "--kind", "rewards"), "did you mean 'reward'"),
        (("method",), "did you mean 'methods'"),
        (("run", "tri-it"), "did you mean 'try-it'"),
        (("run", "try-it", "--set", "rounds"), "must read NAME=VALUE"),
        (("run", "try-it", "--set", "rounds=0"), "rounds: should be greater than or equal to 1, got 0"),
        (("run", "try-it", "--set", "round=3"), "did you mean 'rounds'"),
        (("run", "try-it", "--set", "rounds=1", "--set", "rounds.x=1"), "already set to a value"),
        (("run", "nowhere.yaml"), "no such file"),
        (("report", "nowhere"), "is no run directory"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_right_and_exit_code_2(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("well", 0, ""),
        ("short", 1, ""),
        ("mistake", 2, "error: the data are wrong; mend them"),
        ("ctrl-c", 130, "finished stages are kept: fairlead run try-it --seed 3"),
        ("disk", 2, "No space left on device"),
    ],
)
def test_a_run_ends_with_its_code_and_at_most_one_line(tmp_path: Path, ending: str, code: int, said: str) -> None:
    out = tmp_path / "r"
    got, _, err = call("run", "try-it", "--seed", "3", "--out", str(out), "--set", f"ending={ending}")
    assert got == code
    assert len(err.splitlines()) == (1 if said else 0)
    assert said in err
    status = json.loads((out / "run.json").read_text(encoding="utf-8"))["status"]
    assert status == {0: "finished", 1: "finished", 2: "failed", 130: "interrupted"}[code]
    assert (out / "report.html").exists() == (code < 2)
    if code >= 2:
        assert call("report", str(out))[0] == 0
        assert f"not finished: {status}" in (out / "report.html").read_text(encoding="utf-8")


def test_a_bug_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        call("run", "try-it", "--out", str(tmp_path / "r"), "--set", "ending=bug")


def test_a_run_is_told_to_scripts_and_its_report_is_rendered_again(tmp_path: Path) -> None:
    out = tmp_path / "r"
    code, text, _ = call("run", "try-it", "--out", str(out), "--json")
    told = json.loads(text)
    assert code == 0
    assert told["passed"] and told["checks"][0]["name"] == "ends well"
    (out / "report.html").unlink()
    again = json.loads(call("report", str(out), "--json")[1])
    assert again["status"] == "finished" and again["checks"] == told["checks"]
    assert (out / "report.html").exists()
    code, _, err = call("run", "try-it", "--out", str(out))
    assert code == 2 and "--force" in err
    assert call("run", "try-it", "--out", str(out), "--force")[0] == 0


def test_a_recipe_file_gives_settings_that_the_command_line_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: try-it\nseed: 5\nsettings: {rounds: 3}\n", encoding="utf-8")
    assert call("run", str(file), "--out", str(tmp_path / "a"))[0] == 0
    assert call("run", str(file), "--out", str(tmp_path / "b"), "--seed", "6", "--set", "rounds=4")[0] == 0
    stages = [json.loads((tmp_path / d / "stages" / "work.json").read_text(encoding="utf-8")) for d in "ab"]
    assert stages == [{"rounds": 3, "seed": 5}, {"rounds": 4, "seed": 6}]


@pytest.mark.parametrize("content", ["", "[1]", "recipe: 3", "recipe: try-it\nsettngs: {}", "recipe: try-it\nseed: x", "a: [", "\x00"])
def test_a_recipe_file_that_reads_otherwise_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    code, _, err = call("run", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "r"))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_the_settings_of_a_recipe_are_shown_without_its_key() -> None:
    code, out, _ = call("run", "try-it", "--settings", "--json")
    assert code == 0
    rows = {row["setting"]: row for row in json.loads(out)}
    assert rows["rounds"] == {"setting": "rounds", "type": "int", "allowed": "≥ 1, ≤ 9", "default": 2, "description": "how often"}
    assert "'well', 'short'" in rows["ending"]["type"]
    assert rows["key"]["default"] == repr(SecretKey(7))
    assert "how often" in call("run", "try-it", "--settings")[1]


def test_a_key_typed_into_the_command_is_in_no_file_of_the_run(tmp_path: Path) -> None:
    secret = 1234567890123456789
    plain = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_cli; from fairlead import registry; registry.methods(); registry.add(registry.Method('try-it', 'recipe', test_cli.Try, '', 'x', test_cli.TAGS, 'tests')); from fairlead.cli import main; main()"]
    command = [*plain, str(Path(__file__).parent), "run", "try-it", "--out", str(tmp_path / "r"), "--set", f"key={secret}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "r").rglob("*"):
        if file.is_file():
            assert str(secret).encode() not in file.read_bytes(), file.name
    assert "key=<not shown>" in json.loads((tmp_path / "r" / "run.json").read_text(encoding="utf-8"))["command"]


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,3}(\.[a-z]{1,3}){0,2}", fullmatch=True), st.text(max_size=8)), max_size=4))
def test_any_settings_become_a_nested_dict_or_one_line(pairs: list[tuple[str, str]]) -> None:
    try:
        found = cli.parse_settings(tuple(f"{name}={value}" for name, value in pairs))
    except FairleadError as error:
        assert "\n" not in str(error)
    else:
        assert {name.split(".")[0] for name, _ in pairs} == set(found)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairlead", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_help_version_and_tables_import_no_torch() -> None:
    code = (
        "import sys; from fairlead import cli\n"
        "for words in (['--help'], ['--version'], ['methods'], ['plugins'], ['run', '--help']):\n"
        "    assert cli._guarded(lambda: cli.cli.main(args=words, standalone_mode=False)) == 0, words\n"
        "heavy = {'torch', 'transformers', 'scipy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    ours = {**os.environ, "FAIRLEAD_PLUGINS": "watermark,zoo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ours)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_a_reader_that_goes_away_is_no_error() -> None:
    if os.name == "nt":
        pytest.skip("POSIX pipes")
    command = f"{sys.executable} -m fairlead methods --json | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == ""


def test_nothing_but_json_reaches_a_script_though_a_plugin_name_is_wrong() -> None:
    done = shell("plugins", "--json", FAIRLEAD_DISABLE="no-such-plugin")
    assert done.returncode == 0
    assert any(p["name"] == "core" for p in json.loads(done.stdout))
    assert "no plugin is named 'no-such-plugin'" in done.stderr
