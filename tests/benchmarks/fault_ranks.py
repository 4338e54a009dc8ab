"""One rank of the fault benchmark: it reads and agrees in every step as the training loop does."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from configs.schema import Train
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.s3 import DataError
from trainer.bad_samples import BadSamples
from trainer.engines.distributed import Agreement
from trainer.loop import StepRefused, next_batch, stop_agreed
from trainer.objectives.twinflow import TwinFlow


def read_on_rank(
    url: str, endpoint_url: str, cache_dir: str, budget_s: float, global_batch_size: int
) -> tuple[list[tuple[str, ...]], str, float]:
    """Keys of this rank's rows step by step, the error that ended it ("": none), seconds spent on reading."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    manifest = read_manifest(url, endpoint_url, budget_s)
    order = Order(manifest, seed=0, global_batch_size=global_batch_size)
    loader = Loader(
        order,
        manifest,
        steps=2,
        rank=rank,
        world_size=world_size,
        cache_dir=cache_dir,
        endpoint_url=endpoint_url,
        read_budget_s=budget_s,
    )
    # What stop_agreed asks of a run.
    run: Any = SimpleNamespace(
        step=0,
        order=order,
        objective=TwinFlow(teacher="online"),
        config=SimpleNamespace(
            train=Train(steps=2, global_batch_size=global_batch_size, micro_batch_size=1, chunk_rows=None)
        ),
        stop=SimpleNamespace(requested=0),
        nets=SimpleNamespace(step_calls=(0, 0)),
        agreement=Agreement(30.0),
        bad_samples=BadSamples(order, 0.0),
    )
    read, batches, began = [], iter(loader), time.monotonic()
    try:
        while run.step < 2:
            batch, trouble = next_batch(batches)
            if stop_agreed(cast(Any, run), batch, trouble) or batch is None:
                break
            read.append(batch.keys)
            run.step += 1
    except (StepRefused, DataError) as error:
        return read, str(error), time.monotonic() - began
    return read, "", time.monotonic() - began
