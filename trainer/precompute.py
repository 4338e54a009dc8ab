"""python -m trainer.precompute SOURCE DEST --precompute CONFIG: packs as `data pack` does, but stores what the frozen
encoders of CONFIG make of images and captions, so that training on it loads none of them.

torchrun starts it on any number of ranks, which share the shards among them. The same command goes on with a packing
that was killed; a shard is there whole or not at all, and its bytes do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import load as configuration
from configs.schema import Config
from data.arrays import npy_bytes
from data.buckets import bucket_table
from data.contents import DTYPES, Encoded
from data.manifest import MANIFEST
from data.members import Members, Raw
from data.pack import LEFT_OUT, Packing, make_all, prepare
from data.pack_cli import command_line, options_of, report
from data.pool import Pool
from data.s3 import DataError, LocalFolder
from data.shards import Options
from data.store import Store, open_store, sole_writer
from models.backbone import Conditioning
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from trainer.build import latent_encoder, text_encoder
from trainer.engines.distributed import World, process_group
from trainer.model_folder import with_local_model
from trainer.plugins import plugin
from trainer.training_data import NULL, latent_digest, refuse_other_kind, refuse_samples, text_digest

_TIMEOUT_S = 7 * 86400.0
"""Ranks wait for the plan, and at the end for the slowest; torchrun ends them all when one dies."""
_T = TypeVar("_T")


@dataclass
class Encoders:
    """Samples -> arrays in `dtype`. Captions and images are encoded one by one, so that what is stored is a function of
    the sample alone. edits: captions are encoded with their source image, and the null condition of each sample is stored
    with it."""

    text: TextEncoder
    latents: LatentEncoder
    device: torch.device
    dtype: str
    edits: bool

    def __call__(self, raw: Raw) -> Members:
        found: Members = {}
        sources = () if raw.source_pixels is None else (torch.from_numpy(raw.source_pixels)[None],)
        for number, caption in enumerate(raw.captions):
            encoded = self.text.encode([caption], sources)
            found |= self._text(encoded, ("text", "mask", "pooled"), f".{number}" if number else "")
        for name, pixels in (("latent", raw.pixels), ("reference", raw.source_pixels)):
            if pixels is not None:
                image = torch.from_numpy(pixels)[None].to(self.device)
                found[f"{name}.npy"] = self._array(self.latents.encode(image)[0], name)
        if self.edits:
            null = self.text.encode([self.text.null_prompt], sources)
            found |= self._text(null, ("null", "null_mask", "null_pooled"), "")
        return found

    def null(self) -> Members:
        """The constant null condition, one row, by file name."""
        null = self.text.null()
        found = {NULL[0]: self._array(null.embeds, NULL[0]), NULL[1]: npy_bytes(null.mask.cpu().numpy())}
        return found if null.pooled is None else {**found, NULL[2]: self._array(null.pooled, NULL[2])}

    def _text(self, condition: Conditioning, names: tuple[str, str, str], suffix: str) -> Members:
        text, mask, pooled = (f"{name}{suffix}.npy" for name in names)
        found = {text: self._array(condition.embeds[0], text), mask: npy_bytes(condition.mask[0].cpu().numpy())}
        return found if condition.pooled is None else {**found, pooled: self._array(condition.pooled[0], pooled)}

    def _array(self, tensor: Tensor, name: str) -> bytes:
        stored = tensor.detach().cpu().to(getattr(torch, self.dtype)).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"{name}: numbers that {self.dtype} cannot hold; take --dtype bfloat16 or float32")
        return npy_bytes((stored.view(torch.uint16) if self.dtype == "bfloat16" else stored).numpy())


def precompute(config: Config, given: argparse.Namespace, world: World) -> int:
    """This rank's part of a packing; rank 0 plans it and writes the manifest.

    Raises DataError as data.pack does; ValueError or OSError where the model folder has no encoders or they do not fit
    the buckets.
    """
    store = open_store(given.dest, given.endpoint_url)
    if isinstance(store, LocalFolder) and store.path.is_relative_to(given.source.absolute()):
        raise DataError(f"{store.url}: lies in SOURCE; choose a DEST outside of it")
    text, latents = text_encoder(config, world.device), latent_encoder(config, world.device)
    dtype = given.dtype or plugin("model", config.model)[1].encoder_dtype
    refuse_other_kind(options_of(given).kind, text.sees_images)
    options = replace(options_of(given), encoded=described(config, options_of(given), dtype))
    encoders = Encoders(text, latents, world.device, dtype, options.kind == "edits")
    packing: Packing | None = None
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(sole_writer(store))
            with Pool(given.workers) as pool:
                packing = prepare(given.source, store, options, pool, encoders)
        plans = _from_rank_0(packing.todo if packing is not None else None)
        own = plans[world.rank :: world.world_size]
        store.scratch().mkdir(parents=True, exist_ok=True)
        with Pool(0, bar=world.rank == 0) as here:
            made = [(own[number], *result) for number, result in make_all(own, options, store, here, encoders)]
        everything = _gathered(made)
        if packing is not None:
            for result in everything:
                packing.add(*result)
            _conclude(packing, store, options, encoders)
        with contextlib.suppress(OSError):  # another machine's own; rank 0's holds its lock and goes with it
            store.scratch().rmdir()
    if text.truncated:
        print(f"rank {world.rank}: {text.truncated} captions were cut to {config.encoder.max_text_tokens} tokens")
    return 0


def described(config: Config, options: Options, dtype: str) -> Encoded:
    """What the manifest says about the encoders. Raises ValueError where a bucket does not fit the model."""
    backbone_class, model = plugin("model", config.model)
    backbone = backbone_class.from_folder(model.path, latents=model.latents)
    shapes = [
        backbone.latent_shape(b) for b in bucket_table(options.resolution, options.bucket_step, options.max_aspect)
    ]
    channels, height, _ = backbone.latent_shape((options.resolution, options.resolution))
    assert {shape[0] for shape in shapes} == {channels}
    images = options.kind != "captions"
    if images:
        refuse_samples(config)
    return Encoded(
        dtype=dtype,
        latent_kind=model.latents,
        latents=(latent_digest(model.path, model.latents) or "") if images else "",
        text=text_digest(config) or "",
        latent_channels=channels,
        pixels_per_latent=options.resolution // height,
        text_width=backbone.text_width,
        max_text_tokens=config.encoder.max_text_tokens,
        null_prompt=config.encoder.null_prompt,
    )


def _conclude(packing: Packing, store: Store, options: Options, encoders: Encoders) -> None:
    """Rank 0: null condition (edits hold one each), list of what was left out, manifest."""
    for name, body in ({} if encoders.edits else encoders.null()).items():
        path = store.scratch() / name
        path.write_bytes(body)
        store.publish(path, name)
    report(*packing.publish(), options.kind, store.url_of(LEFT_OUT), store.url_of(MANIFEST))


def _from_rank_0(value: _T | None) -> _T:
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    result: _T = box[0]
    return result


def _gathered(own: list[_T]) -> list[_T]:
    """The lists of all ranks one after the other, on rank 0; empty elsewhere."""
    size = dist.get_world_size()
    everything: list[Any] | None = [None] * size if dist.get_rank() == 0 else None
    dist.gather_object(own, everything, dst=0)
    return [result for part in everything or () for result in part]


def parser() -> argparse.ArgumentParser:
    options = command_line("python -m trainer.precompute", __doc__)
    options.add_argument("--precompute", required=True, action="append", metavar="CONFIG", help="YAML of the run")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in CONFIG")
    options.add_argument("--dtype", choices=DTYPES, help="of what is stored, default model.encoder_dtype")
    return options


def config_of(given: argparse.Namespace) -> Config:
    """The run's configuration; which data it trains on does not matter here."""
    return configuration.load(
        given.precompute, [f"data.manifest={json.dumps(given.dest)}", "data.sources=[]", *given.set]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = parser()
    given = command.parse_args(arguments)
    try:
        options_of(given)
        config = config_of(given)
    except ValueError as error:
        command.error(str(error))
    with process_group(_TIMEOUT_S) as world:
        try:
            return precompute(with_local_model(config), given, world)
        except (DataError, ValueError, OSError) as error:
            code = 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            code = 130
            print("interrupted; the same command goes on", file=sys.stderr, flush=True)
        if world.world_size > 1:
            # The others wait for this rank; torchrun ends them.
            sys.stdout.flush()
            os._exit(code)
        return code


if __name__ == "__main__":
    sys.exit(main())
