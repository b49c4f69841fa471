"""A run: a directory that says what was done, with what, and what came out, and that survives a kill.

    run.json         slug, config, seed, versions, git commit, device, wall clock, status, checks, headline
    metrics.jsonl    one row per metric
    samples.parquet  rows worth reading
    stages/          JSON result of each finished stage: a resumed run reuses them
    figures/         SVG, with captions in run.json
    report.html      one self-contained page

Every file is written beside its place and renamed. Rendering the page is report's; what to do is the recipe's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from . import plugins
from .errors import InputError, RunExistsError
from .files import atomic_write
from .stats import Interval

FORMAT = 1
_PACKAGES = ("torch", "transformers", "triton", "numpy", "scipy")


class Run:
    """An open run. Made by `Run.open`; a recipe adds stages, metrics, samples, figures, tables, sections and checks."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.dir = directory
        self._record = record
        self._started = time.monotonic()
        self._earlier = float(record.get("seconds", 0.0))
        self._samples: list[dict[str, Any]] = []
        self._listeners: list[Callable[[str, int, int | None], None]] = []
        self._stages: dict[str, str] = {}

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], slug: str, config: Mapping[str, Any], seed: int, *,
        resume: bool = False, force: bool = False,
    ) -> Run:  # fmt: skip
        """Start a run in `directory`, or take one up again with resume=True.

        RunExistsError: the directory holds a finished run (force=True replaces it), an unfinished one (resume=True
        goes on, force=True starts over), or, when resuming, a run of another recipe, seed or configuration.
        """
        path = Path(directory)
        config = json.loads(json.dumps(dict(config)))
        old = _read(path)
        if old is None and path.exists() and any(path.iterdir()):
            raise RunExistsError(f"{path}: holds files but no run; choose an empty or new directory")
        if old is not None and not force:
            if old["status"] == "finished":
                raise RunExistsError(f"{path}: holds a finished run; choose another --out, or --force to replace it")
            if not resume:
                raise RunExistsError(f"{path}: holds an unfinished run; --resume goes on, --force starts over")
            for name, now in (("slug", slug), ("seed", seed), ("config", config)):
                if old[name] != now:
                    raise RunExistsError(f"{path}: cannot resume, its {name} was {_difference(old[name], now)}")
        if old is not None and force:
            _clear(path)
            old = None
        record = old or {
            "format": FORMAT, "slug": slug, "config": config, "seed": seed, "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": 0.0,
            "versions": versions(), "git": _git_commit(), "device": _device(), "command": _command(),
        }  # fmt: skip
        record.update(status="running", title=slug, summary="", paper="", headline=[], checks=[], blocks=[])
        run = cls(path, record)
        path.mkdir(parents=True, exist_ok=True)
        if resume:
            (path / "metrics.jsonl").unlink(missing_ok=True)  # metrics come again from the stages' kept results
        run._save()
        plugins.notify("fairlead_run_started", run=run)
        return run

    @property
    def seed(self) -> int:
        return int(self._record["seed"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self._record["config"])

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The checks so far: {name, passed, detail}."""
        return list(self._record["checks"])

    @property
    def passed(self) -> bool:
        return all(check["passed"] for check in self._record["checks"])

    def describe(self, title: str, summary: str = "", paper: str = "") -> None:
        """What the report is called, one sentence about it, and the paper's id."""
        self._record.update(title=title, summary=summary, paper=paper)

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of `function()`, JSON-ready; kept, so that a resumed run reads it instead of working again."""
        other = self._stages.setdefault(_file_name(name), name)
        if other != name:
            raise InputError(f"stages {other!r} and {name!r} would be kept in one file; give them names that differ more")
        path = self.dir / "stages" / f"{_file_name(name)}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        result = json.loads(json.dumps(function()))
        with atomic_write(path) as stream:
            json.dump(result, stream)
        self._save()
        return result

    def listen(self, listener: Callable[[str, int, int | None], None]) -> None:
        """Call `listener(stage, done, total)` on progress; the command line draws its bar with it."""
        self._listeners.append(listener)

    def progress(self, stage: str, done: int, total: int | None = None) -> None:
        """Tell how far a stage has got."""
        for listener in self._listeners:
            listener(stage, done, total)
        plugins.notify("fairlead_run_progress", run=self, stage=stage, done=done, total=total)

    def metric(self, name: str, value: float | int | str | bool, **fields: Any) -> None:
        """Append one row to metrics.jsonl."""
        row = {"name": name, "value": value, **fields}
        with open(self.dir / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        plugins.notify("fairlead_metrics", run=self, metrics=row)

    def samples(self, rows: Sequence[Mapping[str, Any]], title: str = "Samples", show: int = 12) -> None:
        """Keep rows in samples.parquet and show the first `show` of them in the report."""
        self._samples.extend(dict(row) for row in rows)
        if show and rows:
            self.table(title, [dict(row) for row in rows[:show]])

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, note: str = "") -> None:
        """A table in the report; columns default to the keys of the rows, in order of appearance."""
        columns = list(columns or dict.fromkeys(key for row in rows for key in row))
        self._record["blocks"].append(
            {"kind": "table", "title": title, "columns": columns, "note": note,
             "rows": [[_cell(row.get(c, "")) for c in columns] for row in rows]}
        )  # fmt: skip

    def section(self, title: str, text: str = "", *, html: str = "") -> None:
        """A section in the report: `text` is plain paragraphs (escaped), `html` is markup of our own making."""
        self._record["blocks"].append({"kind": "section", "title": title, "text": text, "html": html})

    def figure(self, name: str, figure: Any, caption: str = "", *, format: Literal["svg", "png"] = "svg") -> None:
        """Keep a matplotlib figure and show it in the report; "png" for one of very many marks."""
        if format not in ("svg", "png"):
            raise InputError(f"figure {name!r}: format must be 'svg' or 'png', got {format!r}")
        path = self.dir / "figures" / f"{_file_name(name)}.{format}"
        if any(block.get("file") == path.name for block in self._record["blocks"]):
            raise InputError(f"figure {name!r}: this run has a figure of that name already")
        with atomic_write(path, "wb") as stream:
            import matplotlib

            with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(
                    stream, format=format, dpi=180, transparent=False, facecolor="white",
                    metadata={"Date": None} if format == "svg" else None,
                )  # fmt: skip
        self._record["blocks"].append({"kind": "figure", "title": name, "file": path.name, "caption": caption})

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        """One threshold: what was asked, whether it held, the figures. A failed check makes the exit code 1."""
        self._record["checks"].append({"name": name, "passed": bool(passed), "detail": detail})
        self.metric(f"check: {name}", bool(passed), detail=detail)
        return bool(passed)

    def headline(self, label: str, value: Any, detail: str = "") -> None:
        """One of the few numbers at the top of the report; a stats.Interval is shown with its bounds."""
        if isinstance(value, Interval):
            bounds = f"{value.level:.0%} interval {value.low:.3g} to {value.high:.3g} (n = {value.n}, {value.method})"
            value, detail = f"{value.estimate:.3g}", f"{bounds}; {detail}" if detail else bounds
        self._record["headline"].append({"label": label, "value": _cell(value), "detail": detail})

    def finish(self) -> None:
        """Write samples, run.json and the report; the run can no longer be changed."""
        if self._samples:
            import pyarrow as pa
            import pyarrow.parquet as pq

            with atomic_write(self.dir / "samples.parquet", "wb") as stream:
                pq.write_table(pa.Table.from_pylist(self._samples), stream)
        self._end("finished")

    def fail(self, status: str, reason: str) -> None:
        """Note that the run stopped early ("failed" or "interrupted"); finished stages are kept for --resume."""
        self._record["reason"] = reason
        self._end(status)

    def _end(self, status: str) -> None:
        from . import report

        self._record["status"] = status
        self._save()
        if status == "finished":
            report.write(self.dir)
        plugins.notify("fairlead_run_finished", run=self, status=status)

    def _save(self) -> None:
        self._record["seconds"] = round(self._earlier + time.monotonic() - self._started, 2)
        with atomic_write(self.dir / "run.json") as stream:
            json.dump(self._record, stream, indent=1, ensure_ascii=False)


def read(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a run directory; InputError when it is none."""
    record = _read(Path(directory))
    if record is None:
        raise InputError(f"{directory}: is no run directory (no run.json); 'fairlead run' makes one")
    return record


def versions() -> dict[str, str]:
    """Versions of Python, of our packages and of what they stand on."""
    found = {"python": platform.python_version()}
    ours = sorted({d.name for d in metadata.distributions() if (d.name or "").lower().startswith("fairlead")})
    for name in (*ours, *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'run.json'}: cannot be read as a run ({error})") from None
    return record if isinstance(record, dict) else None


def _clear(path: Path) -> None:
    """Remove what a run wrote, and nothing else that a user may keep there."""
    import shutil

    for name in ("stages", "figures"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in ("metrics.jsonl", "samples.parquet", "report.html", "run.json"):
        (path / name).unlink(missing_ok=True)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        return ", ".join(f"{k}={old.get(k)!r} (now {new.get(k)!r})" for k in names)
    return f"{old!r} (now {new!r})"


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unnamed"


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} visible)"
    return f"CPU: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str:
    """The commit of the working directory's repository, with a "+" when it has changes; empty outside one."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _command() -> str:
    """The command line as it was typed, except for keys that were typed into it."""
    arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(re.sub(r"(?i)([\w.-]*keys?[\"']?)\s*([=:]).*", r"\1\2<not shown>", a, flags=re.S) for a in arguments)
