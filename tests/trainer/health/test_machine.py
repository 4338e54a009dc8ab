"""Versions, limits, shared memory, names and GPUs of a machine, good and bad."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.health import gpu, machine
from trainer.health.findings import GREEN, RED, YELLOW


def test_this_environment_is_what_the_project_asks_for() -> None:
    asked = machine.requirements()
    assert {"torch", "diffusers", "omegaconf"} <= {wanted.name for wanted in asked}
    (found,) = machine.versions(asked, machine.installed(wanted.name for wanted in asked))
    assert found.level == GREEN and f"torch {torch.__version__}" in found.value


def test_a_missing_and_an_old_package_are_both_named() -> None:
    asked = [Requirement("torch>=99"), Requirement("numpy>=1"), Requirement("no-such-package")]
    (found,) = machine.versions(asked, machine.installed(wanted.name for wanted in asked))
    assert found.level == RED and "no-such-package is missing" in found.value
    assert f"torch {torch.__version__} (asked for >=99)" in found.value and "numpy" not in found.value


def test_code_copied_without_its_pyproject_asks_for_the_same(tmp_path: Path) -> None:
    here, there = machine.requirements(), machine.requirements(tmp_path)
    assert {canonicalize_name(wanted.name) for wanted in here} == {canonicalize_name(wanted.name) for wanted in there}


def test_the_shared_memory_of_a_plain_container_is_red_where_loader_processes_need_it(mounted: Path) -> None:
    (found,) = machine.shared_memory(workers=2, folder=str(mounted))
    assert found.level == RED and "--shm-size" in found.remedy
    (found,) = machine.shared_memory(workers=0, folder=str(mounted))
    assert found.level == (RED if torch.cuda.is_available() else YELLOW)
    (found,) = machine.shared_memory(workers=2, folder=str(mounted / "absent"))
    assert found.level == YELLOW


@pytest.mark.parametrize("soft, level", [(200, RED), (1024, YELLOW), (8192, GREEN)])
def test_few_open_files_are_found(soft: int, level: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
        (found,) = machine.limits(several_nodes=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.level == level and f"open files {soft}" in found.value
    assert bool(found.remedy) == (level != GREEN)


def test_a_name_that_leads_back_to_the_machine_itself_matters_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    (found,) = machine.host_name(True, "localhost")
    assert found.level == YELLOW and "GLOO_SOCKET_IFNAME" in found.remedy
    (found,) = machine.host_name(False, "localhost")
    assert found.level == GREEN
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    (found,) = machine.host_name(True, "localhost")
    assert found.level == GREEN


def test_a_name_that_nobody_knows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (found,) = machine.host_name(True, "node-17")
    assert found.level == YELLOW and "node-17" in found.value


@pytest.mark.parametrize(
    "answer, level, word",
    [
        ("570.86.15, 41, 0, Not Active, Not Active, Not Active\n", GREEN, "driver 570.86.15"),
        ("570.86.15, 41, [N/A], Not Active, Not Active, Not Active\n", GREEN, "[N/A]"),
        ("570.86.15, 88, 0, Active, Active, Not Active\n", YELLOW, "hw_thermal_slowdown"),
        ("570.86.15, 41, 3, Not Active, Not Active, Not Active\n", RED, "ECC errors 3"),
        ("Unable to determine the device handle: GPU is lost\n", YELLOW, "GPU is lost"),
    ],
)
def test_the_health_of_a_gpu(answer: str, level: str, word: str) -> None:
    found = gpu.gpu_health(answer)
    assert found.level == level and word in found.value
    assert bool(found.remedy) == (level != GREEN)


def test_the_processor_of_this_machine_is_described_and_measured() -> None:
    device = torch.device("cpu")
    (found,) = gpu.processor(device)
    assert found.level == GREEN or "sees no GPU" in found.value
    assert 1e-4 < gpu.speed(device) < 1e2
