"""An examination of all ranks: each looks at its own machine, all together at what lies between them, rank 0 judges."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.folders import run_folder
from configs.schema import Config
from data.cache import ShardCache
from trainer.engines.distributed import World
from trainer.health import attention, comparison, disk, gpu, machine, outside
from trainer.health.exchange import Exchange
from trainer.health.findings import (
    RED,
    Check,
    Finding,
    Row,
    longest_s,
    merged,
    placed,
    run_checks,
    worst,
)
from trainer.health.links import Links, Measured

_CHECKS = 20
"""More checks than a rank has: how long others wait for it follows from this."""
_LATE = "a process is stopped or dead, or its node is out of reach: see its log, leave the node out"


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


@dataclass(frozen=True)
class Report:
    """level: the worst, the same on all ranks; rows: of all ranks, on rank 0; elsewhere what is red. nodes: machines."""

    level: str
    rows: list[Row]
    nodes: int


def examine(
    world: World,
    config: Config | None,
    scope: Scope,
    clock: Callable[[], float] = time.time,
    host: str = "",
) -> Report:
    """Examine machine and allocation. Collective: call it on all ranks, from one thread. It ends in bounded time
    whatever the machine, the network or another rank does; after a red all-reduce the process group is not to be used.

    config: None leaves out what only a run has: folders, data, stores. clock, host: of this rank; default the node's name
    in SLURM, or the machine's.
    """
    host = host or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    exchange = Exchange(world.rank, world.world_size)
    mark = disk.SharedMark(run_folder(config)) if config is not None and world.rank == 0 else None
    with contextlib.ExitStack() as stack:
        if mark is not None:
            stack.callback(mark.remove)
        exchange.say("hello", {"host": host, "local_rank": world.local_rank, "mark": mark.make() if mark else ""})
        hello = exchange.hear("hello", scope.meet_s)
        hosts = [str(hello[rank]["host"]) if rank in hello else "?" for rank in range(world.world_size)]
        facts: dict[str, Any] = {"host": host, "software": machine.software(), "device": "cpu", "speed": None}
        found = _own(world, config, scope, hosts, str(hello.get(0, {}).get("mark", "")), facts)
        own = placed(found, world.rank, host)
        exchange.say("ready", len(hello))
        wait_s = longest_s(_CHECKS, scope.budget_s) + scope.meet_s
        ready = exchange.hear("ready", wait_s)
        measured = None
        if len(ready) == world.world_size and set(ready.values()) == {world.world_size}:
            locals_ = [int(hello[rank]["local_rank"]) for rank in sorted(hello)]
            measured, between = _between(world, hosts, locals_, scope, clock, stack)
            own += placed(between, world.rank, host)
        else:
            value = f"not measured: {len(hello)} of {world.world_size} ranks met within {scope.meet_s:g} s"
            own += placed([Finding("all-reduce", RED, value, _LATE)], world.rank, host)
        exchange.say("findings", {"findings": [vars(finding) for finding in own], "facts": facts})
        if world.rank == 0:
            return _judge(exchange, hosts, measured, scope, world.device.type == "cuda")
        return _verdict(exchange, hosts, scope)


def _own(
    world: World, config: Config | None, scope: Scope, hosts: Sequence[str], mark: str, facts: dict[str, Any]
) -> list[Finding]:
    """What this rank finds on its machine; only the first rank of a machine looks at what all its ranks share."""
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
    return run_checks(checks, scope.budget_s)


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
        needed = _checkpoints_bytes(config)
        why = f"{options.keep_last + 1} checkpoints of {needed / (options.keep_last + 1) / 1e9:.1f} GB"
        folder = Path(options.dir) if options.dir else run / "checkpoints"
        checks.append(_disk("checkpoints", folder, "checkpoint.dir", needed, why, scope))
    places = outside.manifests(config)
    if any(map(outside.is_remote, places)):
        cache, kept = ShardCache(config.data.cache_dir, 0).directory, config.data.cache_gb * 1e9
        checks.append(_disk("cache", cache, "data.cache_dir", kept / 2, "half of data.cache_gb", scope))
    for place in places:
        checks.append(_data(config, place, node, scope))
    if scope.tracking and world.rank == 0:
        checks.append(Check("MLflow", lambda: outside.tracking(config), 60.0, "check tracking.uri", "yellow"))
    return checks


def _disk(name: str, path: Path, knob: str, needed: float, why: str, scope: Scope) -> Check:
    remedy = f"the file system does not answer: mend it, or set {knob} to another"
    return Check(f"disk {name}", lambda: disk.folder(name, path, knob, needed, why, scope.write), 30.0, remedy)


def _data(config: Config, place: str, node: int, scope: Scope) -> Check:
    remedy = "the store answers too slowly: check data.endpoint_url and the network"
    return Check(f"data {place}", lambda: outside.data_set(config, place, node, scope.read), 45.0, remedy)


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


def _between(
    world: World,
    hosts: Sequence[str],
    locals_: Sequence[int],
    scope: Scope,
    clock: Callable[[], float],
    stack: contextlib.ExitStack,
) -> tuple[Measured | None, list[Finding]]:
    """What lies between the ranks. stack: ends when all have heard of the end, and with it the group made here."""
    try:
        links = Links(world, hosts, locals_, scope.link_timeout_s)
        measured = links.measure(scope.sizes, scope.budget_s, clock)
    except RuntimeError as error:
        remedy = "check firewall, NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME and the interface; NCCL_DEBUG=INFO says more"
        return None, [Finding("all-reduce", RED, str(error).splitlines()[0], remedy)]
    stack.callback(links.close)
    return measured, []


def _judge(exchange: Exchange, hosts: Sequence[str], measured: Measured | None, scope: Scope, gpus: bool) -> Report:
    """On rank 0: hear all, compare, tell the others."""
    wait_s = scope.link_timeout_s * 4 + scope.budget_s
    said = exchange.hear("findings", wait_s)
    findings = [Finding(**entry) for rank in sorted(said) for entry in said[rank]["findings"]]
    facts = {rank: said[rank]["facts"] for rank in sorted(said)}
    hosts = [str(facts[rank]["host"]) if rank in facts else host for rank, host in enumerate(hosts)]  # late ones too
    shared = list(comparison.computing(facts)) + list(comparison.equality(facts))
    if measured is not None:
        shared += comparison.clocks(measured.offsets_s, hosts)
        shared += comparison.traffic(measured, hosts, gpus)
    for rank in sorted(set(range(len(hosts))) - said.keys()):
        findings.append(Finding("rank", RED, "says nothing", _LATE, rank, hosts[rank]))
    rows = merged(findings + placed(shared, -1, "all ranks"))
    level = worst(Finding(row.check, row.level, row.value) for row in rows)
    reds = [vars(row) for row in rows if row.level == RED]
    nodes = len(set(hosts))
    exchange.say("verdict", {"level": level, "rows": reds, "nodes": nodes})
    return Report(level, rows, nodes)


def _verdict(exchange: Exchange, hosts: Sequence[str], scope: Scope) -> Report:
    """On the other ranks: what rank 0 says."""
    wait_s = scope.link_timeout_s * 8 + 2 * scope.budget_s
    said = exchange.hear("verdict", wait_s, [0]).get(0)
    if said is None:
        row = Row("rank", RED, "says nothing", _LATE, (f"{hosts[0]} (rank 0)",))
        return Report(RED, [row], len(set(hosts)))
    rows = [Row(**{**row, "where": tuple(row["where"])}) for row in said["rows"]]
    return Report(str(said["level"]), rows, int(said["nodes"]))
