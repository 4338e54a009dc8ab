"""Rules between keys name the remedy; guidance is expressed as the scale that a user means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs import load, rules
from configs.load import ConfigError
from configs.schema import Config
from trainer.generate import sampler

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
        (["train.chunk_rows=0"], "must be positive"),
        (["optimizer.learning_rate=nan"], "learning_rate is nan; it must be positive"),
        (["optimizer.weight_decay=-1"], "must be 0 or more"),
        (["schedule.final_ratio=2"], "must be from 0 to 1"),
        (["runtime.port=70000"], "must be from 1 to 65535"),
        (["objective.enhanced_ratio=nan"], r"objective\.enhanced_ratio is nan"),
        (["guidance.scale=nan"], "1 is no guidance"),
        (["sample.presets=[1nfe, 3nfe]"], r"sample\.presets: unknown sampler '3nfe'"),
        (["evaluate.presets=[multi0]"], r"evaluate\.presets: unknown sampler 'multi0'"),
        (["optimizer.name=lion"], "choose adamw, adam, radam or adamw8bit"),
        (["optimizer.name=adamw8bit", "engine.cpu_offload=true"], "engine.cpu_offload keeps the shards in host memory"),
        (["lora.rank=0"], "lora.rank is 0; it must be positive"),
        (["lora.rank=4", "lora.alpha=0"], "lora.alpha is 0; it must be positive"),
        (["lora.rank=4", "lora.variant=none"], "choose second_embedding or single_time"),
        (["lora.alpha=4"], "other lora options are set; set lora.rank"),
        (["lora.rank=4", "lora.targets=['.']"], "write ends of module names"),
        (["engine.base_dtype=bfloat16"], "lora.rank is null, which trains all; set engine.base_dtype=float32"),
        (["lora.rank=4", "engine.base_dtype=bfloat16"], "set engine.block_dtype=bfloat16"),
        (["optimizer.betas=[0.9, 1.0]"], r"both lie in \[0, 1\)"),
        (["schedule.name=step"], "choose constant, linear or cosine"),
        (["schedule.warmup_steps=5000"], "does not lie within train.steps"),
        (["train.non_finite=ignore"], "choose stop or skip"),
        (["train.max_skips=-1"], "must be 0 or more"),
        (["profile.steps=[5]"], "write the first and the last step"),
        (["profile.steps=[5, 4]"], "write the first and the last step"),
        (["runtime.hang_timeout_s=0"], "must be positive"),
        (["ema.decay=0"], "sample.weights=ema needs averaged weights"),
        (["ema.decay=0", "objective.teacher=ema"], "objective.teacher=ema needs averaged weights"),
        (["evaluate.images=15"], "multiple of 10"),
        (["data.manifest=null"], r"not set: data\.manifest.* or data\.sources"),
        (["data.sources=[{manifest: x}]"], r"data\.manifest and data\.sources are both set"),
        (["data.manifest=null", "data.sources=[{manifest: x, weight: 0}]"], "the weight of x must be positive"),
        (["data.manifest=null", "data.sources=[{manifest: x, weight: .nan}]"], "the weight of x must be positive"),
        (["data.small_buckets=merge"], "choose refuse, repeat or drop"),
        (["runtime.matmul_precision=low"], "choose highest, high or medium"),
        (["runtime.preflight=maybe"], "choose strict, warn or off"),
    ],
)
def test_a_broken_rule_names_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smoke(*overrides)


def test_the_checked_sampler_names_are_those_that_the_trainer_knows() -> None:
    known = [*sampler.PRESETS, *(f"{family}7" for family in sampler._FAMILIES)]
    assert [name for name in known if not re.fullmatch(rules.SAMPLERS, name)] == []
    for name in ("3nfe", "few", "few0", "multi-1", "any2x", ""):
        assert not re.fullmatch(rules.SAMPLERS, name)
        with pytest.raises(ValueError, match="unknown sampler"):
            sampler.preset(name)


def test_every_numeric_bound_is_of_a_knob_and_the_smallest_legal_value_passes() -> None:
    config = smoke()
    for key, (lowest, _) in rules.RANGES.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, lowest)
    config.schedule.warmup_steps = 0
    rules.apply(config, ConfigError)


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


@pytest.mark.parametrize("where", ["gs://bucket/run", "s3://", "file:///x"])
def test_checkpoints_lie_in_a_folder_or_below_s3(where: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.dir is .*; write a folder, or s3://BUCKET/PREFIX"):
        smoke(f"checkpoint.dir={where}")
    assert smoke("checkpoint.dir=s3://bucket/run", "checkpoint.keep_every=1000").checkpoint.keep_every == 1000
