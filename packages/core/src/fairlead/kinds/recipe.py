"""Kind Recipe: reproduces a paper's effect at small scale and writes a report with thresholds."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ..config import Configurable

if TYPE_CHECKING:
    from ..runs import Run


class Recipe(Configurable):
    """`fairlead run NAME` builds it from --set values and calls it with an open run.

    The work is cut into stages, `run.stage(name, function)`, whose JSON results are kept, so a killed run resumes
    where it stopped. Each threshold of the paper is a `run.check(...)`; a failed check makes the exit code 1.
    """

    @abstractmethod
    def __call__(self, run: Run) -> None:
        """Do the work; all randomness comes from `run.seed`."""
