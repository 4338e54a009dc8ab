"""A tiny model, pictures whose captions have equally many tokens, and training in a process that is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs import load
from models.tiny_pipelines.prompts import CAPTIONS
from tests.data.pictures import body, picture

SMOKE = Path(__file__).parents[2] / "configs/smoke.yaml"
PACK = ("--resolution", "32", "--bucket-step", "16", "--min-bucket", "2", "--workers", "0", "--shard-mb", "0.03")


def write_pictures(folder: Path, count: int, several: bool = False) -> Path:
    """Pictures of 32 x 32 pixels. Captions of one length need no padding, so that they are encoded to the same bits
    alone and in a batch. several: two captions each."""
    folder.mkdir()
    rows = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(body(picture(32, 32, n)))
        captions = [CAPTIONS[n % 10], CAPTIONS[(n + 5) % 10]]
        rows.append({"file_name": f"{n}.png", "captions": captions if several else captions[:1]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(model: Path, manifest: Path, run: Path, **more: Any) -> list[str]:
    """Overrides of configs/smoke.yaml for a few small steps."""
    given = {
        "run.name": "test",
        "run.dir": run,
        "model.path": model,
        "model.latents": "vae",
        "data.manifest": manifest,
        "data.held_out": "null",
        "data.workers": 0,
        "objective.order": 1,
        "objective.enhanced_ratio": 0.5,
        "train.steps": 3,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "schedule.warmup_steps": 0,
        "checkpoint.every": 0,
        "sample.prompts": "[]",
        "evaluate.name": "null",
        "tracking.uri": f"sqlite:///{run.parent}/mlflow.db",
        "tracking.every": 1,
        "runtime.nproc": 1,
    }
    return [f"{key}={value}" for key, value in (given | {k.replace("__", "."): v for k, v in more.items()}).items()]


def train_here(overrides: list[str]) -> tuple[int, list[float], str]:
    """Train as one rank does in the process group that is there: exit status, loss of every step, status message."""
    import torch
    import torch.distributed as dist

    from trainer import session
    from trainer.engines.distributed import World
    from trainer.signals import StopRequest

    config = load.load([SMOKE], overrides)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    code = session.train(config, world, StopRequest(), fresh=False, allow_change=[])
    run = Path(str(config.run.dir))
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    losses = [line["values"]["loss"] for line in lines if line["kind"] == "metrics" and "loss" in line["values"]]
    return code, losses, json.loads((run / "status.json").read_text())["message"]
