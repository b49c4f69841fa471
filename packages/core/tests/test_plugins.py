"""Plugins of strangers: whatever one does wrong costs that one, is said in a line, and the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.errors import DuplicateMethodError, FairleadError, UnknownNameError
from fairlead.registry import Method, Registry

HEAD = "from fairlead import hookimpl\nTAGS = ('stage.decoding', 'access.blackbox', 'goal.preferences')\n"
GOOD = "@hookimpl\ndef fairlead_rewards(register):\n    register('from-good', 'good_one:Reward', tags=TAGS)\n"


def plugin(folder: Path, name: str, code: str) -> None:
    """A distribution with one plugin, as an installer would have left it."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(HEAD + textwrap.dedent(code), encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[fairlead]\n{name} = {module}\n", encoding="utf-8")


def fairlead(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, "-m", "fairlead", *arguments], capture_output=True, text=True, env=variables)


BROKEN = {
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "misspelt": ("@hookimpl\ndef fairlead_reward(register): pass", "unknown hook 'fairlead_reward'"),
    "absent": ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
    "untagged": ("@hookimpl\ndef fairlead_rewards(register): register('a', 'b:c', tags='stage.decoding')", "tags must be a tuple"),
    "nameless": ("@hookimpl\ndef fairlead_rewards(register): register(None, 'b:c')", "must be lower-case words"),
    "numbered": ("@hookimpl\ndef fairlead_rewards(register): register('a', 7)", "or a callable, got a int"),
    "usurper": ("import click\n@hookimpl\ndef fairlead_commands(cli): cli.add_command(click.Command('methods'))", "'methods' exists already"),
}  # fmt: skip


def test_each_fault_is_told_by_plugin_distribution_and_cause_and_the_rest_goes_on(tmp_path: Path) -> None:
    plugin(tmp_path, "good-one", GOOD)
    for name, (code, _) in BROKEN.items():
        plugin(tmp_path, name, code)
    listed = fairlead(tmp_path, "methods", "--kind", "reward", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {"from-good", "keyword"} <= {m["name"] for m in json.loads(listed.stdout)}
    assert len(listed.stderr.splitlines()) == len(BROKEN) - 1, "one line each; the command is not asked for"
    shown = fairlead(tmp_path, "--help")  # loads the commands
    assert "List the methods" in shown.stdout
    told = listed.stderr + shown.stderr
    for name, (_, cause) in BROKEN.items():
        line = next(line for line in told.splitlines() if f"plugin {name} of {name}-dist" in line)
        assert cause in line


def test_the_table_of_plugins_shows_a_name_claimed_twice_which_stops_everything_else(tmp_path: Path) -> None:
    plugin(tmp_path, "good-one", GOOD)
    plugin(tmp_path, "late-one", GOOD)
    stopped = fairlead(tmp_path, "methods")
    assert stopped.returncode == 2
    assert len(stopped.stderr.splitlines()) == 1
    assert "good-one-dist and by late-one-dist" in stopped.stderr
    assert "FAIRLEAD_DISABLE" in stopped.stderr
    shown = fairlead(tmp_path, "plugins", "--json")
    assert shown.returncode == 0, shown.stderr
    errors = {p["name"]: p["error"] for p in json.loads(shown.stdout)}
    assert errors["good-one"] == ""
    assert "registered by" in errors["late-one"]
    assert fairlead(tmp_path, "methods", FAIRLEAD_DISABLE="late-one").returncode == 0


def test_a_registry_whose_plugins_collide_says_so_each_time() -> None:
    def load(registry: Registry) -> None:
        registry.add(Method("twin", "reward", "a:b", package="one"))
        registry.add(Method("twin", "reward", "a:b", package="two"))

    own = Registry(load)
    for _ in range(2):
        with pytest.raises(DuplicateMethodError, match="one and by two"):
            own.methods()


OBSERVER = """
    import pathlib, sys
    log = pathlib.Path(__file__).with_name("seen")

    def say(*words):
        with log.open("a") as stream:
            print(*words, file=stream)

    class Plan:
        "A plan."
        def __init__(self, **settings): pass

    @hookimpl
    def fairlead_run_started(run): say("started", run.seed)

    @hookimpl
    def fairlead_run_progress(stage, done): say(stage, done)

    @hookimpl
    def fairlead_metrics(metrics): raise ValueError("an observer that fails")

    @hookimpl
    def fairlead_run_finished(status): say(status)

    @hookimpl
    def fairlead_resolve(name): return name.removeprefix("my:") if name.startswith("my:") else None
"""


def test_observers_see_a_run_and_one_that_fails_does_not_stop_it(tmp_path: Path) -> None:
    plugin(tmp_path, "watcher", OBSERVER)
    code = f"""
        from fairlead.runs import Run
        from fairlead import plugins
        run = Run.open({str(tmp_path / "r")!r}, "sample", {{}}, seed=7)
        run.progress("reading", 1, 2)
        run.metric("loss", 1.0)
        run.finish()
        print(plugins.resolve("my:thing"), plugins.resolve("other:thing"))
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["thing", "None"]
    assert (tmp_path / "seen").read_text().split("\n")[:3] == ["started 7", "reading 1", "finished"]
    assert "an observer that fails" in done.stderr


@given(
    name=st.one_of(st.text(max_size=8), st.none(), st.integers()),
    kind=st.one_of(st.sampled_from(["reward", "guard"]), st.text(max_size=6)),
    factory=st.one_of(st.text(max_size=8), st.just("module:attribute"), st.none()),
    tags=st.one_of(st.just(()), st.tuples(st.text(max_size=8)), st.text(max_size=5), st.just(("stage.decoding",))),
)
def test_a_registration_is_listed_as_given_or_refused_in_one_line(name: Any, kind: str, factory: Any, tags: Any) -> None:
    own = Registry()
    try:
        own.add(Method(name, kind, factory, tags=tags))
    except FairleadError as error:
        assert own.methods() == []
        assert len(str(error).splitlines()) <= 1
    else:
        assert own.get(kind, name) in own.methods(kind)


@given(st.text(min_size=1, max_size=12))
def test_a_name_that_is_not_there_is_an_error_with_names_that_are(name: str) -> None:
    own = Registry()
    own.add(Method("keyword", "reward", "a:b"))
    if name != "keyword":
        with pytest.raises(UnknownNameError, match="keyword"):
            own.get("reward", name)
