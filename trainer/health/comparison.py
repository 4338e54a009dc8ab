"""What only shows when ranks are put side by side: clocks, links, speeds, versions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.health.findings import GREEN, RED, YELLOW, Finding
from trainer.health.links import Measured

_SKEW_S, _WRONG_CLOCK_S = 1.0, 60.0
_SLOW_LINK, _SLOW_RANK = 0.4, 0.7
"""Shares of the median below which a rank's best link, and its computing, are called slow."""
_GPU_BYTES_PER_S = 5e9
"""An all-reduce between GPUs below it goes over plain TCP, most likely."""

Facts = Mapping[int, Mapping[str, Any]]
"""By rank: host, software (name -> version), device, speed [1e12 operations a second]."""


def clocks(offsets_s: Sequence[float], hosts: Sequence[str]) -> Iterator[Finding]:
    """Ranks whose clock is away from the median of all."""
    off = {rank: offset for rank, offset in enumerate(offsets_s) if abs(offset) > _SKEW_S}
    for rank, offset in off.items():
        level = RED if abs(offset) > _WRONG_CLOCK_S else YELLOW
        value = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the other ranks"
        remedy = "set the node's time (chronyc makestep; systemctl status chronyd): S3 refuses requests, logs mislead"
        yield Finding("clocks", level, value, remedy, rank, hosts[rank])
    if not off:
        yield Finding("clocks", GREEN, f"within {1e3 * (max(offsets_s) - min(offsets_s)):.1f} ms of each other")


def traffic(measured: Measured, hosts: Sequence[str], gpus: bool) -> Iterator[Finding]:
    """The all-reduce, and the ranks that are slow in the ring."""
    ranks = len(hosts)
    if ranks == 1:
        yield Finding("all-reduce", GREEN, "one rank: nothing to measure")
        return
    speeds = {size: size / seconds for size, seconds in measured.seconds.items()}
    value = ", ".join(f"{size / 1e6:.0f} MB {speed / 1e9:.2f} GB/s" for size, speed in speeds.items())
    if gpus and max(speeds.values()) < _GPU_BYTES_PER_S:
        remedy = "NCCL_DEBUG=INFO says which network it took; check NCCL_SOCKET_IFNAME, NCCL_IB_HCA or FI_PROVIDER"
        yield Finding("all-reduce", YELLOW, value, remedy)
    else:
        yield Finding("all-reduce", GREEN, value)
    slow, best = slow_links(measured.speeds), [max(row) / 1e9 for row in measured.speeds]
    for rank in slow:
        value = f"its best link makes {best[rank]:.2f} GB/s, the median rank's {statistics.median(best):.2f}"
        remedy = "leave this node out (sbatch --exclude) and check its network card, cable and PCIe link"
        yield Finding("links", YELLOW, value, remedy, rank, hosts[rank])
    if not slow:
        yield Finding("links", GREEN, f"{min(best):.2f} to {max(best):.2f} GB/s with a neighbour")


def slow_links(speeds: Sequence[Sequence[float]]) -> list[int]:
    """Ranks whose best link is much slower than the median rank's. A slow rank makes one link of each neighbour slow, so
    their better one counts; of two ranks with one link neither can be blamed."""
    best = [max(row) for row in speeds]
    middle = statistics.median(best)
    return [rank for rank, speed in enumerate(best) if speed < _SLOW_LINK * middle]


def computing(facts: Facts) -> Iterator[Finding]:
    """Ranks that compute slower than the others on the same kind of GPU; the whole run goes at their pace."""
    speeds = {rank: float(fact["speed"]) for rank, fact in facts.items() if fact["speed"] is not None}
    if not speeds:
        return
    middle, gpus = statistics.median(speeds.values()), all(fact["device"] != "cpu" for fact in facts.values())
    slow = [rank for rank, speed in speeds.items() if speed < _SLOW_RANK * middle] if gpus else []
    for rank in slow:
        value = f"{speeds[rank]:.0f} TFLOP/s in matrix products, the median rank has {middle:.0f}"
        remedy = "check temperature, power limit and clocks (nvidia-smi -q -d PERFORMANCE), or leave the node out"
        yield Finding("computing", YELLOW, value, remedy, rank, str(facts[rank]["host"]))
    if not slow:
        span = f"{min(speeds.values()):.3g} to {max(speeds.values()):.3g} TFLOP/s"
        yield Finding("computing", GREEN, f"{span} in matrix products")


def equality(facts: Facts) -> Iterator[Finding]:
    """Ranks whose software or kind of device is not that of most."""
    found = {rank: {"device": str(fact["device"]), **fact["software"]} for rank, fact in facts.items()}
    names = list(dict.fromkeys(name for fact in found.values() for name in fact))
    usual = {name: Counter(fact.get(name, "none") for fact in found.values()).most_common(1)[0][0] for name in names}
    odd = False
    for rank, fact in found.items():
        differs = [f"{name} {fact.get(name, 'none')} (others: {usual[name]})" for name in names]
        differs = [text for name, text in zip(names, differs, strict=True) if fact.get(name, "none") != usual[name]]
        if differs:
            odd = True
            remedy = "give every node the same image or environment; leave this one out until then"
            yield Finding("same on all nodes", RED, "; ".join(differs), remedy, rank, str(facts[rank]["host"]))
    if not odd and len(facts) > 1:
        yield Finding("same on all nodes", GREEN, f"{', '.join(names)} equal on {len(facts)} ranks")
