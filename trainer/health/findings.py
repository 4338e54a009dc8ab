"""What a check of a machine finds, how checks are run so that none can hang, and how findings of many ranks are shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

GREEN, YELLOW, RED = LEVELS = ("green", "yellow", "red")
_SHOWN = 4
"""Most nodes named in one row."""


@dataclass(frozen=True)
class Finding:
    """One check on one rank. level: green, yellow (works, but not well) or red (would spoil the run); value: what was
    measured; remedy: what to do, for yellow and red; rank: -1 where it is of all of them."""

    check: str
    level: str
    value: str
    remedy: str = ""
    rank: int = 0
    host: str = ""


@dataclass(frozen=True)
class Check:
    """measure: raises only by mistake; timeout_s: after which it counts as hanging, at `level`, with `remedy`."""

    name: str
    measure: Callable[[], Iterable[Finding]]
    timeout_s: float = 20.0
    remedy: str = "look for a file system, driver or server that does not answer"
    level: str = RED


@dataclass(frozen=True)
class Row:
    """The findings of one check at one level. where: "host (rank 3)" of each."""

    check: str
    level: str
    value: str
    remedy: str
    where: tuple[str, ...]

    def line(self) -> str:
        named = ", ".join(self.where[:_SHOWN])
        more = f" and {len(self.where) - _SHOWN} more" if len(self.where) > _SHOWN else ""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.level} {self.check} on {named}{more}: {self.value}{remedy}"


def run_checks(checks: Sequence[Check], budget_s: float) -> list[Finding]:
    """Run the checks one after the other for at most about budget_s seconds; each of those that no time is left for gets
    one second. A check that hangs is left behind in its thread."""
    end, findings = time.monotonic() + budget_s, []
    for check in checks:
        findings += _bounded(check, max(min(check.timeout_s, end - time.monotonic()), 1.0))
    return findings


def longest_s(checks: int, budget_s: float) -> float:
    """The longest time that run_checks takes for so many checks."""
    return budget_s + checks * 1.0


def _bounded(check: Check, timeout_s: float) -> list[Finding]:
    found: list[Finding] = []
    failed: list[Exception] = []

    def measure() -> None:
        try:
            found.extend(check.measure())
        except Exception as error:  # whatever it is, it is this check's result and must not end the examination
            failed.append(error)

    thread = threading.Thread(target=measure, name=f"check {check.name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [Finding(check.name, check.level, f"no answer within {timeout_s:.0f} s", check.remedy)]
    if failed:
        return [*found, Finding(check.name, RED, f"{type(failed[0]).__name__}: {failed[0]}", check.remedy)]
    return found


def placed(findings: Iterable[Finding], rank: int, host: str) -> list[Finding]:
    """The same with the rank that found them, where it names none itself."""
    return [finding if finding.host else replace(finding, rank=rank, host=host) for finding in findings]


def worst(findings: Iterable[Finding]) -> str:
    return max((finding.level for finding in findings), key=LEVELS.index, default=GREEN)


def merged(findings: Iterable[Finding]) -> list[Row]:
    """A row for every check and level, the worst level of a check first, checks in the order of their appearance."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    order: dict[str, int] = {}
    for finding in findings:
        order.setdefault(finding.check, len(order))
        groups.setdefault((finding.check, finding.level), []).append(finding)
    rows = [_row(check, level, members) for (check, level), members in groups.items()]
    return sorted(rows, key=lambda row: (order[row.check], -LEVELS.index(row.level)))


def _row(check: str, level: str, members: Sequence[Finding]) -> Row:
    members = sorted(members, key=lambda finding: finding.rank)
    values = list(dict.fromkeys(finding.value for finding in members))
    value = values[0] if len(values) == 1 else f"{values[0]} (others differ: {values[1]}{', ...' * (len(values) > 2)})"
    where = tuple(finding.host + (f" (rank {finding.rank})" if finding.rank >= 0 else "") for finding in members)
    return Row(check, level, value, members[0].remedy, where)


def json_report(rows: Sequence[Row], ranks: int, nodes: int) -> dict[str, Any]:
    """What the last line of `doctor` says."""
    reds = [row for row in rows if row.level == RED]
    return {
        "ok": not reds,
        "level": max((row.level for row in rows), key=LEVELS.index, default=GREEN),
        "ranks": ranks,
        "nodes": nodes,
        "findings": [asdict(row) for row in rows],
    }
