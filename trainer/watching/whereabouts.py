"""Where every rank is, as far as the others know: positions on a board that all ranks reach without a collective."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

_ORDER = ("encode", "targets", "graded pass", "optimizer step")
_REACH_S = 30.0
_SHOWN = 12
"""Most lines about ranks in one message."""


@dataclass(frozen=True)
class Position:
    """One rank at one moment. stage: empty between two stages; called_step: the step that the calls belong to;
    no_grad_calls, graded_calls: network calls that it has begun in that step; idle_s: seconds without progress."""

    rank: int
    step: int
    stage: str
    called_step: int
    no_grad_calls: int
    graded_calls: int
    idle_s: float

    def past(self, stage: str) -> bool:
        """Whether the rank has left `stage` of called_step behind."""
        if self.step != self.called_step:
            return self.step > self.called_step
        return self.stage in _ORDER and _ORDER.index(self.stage) > _ORDER.index(stage)

    def place(self) -> str:
        where = f"in stage '{self.stage}'" if self.stage else "between stages"
        calls = f"{self.no_grad_calls} no-grad and {self.graded_calls} graded network calls of step {self.called_step}"
        return f"{where} of step {self.step}" + (f", {calls} begun" if self.called_step >= 0 else "")


def own_connection(prefix: str, ranks: int) -> dist.Store:
    """The store that the ranks met in, under a prefix, by a connection of its own: the process group's may be blocked in
    a wait of another thread. A world of one has a store to itself."""
    store: dist.Store = dist.HashStore()
    if ranks > 1:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        reach = timedelta(seconds=_REACH_S)
        store = dist.TCPStore(host, port, is_master=False, timeout=reach, wait_for_workers=False)
    return dist.PrefixStore(prefix, store)


class Board:
    """Positions of all ranks in the store that they met in; every rank writes its own. Building it is not collective.

    Its calls raise RuntimeError where the store is out of reach. They are safe to make from several threads.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._store = own_connection("whereabouts", ranks)

    def publish(self, position: Position) -> None:
        self._store.set(f"now/{self.rank}", json.dumps(asdict(position)))

    def positions(self) -> list[Position]:
        """The last position of every rank that has published one."""
        return self._read("now")

    def raise_alarm(self, reason: str) -> None:
        """All ranks shall show their stacks and end; the first reason stays."""
        self._store.compare_set("alarm", "", reason)

    def alarm(self) -> str:
        """The reason why the run ends, empty while there is none."""
        return self._store.get("alarm").decode() if self._store.check(["alarm"]) else ""

    def report(self, position: Position) -> None:
        """This rank has heard the alarm; where it stood then."""
        self._store.set(f"end/{self.rank}", json.dumps(asdict(position)))

    def reports(self) -> list[Position]:
        return self._read("end")

    def _read(self, kind: str) -> list[Position]:
        keys = [f"{kind}/{rank}" for rank in range(self.ranks)]
        known = [key for key in keys if self._store.check([key])]
        return [Position(**json.loads(text)) for text in self._store.multi_get(known)] if known else []


def mismatch(positions: Sequence[Position]) -> str:
    """How two ranks differ in the network calls of a step, empty where they need not.

    A rank that has left the no-grad (graded) calls of a step behind made as many as it says; another that has begun
    more of them in the same step can never meet it. Calls only ever grow, so positions may be some seconds old.
    """
    for step in sorted({position.called_step for position in positions}):
        same = [position for position in positions if position.called_step == step]
        for kind, stage in (("no_grad_calls", "targets"), ("graded_calls", "graded pass")):
            done = [position for position in same if position.past(stage)]
            if not done:
                continue
            fewest = min(done, key=lambda position: getattr(position, kind))
            most = max(same, key=lambda position: getattr(position, kind))
            if getattr(most, kind) > getattr(fewest, kind):
                named = kind.replace("_calls", "").replace("_", "-")
                return (
                    f"the ranks make different network calls in step {step}: rank {most.rank} has begun "
                    f"{getattr(most, kind)} {named} calls, rank {fewest.rank} made {getattr(fewest, kind)}. Calls must "
                    "follow from configuration, step and row position alone, never from data or rank"
                )
    return ""


def describe(ranks: int, last: Iterable[Position], reported: Iterable[Position]) -> list[str]:
    """A line for the ranks at the same place, then one for every rank that did not report."""
    places: dict[str, list[Position]] = {}
    for position in reported:
        places.setdefault(position.place(), []).append(position)
    lines = []
    for place, members in sorted(places.items(), key=lambda entry: len(entry[1])):
        idle = max(member.idle_s for member in members)
        lines.append(f"{_named(member.rank for member in members)}: {place}, no progress for {idle:.0f} s")
    heard = {position.rank for members in places.values() for position in members}
    seen = {position.rank: position for position in last}
    for rank in sorted(set(range(ranks)) - heard):
        where = f"last seen {seen[rank].place()}" if rank in seen else "never seen"
        lines.append(f"rank {rank} is silent ({where}): stopped, dead, or its machine is out of reach")
    left_out = [f"and {len(lines) - _SHOWN} more lines like these"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + left_out


def _named(ranks: Iterable[int]) -> str:
    """rank 3, or ranks 0-2, 5."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"
