"""The recipes that the benchmarks compare. Nothing here inherits a default that a recipe depends on."""

from __future__ import annotations

from configs.schema import Optimizer, Schedule
from tests.benchmarks.toy_training import Recipe
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.twinflow import TwinFlow

PUBLISHED_ROLES = {"e2e": 1, "mul": 1, "any": 1, "adv": 1}

CONSTANT = Optimizer("adam", learning_rate=5e-4, betas=(0.9, 0.999), max_grad_norm=0.0)
DECAYED = Optimizer("adam", learning_rate=1e-3, betas=(0.9, 0.999), max_grad_norm=1.0)
COSINE = Schedule("cosine", warmup_steps=100)
EMA_DECAY = 0.99

DEFAULT = Recipe(TwinFlow(), DECAYED, COSINE, EMA_DECAY)
PUBLISHED = Recipe(
    TwinFlow(
        order=2,
        roles=PUBLISHED_ROLES,
        published_partition=True,
        rectification_weight=0.5,
        rectification_clamp=1.0,
        residual_clamp=1.0,
        time_step=0.01,
        distance="barron",
        barron_alpha=1.0,
        barron_scale=1e-3,
        interval_weight="tan",
        time_distribution="beta",
        time_alpha=1.0,
        time_beta=1.0,
    ),
    CONSTANT,
    Schedule("constant"),
    EMA_DECAY,
)
FLOW_CONSTANT = Recipe(
    FlowMatching(distance="l2", time_distribution="uniform"), CONSTANT, Schedule("constant"), EMA_DECAY
)
FLOW = Recipe(FlowMatching(distance="l2", time_distribution="uniform"), DECAYED, COSINE, EMA_DECAY)
