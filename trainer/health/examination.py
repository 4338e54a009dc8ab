"""An examination of all ranks: each looks at its own machine, all together at what lies between them, rank 0 judges."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from configs.folders import run_folder
from configs.schema import Config
from trainer.engines.distributed import World
from trainer.health import comparison, disk, machine
from trainer.health.checks import Scope, own_checks
from trainer.health.exchange import Exchange
from trainer.health.findings import RED, Check, Finding, Row, longest_s, merged, placed, run_checks, worst
from trainer.health.links import Links, Measured

_CHECKS = 20
"""More checks than a rank has: how long others wait for it follows from this."""
_MARK_S = 10.0
_LATE = "a process is stopped or dead, or its node is out of reach: see its log, leave the node out"


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
    with contextlib.ExitStack() as stack:
        mark = stack.enter_context(_mark(config)) if config is not None and world.rank == 0 else ""
        exchange.say("hello", {"host": host, "local_rank": world.local_rank, "mark": mark})
        hello = exchange.hear("hello", scope.meet_s)
        hosts = [str(hello[rank]["host"]) if rank in hello else "?" for rank in range(world.world_size)]
        facts: dict[str, Any] = {"host": host, "software": machine.software(), "device": "cpu", "speed": None}
        checks = own_checks(world, config, scope, hosts, str(hello.get(0, {}).get("mark", "")), facts)
        own = run_checks(checks, scope.budget_s)
        exchange.say("ready", len(hello))
        ready = exchange.hear("ready", longest_s(_CHECKS, scope.budget_s) + scope.meet_s)
        measured = None
        if len(ready) == world.world_size and set(ready.values()) == {world.world_size}:
            locals_ = [int(hello[rank]["local_rank"]) for rank in sorted(hello)]
            measured, between = _between(world, hosts, locals_, scope, clock, stack)
        else:
            value = f"not measured: {len(hello)} of {world.world_size} ranks met within {scope.meet_s:g} s"
            between = [Finding("all-reduce", RED, value, _LATE)]
        found = [vars(finding) for finding in placed(own + between, world.rank, host)]
        exchange.say("findings", {"findings": found, "facts": facts})
        if world.rank == 0:
            return _judge(exchange, hosts, measured, scope, world.device.type == "cuda")
        return _verdict(exchange, hosts, scope)


@contextlib.contextmanager
def _mark(config: Config) -> Iterator[str]:
    """Path of a file in the run's folder while this lasts; empty where none could be made, which another check says. In
    bounded time, as everything that touches a file system."""
    marks: list[disk.SharedMark] = []
    paths: list[str] = []

    def make() -> Iterator[Finding]:
        marks.append(disk.SharedMark(run_folder(config)))
        paths.append(marks[0].make())
        yield from ()

    def remove() -> Iterator[Finding]:
        marks[0].remove()
        yield from ()

    run_checks([Check("run folder shared", make)], _MARK_S)
    try:
        yield paths[0] if paths else ""
    finally:
        if paths:
            run_checks([Check("run folder shared", remove)], _MARK_S)


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
