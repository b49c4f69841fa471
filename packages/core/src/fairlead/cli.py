"""The command line: `fairlead methods | plugins | doctor | run | report`, and the verbs that plugins add.

A user's mistake is one line on stderr and exit code 2, Ctrl-C is 130, a failed threshold of a run is 1; only our own
bugs show a traceback. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import FairleadError, InputError


class Commands(click.Group):
    """A group whose further commands come from the plugins, on first need."""

    _loaded = False

    def _load(self) -> None:
        if not self._loaded:
            type(self)._loaded = True
            from . import plugins

            plugins.add_commands(self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return sorted(super().list_commands(ctx))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        if found is None:
            self._load()
            found = super().get_command(ctx, name)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from .errors import UnknownNameError

            raise UnknownNameError("command", args[0], self.list_commands(ctx)) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fairlead")
def cli() -> None:
    """Align language and vision models with published methods."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `fairlead` command."""
    sys.exit(_guarded(lambda: cli.main(args=arguments, prog_name="fairlead", standalone_mode=False)))


def _guarded(call: Callable[[], Any]) -> int:
    """Run a command; every way to end becomes an exit code and at most one line."""
    try:
        result = call()
    except click.ClickException as error:
        error.show()
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; what was finished is kept (--resume goes on)")
        return 130
    except FairleadError as error:
        _say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has gone; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM):
            where = f"{error.filename}: " if error.filename else ""
            _say(f"error: {where}{error.strerror or error}; free space or choose another place, then --resume")
            return 2
        raise
    return result if isinstance(result, int) else 0


def _say(line: str) -> None:
    click.echo(line, err=True)


def echo_json(value: Any) -> None:
    """JSON for scripts: one document on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


def print_table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
    """A table for people; plain text where the output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*columns, title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`--set a.b=c` pairs as a nested dict; values are YAML, so 3, true, [1, 2] and text all work."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair}: must read NAME=VALUE, as in --set gamma=0.5")
        place = settings
        *path, last = name.strip().replace("-", "_").split(".")
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {pair}: {part!r} is already set to a value")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            place[last] = value
    return settings


@cli.command()
@click.option("--kind", help="Only methods of this kind, such as watermark.")
@click.option("--package", help="Only methods of this distribution.")
@click.option("--paper", help="Only methods whose paper holds this text, such as 2506.04462.")
@click.option("--tag", "tags", multiple=True, help="Only methods tagged with or below this taxonomy id; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods(kind: str | None, package: str | None, paper: str | None, tags: tuple[str, ...], as_json: bool) -> None:
    """List the methods that are installed."""
    from . import registry, taxonomy

    for tag in tags:
        taxonomy.check(tag)
    found = [
        m
        for m in registry.methods(kind)
        if (package is None or m.package == package)
        and (paper is None or paper.lower() in m.paper.lower())
        and all(taxonomy.matches(m.tags, tag) for tag in tags)
    ]
    if as_json:
        echo_json([{k: getattr(m, k) for k in ("kind", "name", "package", "paper", "summary", "tags")} for m in found])
    elif found:
        print_table(
            ["kind", "name", "package", "paper", "what it does"],
            [[m.kind, m.name, m.package, m.paper, m.summary] for m in found],
        )
    else:
        click.echo("no method fits; 'fairlead methods' lists all")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List the plugins: which loaded, which did not and why."""
    from . import plugins as manager

    found = manager.status()
    if as_json:
        echo_json([vars(s) for s in found])
        return
    rows = []
    for s in found:
        state = "disabled" if s.disabled else (f"FAILED: {s.error}" if s.error else f"{s.methods} methods")
        rows.append([s.name, f"{s.distribution} {s.version}", s.module, state])
    print_table(["plugin", "distribution", "module", "state"], rows)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say which kernel backend serves which operation here and why, what is installed and what is missing."""
    from . import doctor as examination

    found = examination.examine()
    if as_json:
        echo_json(found)
        return
    print_table(["", ""], [[k, str(v)] for k, v in found["machine"].items()], title="machine")
    print_table(
        ["operation", "served by", "why not the others"],
        [
            [row["operation"], row["backend"] or "nothing", "; ".join(f"{b}: {r}" for b, r in row["reasons"].items())]
            for row in found["kernels"]
        ],
        title=f"kernels on {found['kernels'][0]['device']} tensors" if found["kernels"] else "kernels",
    )
    print_table(["package", "version"], [[k, v] for k, v in found["installed"].items()], title="installed")
    if found["missing"]:
        print_table(["missing", "what it would give", "install"], found["missing"], title="missing (optional)")
    for line in found["problems"]:
        click.echo(f"problem: {line}")


@cli.command()
@click.argument("recipe")
@click.option("--seed", type=int, default=None, help="Seed of all randomness (default 0).")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a setting; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory (default runs/RECIPE-seedN).")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--force", is_flag=True, help="Replace the run that is in the directory.")
@click.option("--settings", "show", is_flag=True, help="Show the recipe's settings and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def run(
    recipe: str, seed: int | None, settings: tuple[str, ...], out: Path | None, resume: bool, force: bool, show: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Run RECIPE (a registered name or a YAML file) and write its report.

    A YAML file reads {recipe: NAME, seed: 0, settings: {...}}. Exit code 1 when a threshold of the recipe fails.
    """
    from . import registry

    chosen: dict[str, Any] = {}
    if recipe.endswith((".yaml", ".yml")):
        recipe, seed, chosen = _read_recipe(Path(recipe), seed)
    method = registry.get("recipe", recipe)
    if show:
        _show_settings(method.config, as_json)
        return 0
    built = method.load()(**_merge(chosen, parse_settings(settings)))
    seed = 0 if seed is None else seed
    return run_recipe(built, method, out or Path("runs") / f"{recipe}-seed{seed}", seed, resume, force, as_json)


def run_recipe(built: Any, method: Any, out: Path, seed: int, resume: bool, force: bool, as_json: bool) -> int:
    """Run a recipe in a run directory, with a progress bar, and tell its checks; the exit code."""
    from .progress import run_progress
    from .runs import Run

    opened = Run.open(out, method.name, built.config.public_dict(), seed, resume=resume, force=force)
    opened.describe(method.name.replace("-", " ").capitalize(), method.summary, method.paper)
    try:
        with run_progress(opened):
            built(opened)
    except KeyboardInterrupt:
        opened.fail("interrupted", "Ctrl-C")
        _say(f"interrupted; finished stages are kept: fairlead run {method.name} --seed {seed} --out {out} --resume")
        return 130
    except BaseException as error:
        opened.fail("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    opened.finish()
    if as_json:
        echo_json({"dir": str(out), "report": str(out / "report.html"), "passed": opened.passed, "checks": opened.checks})
    else:
        for check in opened.checks:
            click.echo(f"{'held  ' if check['passed'] else 'FAILED'}  {check['name']}: {check['detail']}")
        click.echo(f"report: {out / 'report.html'}")
    return 0 if opened.passed else 1


def _read_recipe(path: Path, seed: int | None) -> tuple[str, int | None, dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), str):
        raise InputError(f"{path}: must read {{recipe: NAME, seed: 0, settings: {{...}}}}")
    unknown = set(content) - {"recipe", "seed", "settings"}
    if unknown:
        raise InputError(f"{path}: unknown entry {sorted(unknown)[0]!r}; allowed are recipe, seed, settings")
    settings = content.get("settings") or {}
    if not isinstance(settings, dict) or not isinstance(content.get("seed", 0), int):
        raise InputError(f"{path}: seed must be an integer and settings a mapping")
    return content["recipe"], content.get("seed") if seed is None else seed, settings


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for name, value in second.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _show_settings(config: Any, as_json: bool) -> None:
    """What --set may change, read off the recipe's pydantic model."""
    rows = [
        {"setting": name, "type": _type(field.annotation), "allowed": _limits(field.metadata),
         "default": field.get_default(call_default_factory=True), "description": field.description or ""}
        for name, field in config.model_fields.items()
    ]  # fmt: skip
    if as_json:
        plain = (str, int, float, bool, list, dict, type(None))
        echo_json([{**row, "default": d if isinstance(d := row["default"], plain) else str(d)} for row in rows])
    else:
        print_table(
            ["setting", "type", "allowed", "default", "what it is"],
            [[str(row[k]) for k in ("setting", "type", "allowed", "default", "description")] for row in rows],
        )


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return re.sub(r"\b(typing|fairlead[\w.]*)\.", "", str(annotation)).replace("NoneType", "None")


def _limits(metadata: list[Any]) -> str:
    """The bounds of a field, "≥ 1, < 2"."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    found = [(signs[n], getattr(m, n)) for m in metadata for n in signs if getattr(m, n, None) is not None]
    return ", ".join(f"{sign} {bound}" for sign, bound in found)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(directory: Path, as_json: bool) -> None:
    """Render the report of a run DIRECTORY again."""
    from . import report as rendering
    from . import runs

    path = rendering.write(directory)
    record = runs.read(directory)
    if as_json:
        passed = all(check["passed"] for check in record["checks"])
        echo_json({"report": str(path), "status": record["status"], "passed": passed, "checks": record["checks"]})
    else:
        click.echo(f"report: {path}")


if __name__ == "__main__":
    main()
