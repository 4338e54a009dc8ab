from __future__ import annotations

import pytest

from launcher import scheduler

SHOWN = (
    "JobId=1 JobName=j.sh UserId=root(0) Priority=4294901759 Nice=0 JobState=COMPLETING Reason=None Dependency=(null) "
    "Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 PreemptEligibleTime=2026-11-20T23:37:44 "
    "PreemptTime={preempted} NodeList=node[2-3] BatchHost=node2 ReqNodeList=(null) ExcNodeList=node1 Comment=a b=c"
)


def test_a_job_as_the_controller_shows_it() -> None:
    job = scheduler.parse_job(SHOWN.format(preempted="None"))
    assert job == scheduler.QueuedJob("COMPLETING", "None", 2, False, "node[2-3]", "node1")
    assert scheduler.parse_job(SHOWN.format(preempted="2026-11-20T23:38:00")).preempted
    assert scheduler.alive(job) and not scheduler.alive(None)


def test_nodes_that_are_down_or_drained_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "n1 idle\nn1 idle\nn2 down*\nn3 drain\nn4 alloc\nn5 drng\nn6 mix\nn7 idle*\nn8 fail\n"
    monkeypatch.setattr(scheduler, "run", lambda *command: listed)
    assert scheduler.usable_nodes(None) == {"n1", "n4", "n6"}


def test_a_missing_or_failing_program_is_one_clear_error() -> None:
    with pytest.raises(scheduler.SchedulerError, match="sbatchx is not installed here: submit from a login node"):
        scheduler.run("sbatchx")
    with pytest.raises(scheduler.SchedulerError, match="false"):
        scheduler.run("false")
