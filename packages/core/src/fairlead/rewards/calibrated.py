"""A reward as its quantile among reference responses to the same prompt, under a transform.

R(x, y) = Phi(C(x, y)), C the mid-rank quantile of r(x, y) among K reference responses to x (Balashankar et al., "InfAlign",
arXiv 2412.19792): uniform on [0, 1] under the reference, so rewards of different prompts become comparable. Leaves the
quantiles and the transforms to `calibration`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from ..config import MethodConfig
from ..errors import InputError, UnknownNameError
from ..kinds.reward import Reward, as_reward, check_pairs, question
from .calibration import CalibrationTable, UnknownPromptError, as_transform, key


class CalibratedConfig(MethodConfig):
    """Settings of the calibrated reward."""

    reward: Any = Field("length", description="Reward, callable, registered name or {name, settings}")
    references: Mapping[str, list[str]] = Field(
        default_factory=dict, description="prompt -> reference responses; the empty prompt serves those without their own"
    )
    table: Any = Field(
        None, description="CalibrationTable of the reward's values on references, or its file; in place of references"
    )
    transform: Any = Field(
        "identity", description="identity, log, exp:T or power:N (exp:10 for best-of-n, exp:-10 for worst-of-n), or a function of C"
    )

    @field_validator("reward", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_reward(value)

    @field_validator("table")
    @classmethod
    def _is_table(cls, value: Any) -> Any:
        if value is None or isinstance(value, (CalibrationTable, os.PathLike)) or (isinstance(value, str) and value):
            return value
        raise ValueError("must be a CalibrationTable or the path of a saved one")

    @field_validator("transform")
    @classmethod
    def _is_transform(cls, value: Any) -> Any:
        try:
            as_transform(value)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> CalibratedConfig:
        if self.table is not None and self.references:
            raise ValueError("give either references or table, not both")
        return self


class CalibratedReward(Reward):
    """Phi of the mid-rank quantile. Reference responses of a prompt are scored once, when it is first asked for; they join
    `table`, which can be saved. Responses are judged whole: a prefix has no place among whole references."""

    Config = CalibratedConfig
    config: CalibratedConfig

    def setup(self) -> None:
        given = self.config.table
        if given is None:
            given = CalibrationTable.fit([], [])
        self.table: CalibrationTable = given if isinstance(given, CalibrationTable) else CalibrationTable.load(given)
        self.accepts_ids = self.config.table is not None and self.config.reward.accepts_ids
        self._transform = as_transform(self.config.transform)
        self._smoothed = bool(getattr(self._transform, "smoothed", False))
        self.bounds = (0.0, 1.0) if getattr(self._transform, "normalised", False) else None

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not len(responses):
            return torch.zeros(0)
        keys = [key(question(prompt)) for prompt in prompts]
        if self.config.table is None:
            self._add(dict.fromkeys(k for k in keys if k not in self.table))
        scores = torch.as_tensor(self.config.reward(prompts, responses, finished, **columns))
        c_B = self.table(keys, scores, smoothed=self._smoothed)
        values_B = torch.as_tensor(self._transform(c_B.numpy()), dtype=torch.float64)
        if values_B.shape != c_B.shape or not bool(values_B.isfinite().all()):
            name = getattr(self._transform, "name", getattr(self._transform, "__name__", "function"))
            raise InputError(f"transform {name}: must give one finite number per calibrated reward")
        return values_B.float()

    def _add(self, prompts: Mapping[Any, None]) -> None:
        """Score the references of prompts that are not in the table yet, all in one call of the reward."""
        if not prompts:
            return
        found = {p: self.config.references.get(p, self.config.references.get("", [])) for p in prompts}
        missing = next((p for p, references in found.items() if not references), None)
        if missing is not None:
            raise UnknownPromptError(f"calibrated reward: no reference responses for the prompt {str(missing)[:60]!r}")
        asked = [p for p, references in found.items() for _ in references]
        scores = self.config.reward(asked, [r for references in found.values() for r in references])
        rows = torch.as_tensor(scores).split([len(references) for references in found.values()])
        # A single reference is a table too, of the quantiles 0, 1/2 and 1.
        self.table = self.table.merged(CalibrationTable.fit(list(found), rows, least=1))
