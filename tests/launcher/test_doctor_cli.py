"""`twinflow doctor`: the ranks that it starts, here and on all nodes of an allocation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from launcher import doctor_cli, examine, scheduler
from launcher.cli import app

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run; each ends with status 1."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(doctor_cli.subprocess, "run", run)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return commands


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_configuration_and_its_ranks_are_passed_on_and_the_status_comes_back(started: list[list[str]]) -> None:
    result = invoke(str(SMOKE), "run.name=x", "--quick")
    assert result.exit_code == 1
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc-per-node 2" in " ".join(command)
    assert command[-5:] == ["trainer.doctor", "--config", str(SMOKE), "--quick", "run.name=x"]


def test_without_a_configuration_one_process_looks_at_this_machine(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_cli.local, "count_gpus", lambda: 0)
    invoke()
    invoke("--nproc", "3")
    assert started[0] == [sys.executable, "-m", "trainer.doctor"]
    assert "--nproc-per-node 3" in " ".join(started[1])


def test_overrides_without_a_file_are_refused(started: list[list[str]]) -> None:
    assert invoke("run.name=x").exit_code == 2 and started == []


def test_in_an_allocation_srun_starts_one_process_per_node(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_NUM_NODES": "3", "JOB_NODELIST": "gpu[1-3]", "JOB_ID": "123456"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(scheduler, "hostnames", lambda nodes: ["gpu1", "gpu2", "gpu3"])
    monkeypatch.setattr(scheduler, "node_address", lambda node: f"{node}.cluster")
    invoke("--nproc", "8", "--quick")
    command = " ".join(started[0])
    assert command.startswith("srun --nodes=3 --ntasks=3 --ntasks-per-node=1")
    assert command.endswith("-m launcher.examine gpu1.cluster 23456 8 trainer.doctor --quick")


@pytest.mark.parametrize("number", [0, 2])
def test_every_node_becomes_its_torchrun(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[str] = []
    monkeypatch.setattr(examine.os, "execv", lambda path, arguments: became.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["examine", "127.0.0.1", "23456", "8", "trainer.doctor", "--quick"])
    for name, value in {"NODEID": str(number), "NNODES": "3", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    examine.main()
    line = " ".join(became)
    assert "--nnodes 3 --nproc-per-node 8" in line and "--rdzv-endpoint 127.0.0.1:23456" in line
    assert f"is_host={str(number == 0).lower()}" in line and line.endswith("-m trainer.doctor --quick")
