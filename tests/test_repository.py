"""What is in the repository: no machine's paths, no package index, no unfinished business; versions and licences agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from house import DISTRIBUTIONS, ROOT, tracked_files

tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")

BINARY = {".safetensors", ".png", ".parquet", ".ico"}
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w./-])/(?:work|root|home|opt|Users|mnt|tmp)/\w",
    "a package index": r"\b(?:pypi\.org|pythonhosted\.org|--extra-index-url|--index-url)",
    "a tracker's number": r"\b[Ii]ssues? #?\d+\b|(?<![\w&])#\d{1,4}\b(?!\d)(?=[ ,.)]|$)",
    "unfinished business": r"\b(?:TODO|FIXME|XXX|HACK)\b",
    "a private folder": r"(?<!\.\./)\bshared/(?:specs|design|style|abstractions)\b",
    "merge leftovers": r"^(?:<<<<<<<|>>>>>>>) ",
}


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked_files():
        if path.suffix not in BINARY and path != Path(__file__).resolve():
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    hits = [
        f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]}"
        for path, text in texts()
        if path.suffix not in (".svg", ".json", ".css")
        for found in pattern.finditer(text)
    ]
    assert hits == []


def test_every_python_file_says_what_it_is() -> None:
    silent = []
    for path, text in texts():
        if path.suffix == ".py" and text.strip() and not re.match(r'(?:#!.*\n)?[ru]?"""\S', text.lstrip()):
            silent.append(str(path))
    assert silent == []


def test_no_file_is_too_large_for_a_clone() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked_files() if p.stat().st_size > 6 << 20}
    assert large == {}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_distribution_is_complete(distribution: str) -> None:
    folder = ROOT / distribution
    (package,) = (p for p in (folder / "src").iterdir() if (p / "__init__.py").exists())
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (package / "py.typed").exists()
    assert (folder / "README.md").exists()
    assert project["readme"] == "README.md"
    assert "Apache-2.0" in str(project["license"])
    assert project["requires-python"] == ">=3.10"
    assert "version" in project["dynamic"], "the version stands in one place, the package's __init__"


def test_triton_is_asked_for_on_linux_x86_64_alone() -> None:
    for distribution in DISTRIBUTIONS:
        for need in tomllib.loads((ROOT / distribution / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "dependencies"
        ]:
            if need.startswith("triton"):
                assert "platform_system == 'Linux'" in need.replace('"', "'")
                assert "platform_machine == 'x86_64'" in need.replace('"', "'")


def test_tested_versions_are_exact_and_sorted() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert pins == sorted(pins, key=lambda pin: pin.lower().replace("_", "-"))
