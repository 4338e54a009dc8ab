"""Rules between keys; each message names the remedy. They also fill in what one key implies for another."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable

from configs.schema import Config

Error = type[ValueError]

LARGEST = sys.float_info.max
SMALLEST = sys.float_info.min
RANGES = {
    "run.seed": (0, 2**63 - 1),
    "data.cache_gb": (SMALLEST, LARGEST),
    "data.workers": (0, LARGEST),
    "data.prefetch": (1, LARGEST),
    "data.prefetch_gb": (SMALLEST, LARGEST),
    "data.fetch_threads": (1, 64),
    "data.lanes": (1, LARGEST),
    "data.read_budget_s": (SMALLEST, LARGEST),
    "data.max_bad_samples": (0, 1),
    "encoder.max_text_tokens": (1, LARGEST),
    "encoder.seen_edge": (32, LARGEST),
    "lora.rank": (1, LARGEST),
    "lora.alpha": (1, LARGEST),
    "train.steps": (1, LARGEST),
    "train.global_batch_size": (1, LARGEST),
    "train.micro_batch_size": (1, LARGEST),
    "train.chunk_rows": (1, LARGEST),
    "train.max_skips": (0, LARGEST),
    "optimizer.learning_rate": (SMALLEST, LARGEST),
    "optimizer.eps": (SMALLEST, LARGEST),
    "optimizer.weight_decay": (0, LARGEST),
    "optimizer.max_grad_norm": (0, LARGEST),
    "schedule.final_ratio": (0, 1),
    "checkpoint.every": (0, LARGEST),
    "checkpoint.keep_last": (1, LARGEST),
    "checkpoint.keep_every": (0, LARGEST),
    "sample.every": (0, LARGEST),
    "sample.columns": (1, LARGEST),
    "sample.chunk_rows": (1, LARGEST),
    "tracking.every": (1, LARGEST),
    "tracking.held_out_every": (0, LARGEST),
    "runtime.nproc": (1, LARGEST),
    "runtime.threads": (1, LARGEST),
    "runtime.port": (1, 65535),
    "runtime.stop_timeout_s": (1, LARGEST),
    "runtime.collective_timeout_s": (1, LARGEST),
    "runtime.hang_timeout_s": (1, LARGEST),
    "runtime.hang_first_timeout_s": (1, LARGEST),
}
"""Lowest and highest legal value, both included; null is legal where the schema has it, nan nowhere."""
SAMPLERS = r"[124]nfe|(few|any|multi)0*[1-9]\d*"
"""Names that trainer/generate/sampler.py knows; a typing error must not come to light when the training is over."""


def apply(config: Config, error: Error) -> None:
    """Check everything, raising one error that lists all that is wrong."""
    problems = [str(problem) for rule in RULES if (problem := _problem(rule, config))]
    if problems:
        raise error("\n".join(problems))


def accumulation(config: Config, world_size: int, rows_per_sample: int) -> int:
    """Micro-batches of a step on one rank: global_batch_size x rows per sample / (ranks x micro_batch_size), whole.

    Raises:
        ValueError: it does not come out even; the message names settings near by that do.
    """
    train = config.train
    rows = train.global_batch_size * rows_per_sample
    if train.global_batch_size % world_size == 0 and rows % (world_size * train.micro_batch_size) == 0:
        return rows // (world_size * train.micro_batch_size)
    fits = [
        n for n in range(1, train.global_batch_size // world_size * rows_per_sample + 1) if rows % (world_size * n) == 0
    ]
    nearest = min(fits, key=lambda n: abs(n - train.micro_batch_size), default=None)
    batch = max(round(train.global_batch_size / world_size), 1) * world_size
    remedy = f"train.micro_batch_size={nearest}" if nearest and train.global_batch_size % world_size == 0 else ""
    raise ValueError(
        f"train.global_batch_size={train.global_batch_size} with {rows_per_sample} graded rows a sample is not a whole number "
        f"of micro-batches of {train.micro_batch_size} on {world_size} ranks; "
        f"set {remedy or f'train.global_batch_size={batch} (a multiple of the ranks)'}"
    )


def _problem(rule: Callable[[Config], None], config: Config) -> str | None:
    try:
        rule(config)
    except ValueError as error:
        return str(error)
    return None


def _run_name(config: Config) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        raise ValueError(
            f"run.name is {config.run.name!r}; it names a folder: letters, digits, '.', '_' and '-' (run.dir sets a path)"
        )


def _guidance(config: Config) -> None:
    """guidance.scale w -> objective.enhanced_ratio rho. A frozen teacher gives w = 1 + rho (w = rho where the objective is
    image-free); a trained one is guided by itself, with the fixed point w = 1 / (1 - rho) (method 2.2)."""
    objective, scale = config.objective, config.guidance.scale
    if "enhanced_ratio" not in objective:
        if scale is not None:
            raise ValueError(f"guidance.scale is set, but the objective {objective['name']} has no guidance; remove it")
        return
    frozen = objective["teacher"] == "frozen"
    if scale is not None:
        if not scale >= 1:
            raise ValueError(f"guidance.scale is {scale}; 1 is no guidance, useful values lie between 1 and 8")
        ratio = scale - 1 if frozen else 1 - 1 / scale
        if frozen and objective.get("image_free") and scale > 1:
            ratio = scale
        if objective["enhanced_ratio"] not in (0, ratio):
            raise ValueError(
                f"guidance.scale={scale} means objective.enhanced_ratio={ratio:g}, but it is set to "
                f"{objective['enhanced_ratio']}; set only one of the two"
            )
        objective["enhanced_ratio"] = ratio
    if not frozen and objective["enhanced_ratio"] >= 1 and not config.guidance.allow_divergent:
        raise ValueError(
            f"objective.enhanced_ratio={objective['enhanced_ratio']:g} diverges with teacher {objective['teacher']}: the "
            "teacher is guided by its own guided targets, and the effective scale 1 / (1 - ratio) has no limit from 1 on. "
            "Set guidance.scale to the scale you mean (5 is a ratio of 0.8), or objective.teacher=frozen, or "
            "guidance.allow_divergent=true"
        )


def _ranges(config: Config) -> None:
    wrong = []
    for key, (lowest, highest) in RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not lowest <= value <= highest:
            wrong.append(f"{key} is {value}; it must be {_bounds(lowest, highest)}")
    options = {"objective": config.objective, "model": config.model, "engine": config.engine}
    for kind, given in options.items():
        nans = [option for option, number in given.items() if isinstance(number, float) and math.isnan(number)]
        wrong += [f"{kind}.{option} is nan; write a number" for option in nans]
    if wrong:
        raise ValueError("\n".join(wrong))


def _bounds(lowest: float, highest: float) -> str:
    if highest != LARGEST:
        return f"from {lowest:g} to {highest:g}"
    return "positive" if lowest in (1, SMALLEST) else f"{lowest:g} or more"


def _samplers(config: Config) -> None:
    for key, names in (("sample.presets", config.sample.presets), ("evaluate.presets", config.evaluate.presets)):
        for name in names:
            if not re.fullmatch(SAMPLERS, name):
                raise ValueError(
                    f"{key}: unknown sampler {name!r}; write 1nfe, 2nfe, 4nfe, or fewN, anyN, multiN with N steps"
                )


def _checkpoint(config: Config) -> None:
    where = config.checkpoint.dir or ""
    scheme, _, rest = where.partition("://")
    if "://" in where and (scheme != "s3" or not rest.strip("/")):
        raise ValueError(f"checkpoint.dir is {where}; write a folder, or s3://BUCKET/PREFIX")


def _data(config: Config) -> None:
    data = config.data
    if (data.manifest is None) == (not data.sources):
        raise ValueError(
            "not set: data.manifest; write the folder of the data, or data.sources for several"
            if data.manifest is None
            else "data.manifest and data.sources are both set; write all data sets into data.sources"
        )
    if wrong := [source.manifest for source in data.sources if not 0 < source.weight < math.inf]:
        raise ValueError(f"data.sources: the weight of {wrong[0]} must be positive")
    if data.small_buckets not in ("refuse", "repeat", "drop"):
        raise ValueError(f"data.small_buckets is {data.small_buckets!r}; choose refuse, repeat or drop")


def _encoder(config: Config) -> None:
    if config.encoder.latents not in ("mean", "sample"):
        raise ValueError(f"encoder.latents is {config.encoder.latents!r}; choose mean or sample")


def _init_from(config: Config) -> None:
    if config.init_from.weights not in ("ema", "online"):
        raise ValueError(f"init_from.weights is {config.init_from.weights!r}; choose ema or online")


def _optimizer(config: Config) -> None:
    if config.optimizer.name not in ("adamw", "adam", "radam", "adamw8bit"):
        raise ValueError(f"optimizer.name is {config.optimizer.name!r}; choose adamw, adam, radam or adamw8bit")
    offloaded = [f"engine.{key}" for key in ("cpu_offload", "offload_optimizer") if config.engine.get(key)]
    if config.optimizer.name == "adamw8bit" and offloaded:
        raise ValueError(
            f"optimizer.name=adamw8bit updates on GPUs, but {offloaded[0]} keeps the shards in host memory; set "
            f"{offloaded[0]}=false, or optimizer.name=adamw"
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ValueError(f"optimizer.betas is {tuple(config.optimizer.betas)}; both lie in [0, 1)")


def _lora(config: Config) -> None:
    lora = config.lora
    if lora.variant not in ("second_embedding", "single_time"):
        raise ValueError(f"lora.variant is {lora.variant!r}; choose second_embedding or single_time")
    if lora.rank is None and (lora.alpha is not None or lora.targets or lora.variant != "second_embedding"):
        raise ValueError(
            "lora.rank is null, which trains all parameters, but other lora options are set; set lora.rank"
        )
    if any(not target.strip(".") for target in lora.targets):
        raise ValueError(f"lora.targets is {lora.targets}; write ends of module names, for instance [attn.to_q]")
    if config.engine.get("base_dtype") == "bfloat16":
        if lora.rank is None:
            raise ValueError(
                "engine.base_dtype=bfloat16 is for the frozen weights under adapters, and lora.rank is null, which trains "
                "all; set engine.base_dtype=float32"
            )
        if config.engine["block_dtype"] != "bfloat16" or config.model.get("dtype") == "float64":
            raise ValueError(
                "engine.base_dtype=bfloat16 needs blocks that compute so: set engine.block_dtype=bfloat16 and "
                "model.dtype=float32, or engine.base_dtype=float32"
            )


def _schedule(config: Config) -> None:
    if config.schedule.name not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule.name is {config.schedule.name!r}; choose constant, linear or cosine")
    if not 0 <= config.schedule.warmup_steps <= config.train.steps:
        raise ValueError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} does not lie within train.steps={config.train.steps}"
        )


def _non_finite(config: Config) -> None:
    if config.train.non_finite not in ("stop", "skip"):
        raise ValueError(f"train.non_finite is {config.train.non_finite!r}; choose stop or skip")


def _profile(config: Config) -> None:
    steps = config.profile.steps
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
        raise ValueError(f"profile.steps is {steps}; write the first and the last step, for instance [20, 22]")


def _averages(config: Config) -> None:
    if not 0 <= config.ema.decay < 1:
        raise ValueError(f"ema.decay is {config.ema.decay}; it lies in [0, 1), 0 keeps no averaged weights")
    if config.ema.decay == 0 and config.objective.get("teacher") == "ema":
        raise ValueError("objective.teacher=ema needs averaged weights; set ema.decay, for instance 0.99")
    if config.sample.weights not in ("ema", "online"):
        raise ValueError(f"sample.weights is {config.sample.weights!r}; choose ema or online")
    if config.ema.decay == 0 and config.sample.weights == "ema":
        raise ValueError("sample.weights=ema needs averaged weights; set ema.decay, or sample.weights=online")


def _yardstick(config: Config) -> None:
    if config.evaluate.name not in (None, "digits"):
        raise ValueError(f"evaluate.name is {config.evaluate.name!r}; choose digits or null")
    if config.evaluate.name == "digits" and (config.evaluate.images <= 0 or config.evaluate.images % 10):
        raise ValueError(f"evaluate.images is {config.evaluate.images}; digits want a positive multiple of 10")


def _numerics(config: Config) -> None:
    if config.runtime.matmul_precision not in ("highest", "high", "medium"):
        raise ValueError(
            f"runtime.matmul_precision is {config.runtime.matmul_precision!r}; choose highest, high or medium"
        )


def _preflight(config: Config) -> None:
    if config.runtime.preflight == "False":  # YAML reads a plain off as a truth value
        config.runtime.preflight = "off"
    if config.runtime.preflight not in (None, "strict", "warn", "off"):
        raise ValueError(f"runtime.preflight is {config.runtime.preflight!r}; choose strict, warn or off")


RULES = (
    _run_name,
    _guidance,
    _ranges,
    _data,
    _checkpoint,
    _samplers,
    _encoder,
    _init_from,
    _optimizer,
    _lora,
    _schedule,
    _non_finite,
    _profile,
    _averages,
    _yardstick,
    _numerics,
    _preflight,
)
