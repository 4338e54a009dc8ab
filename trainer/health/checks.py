"""What a rank looks at on its own machine, and how thoroughly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.folders import run_folder
from configs.schema import Config
from data.cache import ShardCache
from trainer.engines.distributed import World
from trainer.health import attention, disk, gpu, machine, outside
from trainer.health.findings import YELLOW, Check, Finding


@dataclass(frozen=True)
class Scope:
    """How thorough. write, read: bytes written to every disk, and read of every data set; sizes: bytes of the
    all-reduces; budget_s: of one rank's own checks, and of the all-reduces; meet_s: longest wait for a rank to come;
    tracking: ask MLflow too."""

    write: int
    read: int
    sizes: tuple[int, ...]
    budget_s: float
    meet_s: float
    link_timeout_s: float
    tracking: bool


THOROUGH = Scope(256 << 20, 64 << 20, (1 << 20, 16 << 20, 64 << 20, 256 << 20), 90.0, 60.0, 30.0, True)
BRIEF = Scope(16 << 20, 8 << 20, (1 << 20, 16 << 20), 30.0, 60.0, 20.0, False)


def own_checks(
    world: World, config: Config | None, scope: Scope, hosts: Sequence[str], mark: str, facts: dict[str, Any]
) -> list[Check]:
    """What this rank looks at on its machine; only the first rank of a machine looks at what all its ranks share.

    hosts: by rank; mark: a file of rank 0 in the run's folder; facts: gets kind and speed of the device.
    """
    several = len(set(hosts)) > 1
    checks = [
        Check("GPU", lambda: gpu.processor(world.device), remedy="restart the node's driver"),
        Check("attention", lambda: attention.attention(world.device)),
        Check("computing", lambda: _compute(world.device, facts), remedy="restart the node's driver, or leave it out"),
    ]
    if world.local_rank == 0:
        workers = 1 if config is None else config.data.workers
        asked = machine.requirements
        checks += [
            Check("versions", lambda: machine.versions(asked(), machine.installed(wanted.name for wanted in asked()))),
            Check("shared memory", lambda: machine.shared_memory(workers)),
            Check("limits", lambda: machine.limits(several)),
            Check("host name", lambda: machine.host_name(several), 10.0, "mend the node's name service (DNS)"),
        ]
        if config is not None:
            checks += _of_run(config, world, scope, hosts, mark)
        else:
            checks.append(_disk("here", Path.cwd(), "run.dir", 1e9, "for the run's files", scope))
    return checks


def _of_run(config: Config, world: World, scope: Scope, hosts: Sequence[str], mark: str) -> list[Check]:
    """Folders, data and stores of a run."""
    node = sorted(set(hosts)).index(hosts[world.rank])
    run, options = run_folder(config), config.checkpoint
    checks = [_disk("run", run, "run.dir", 1e9, "for the run's files", scope)]
    if len(set(hosts)) > 1 and mark:
        checks.append(Check("run folder shared", lambda: disk.shared(mark)))
    if outside.is_remote(options.dir):
        checks.append(Check("checkpoint store", lambda: outside.checkpoints(config), outside.BUDGET_S * 3))
    else:
        checks.append(_checkpoint_disk(config, scope))
    places = outside.manifests(config)
    if any(map(outside.is_remote, places)):
        cache, kept = ShardCache(config.data.cache_dir, 0).directory, config.data.cache_gb * 1e9
        checks.append(_disk("cache", cache, "data.cache_dir", kept / 2, "half of data.cache_gb", scope))
    for place in places:
        checks.append(_data(config, place, node, scope))
    if scope.tracking and world.rank == 0:
        checks.append(Check("MLflow", lambda: outside.tracking(config), 60.0, "check tracking.uri", YELLOW))
    return checks


def _disk(name: str, path: Path, knob: str, needed: float, why: str, scope: Scope) -> Check:
    remedy = f"the file system does not answer: mend it, or set {knob} to another"
    return Check(f"disk {name}", lambda: disk.folder(name, path, knob, needed, why, scope.write), 30.0, remedy)


def _data(config: Config, place: str, node: int, scope: Scope) -> Check:
    remedy = "the store answers too slowly: check data.endpoint_url and the network"
    return Check(f"data {place}", lambda: outside.data_set(config, place, node, scope.read), 45.0, remedy)


def _checkpoint_disk(config: Config, scope: Scope) -> Check:
    options = config.checkpoint
    folder = Path(options.dir) if options.dir else run_folder(config) / "checkpoints"

    def look() -> Iterator[Finding]:
        needed, count = _checkpoints_bytes(config), options.keep_last + 1
        why = f"{count} checkpoints of {needed / count / 1e9:.1f} GB"
        yield from disk.folder("checkpoints", folder, "checkpoint.dir", needed, why, scope.write)

    remedy = "the file system does not answer: mend it, or set checkpoint.dir to another"
    return Check("disk checkpoints", look, 30.0, remedy)


def _checkpoints_bytes(config: Config) -> float:
    """Bytes that the checkpoints of a run will take, one more than it keeps; 0 where its model cannot be counted."""
    path = config.model.get("path")
    if not path or outside.is_remote(path) or not Path(path).is_dir():
        return 0.0
    return disk.checkpoint_bytes(Path(path), config.ema.decay > 0) * (config.checkpoint.keep_last + 1)


def _compute(device: torch.device, facts: dict[str, Any]) -> Iterator[Finding]:
    """Leaves kind and speed of the device in `facts`: what is slow shows only beside the others."""
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    facts["speed"] = gpu.speed(device)
    yield from ()
