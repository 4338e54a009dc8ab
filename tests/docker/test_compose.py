"""The image's and the compose file's texts, and the services as plain processes (no Docker engine is needed)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import load
from tests.docker import plain_services

ROOT = plain_services.ROOT
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def test_every_service_waits_for_services_that_can_become_healthy() -> None:
    services = plain_services.services()
    assert set(services) == {"store", "setup", "mlflow", "trainer"}
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[needed]


def test_no_service_but_the_trainer_ends_by_itself() -> None:
    """--abort-on-container-exit would take any end for the end of the run."""
    setup = plain_services.services()["setup"]
    assert setup["command"][-1].rstrip().endswith("exec sleep infinity")


def test_nothing_is_published_beyond_this_machine() -> None:
    published = [port for service in plain_services.services().values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_trainers_command_is_a_valid_configuration() -> None:
    words = shlex.split(plain_services.services()["trainer"]["command"][-1])
    settings = words[words.index("train") + 1 :]
    config = load.load([str(ROOT / settings[0])], settings[1:])
    assert config.tracking.uri == "http://mlflow:5000"
    assert config.data.manifest.startswith("s3://digits/")


def test_the_image_runs_as_nobody_special_and_holds_no_secret() -> None:
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"(?i)secret|password|access_key|token", DOCKERFILE)
    base = re.search(r"^ARG BASE=(\S+)\nFROM \$\{BASE\}$", DOCKERFILE, re.MULTILINE)
    assert base and base[1].startswith("nvidia/cuda:") and not base[1].endswith(":latest")


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    assert DOCKERFILE.index("--requirement requirements.txt") < DOCKERFILE.index("COPY . .")


def test_requirements_are_those_of_the_project() -> None:
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), str(ROOT / "pyproject.toml"), "gpu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("torch>=") for line in printed)
    assert any(line.startswith("flash-attn") for line in printed)
    assert not any(line.startswith("pytest") for line in printed)


@pytest.mark.parametrize(
    ("arguments", "printed"), [(["echo", "a b"], "a b"), (["config", "check"], "twinflow config check")]
)
def test_the_entrypoint_runs_programs_and_words_of_the_command_line(
    tmp_path: Path, arguments: list[str], printed: str
) -> None:
    shown = tmp_path / "twinflow"
    shown.write_text('#!/bin/sh\necho "twinflow $*"\n')
    shown.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/nowhere"}
    command = [str(ROOT / "docker" / "entrypoint.sh"), *arguments]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == printed


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_docker_compose_accepts_the_file() -> None:
    command = [
        "docker-compose",
        "--project-directory",
        str(ROOT),
        "--file",
        str(plain_services.COMPOSE),
        "config",
        "-q",
    ]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_the_services_train_from_the_store_into_the_tracking_server(tmp_path: Path) -> None:
    short = (
        "train.steps=4",
        "schedule.warmup_steps=2",
        "checkpoint.every=2",
        "evaluate.name=null",
        "sample.presets=[1nfe]",
        "sample.columns=2",
    )
    status, artifacts = plain_services.run(tmp_path, *short)
    assert status == 0, (tmp_path / "trainer.log").read_text()[-3000:]
    summary = json.loads((tmp_path / "outputs" / "smoke" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert any("1nfe_step00000004" in name for name in artifacts), artifacts
