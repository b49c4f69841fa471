"""Every hook of fairlead, on one page. A plugin implements those it needs with `@fairlead.hookimpl`.

Registration hooks get `register(name, factory, *, paper="", summary="", tags=())`; `factory` is an import string
"module:attribute", so that listing methods imports nothing. Our own packages register through the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from .runs import Run

hookspec = pluggy.HookspecMarker("fairlead")
hookimpl = pluggy.HookimplMarker("fairlead")
Register = Callable[..., None]


@hookspec
def fairlead_watermarks(register: Register) -> None:
    """Watermarks: `fairlead.kinds.Watermark` factories."""


@hookspec
def fairlead_decoders(register: Register) -> None:
    """Decoders: `fairlead.kinds.Decoder` factories."""


@hookspec
def fairlead_rewards(register: Register) -> None:
    """Rewards: `fairlead.kinds.Reward` factories."""


@hookspec
def fairlead_guards(register: Register) -> None:
    """Guards: `fairlead.kinds.Guard` factories."""


@hookspec
def fairlead_rewriters(register: Register) -> None:
    """Prompt rewriters: `fairlead.kinds.Rewriter` factories."""


@hookspec
def fairlead_objectives(register: Register) -> None:
    """Training objectives: `fairlead.kinds.Objective` factories."""


@hookspec
def fairlead_protectors(register: Register) -> None:
    """Protectors of a training step: `fairlead.kinds.Protector` factories."""


@hookspec
def fairlead_selectors(register: Register) -> None:
    """Data selectors: `fairlead.kinds.Selector` factories."""


@hookspec
def fairlead_evaluations(register: Register) -> None:
    """Evaluations: `fairlead.kinds.Evaluation` factories."""


@hookspec
def fairlead_probes(register: Register) -> None:
    """Probes of activations or weights: `fairlead.kinds.Probe` factories."""


@hookspec
def fairlead_recipes(register: Register) -> None:
    """Recipes for `fairlead run NAME`: `fairlead.kinds.Recipe` factories."""


@hookspec
def fairlead_kernel_backends(register: Callable[..., None]) -> None:
    """Backends of kernel operations: `register(operation, name, implementation)`, see `fairlead_kernels.opspec`."""


@hookspec
def fairlead_commands(cli: click.Group) -> None:
    """Add commands to the `fairlead` command line."""


@hookspec(firstresult=True)
def fairlead_resolve(name: str) -> str | None:
    """Turn a name such as "zoo:aligned" into a local path: a model folder in Hugging Face format, or a data file;
    None for a name of somebody else's."""


@hookspec
def fairlead_run_started(run: Run) -> None:
    """A run directory has been opened (new or resumed)."""


@hookspec
def fairlead_run_progress(run: Run, stage: str, done: int, total: int | None) -> None:
    """A stage of a run has got so far."""


@hookspec
def fairlead_metrics(run: Run, metrics: dict[str, Any]) -> None:
    """A row has been written to metrics.jsonl."""


@hookspec
def fairlead_run_finished(run: Run, status: str) -> None:
    """A run has ended: "finished", "failed" or "interrupted"."""
