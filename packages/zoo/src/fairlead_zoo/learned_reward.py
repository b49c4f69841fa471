"""The learned reward of the world: `zoo:reward` through the core's sequence-classifier reward.

A module of its own, because the core's classifier needs torch and the world's exact reward and guard do not.
"""

from __future__ import annotations

from pydantic import Field

from fairlead.rewards.sequence_classifier import SequenceClassifierConfig, SequenceClassifierReward


class WorldModelConfig(SequenceClassifierConfig):
    """The classifier's settings, with the zoo's reward model as the model."""

    model: str = Field("zoo:reward", description="reward model of the world; zoo:reward@SEED for another seed's")


class WorldModelReward(SequenceClassifierReward):
    """Score of the zoo's reward model: ranks well, can be hacked."""

    Config = WorldModelConfig
    config: WorldModelConfig
