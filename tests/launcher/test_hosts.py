"""Ranks on different hosts: each node of a real SLURM in a network namespace of its own, and one cable pulled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.clusters import Cluster
from tests.launcher.network import INTERFACE, Network, why_not
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.slurm_runs import ROOT, SlurmRun

BUDGET_S = 150.0
"""From the pull to the first step of the next start: the node's silence (10 s and SLURM's own rounds), the requeue (6 s),
and the start of the ranks on a busy machine."""
REASON = why_not() or (f"no SLURM here, {', '.join(missing_programs())} missing" if missing_programs() else "")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with Network(3) as hosts:
        yield hosts


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_pulled_cable_is_noticed_told_and_the_run_goes_on_elsewhere(
    assets: Path, network: Network, tmp_path: Path
) -> None:
    cluster = Cluster(environment={"GLOO_SOCKET_IFNAME": INTERFACE}, interface=INTERFACE)
    with SlurmCluster(tmp_path / "slurm", network=network) as slurm:
        run = SlurmRun(slurm, assets, tmp_path / "run", cluster=cluster, steps=20, pace_s=0.3)
        run.submit()
        run.until(lambda: run.steps_done() >= 5, "step 5")
        network.pull(2)
        pulled = time.monotonic()
        run.until(lambda: len(run.chain().attempts) > 1, "a second start", BUDGET_S)
        again = run.steps_done()
        run.until(lambda: run.steps_done() > again, "progress of the second start", BUDGET_S)
        seconds = time.monotonic() - pulled
        chain = run.wait()
        assert seconds < BUDGET_S, run.words()
        assert chain.state == "finished" and run.status()["step"] == 20, run.words()
        first, *_, last = chain.attempts
        assert first.nodes == ["node1", "node2"] and last.nodes == ["node1", "node3"], run.words()
        assert first.reason and first.checkpoint_after >= 3
        assert run.parameters()


def test_plain_torchrun_trains_across_two_hosts(assets: Path, network: Network, tmp_path: Path) -> None:
    """As README says, without any launcher of ours."""
    run = SlurmRun(None, assets, tmp_path / "run", steps=3)  # type: ignore[arg-type]
    settings = [f"{key}={value}" for key, value in run.settings().items()]
    processes = []
    for host in (1, 2):
        rules = f"is_host={'true' if host == 1 else 'false'}"
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        meeting = ["--rdzv-endpoint", f"{network.address(1)}:29400", "--rdzv-conf", rules, "--rdzv-id", "x"]
        local = ["--local-addr", network.address(host), "-m", "trainer.train", "--config", "configs/smoke.yaml"]
        places = [f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", f"GLOO_SOCKET_IFNAME={INTERFACE}"]
        command = network.on(host, "env", *places, sys.executable, *torchrun, *meeting, *local, *settings)
        processes.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert run.status()["state"] == "finished" and run.parameters()
