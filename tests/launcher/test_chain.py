"""What follows the end of a job, as a table; and which nodes the next one must do without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.clusters import Cluster
from launcher.chain import Attempt, Chain, Facts, close_silent, decide, excluded

CLUSTER = Cluster(nodes=2, max_failures=2, max_requeues=3)


def start(before: int, after: int, suspects: tuple[str, ...] = (), preempted: bool = False) -> Attempt:
    nodes = ["n1", "n2"]
    return Attempt("001", "7", 0, nodes, 1.0, before, 2.0, after, suspects=list(suspects), preempted=preempted)


GOOD = [start(0, 5)]
SAVED = "stopped on request, saved at step 5"


@pytest.mark.parametrize(
    "facts, attempts, action, state, reason",
    [
        (Facts(state="finished", message="all 9 steps are done"), GOOD, "end", "finished", "all 9 steps"),
        # Whatever else was said: what is done is done.
        (Facts(state="finished", message="done", cancelled=True, trouble="late"), GOOD, "end", "finished", "done"),
        (Facts(state="stopped", warned="warned before the time limit"), GOOD, "requeue", "queued", "time limit"),
        (Facts(state="stopped", message=SAVED, stop=True), GOOD, "end", "stopped", "saved at step 5"),
        (Facts(stop=True, trouble="not saved within 9 s"), GOOD, "end", "failed", "not saved within 9 s.*of step 5"),
        (Facts(state="stopped", cancelled=True), GOOD, "end", "stopped", "scancel.*twinflow submit goes on"),
        (Facts(state="failed", message="no such key", vain=True), GOOD, "end", "failed", "would fail again"),
        (Facts(state="failed", message="S3 is away"), GOOD, "requeue", "queued", "S3 is away"),
        (Facts(trouble="a rank hangs"), GOOD, "requeue", "queued", "a rank hangs"),
        (Facts(), GOOD, "requeue", "queued", "without a word"),
        (Facts(trouble="dead"), [start(0, 5), start(5, 5)], "requeue", "queued", "dead"),
        (Facts(trouble="dead"), [start(5, 5), start(5, 5)], "end", "failed", "2 jobs in a row.*max_failures=2.*dead"),
        # Progress in between ends the row; to make room is no failure.
        (Facts(trouble="dead"), [start(5, 5), start(5, 6), start(6, 6)], "requeue", "queued", "dead"),
        (Facts(state="stopped"), [start(5, 5), start(5, 5, preempted=True)], "requeue", "queued", "saved"),
        (Facts(state="stopped"), [start(n, n + 1) for n in range(4)], "end", "stopped", "max_requeues=3"),
        (Facts(trouble="dead"), [start(n, n + 1) for n in range(4)], "end", "failed", "max_requeues=3.*dead"),
    ],
)
def test_what_follows(facts: Facts, attempts: list[Attempt], action: str, state: str, reason: str) -> None:
    decision = decide(facts, attempts, CLUSTER)
    assert (decision.action, decision.state) == (action, state)
    assert re.search(reason, decision.reason, re.DOTALL), decision.reason


def test_a_node_that_failed_is_left_out_as_long_as_others_do() -> None:
    attempts = [start(0, 1, ("n1",)), start(1, 2, ("n3",))]
    assert excluded(attempts, CLUSTER, {"n1", "n2", "n3", "n4"}) == (["n1", "n3"], "")
    names, warning = excluded(attempts, CLUSTER, {"n1", "n2", "n3"})
    assert names == ["n3"] and "n1 failed, but without it only 1 nodes are usable for 2" in warning  # the newest first
    one = Cluster(nodes=2, max_excluded=1, exclude=["n9"])
    assert excluded(attempts, one, {"n1", "n2", "n3", "n4", "n9"}) == (["n3", "n9"], "")


def test_a_start_that_nobody_ended_counts_with_the_checkpoint_that_it_left() -> None:
    attempt = Attempt("001", "7", 0, ["n1"], 1.0, 3)
    close_silent([attempt], checkpoint=3)
    assert attempt.end is not None and attempt.vain and "without a word" in attempt.reason


def test_a_chain_is_read_as_it_was_written_and_hears_only_its_own_stop(tmp_path: Path) -> None:
    assert Chain.read(tmp_path) is None
    (tmp_path / "slurm").mkdir()
    chain = Chain(tmp_path / "slurm", "002", "8", "running", "", [start(0, 5), start(5, 6)])
    chain.write()
    assert Chain.read(tmp_path) == chain and chain.current() == []
    (tmp_path / "slurm" / "stop.json").write_text('{"submission": "001"}')
    assert not chain.stop_wanted()
    (tmp_path / "slurm" / "stop.json").write_text('{"submission": "002"}')
    assert chain.stop_wanted()
