"""InfAlign-CTRL: train for the way a model is served by calibrating its reward and transforming it.

Balashankar et al., "InfAlign: Inference-aware language model alignment" (arXiv 2412.19792): K answers of the reference
per prompt turn the reward r into its quantile C, and any KL-regularised RL trainer maximises E Phi(C) - beta KL. The
quantiles and the transforms are the core's `calibrated` reward; here are the reference answers, kept on disk, the beta to
start from, and a controller of beta. Roll-outs and the policy step are left to the RL trainer.

Shape suffixes: Q quadrature nodes.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from transformers import TrainerCallback

from fairlead.config import Configurable, MethodConfig
from fairlead.errors import InputError, UnknownNameError
from fairlead.files import atomic_write, cache_dir
from fairlead.generation import encode, end_tokens, generate
from fairlead.kinds.reward import as_reward, question
from fairlead.logprobs import unwrapped
from fairlead.rewards.calibrated import CalibratedReward
from fairlead.rewards.calibration import CalibrationTable, as_transform, key

from .references import Reference, model_fingerprint

log = logging.getLogger("fairlead")
NODES = 5000


class CTRLConfig(MethodConfig):
    """What is calibrated, how it is transformed, and how the reference answers are drawn."""

    reward: Any = Field("length", description="Reward, callable, registered name or {name, settings}")
    transform: Any = Field(
        "exp:10", description="exp:T, T > 0 for best-of-n and T < 0 for worst-of-n; identity, log, power:N, or a function of C"
    )
    samples: int = Field(100, ge=2, description="reference answers per prompt, K; at least 10 |T| under exp:T")
    max_new_tokens: int = Field(64, ge=1, description="longest reference answer, as in training")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the reference, as in training")
    top_k: int | None = Field(None, ge=1, description="sample among this many tokens only")
    top_p: float | None = Field(None, gt=0, le=1, description="sample within this probability mass only")
    seed: int = Field(0, ge=0, description="seed of the reference answers")
    folder: Path | None = Field(None, description="where reference answers are kept; default: the user's cache directory")

    @field_validator("reward", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_reward(value)

    @field_validator("transform")
    @classmethod
    def _is_transform(cls, value: Any) -> Any:
        try:
            as_transform(value)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
        return value


class CTRL(Configurable):
    """`CTRL(reward=r, transform="exp:10").calibrate(model, tokenizer, prompts)` gives the reward to train on.

    That reward is called as r is, and its `as_trl()` fits TRL's `reward_funcs`. The answers are kept under a hash of the model's
    weights, the prompts' ids and the sampling settings, so another reward or transform pays for its own scores alone.
    """

    Config = CTRLConfig
    config: CTRLConfig

    def setup(self) -> None:
        name, _, t = str(getattr(as_transform(self.config.transform), "name", "")).partition(":")
        if name == "exp" and self.config.samples < 10 * abs(float(t.partition(",")[0])):
            log.warning("%d reference answers are coarse for exp:%s; take 10 |T| or more", self.config.samples, t)

    def calibrate(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> CalibratedReward:
        """The transformed, calibrated reward; its `table` holds the reference rewards, and can be saved.

        model: the reference, any causal LM; of a PEFT model the one without its adapters. tokenizer: None for prompts that are
        id tensors. prompts: texts, chats or id tensors, repeats allowed. InputError for no prompts, for two chats that end
        with the same message (rewards see no more of a chat), and for a reward of texts without a tokenizer.
        """
        asked = _distinct(prompts)
        if tokenizer is None and not self.config.reward.accepts_ids:
            raise InputError(f"tokenizer: {type(self.config.reward).__name__} reads text; give the tokenizer of the model")
        count = self.config.samples
        answers = self.reference_answers(model, tokenizer, list(asked.values()))
        responses = [ids if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        scores = self.config.reward([question(prompt) for prompt in asked.values() for _ in range(count)], responses)
        info = {name: str(getattr(self.config, name)) for name in ("samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed")}
        table = CalibrationTable.fit(list(asked), torch.as_tensor(scores).reshape(-1, count), info=info)
        return CalibratedReward(reward=self.config.reward, table=table, transform=self.config.transform)

    def reference_answers(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[torch.Tensor]:
        """`samples` answers to each prompt in order, int64 ids each, from the folder or sampled and written there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save

        c = self.config
        with Reference(model).active() as active:
            reference = unwrapped(active)
            ids = [encode(tokenizer, prompt, i).tolist() for i, prompt in enumerate(prompts)]
            sampling = (c.samples, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.seed, sorted(end_tokens(reference, tokenizer)))
            digest = hashlib.sha256(repr((model_fingerprint(reference, adapters=False), ids, sampling)).encode()).hexdigest()[:24]
            path = (c.folder or cache_dir("ctrl")) / f"answers-{digest}.safetensors"
            try:
                kept = load_file(path)
                if len(kept["lengths"]) == len(prompts) * c.samples and int(kept["lengths"].sum()) == len(kept["ids"]):
                    return list(kept["ids"].split(kept["lengths"].tolist()))
            except (OSError, KeyError, SafetensorError):  # absent, torn or foreign
                pass
            found = generate(
                reference, tokenizer, list(prompts), n=c.samples, max_new_tokens=c.max_new_tokens, temperature=c.temperature,
                top_k=c.top_k, top_p=c.top_p, seed=c.seed, batch_size=max(64, c.samples),
            )  # fmt: skip
        answers = [answer.ids.cpu() for row in found for answer in row]
        lengths = torch.tensor([len(a) for a in answers])
        with atomic_write(path, "wb") as stream:
            stream.write(save({"ids": torch.cat(answers), "lengths": lengths}))
        return answers

    def starting_beta(self, kl: float) -> float:
        """`starting_beta` of the transform."""
        return starting_beta(self.config.transform, kl)


def _distinct(prompts: Sequence[Any]) -> dict[Any, Any]:
    """The prompts by what the reward's table knows them by, each once."""
    found: dict[Any, Any] = {}
    for prompt in prompts:
        name = key(question(prompt))
        first = found.setdefault(name, prompt)
        if isinstance(prompt, (str, list)) and first != prompt:
            raise InputError(f"prompts: two of them end with {str(name)[:60]!r}, which is all that a reward sees; calibrate one of them")
    if not found:
        raise InputError("prompts: none are given; calibrate on the training prompts")
    return found


def starting_beta(transform: Any, kl: float) -> float:
    """beta at which the optimum of E Phi(C) - beta KL lies `kl` nats from the reference, for rewards without ties.

    The optimum has the density exp(Phi(u) / beta) / Z over quantiles u whatever the model and the reward (the paper's closed
    form), so beta is the root of a one-dimensional integral: here of the midpoint rule, by bisection. InputError for
    kl <= 0, for a constant transform, and for more nats than the transform can spend.
    """
    phi_Q = np.asarray(as_transform(transform)((np.arange(NODES) + 0.5) / NODES), dtype=np.float64)
    span = float(np.ptp(phi_Q))
    if not 0 < kl < math.inf:
        raise InputError(f"kl: must be above 0 nats, got {kl}")
    if not 0 < span < math.inf:
        raise InputError("transform: must be finite within (0, 1) and not constant")

    def divergence(log_beta: float) -> float:
        score_Q = (phi_Q - phi_Q.max()) / (span * math.exp(log_beta))
        weight_Q = np.exp(score_Q)
        return float((weight_Q * score_Q).sum() / weight_Q.sum() - math.log(weight_Q.mean()))

    low, high = math.log(1e-9), math.log(1e9)
    if not divergence(low) > kl:
        raise InputError(f"kl: this transform cannot spend {kl} nats; take fewer")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) > kl else (low, middle)
    return span * math.exp((low + high) / 2)


class BetaController(TrainerCallback):
    """Moves beta until the policy's divergence is the target: log beta += rate clip((KL - target) / target, -1, 1).

    beta: where it starts. target: nats, in the unit of the KL it is told (TRL's GRPO and RLOO log a mean per token). rate:
    largest change of log beta. warmup: first updates that leave beta alone. By hand: `update(kl)` after each step. With a
    trainer: `attach(trainer)`, which reads the logged `metric` and sets the trainer's `attribute`.
    `state_dict` and `load_state_dict` carry it over an interruption.
    """

    def __init__(
        self, beta: float, target: float, rate: float = 0.03, warmup: int = 60, *, metric: str = "kl", attribute: str = "beta"
    ) -> None:
        for name, value in (("beta", beta), ("target", target)):
            if not 0 < value < math.inf:
                raise InputError(f"{name}: must be above 0, got {value}")
        if not 0 <= rate < math.inf or warmup < 0:
            raise InputError(f"rate and warmup: must be at least 0, got {rate} and {warmup}")
        self.beta, self.target, self.rate, self.warmup = float(beta), float(target), float(rate), int(warmup)
        self.metric, self.attribute = metric, attribute
        self.updates = 0
        self._trainer: Any = None

    def update(self, kl: float) -> float:
        """The beta of the next step, told the KL of this one; InputError for a KL that is not finite."""
        if not math.isfinite(kl):
            raise InputError(f"kl: must be a finite number of nats, got {kl}")
        self.updates += 1
        if self.updates > self.warmup:
            self.beta *= math.exp(self.rate * min(1.0, max(-1.0, (kl - self.target) / self.target)))
        return self.beta

    def attach(self, trainer: Any) -> BetaController:
        """Sets the trainer's beta now and after each log that has the metric; returns itself."""
        if not hasattr(trainer, self.attribute):
            raise InputError(f"trainer: {type(trainer).__name__} has no {self.attribute}; name the attribute that holds its beta")
        self._trainer = trainer
        setattr(trainer, self.attribute, self.beta)
        trainer.add_callback(self)
        return self

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """One update per log that has the metric."""
        if logs and self.metric in logs:
            beta = self.update(float(logs[self.metric]))
            if self._trainer is not None:
                setattr(self._trainer, self.attribute, beta)

    def state_dict(self) -> dict[str, float]:
        """beta and the number of updates."""
        return {"beta": self.beta, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from `state_dict`'s numbers."""
        self.beta, self.updates = float(state["beta"]), int(state["updates"])
        if self._trainer is not None:
            setattr(self._trainer, self.attribute, self.beta)
