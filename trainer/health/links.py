"""What lies between the ranks: all-reduce, every link of a ring, clocks. Collective, and bounded: nothing here waits
longer than its time-out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engines.distributed import World

_REPEATS = 3
_ROUNDS = 5
_POLL_S = 2e-4


class LinkError(RuntimeError):
    """Ranks cannot talk to each other as they should; the message says what was tried."""


@dataclass(frozen=True)
class Measured:
    """seconds: bytes -> time of one all-reduce of so many; offsets_s: by rank, how far its clock is ahead of the median;
    speeds: by rank, bytes a second of its links with its neighbours in the ring."""

    seconds: dict[int, float]
    offsets_s: tuple[float, ...]
    speeds: tuple[tuple[float, ...], ...]


class Links:
    """The ranks of an examination. hosts: by rank; timeout_s: of every single wait. Building it is collective."""

    def __init__(self, world: World, hosts: Sequence[str], locals_: Sequence[int], timeout_s: float) -> None:
        self.world, self.hosts, self.timeout_s = world, hosts, timeout_s
        self._words = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # Not a group of their own on GPUs: the connections that the run will use are the ones to look at.
        self._bulk = dist.group.WORLD if world.device.type == "cuda" else self._words
        self.ring = ring_of(world.rank, hosts, locals_)

    def measure(self, sizes: Sequence[int], budget_s: float, clock: Callable[[], float] = time.time) -> Measured:
        """All measurements. sizes: bytes of the all-reduces, rising; later ones are left out where they would take
        longer than budget_s.

        Raises:
            LinkError: a rank did not answer in time, a connection broke, or a sum came out wrong.
        """
        offsets = self._offsets(clock)
        seconds: dict[int, float] = {}
        for size in sizes:
            if seconds and max(seconds.values()) * size / max(seconds) * (_REPEATS + 1) > budget_s:
                break
            seconds[size] = self._all_reduce(size)
        return Measured(seconds, offsets, self._speeds(max(seconds)))

    def close(self) -> None:
        """When no rank measures any more."""
        dist.destroy_process_group(self._words)

    def _offsets(self, clock: Callable[[], float]) -> tuple[float, ...]:
        rounds = []
        for _ in range(_ROUNDS):
            self._gather(0.0)  # all leave it within moments
            times = [row[0] for row in self._gather(clock())]
            middle = statistics.median_low(times)
            rounds.append([moment - middle for moment in times])
        # A rank that was delayed in one round is further off there, never nearer.
        return tuple(min(column, key=abs) for column in zip(*rounds, strict=True))

    def _all_reduce(self, size: int) -> float:
        """Seconds of one all-reduce of `size` bytes, the longest of all ranks."""
        ranks = self.world.world_size
        payload, elapsed = torch.empty(size // 4, device=self.world.device), 0.0
        for repeat in range(_REPEATS + 1):
            payload.fill_(self.world.rank + 1.0)
            self._synchronize()
            began = time.perf_counter()
            self._wait(dist.all_reduce(payload, group=self._bulk, async_op=True), f"all-reduce of {size / 1e6:.0f} MB")
            elapsed += (time.perf_counter() - began) * (repeat > 0)  # the first one connects
        expected = ranks * (ranks + 1) / 2
        if not bool((payload == expected).all()):
            raise LinkError(f"an all-reduce of {size / 1e6:.0f} MB came out wrong on rank {self.world.rank}")
        return max(row[0] for row in self._gather(elapsed / _REPEATS))

    def _speeds(self, size: int) -> tuple[tuple[float, ...], ...]:
        """Bytes a second with the next and the previous rank of the ring; 0 where there is none."""
        found = [0.0, 0.0]
        here, size = self.ring.index(self.world.rank), size // 4 * 4
        outgoing, incoming = (torch.zeros(size // 4, device=self.world.device) for _ in range(2))
        for colour in range(3):
            self._gather(0.0)
            for side, edge in enumerate((here, (here - 1) % len(self.ring))):
                if edge_colour(edge, len(self.ring)) != colour:
                    continue
                peer = self.ring[(here + 1) % len(self.ring)] if side == 0 else self.ring[here - 1]
                found[side] = size / self._swap(outgoing, incoming, peer)
        return tuple(tuple(row) for row in self._gather(*found))

    def _swap(self, outgoing: Tensor, incoming: Tensor, peer: int) -> float:
        """Seconds to send to and receive from a rank at the same time."""
        self._synchronize()
        began = time.perf_counter()
        ends = [dist.P2POp(dist.isend, outgoing, peer, self._bulk), dist.P2POp(dist.irecv, incoming, peer, self._bulk)]
        for work in dist.batch_isend_irecv(ends):
            self._wait(work, f"rank {self.world.rank} and rank {peer} ({self.hosts[peer]})")
        return time.perf_counter() - began

    def _gather(self, *values: float) -> list[list[float]]:
        mine = torch.tensor([values], dtype=torch.float64)
        rows = mine.new_empty((self.world.world_size, len(values)))
        self._wait(dist.all_gather_into_tensor(rows, mine, group=self._words, async_op=True), "a word to all ranks")
        return [[float(value) for value in row] for row in rows.tolist()]

    def _wait(self, work: dist.Work | None, what: str) -> None:
        assert work is not None
        try:
            if self.world.device.type == "cuda":
                self._poll(work, what)  # NCCL's own wait would leave the rank to the abort of its watchdog
            else:
                work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            if isinstance(error, LinkError):
                raise
            raise LinkError(f"{what}: {str(error).splitlines()[0]}") from error

    def _poll(self, work: dist.Work, what: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise LinkError(f"{what}: no end within {self.timeout_s:.0f} s")
            time.sleep(_POLL_S)
        work.wait()

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


def ring_of(rank: int, hosts: Sequence[str], locals_: Sequence[int]) -> list[int]:
    """The ranks that are compared with `rank`: those with its place on the other machines, or all where there is one
    machine, since links between machines and links within one are not alike."""
    if len(set(hosts)) == 1:
        return list(range(len(hosts)))
    return [other for other, place in enumerate(locals_) if place == locals_[rank]]


def edge_colour(edge: int, length: int) -> int:
    """When the edge from `edge` to the next one of a ring is used, so that no rank serves two edges at a time; -1: there
    is no such edge (a ring of two has one, a ring of one none)."""
    if length < 2 or (length == 2 and edge == 1):
        return -1
    return 2 if edge == length - 1 and length % 2 else edge % 2
