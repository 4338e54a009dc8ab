"""Rules between keys name the remedy; guidance is expressed as the scale that a user means."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import load, rules
from configs.load import ConfigError
from configs.schema import Config

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def smoke(*overrides: str) -> Config:
    return load.load([SMOKE], overrides)


@pytest.mark.parametrize(
    "teacher, scale, ratio",
    [("online", 5, 0.8), ("ema", 2, 0.5), ("frozen", 5, 4.0), ("online", 1, 0.0), ("frozen", 1, 0.0)],
)
def test_the_effective_scale_becomes_the_ratio(teacher: str, scale: float, ratio: float) -> None:
    config = smoke(f"guidance.scale={scale}", f"objective.teacher={teacher}")
    assert config.objective["enhanced_ratio"] == pytest.approx(ratio)


def test_image_free_training_with_a_frozen_teacher_uses_the_scale_itself() -> None:
    config = smoke("guidance.scale=4", "objective.teacher=frozen", "objective.image_free=true")
    assert config.objective["enhanced_ratio"] == 4


def test_guidance_that_diverges_is_refused_until_allowed() -> None:
    with pytest.raises(ConfigError, match=r"diverges with teacher online.*guidance\.allow_divergent=true"):
        smoke("objective.enhanced_ratio=1.0")
    allowed = smoke("objective.enhanced_ratio=1.5", "guidance.allow_divergent=true")
    assert allowed.objective["enhanced_ratio"] == 1.5
    assert smoke("objective.enhanced_ratio=4", "objective.teacher=frozen").objective["enhanced_ratio"] == 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["guidance.scale=5", "objective.enhanced_ratio=0.3"], "set only one of the two"),
        (["guidance.scale=0.5"], "1 is no guidance"),
        (["run.name=a/b"], "names a folder"),
        (["train.micro_batch_size=0"], "must be positive"),
        (["train.chunk_rows=0"], "null for no limit"),
        (["optimizer.name=lion"], "choose adamw, adam or radam"),
        (["optimizer.betas=[0.9, 1.0]"], r"both lie in \[0, 1\)"),
        (["schedule.name=step"], "choose constant, linear or cosine"),
        (["schedule.warmup_steps=5000"], "does not lie within train.steps"),
        (["ema.decay=0"], "sample.weights=ema needs averaged weights"),
        (["ema.decay=0", "objective.teacher=ema"], "objective.teacher=ema needs averaged weights"),
        (["evaluate.images=15"], "multiple of 10"),
        (["runtime.matmul_precision=low"], "choose highest, high or medium"),
    ],
)
def test_a_broken_rule_names_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smoke(*overrides)


def test_guidance_needs_an_objective_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text("run: {name: flow}\nobjective: {name: flow_matching}\ndata: {manifest: x}\nguidance: {scale: 2}\n")
    with pytest.raises(ConfigError, match="flow_matching has no guidance"):
        load.load([path], ["train={steps: 2, global_batch_size: 2, micro_batch_size: 1}"])


def test_all_broken_rules_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        smoke("optimizer.name=lion", "schedule.name=step")
    assert "lion" in str(caught.value) and "step" in str(caught.value)


def test_accumulation_is_whole_or_refused_with_what_fits() -> None:
    config = smoke("train.global_batch_size=64", "train.micro_batch_size=8")
    assert rules.accumulation(config, 2, 1) == 4
    assert rules.accumulation(config, 2, 4) == 16
    config.train.micro_batch_size = 12
    with pytest.raises(ValueError, match=r"set train\.micro_batch_size=16|set train\.micro_batch_size=8"):
        rules.accumulation(config, 2, 1)
    with pytest.raises(ValueError, match=r"train\.global_batch_size=63"):
        rules.accumulation(config, 3, 1)
