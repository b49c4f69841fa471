"""`fairlead zoo list | show | path | build`: what the zoo holds, where it is, how it is made again."""

from __future__ import annotations

import json
from typing import Any

import click

from fairlead.cli import echo_json, print_table

from . import catalogue
from .files import cache_dir


@click.group()
def zoo() -> None:
    """Tiny models and worlds: list them, find them, train them again."""


@zoo.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """Every name, what it is and where it is."""
    rows = [_row(entry) for entry in catalogue.ENTRIES.values()]
    if as_json:
        echo_json(rows)
        return
    print_table(
        ["name", "kind", "where", "parameters", "summary"],
        [
            [r["name"], r["kind"], r["where"], f"{r['parameters']:,}" if r["parameters"] else "", r["summary"]]
            for r in rows
        ],
    )


@zoo.command()
@click.argument("name")
@click.option("--seed", type=click.IntRange(0), help="Another seed than the shipped one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def path(name: str, seed: int | None, as_json: bool) -> None:
    """Print the local path of NAME, building it first when that takes seconds."""
    place = str(catalogue.resolve(_with_seed(name, seed)))
    if as_json:
        echo_json({"name": name, "path": place})
    else:
        click.echo(place)


@zoo.command()
@click.argument("name")
@click.option("--seed", type=click.IntRange(0), help="Seed of world and training (default: the shipped one).")
@click.option("--force", is_flag=True, help="Train again although the result is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def build(name: str, seed: int | None, force: bool, as_json: bool) -> None:
    """Train NAME (and its parents where they are missing) on one thread; a killed build goes on where it stopped."""
    from fairlead.progress import bar

    entry, number = catalogue.parse(_with_seed(name, seed))
    with bar() as shown:
        place = catalogue.build(entry.name, number, force=force, report=shown)
    made = place / "build.json"
    row = {
        "name": entry.name, "seed": number, "path": str(place), "sha256": catalogue.content_hash(place),
        "figures": json.loads(made.read_text(encoding="utf-8")) if made.exists() else None,
    }  # fmt: skip
    if as_json:
        echo_json(row)
    else:
        click.echo(f"{place}\nsha256 {row['sha256']}")


@zoo.command()
@click.argument("name")
@click.option("--seed", type=click.IntRange(0), help="Another seed than the shipped one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, seed: int | None, as_json: bool) -> None:
    """Figures of NAME: size, hash, recipe, and what it scored."""
    entry, number = catalogue.parse(_with_seed(name, seed))
    real = entry.kind == "real"
    place = catalogue.resolve(entry.name) if real else catalogue.location(entry.name, number)
    row = _row(entry, number)
    row["path"] = str(place) if place.exists() else None
    row["parents"], row["license"], row["seed"] = list(entry.parents), entry.license, number
    row["bytes"] = catalogue.size(entry.name, number)
    if entry.kind != "real":
        row["recipe"] = catalogue.recipe_hash(entry.name, number or 0)
        row["sha256"] = catalogue.content_hash(place) if place.exists() else None
    known = catalogue.figures()
    if entry.seed == number:
        row["figures"] = known.get("checkpoints", {}).get(entry.name, {}).get("figures")
        if entry.kind == "organism":
            row["gate"] = known.get("gate")
    if as_json:
        echo_json(row)
        return
    for key in (
        "name",
        "kind",
        "summary",
        "where",
        "path",
        "parents",
        "parameters",
        "bytes",
        "license",
        "seed",
        "recipe",
        "sha256",
    ):
        if row.get(key) not in (None, [], ""):
            value = row[key]
            click.echo(f"{key:<11}{' <- '.join(value) if isinstance(value, list) else value}")
    for name_, value in (row.get("figures") or {}).items():
        click.echo(f"  {name_}: {_flat(value)}")
    if row.get("gate"):
        click.echo("gate of the family:")
        for check in row["gate"]:
            click.echo(
                f"  {'pass' if check['passed'] else 'FAIL'}  {check['value']:.3f} {check['rule']}  {check['check']}"
            )


def _with_seed(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name.partition('@')[0]}@{seed}"


def _row(entry: catalogue.Entry, seed: int | None = None) -> dict[str, Any]:
    seed = entry.seed if seed is None else seed
    if entry.shipped and seed == entry.seed:
        where = "shipped"
    elif catalogue.is_here(entry.name, seed):
        where = "on this machine"
    elif entry.kind == "real":
        where = "not installed"
    else:
        where = "train it first" if entry.name in catalogue.LONG else "built on first use"
    return {
        "name": f"zoo:{entry.name}", "kind": entry.kind, "where": where, "parameters": entry.parameters,
        "summary": entry.summary, "cache": str(cache_dir()),
    }  # fmt: skip


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
