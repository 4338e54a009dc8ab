"""A short part of the chain's life under a real SLURM; tests/benchmarks/slurm.py has all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.chain import Chain
from launcher.status import describe
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.slurm_runs import ROOT, SlurmRun
from tests.launcher.slurm_scenarios import SCENARIOS, nothing
from tests.launcher.slurm_verdict import problems

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no SLURM here, {', '.join(missing_programs())} missing: tests/launcher/install_slurm.sh as root on Debian",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quiet(slurm: SlurmCluster, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A run that nothing happens to."""
    run = SlurmRun(slurm, assets, tmp_path_factory.mktemp("runs") / "quiet", pace_s=0.0)
    nothing(run)
    return run


def test_a_submitted_run_trains_on_two_nodes_and_tells_it(quiet: SlurmRun) -> None:
    chain = quiet.chain()
    assert chain.state == "finished" and chain.attempts[0].nodes == ["node1", "node2"], quiet.words()
    with quiet.here():
        said = "\n".join(describe(quiet.folder))
    assert "finished, step 12 of 12" in said and "job 1.0 on node1,node2: steps 0 to 12" in said and "completed" in said
    logs = sorted(path.parent.name for path in quiet.folder.glob("logs/job_1_0/node_*/torchrun.log"))
    assert logs == ["node_0", "node_1"]
    assert len(list(quiet.folder.glob("logs/job_1_0/node_*/*/attempt_0/0/stderr.log"))) == 2


def test_a_submitted_run_looks_at_its_nodes_before_it_loads_the_model(quiet: SlurmRun) -> None:
    entries = [json.loads(line) for line in (quiet.folder / "journal.jsonl").read_text().splitlines()]
    looks = [entry for entry in entries if entry.get("what") == "preflight"]
    assert len(looks) == 1 and looks[0]["level"] in ("green", "yellow"), looks
    assert entries.index(looks[0]) < min(n for n, entry in enumerate(entries) if entry["kind"] == "metrics")


def test_doctor_in_an_allocation_looks_at_all_its_nodes(slurm: SlurmCluster) -> None:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--quick", "--nproc", "1"]
    done = subprocess.run(
        ["salloc", "--nodes=2", "--exclusive", *command],
        cwd=ROOT,
        env={**slurm.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert (report["ranks"], report["nodes"]) == (2, 2)
    limits = next(row for row in report["findings"] if row["check"] == "limits")
    assert sorted(where.split()[0] for where in limits["where"]) == ["node1", "node2"]


def test_a_warned_job_saves_requeues_itself_and_ends_bit_equal(quiet: SlurmRun, tmp_path: Path) -> None:
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == "time-limit warning")
    run = SlurmRun(quiet.slurm, quiet.assets, tmp_path / "run")
    scenario.happen(run)
    assert problems(run, scenario, quiet.parameters()) == []


def test_train_in_an_allocation_uses_all_its_nodes(quiet: SlurmRun, tmp_path: Path) -> None:
    run = SlurmRun(quiet.slurm, quiet.assets, tmp_path / "run")
    settings = [f"{key}={value}" for key, value in run.settings().items()]
    command = [sys.executable, "-m", "launcher.cli", "train", "configs/smoke.yaml", *settings]
    environment = {**quiet.slurm.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["salloc", "--nodes=2", "--exclusive", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr + run.words()
    chain = Chain.read(run.folder)
    assert chain is not None and chain.state == "finished" and len(chain.attempts[0].nodes) == 2
    found, expected = run.parameters(), quiet.parameters()
    assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected)
