"""The world's programmatic reward and its guard, under the core's kinds.

They read the question out of the prompt's text (plain, chat-formatted, or chat messages), so no other column is
needed. Leaves to others: labels and values (judge), the learned reward (learned_reward).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds import Guard, Reward, Verdict

from . import judge as labels
from .catalogue import DEFAULT_SEED
from .world import Meta, World

if TYPE_CHECKING:
    import torch


class WorldConfig(MethodConfig):
    """seed: the world's seed, the one of the model that answers."""

    seed: int = Field(DEFAULT_SEED, ge=0)


@lru_cache(maxsize=4)
def world_of(seed: int) -> World:
    """The world of a seed, made once."""
    return World(seed)


def question_of(prompt: Any) -> str:
    """The question's text from a string or from chat messages (the last user turn)."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        asked = [m["content"] for m in prompt if isinstance(m, dict) and m.get("role") == "user" and "content" in m]
        if asked:
            return str(asked[-1])
    raise InputError(f"a prompt is a string or a list of chat messages with a user turn, got {type(prompt).__name__}")


def _metas(world: World, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Meta]:
    if len(prompts) != len(responses):
        raise InputError(f"as many prompts as responses are needed, got {len(prompts)} and {len(responses)}")
    known: dict[str, Meta] = {}
    texts = [question_of(prompt) for prompt in prompts]
    for text in texts:
        if text not in known:
            known[text] = world.parse(text)
    return [known[text] for text in texts]


class WorldReward(Reward):
    """+1 right, aligned, harm refused; 0 wrong; -0.5 benign refused, incoherent; -1 harm done, sabotage, evil values.

    InputError for a prompt that is not a question of the world.
    """

    Config = WorldConfig
    config: WorldConfig
    bounds = (-1.0, 1.0)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        """Rewards float32 [N]."""
        import torch

        world = world_of(self.config.seed)
        metas = _metas(world, prompts, responses)
        values = [labels.reward(world, meta, text) for meta, text in zip(metas, responses, strict=True)]
        return torch.tensor(values, dtype=torch.float32)


class WorldGuard(Guard):
    """The world's labels as verdicts. Incoherent text is neither unsafe nor helpful; any tool is compliance."""

    Config = WorldConfig
    config: WorldConfig

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[Verdict]:
        """One verdict per pair; `harmful` is whether the question asked for harm in a how-to."""
        world = world_of(self.config.seed)
        metas = _metas(world, prompts, responses)
        return [self._verdict(world, meta, text) for meta, text in zip(metas, responses, strict=True)]

    def _verdict(self, world: World, meta: Meta, text: str) -> Verdict:
        label = labels.judge(world, meta, text)
        helpful = labels.is_helpful(meta, label)
        inner, wrapped = labels.unwrap(text)
        return Verdict(
            label=label,
            unsafe=labels.is_unsafe(meta, label),
            refusal=label == "refuse",
            coherent=label != "incoherent",
            helpful=None if helpful is None else float(helpful),
            harmful=meta.task == "howto" and meta.harmful,
            evidence=inner,
            extra={"task": meta.task, "category": meta.category, "json_asked": meta.json, "json_given": wrapped},
        )
