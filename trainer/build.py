"""Configuration -> objects: the only file that knows which class serves which section."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from configs.load import digest, identity
from configs.rules import accumulation
from configs.schema import Config
from configs.schema import Encoder as EncoderKnobs
from data.batch import Batch
from data.demo import CAPTIONS
from data.loader import Loader
from data.manifest import Manifest, read_manifest
from data.order import Order
from models import lora
from models.backbone import Backbone
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from trainer import initial_weights
from trainer.bad_samples import BadSamples
from trainer.encoding import Encoding
from trainer.engines.distributed import Agreement, World
from trainer.engines.engine import Engine
from trainer.engines.frozen import shard_frozen
from trainer.engines.sharding import device_mesh
from trainer.generate.showcase import COLLAPSE_BEST, COLLAPSE_CHECKS, Showcase
from trainer.ledger import Ledger, SampleLog
from trainer.objectives.objective import Objective
from trainer.observe.counting import CountedNets
from trainer.observe.flops import PassFlops
from trainer.observe.profiler import Profiler
from trainer.observe.profiler import refuse as refuse_profile
from trainer.observe.sentinel import CollapseAlarm
from trainer.observe.tracking import NullTracker, Tracker
from trainer.plugins import plugin
from trainer.run import Run
from trainer.run_folder import RunFolder, open_checkpoints
from trainer.saving import unsaved_weights
from trainer.saving.certificate import CONFIG
from trainer.saving.checkpoint import Checkpoints
from trainer.signals import StopRequest
from trainer.training_data import check_contents, check_latents, refuse_other_kind, stored_null
from trainer.updates import Updates

log = logging.getLogger(__name__)
Kind = TypeVar("Kind", TextEncoder, LatentEncoder)
ENCODER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_objective(config: Config) -> Objective:
    return plugin("objective", config.objective)[1]


def build_order(config: Config, manifest: Manifest) -> Order:
    data = config.data
    return Order(
        manifest,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        lanes=data.lanes,
        small_buckets=data.small_buckets,
    )


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
    refuse_profile(config.profile, world.device)
    backbone_class, model = plugin("model", config.model)
    backbone = backbone_class.from_folder(model.path, latents=model.latents, dtype=getattr(torch, model.dtype))
    if config.lora.rank is not None:
        lora.add(backbone, config.lora, objective.teacher)
        log.info("adapters: %s", lora.summary(backbone))
    engine_class, engine_options = plugin("engine", config.engine)
    kernel = use_attention(backbone, model, engine_options.block_dtype, world.device)
    metadata = {**certificate(config, world, order, steps), "attention": kernel, CONFIG: folder.config}
    checkpoints = Checkpoints(open_checkpoints(config, folder.path), config.checkpoint, metadata)
    resumes = checkpoints.newest() is not None
    load = initial_weights.loader(config, resumes, objective.teacher)
    engine: Engine = engine_class(
        engine_options,
        backbone,
        config.optimizer,
        config.ema,
        objective.teacher,
        load=load,
    )
    left_out = unsaved_weights.fingerprints(engine, objective.teacher)
    load.refuse_other_base(left_out, model.path)
    metadata |= left_out
    done = checkpoints.resume(engine)
    unsaved_weights.check(left_out, done.metadata, model.path)
    bucket, held_out = order.stream(0).bucket, held_out_batch(config, world)
    check_latents(manifest.encoded, bucket, backbone.latent_shape(bucket))
    return Run(
        config=config,
        world=world,
        folder=folder,
        objective=objective,
        engine=engine,
        nets=CountedNets(engine.nets, PassFlops(backbone)),
        encoding=build_encoding(config, world, manifest, held_out, objective, backbone, engine),
        order=order,
        loader=build_loader(
            config,
            world,
            order,
            manifest,
            config.train.steps,
            done.step,
            config.data.workers,
            config.data.prefetch,
            config.data.flip,
        ),
        agreement=Agreement(config.runtime.collective_timeout_s),
        checkpoints=checkpoints,
        tracker=tracker,
        showcase=Showcase(
            backbone.latent_shape(bucket),
            held_out,
            alarm=CollapseAlarm(
                best=done.counters.get(COLLAPSE_BEST, 0.0), checks=int(done.counters.get(COLLAPSE_CHECKS, 0))
            ),
        ),
        stop=stop,
        accumulation=steps,
        bad_samples=BadSamples(
            order, config.data.max_bad_samples, done.step, done.bad_samples, Ledger(folder.path, done.step)
        ),
        sample_log=SampleLog(folder.path, world.rank, done.step) if config.tracking.samples else None,
        profiler=Profiler(config.profile, folder.path, world.device, tracker) if world.rank == 0 else None,
        # A step whose update was left out counts as a step of the run, not of the optimizer.
        updates=Updates(skipped=done.step - int(engine.counters()["optimizer_step"])),
        step=done.step,
        seconds=done.seconds,
    )


def use_attention(backbone: Any, model: Any, block_dtype: str, device: torch.device) -> str:
    """The kernel of model.attention, put in use; the log says which and why."""
    if not hasattr(backbone, "use_attention"):
        return "native"
    dtype = getattr(torch, block_dtype if model.dtype == "float32" else model.dtype)
    choice = backbone.use_attention(model.attention, device, dtype)
    log.info("attention: %s (%s)", choice.name, choice.why)
    return str(choice.name)


def build_encoding(
    config: Config,
    world: World,
    manifest: Manifest,
    held_out: Batch | None,
    objective: Objective,
    backbone: Backbone,
    engine: Engine,
) -> Encoding:
    """The encoders; those that precomputed data makes superfluous are loaded for the showcase's prompts alone."""
    check_contents(config, manifest)
    if manifest.kind == "edits" and not backbone.takes_references:
        raise ValueError(
            f"model.name={config.model['name']} takes no source images; set model.name=qwen_image, or pack images"
        )
    raw = manifest.encoded is None or (held_out is not None and held_out.precomputed is None)
    images = (manifest.encoded is None and manifest.contents.has_targets) or (
        held_out is not None and held_out.pixels is not None
    )
    encoding = Encoding(
        load_text=lambda: placed(config, engine, text_encoder, world.device),
        load_latents=lambda: placed(config, engine, latent_encoder, world.device),
        device=world.device,
        needs_null=objective.needs_null,
        latent_shape=backbone.latent_shape,
        seed=config.run.seed,
        stored_null=stored_null(config, manifest) if objective.needs_null else None,
        keeps_text=raw,
    )
    if manifest.kind == "edits" and config.sample.prompts:
        raise ValueError(
            "sample.prompts have no source images; leave it empty: grids show held-out edits (data.held_out)"
        )
    if manifest.kind == "edits" and objective.needs_null and config.encoder.null_prompt == EncoderKnobs().null_prompt:
        log.warning(
            "encoder.null_prompt is %r; the published one of editing is 'Edit this image.'", config.encoder.null_prompt
        )
    prompts = [*config.sample.prompts, *(CAPTIONS if config.evaluate.name == "digits" else ())]
    encoding.keep_prompts(prompts)
    # Here, not in the first step or at the first grid: what cannot be loaded must not come to light hours later.
    shown = bool(prompts) or (held_out is not None and held_out.has_sources)
    encoding.load(text=raw, latents=images or shown)
    if raw:
        refuse_other_kind(manifest.kind, encoding.text.sees_images)
    return encoding


def placed(config: Config, engine: Engine, build: Callable[[Config, torch.device], Kind], device: torch.device) -> Kind:
    """An encoder on the device; with encoder.shard over all ranks, on the mesh of the engine where it has one."""
    if not config.encoder.shard:
        return build(config, device)
    encoder = build(config, torch.device("cpu"))
    mesh = getattr(engine, "mesh", None) or device_mesh(device)
    for parts in encoder.shards():
        shard_frozen(*parts, mesh=mesh)
    return encoder


def text_encoder(config: Config, device: torch.device) -> TextEncoder:
    backbone, model = plugin("model", config.model)
    encoder, dtype = config.encoder, ENCODER_DTYPES[model.encoder_dtype]
    made: TextEncoder = backbone.text_encoder(model.path, device, dtype, encoder.max_text_tokens, encoder.null_prompt)
    if encoder.seen_edge is not None and made.sees_images:
        made.seen_edge = encoder.seen_edge  # type: ignore[attr-defined]
    return made


def latent_encoder(config: Config, device: torch.device) -> LatentEncoder:
    backbone, model = plugin("model", config.model)
    encoder, dtype = config.encoder, ENCODER_DTYPES[model.encoder_dtype]
    made: LatentEncoder = backbone.latent_encoder(
        model.path, model.latents, device, dtype, encoder.latents, encoder.tiling
    )
    return made


def build_loader(
    config: Config,
    world: World,
    order: Order,
    manifest: Manifest,
    steps: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 1,
    flip: bool = False,
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
        local_world_size=world.local_world_size,
        workers=workers,
        prefetch=prefetch,
        prefetch_gb=data.prefetch_gb,
        fetch_threads=data.fetch_threads,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        endpoint_url=data.endpoint_url,
        read_budget_s=data.read_budget_s,
        flip=flip,
    )


def held_out_batch(config: Config, world: World) -> Batch | None:
    """This rank's rows of the first global batch of the held-out data; the same at every call. A set, or a bucket of it,
    that is smaller than the global batch is repeated in it."""
    data = config.data
    if data.held_out is None:
        return None
    manifest = read_manifest(data.held_out, data.endpoint_url, data.read_budget_s)
    order = Order(manifest, seed=0, global_batch_size=config.train.global_batch_size, small_buckets="repeat")
    return next(iter(build_loader(config, world, order, manifest, steps=1)))


def certificate(config: Config, world: World, order: Order, accumulation: int) -> dict[str, Any]:
    """What a checkpoint says about its origin, beside its tensors."""
    names = ("torch", "diffusers", "transformers", "safetensors", "deepspeed", "peft", "numpy")
    return {
        "identity_digest": digest({**identity(config), "data_order": order.identity()}),
        "data_order": order.identity(),
        "code_revision": code_revision(),
        "engine": config.engine["name"],
        "run": config.run.name,
        "world_size": world.world_size,
        "accumulation": accumulation,
        "micro_batch_size": config.train.micro_batch_size,
        "chunk_rows": config.train.chunk_rows,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def code_revision() -> str | None:
    """Commit of this checkout, with + where files differ from it. A copy without git (an image, a job's snapshot of the
    code) says it in TWINFLOW_REVISION; None where nothing does."""
    if said := os.environ.get("TWINFLOW_REVISION"):
        return said
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
