"""Configuration -> objects: the only file that knows which class serves which section."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configs.load import digest, identity
from configs.rules import accumulation
from configs.schema import Config
from data.batch import Batch
from data.loader import Loader
from data.manifest import Manifest, read_manifest
from data.order import Order
from models.encoders import LatentEncoder, TextEncoder
from trainer.bad_samples import BadSamples
from trainer.checkpoint import Checkpoints
from trainer.encoding import Encoding
from trainer.engines.distributed import Agreement, World
from trainer.engines.engine import Engine
from trainer.generate.showcase import Showcase
from trainer.objectives.objective import Objective
from trainer.observe.counting import CountedNets
from trainer.observe.flops import PassFlops
from trainer.observe.tracking import NullTracker, Tracker
from trainer.plugins import plugin
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.signals import StopRequest

ENCODER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_objective(config: Config) -> Objective:
    return plugin("objective", config.objective)[1]


def build_order(config: Config, manifest: Manifest) -> Order:
    data = config.data
    return Order(manifest, seed=config.run.seed, global_batch_size=config.train.global_batch_size, lanes=data.lanes)


def build_run(
    config: Config,
    world: World,
    folder: RunFolder,
    manifest: Manifest,
    order: Order,
    objective: Objective,
    stop: StopRequest,
    tracker: Tracker | NullTracker,
) -> Run:
    """All objects of a run, resumed from the folder's latest checkpoint where there is one."""
    steps = accumulation(config, world.world_size, objective.rows_per_sample)
    backbone_class, model = plugin("model", config.model)
    backbone = backbone_class.from_folder(model.path, latents=model.latents, dtype=getattr(torch, model.dtype))
    engine_class, engine_options = plugin("engine", config.engine)
    engine: Engine = engine_class(
        engine_options,
        backbone,
        config.optimizer,
        config.ema,
        objective.teacher,
        load=lambda module: module.load(model.path),
    )
    checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint, certificate(config, world, order))
    done = checkpoints.resume(engine)
    dtype = ENCODER_DTYPES[model.encoder_dtype]
    text = TextEncoder.from_folder(
        model.path, world.device, dtype, config.encoder.max_text_tokens, config.encoder.null_prompt
    )
    latents = LatentEncoder.from_folder(model.path, model.latents, world.device, dtype)
    bucket = order.stream(0).bucket
    return Run(
        config=config,
        world=world,
        folder=folder,
        objective=objective,
        engine=engine,
        nets=CountedNets(engine.nets, PassFlops(backbone)),
        encoding=Encoding(text, latents, world.device, objective.needs_null),
        order=order,
        loader=build_loader(
            config, world, order, manifest, config.train.steps, done.step, config.data.workers, config.data.prefetch
        ),
        agreement=Agreement(config.runtime.collective_timeout_s),
        checkpoints=checkpoints,
        tracker=tracker,
        showcase=Showcase(backbone.latent_shape(bucket), held_out_batch(config, world)),
        stop=stop,
        accumulation=steps,
        bad_samples=BadSamples(order, config.data.max_bad_samples, done.step, done.bad_samples),
        step=done.step,
        seconds=done.seconds,
    )


def build_loader(
    config: Config,
    world: World,
    order: Order,
    manifest: Manifest,
    steps: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 1,
) -> Loader:
    """This rank's batches of steps start_step .. steps - 1, read as the data section says."""
    data = config.data
    return Loader(
        order,
        manifest,
        steps=steps,
        start_step=start_step,
        rank=world.rank,
        world_size=world.world_size,
        workers=workers,
        prefetch=prefetch,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        endpoint_url=data.endpoint_url,
        read_budget_s=data.read_budget_s,
    )


def held_out_batch(config: Config, world: World) -> Batch | None:
    """This rank's rows of the first global batch of the held-out data; the same at every call."""
    data = config.data
    if data.held_out is None:
        return None
    manifest = read_manifest(data.held_out, data.endpoint_url, data.read_budget_s)
    order = Order(manifest, seed=0, global_batch_size=config.train.global_batch_size)
    return next(iter(build_loader(config, world, order, manifest, steps=1)))


def certificate(config: Config, world: World, order: Order) -> dict[str, Any]:
    """What a checkpoint says about its origin, beside its tensors."""
    names = ("torch", "diffusers", "transformers", "safetensors")
    return {
        "identity_digest": digest({**identity(config), "data_order": order.identity()}),
        "data_order": order.identity(),
        "code_revision": code_revision(),
        "engine": config.engine["name"],
        "world_size": world.world_size,
        "chunk_rows": config.train.chunk_rows,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def code_revision() -> str | None:
    """Commit of this checkout, with + where files differ from it; None outside a git checkout."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
