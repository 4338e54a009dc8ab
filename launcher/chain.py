"""A chain of jobs that ends where one long job would: its record in the run's folder, and what to do when a job ends.

The decision is a pure function of what is known: `decide`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.clusters import Cluster
from configs.folders import CHAIN, write_json

FOLDER = CHAIN.parent.name
STOP = "stop.json"
"""In FOLDER: a person has asked this run to stop."""
UNSAID = "the job ended without a word: its first node was lost, or SLURM killed it"


@dataclass
class Attempt:
    """One start of the ranks. submission: name of its folder; job, restart: of SLURM; nodes: of the allocation; begin,
    end: seconds since 1970; checkpoint_before, checkpoint_after: steps of the newest checkpoint; suspects: nodes that
    failed; preempted: it had to make room, which is nobody's failure; action: what was decided."""

    submission: str
    job: str
    restart: int
    nodes: list[str]
    begin: float
    checkpoint_before: int
    end: float | None = None
    checkpoint_after: int = 0
    reason: str = ""
    action: str = ""
    suspects: list[str] = field(default_factory=list)
    preempted: bool = False

    @property
    def vain(self) -> bool:
        return self.checkpoint_after <= self.checkpoint_before and not self.preempted


@dataclass
class Chain:
    """state: queued | running | finished | stopped | failed; reason: why; jobs: of all submissions, the newest last."""

    folder: Path
    submission: str = ""
    job: str = ""
    state: str = "queued"
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> Chain | None:
        """The chain of a run; None where it was never submitted."""
        path = run / CHAIN
        if not path.exists():
            return None
        values: dict[str, Any] = json.loads(path.read_text())
        attempts = [Attempt(**attempt) for attempt in values.pop("attempts")]
        return cls(folder=run / FOLDER, **values, attempts=attempts)

    def write(self) -> None:
        values = asdict(self)
        values.pop("folder")
        write_json(self.folder / CHAIN.name, values)

    def current(self) -> list[Attempt]:
        """Attempts of the newest submission."""
        return [attempt for attempt in self.attempts if attempt.submission == self.submission]

    def stop_wanted(self) -> bool:
        """Whether a person has asked this submission to stop."""
        path = self.folder / STOP
        return path.exists() and json.loads(path.read_text()).get("submission") == self.submission


@dataclass(frozen=True)
class Facts:
    """How a start ended. state, message, vain: what the ranks wrote, empty where they wrote nothing; stop: a person asked;
    cancelled: SLURM ended the job for good; warned: the time limit or somebody who makes room; trouble: why the launcher
    ended it, or what it saw (a hanging rank, a killed one); suspects: nodes that failed."""

    state: str = ""
    message: str = ""
    vain: bool = False
    stop: bool = False
    cancelled: bool = False
    warned: str = ""
    trouble: str = ""
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """action: requeue, or end with `state`; reason: one sentence for a person."""

    action: Literal["requeue", "end"]
    state: Literal["queued", "finished", "stopped", "failed"]
    reason: str


def decide(facts: Facts, attempts: Sequence[Attempt], cluster: Cluster) -> Decision:
    """What follows the last of `attempts` of one submission."""
    saved = attempts[-1].checkpoint_after
    kept = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    if facts.state == "finished":
        return Decision("end", "finished", facts.message)
    if facts.stop:
        if facts.state == "stopped":
            return Decision("end", "stopped", facts.message)
        return Decision("end", "failed", f"asked to stop, but not saved ({_why(facts)}); {kept}")
    if facts.cancelled:
        return Decision("end", "stopped", f"cancelled by scancel; {kept}. twinflow submit goes on from there")
    if facts.state == "failed" and facts.vain:
        return Decision("end", "failed", f"{facts.message}\nThe same start would fail again; {kept}")
    reason = f"saved: {facts.warned or 'a signal from outside'}" if facts.state == "stopped" else _why(facts)
    vain = _vain_in_a_row(attempts)
    if vain >= cluster.max_failures:
        said = (
            f"{vain} jobs in a row without a new checkpoint (max_failures={cluster.max_failures}); the last: {reason}"
        )
        return Decision("end", "failed", f"{said}; {kept}")
    if len(attempts) > cluster.max_requeues:
        said = f"the limit of requeues is reached (max_requeues={cluster.max_requeues}); {reason}"
        state: Literal["stopped", "failed"] = "stopped" if facts.state == "stopped" else "failed"
        return Decision("end", state, f"{said}; {kept}. twinflow submit goes on from there")
    return Decision("requeue", "queued", reason)


def excluded(attempts: Sequence[Attempt], cluster: Cluster, usable: set[str]) -> tuple[list[str], str]:
    """Nodes that the next job must do without, newest suspects first, as long as enough others are usable; a warning
    where a suspect has to be used again."""
    suspects = list(dict.fromkeys(node for attempt in reversed(attempts) for node in attempt.suspects))
    left = usable - set(cluster.exclude)
    chosen: list[str] = []
    for node in suspects[: cluster.max_excluded]:
        if len(left - {node}) < cluster.nodes:
            return sorted([*cluster.exclude, *chosen]), (
                f"{node} failed, but without it only {len(left - {node})} nodes are usable for {cluster.nodes}: used again"
            )
        chosen.append(node)
        left -= {node}
    return sorted([*cluster.exclude, *chosen]), ""


def close_silent(attempts: Sequence[Attempt], checkpoint: int) -> None:
    """Give an end to starts whose launcher could not write it any more."""
    for attempt in attempts:
        if attempt.end is None:
            attempt.end, attempt.checkpoint_after = time.time(), checkpoint
            attempt.reason, attempt.action = attempt.reason or UNSAID, "requeued by SLURM"


def _why(facts: Facts) -> str:
    parts = [facts.trouble, facts.message if facts.state == "failed" else ""]
    return "; ".join(part for part in parts if part) or facts.warned or "the ranks ended without a word"


def _vain_in_a_row(attempts: Sequence[Attempt]) -> int:
    count = 0
    for attempt in reversed(attempts):
        if not attempt.vain:
            break
        count += 1
    return count
