"""Kind Evaluation: measures a subject and says how sure the numbers are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..config import Configurable
from ..errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from ..runs import Run
    from ..stats import Interval


@dataclass(frozen=True)
class Metric:
    """One number with its interval, and how to read it.

    name: "refusal rate". interval: estimate, bounds, n and how they were made. higher_is_better: None where neither
    direction is good in itself. positive_means: what one positive sample is, such as "the answer refuses".
    """

    name: str
    interval: Interval
    higher_is_better: bool | None = None
    positive_means: str = ""


@dataclass(frozen=True)
class Scorecard:
    """What an evaluation found.

    evaluation: its name. subject: what was measured, in words. metrics: in the order to read them, names distinct.
    rows: one dict of plain JSON values per sample, enough to compute every metric again without the model; each has
    `sample_id`, and `cluster` where samples are not independent. settings: what the numbers depend on.
    """

    evaluation: str
    subject: str
    metrics: tuple[Metric, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [m.name for m in self.metrics]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise InputError(f"scorecard of {self.evaluation}: two metrics are called {twice[0]!r}")

    def __getitem__(self, name: str) -> Interval:
        """The interval of a metric; UnknownNameError otherwise."""
        for metric in self.metrics:
            if metric.name == name:
                return metric.interval
        raise UnknownNameError("metric", name, [m.name for m in self.metrics])

    def table(self) -> list[dict[str, Any]]:
        """One row per metric, for a run's table."""
        arrow = {True: "higher", False: "lower", None: "neither"}
        return [
            {
                "metric": m.name, "estimate": m.interval.estimate, "low": m.interval.low, "high": m.interval.high,
                "n": m.interval.n, "interval by": m.interval.method, "better is": arrow[m.higher_is_better],
            }
            for m in self.metrics
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, rows included; `Scorecard.from_dict` reads them back."""
        metrics = [
            {"name": m.name, "interval": m.interval.as_dict(), "higher_is_better": m.higher_is_better,
             "positive_means": m.positive_means}
            for m in self.metrics
        ]  # fmt: skip
        return {
            "evaluation": self.evaluation, "subject": self.subject, "metrics": metrics, "rows": self.rows,
            "settings": self.settings,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Scorecard:
        """Read what `as_dict` gave; InputError for anything else."""
        from ..stats import Interval

        try:
            metrics = tuple(Metric(**{**m, "interval": Interval(**m["interval"])}) for m in value["metrics"])
            return cls(**{**value, "metrics": metrics})
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no scorecard: {error}") from None

    def add_to(self, run: Run) -> None:
        """Log the metrics of this card in a run, show its table, and keep its rows as samples."""
        for metric in self.metrics:
            run.metric(f"{self.evaluation}: {metric.name}", metric.interval.estimate, **metric.interval.as_dict())
        run.table(f"{self.evaluation}: {self.subject}", self.table())
        if self.rows:
            run.samples(self.rows, show=0)


class Evaluation(Configurable):
    """subject -> Scorecard.

    Contract
    --------
    - `subject` is a (model, tokenizer) pair, or a callable (prompts) -> responses for evaluations that need no more.
    - `needs` says what of the subject is used: "generate", "logprobs", "hidden" or "gradients"; a subject that lacks
      one is refused with an InputError before anything is computed.
    - Every metric has an interval that says how it was made; samples that could not be judged are counted in a metric
      of their own, never given a default.
    - Deterministic in (subject, seed).
    """

    needs: ClassVar[tuple[str, ...]] = ("generate",)

    @abstractmethod
    def __call__(self, subject: Any, *, seed: int = 0) -> Scorecard:
        """Measure the subject."""
