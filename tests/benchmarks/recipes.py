"""The recipes that the benchmarks compare. Nothing here inherits a default that a recipe depends on."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from configs.load import read_yaml
from configs.schema import Ema, Optimizer, Schedule
from tests.benchmarks.toy_training import Recipe
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.twinflow import TwinFlow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED_ROLES = {"e2e": 1, "mul": 1, "any": 1, "adv": 1}

CONSTANT = Optimizer("adam", learning_rate=5e-4, betas=(0.9, 0.999), max_grad_norm=0.0)
DECAYED = Optimizer("adam", learning_rate=1e-3, betas=(0.9, 0.999), max_grad_norm=1.0)
COSINE = Schedule("cosine", warmup_steps=100)
EMA_DECAY = 0.99


def _shipped(name: str) -> TwinFlow:
    """The objective of a file in configs/."""
    options = OmegaConf.to_container(read_yaml(CONFIGS / name).objective)
    assert isinstance(options, dict) and options.pop("name") == "twinflow"
    return TwinFlow(**{str(key): value for key, value in options.items()})


DEFAULT = Recipe(TwinFlow(), DECAYED, COSINE, Ema().decay)
WARM_START = Recipe(_shipped("objective/warm_start.yaml"), DECAYED, COSINE, EMA_DECAY)
# The teacher's decay is the paper's for the full Qwen-Image (method 2.7). With the online teacher of the published script
# the raw weights are far from the yardstick's figures, with this one they agree (DESIGN.md, log).
PUBLISHED = Recipe(
    TwinFlow(
        order=2,
        teacher="ema",
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
