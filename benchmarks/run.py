"""Measure every row of bench_*.py: one table, a history of JSON lines, a picture; exit 1 where one falls behind.

    python benchmarks/run.py [--only TEXT] [--quick] [--no-history] [--json]

Each bench file runs in a process of its own with one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="a second per row")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    parser.add_argument("--no-history", action="store_true", help="leave the history alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return _memory(*options.memory.split("::"))
    if options.worker:
        return _work(Path(options.worker), options.only, options.quick)
    results: list[dict[str, Any]] = []
    broken = []
    for path in sorted(HERE.glob("bench_*.py")):
        command = [
            sys.executable,
            __file__,
            "--worker",
            str(path),
            "--only",
            options.only,
            *(["--quick"] if options.quick else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_one_thread())
        results += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0:
            broken.append(path.name)
    history = HERE / "history" / f"{machine()}.jsonl"
    best = _best(history)
    behind = [text for r in results for text in _behind(r)]
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(_table(results, best))
    if results and not options.no_history and not options.only:
        _append(history, results)
        _picture(history)
    for text in behind:
        print(f"BEHIND: {text}", file=sys.stderr)
    for name in broken:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if behind or broken else 0


def _behind(r: dict[str, Any]) -> list[str]:
    """What of a row falls behind what is asked. The minima are less shaken by neighbours than the medians: one of the two
    ratios must hold."""
    found = []
    if r["at_least"] and max(r["ratio"], r["best_ratio"]) < r["at_least"]:
        found.append(f"{r['name']}: {r['ratio']:.2f}x, {r['at_least']:.3g}x is asked")
    if r["most_mib"] is not None and r["peak_mib"] is not None and r["peak_mib"] > r["most_mib"]:
        found.append(f"{r['name']}: peak {r['peak_mib']:.0f} MiB, {r['most_mib']:.0f} are allowed")
    peer = r["peer_peak_mib"] if r["less_memory"] else None
    if peer is not None and r["peak_mib"] is not None and peer < r["less_memory"] * r["peak_mib"]:
        times = peer / max(r["peak_mib"], 1e-9)
        found.append(f"{r['name']}: {times:.1f}x less memory, {r['less_memory']:.3g}x is asked")
    return found


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _rows(path: Path) -> list[Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.rows())


def _work(path: Path, only: str, quick: bool) -> int:
    import torch
    from harness import measure

    torch.set_num_threads(1)
    failed = 0
    for row in _rows(path):
        if only and only not in row.name:
            continue
        try:
            found = measure(row, budget=1.0 if quick else 8.0)
        except Exception as error:  # one broken row must not hide the others
            print(f"{row.name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = 1
            continue
        if row.memory:
            found.peak_mib = _ask_memory(path, row.name, "ours")
            found.peer_peak_mib = _ask_memory(path, row.name, row.baseline)
        asked = {"at_least": row.at_least, "most_mib": row.most_mib, "less_memory": row.less_memory, "baseline": row.baseline}
        print(json.dumps({**asdict(found), **asked}), flush=True)
    return failed


def _ask_memory(path: Path, name: str, way: str) -> float | None:
    done = subprocess.run(
        [sys.executable, __file__, "--memory", f"{path}::{name}::{way}"],
        stdout=subprocess.PIPE,
        text=True,
        env=_one_thread(),
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def _memory(path: str, name: str, way: str) -> int:
    import torch
    from harness import peak_mib

    torch.set_num_threads(1)
    row = next(r for r in _rows(Path(path)) if r.name == name)
    print(peak_mib(row.ours if way == "ours" else row.peers[way]))
    return 0


def machine() -> str:
    """The processor's name, fit for a file."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    try:
        import torch

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
    except ImportError:
        pass
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _best(history: Path) -> dict[str, float]:
    best: dict[str, float] = {}
    if history.exists():
        for line in history.read_text(encoding="utf-8").splitlines():
            for r in json.loads(line)["rows"]:
                best[r["name"]] = min(best.get(r["name"], float("inf")), r["ours_ms"])
    return best


def _table(results: list[dict[str, Any]], best: dict[str, float]) -> str:
    head = [
        "operation",
        "shape",
        "dtype",
        "today ms",
        "best ms",
        "peer",
        "peer ms",
        "ratio",
        "asked",
        "floor ms",
        "peak MiB",
    ]
    lines = [head]
    for r in results:
        operation, shape, dtype, _ = r["name"].split(" | ")
        peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f} / {r['peer_peak_mib'] or 0:.0f}"
        lines.append(
            [
                operation, shape, dtype, f"{r['ours_ms']:.3f}", f"{min(best.get(r['name'], r['ours_ms']), r['ours_ms']):.3f}",
                r["baseline"], f"{r['peers_ms'][r['baseline']]:.2f}", f"{r['ratio']:.2f}x",
                f"{r['at_least']:.3g}x" if r["at_least"] else "-", "-" if r["floor_ms"] is None else f"{r['floor_ms']:.3f}", peak,
            ]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rendered = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])


def _append(history: Path, results: list[dict[str, Any]]) -> None:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=HERE)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit.stdout.strip(), "rows": results,
    }  # fmt: skip
    history.parent.mkdir(exist_ok=True)
    with open(history, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def _picture(history: Path) -> None:
    """Ratio of the latest run against what is asked, per row, beside the run before."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    rows = sorted((r for r in records[-1]["rows"] if r["at_least"]), key=lambda r: r["ratio"] / r["at_least"])
    before = {r["name"]: r for r in records[-2]["rows"]} if len(records) > 1 else {}
    figure = Figure(figsize=(9, 1 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(rows)), [r["ratio"] / r["at_least"] for r in rows], color="#1b7f4d", height=0.6)
    for place, r in enumerate(rows):
        if r["name"] in before:
            axis.plot(before[r["name"]]["ratio"] / r["at_least"], place, "k|", ms=10)
        axis.annotate(f" {r['ratio']:.1f}x", (r["ratio"] / r["at_least"], place), va="center", fontsize=7)
    axis.axvline(1, color="#b3261e", lw=1)
    axis.set_yticks(range(len(rows)), [r["name"].replace(" | ", ", ") for r in rows], fontsize=7)
    axis.set_xlabel(
        f"speed against the peer, over what is asked (bar: last run, tick: the one before) on {records[-1]['machine']}",
        fontsize=8,
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(history.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
