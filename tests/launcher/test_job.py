from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from launcher.job import Job, environment, processes, threads, torchrun

JOB = Job("trainer.train", ("--config", "c.yaml"), nproc=2, threads=3, log_dir=Path("logs"), root=Path("/root/of/it"))


def test_the_arguments_of_torchrun() -> None:
    assert " ".join(torchrun(JOB)).removeprefix(sys.executable) == (
        " -m torch.distributed.run --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0"
        " --rdzv-conf is_host=true --local-addr 127.0.0.1 --max-restarts 0 --signals-to-handle SIGTERM,SIGINT,SIGUSR1"
        " --log-dir logs --redirects 3 -m trainer.train --config c.yaml"
    )
    assert "127.0.0.1:29501" in torchrun(dataclasses.replace(JOB, port=29501))


def test_our_root_comes_first_and_the_rest_of_the_environment_stays() -> None:
    made = environment(JOB, {"PYTHONPATH": "/other", "HOME": "/home/me", "HF_HUB_OFFLINE": "0"})
    assert made["PYTHONPATH"] == "/root/of/it:/other"
    assert made["HOME"] == "/home/me" and made["OMP_NUM_THREADS"] == "3"
    assert made["HF_HUB_OFFLINE"] == "0"  # what a user sets stays
    assert environment(JOB, {})["PYTHONPATH"] == "/root/of/it"


def test_tools_beside_the_interpreter_are_found_once_on_the_path() -> None:
    tools = str(Path(sys.executable).parent)
    assert environment(JOB, {"PATH": "/usr/bin:/bin"})["PATH"] == f"{tools}:/usr/bin:/bin"
    assert environment(JOB, {"PATH": f"/usr/bin:{tools}"})["PATH"] == f"/usr/bin:{tools}"


def test_ranks_and_threads_follow_the_machine_unless_configured() -> None:
    assert [processes(None, 8), processes(2, 8), processes(None, 0)] == [8, 2, 1]
    assert [threads(None, 8, 2), threads(1, 8, 2), threads(None, 2, 4)] == [4, 1, 1]
