"""Checks that hang or fail become findings in bounded time, and many ranks' findings become few rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from trainer.health.findings import GREEN, RED, YELLOW, Check, Finding, json_report, merged, placed, run_checks, worst


def test_a_check_that_hangs_is_red_in_time_and_the_next_ones_run() -> None:
    never, began = threading.Event(), time.monotonic()

    def hang() -> Iterator[Finding]:
        never.wait(60)
        yield Finding("disk", GREEN, "back again")

    checks = [Check("disk", hang, 0.2, "mend the mount"), Check("next", lambda: [Finding("next", GREEN, "here")])]
    found = run_checks(checks, budget_s=1.0)
    never.set()
    assert time.monotonic() - began < 10
    assert (found[0].level, found[0].remedy) == (RED, "mend the mount") and "no answer within" in found[0].value
    assert found[1] == Finding("next", GREEN, "here")


def test_the_budget_bounds_all_checks_together() -> None:
    never, began = threading.Event(), time.monotonic()

    def hang() -> list[Finding]:
        never.wait(60)
        return []

    found = run_checks([Check(str(n), hang, 30.0) for n in range(3)], budget_s=1.5)
    never.set()
    assert [finding.level for finding in found] == [RED] * 3
    assert time.monotonic() - began < 15


def test_a_check_that_raises_keeps_what_it_has_found_and_is_red() -> None:
    def fails() -> Iterator[Finding]:
        yield Finding("a", GREEN, "so far so good")
        raise ZeroDivisionError("planted")

    found = run_checks([Check("a", fails, remedy="look there")], budget_s=5)
    assert found == [
        Finding("a", GREEN, "so far so good"),
        Finding("a", RED, "ZeroDivisionError: planted", "look there"),
    ]


def test_what_is_allowed_to_hang_is_not_red() -> None:
    never = threading.Event()
    found = run_checks([Check("MLflow", lambda: [Finding("x", GREEN, str(never.wait(60)))], 0.1, "x", YELLOW)], 1.0)
    never.set()
    assert worst(found) == YELLOW


def test_ranks_share_a_row_and_the_bad_ones_are_named() -> None:
    good = [Finding("disk", GREEN, f"{rank} MB/s") for rank in range(6)]
    findings = [finding for rank in range(6) for finding in placed([good[rank]], rank, f"n{rank}")]
    findings[4] = Finding("disk", RED, "read-only", "remount it", 4, "n4")
    findings += placed([Finding("clocks", YELLOW, "3 s", "chrony")], -1, "all ranks")
    rows = merged(findings)
    assert [(row.check, row.level) for row in rows] == [("disk", RED), ("disk", GREEN), ("clocks", YELLOW)]
    assert rows[0].line() == "red disk on n4 (rank 4): read-only -> remount it"
    assert "n0 (rank 0), n1 (rank 1), n2 (rank 2), n3 (rank 3) and 1 more" in rows[1].line()
    assert rows[2].where == ("all ranks",)
    assert json_report(rows, 6, 6)["ok"] is False and json_report(rows[1:], 6, 6)["ok"] is True
    assert json_report(rows[1:], 6, 6)["level"] == YELLOW


def test_a_finding_that_names_a_rank_keeps_it() -> None:
    named = Finding("clocks", RED, "x", rank=3, host="n3")
    assert placed([named], 0, "n0") == [named]
