"""What runs on a node: where it meets the others, and how it hears of a request to stop."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from launcher import local
from launcher.job import torchrun
from launcher.node import local_address, node_job
from tests.launcher.test_local import job, ranks
from tests.launcher.test_slurm import JOB

VARIABLES = {
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "8",
    "TWINFLOW_HEAD": "10.0.0.1",
    "TWINFLOW_PORT": "29400",
    "TWINFLOW_LOGS": "/shared/runs/pets/logs/job_7_2",
}


def test_every_node_knows_the_meeting_point_and_its_own_address() -> None:
    said = " ".join(torchrun(node_job(JOB, VARIABLES, "10.0.0.2")))
    assert "--nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29400" in said
    assert "is_host=false,timeout=3600,join_timeout=3600 --rdzv-id job_7_2 --local-addr 10.0.0.2" in said
    assert "--log-dir /shared/runs/pets/logs/job_7_2/node_1" in said and "-m trainer.train --config" in said
    first = " ".join(torchrun(node_job(JOB, {**VARIABLES, "SLURM_NODEID": "0"}, "")))
    assert "is_host=true" in first and "--local-addr 10.0.0.1" in first


def test_the_own_address_is_the_one_on_the_way_to_the_first_node() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"


def test_the_stop_file_reaches_the_ranks_and_keeps_their_exit_codes(tmp_path: Path) -> None:
    stop_file = tmp_path / "stop"

    def ask() -> None:
        while not (tmp_path / "up_1").exists() or not (tmp_path / "up_0").exists():
            time.sleep(0.05)
        stop_file.touch()

    threading.Thread(target=ask).start()
    outcome = local.Runner(job(tmp_path, "stop"), stop_file=stop_file, shared_signals=True).run()
    assert (outcome.code, outcome.died) == (0, None) and '"stopped"' in (tmp_path / "status.json").read_text()
    assert ranks(tmp_path) == []
