"""Runs: whole files, resume, refusal to overwrite, and a report that stands alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import report, stats
from fairlead.errors import InputError, RunExistsError
from fairlead.files import atomic_write
from fairlead.runs import Run, read


def small_run(path: Path, **options: bool) -> Run:
    run = Run.open(path, "sample", {"a": 1}, seed=3, **options)
    run.describe("A <sample> run", "one & two")
    run.stage("first", lambda: {"x": 1})
    run.metric("loss", 0.5, step=1)
    run.headline("gain", stats.wilson(9, 10), "of ten")
    run.table("Rows", [{"name": "a <b>", "value": 0.5}, {"name": "c", "other": 2}])
    run.section("Words", "First.\n\nSecond <script>alert(1)</script>.")
    run.samples([{"prompt": "p", "text": "t"}])
    run.check("holds", True, "1 > 0")
    return run


def test_a_finished_run_has_every_file(tmp_path: Path) -> None:
    run = small_run(tmp_path / "r")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    run.figure("curve", figure, "a curve")
    run.finish()
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert {"run.json", "metrics.jsonl", "samples.parquet", "figures", "stages", "report.html"} <= names
    record = read(tmp_path / "r")
    assert record["status"] == "finished"
    assert record["seed"] == 3
    assert "torch" in record["versions"]


def test_the_report_stands_alone_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    run = small_run(tmp_path / "r")
    run.finish()
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|https://arxiv)', html)
    assert "<script" not in html
    assert "A &lt;sample&gt; run" in html
    before = html
    report.write(tmp_path / "r")
    assert (tmp_path / "r" / "report.html").read_text(encoding="utf-8") == before


def test_a_finished_run_is_never_overwritten_without_force(tmp_path: Path) -> None:
    small_run(tmp_path / "r").finish()
    with pytest.raises(RunExistsError, match="finished"):
        Run.open(tmp_path / "r", "sample", {"a": 1}, seed=3)
    with pytest.raises(RunExistsError, match="finished"):
        Run.open(tmp_path / "r", "sample", {"a": 1}, seed=3, resume=True)
    (tmp_path / "r" / "notes.txt").write_text("mine", encoding="utf-8")
    small_run(tmp_path / "r", force=True).finish()
    assert (tmp_path / "r" / "notes.txt").exists()


def test_a_resumed_run_reuses_its_stages_and_refuses_another_configuration(tmp_path: Path) -> None:
    small_run(tmp_path / "r").fail("interrupted", "test")
    with pytest.raises(RunExistsError, match="--resume"):
        Run.open(tmp_path / "r", "sample", {"a": 1}, seed=3)
    with pytest.raises(RunExistsError, match="a=1"):
        Run.open(tmp_path / "r", "sample", {"a": 2}, seed=3, resume=True)
    run = Run.open(tmp_path / "r", "sample", {"a": 1}, seed=3, resume=True)
    assert run.stage("first", lambda: pytest.fail("the stage was kept")) == {"x": 1}


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunExistsError, match="no run"):
        Run.open(tmp_path, "sample", {}, seed=0)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_write(target) as stream:
        stream.write("half")
        raise RuntimeError
    assert target.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


RECIPE = """
import time
from fairlead import hookimpl
from fairlead.kinds import Recipe

class Slow(Recipe):
    "A recipe of two stages."
    def __call__(self, run):
        run.stage("quick", lambda: 1)
        (run.dir / "started").write_text("x")
        run.stage("slow", lambda: time.sleep(0.0 if (run.dir / "second").exists() else 30))
        run.check("fine", True, "yes")

@hookimpl
def fairlead_recipes(register):
    register("slow-one", "slow_plugin:Slow", summary="two stages", tags=("stage.evaluation", "access.blackbox", "goal.preferences"))
"""


def listens() -> None:
    """Ctrl-C reaches the child even where these tests run in the background of a shell that ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "slow_plugin.py").write_text(RECIPE, encoding="utf-8")
    info = tmp_path / "slow_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-plugin\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[fairlead]\nslow = slow_plugin\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "fairlead", "run", "slow-one", "--out", str(tmp_path / "r")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    for _ in range(600):
        if (tmp_path / "r" / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    (tmp_path / "r" / "second").write_text("x", encoding="utf-8")
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_figures_are_kept_and_stand_in_the_page_itself(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = small_run(tmp_path / "r")
    drawn = Figure()
    drawn.subplots().plot([1, 2])
    run.figure("curve", drawn, 'one "curve" & more')
    run.figure("cloud", drawn, "many marks", format="png")
    with pytest.raises(InputError, match="already"):
        run.figure("Curve", drawn)
    with pytest.raises(InputError, match="'svg' or 'png'"):
        run.figure("third", drawn, format="gif")  # type: ignore[arg-type]
    run.finish()
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1
    assert "data:image/png;base64," in html
    assert not re.search(r'(src|href)="(?!#|data:|https://arxiv)', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert used <= set(ids)
    (tmp_path / "r" / "figures" / "curve.svg").unlink()
    with pytest.raises(InputError, match=r"curve\.svg"):
        report.write(tmp_path / "r")


def test_numbers_are_set_to_the_right_at_four_digits_and_an_interval_with_its_bounds(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", "sample", {}, seed=0)
    run.headline("share", stats.wilson(9, 10))
    run.table("T", [{"a": 0.1 + 0.2, "b": "a long answer " * 9, "c": None, "d": True}, {"a": 12345.678, "b": "x"}])
    run.finish()
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert '<td class="n">0.3</td>' in html
    assert '<td class="n">1.235e+04</td>' in html
    assert '<td class="l">a long answer' in html
    assert "–</td>" in html and ">yes</td>" in html
    assert "95% interval 0.596 to 0.982 (n = 10, Wilson)" in html


def test_two_stages_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", "sample", {}, seed=0)
    assert run.stage("step 1", lambda: 1) == 1
    assert run.stage("step 1", lambda: 2) == 1
    with pytest.raises(InputError, match="step 1"):
        run.stage("step-1", lambda: 3)


@given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8))
@settings(max_examples=25, deadline=None)
def test_a_stage_gives_the_same_result_when_it_is_resumed(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = Run.open(Path(folder) / "r", "sample", {}, seed=0).stage("s", lambda: value)
        again = Run.open(Path(folder) / "r", "sample", {}, seed=0, resume=True).stage("s", lambda: pytest.fail("worked again"))
        assert first == again


@given(title=st.text(max_size=30), text=st.text(max_size=60), cell=st.text(max_size=30))
@settings(max_examples=25, deadline=None)
def test_any_text_is_shown_as_text(title: str, text: str, cell: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder) / "r", "sample", {"note": "<img>"}, seed=0)
        run.describe(title + "<b>", text)
        run.section(title, text + "<script>")
        run.table(title, [{"column <i>": cell + "<u>"}], note=text)
        run.check(title, False, text + "<em>")
        run.finish()
        html = (run.dir / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"<(b|i|script|u|em|img)>", html)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_a_broken_run_directory_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
