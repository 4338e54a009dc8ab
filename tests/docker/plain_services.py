"""The services of docker/compose.yaml as plain processes on this machine: python -m tests.docker.plain_services FOLDER.

A stand-in for `docker compose up` where there is no engine. Commands, environments and order are the file's own; only
host names, ports and paths inside containers are replaced, and moto stands for MinIO.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def services() -> dict[str, dict[str, Any]]:
    """The file's services with every variable at its default."""
    described: dict[str, dict[str, Any]] = yaml.safe_load(_DEFAULT.sub(r"\1", COMPOSE.read_text()))["services"]
    return described


def run(folder: Path, *overrides: str, timeout_s: float = 1200.0) -> tuple[int, list[str]]:
    """Start store, mlflow, setup and trainer as depends_on says; the trainer's exit status, and the names of the
    objects that the run left in the store's bucket for artifacts.

    overrides: appended to the trainer's command. folder: home, temporary files and logs of the processes; the run's
    results go to folder/outputs.
    """
    described, store_port, mlflow_port = services(), _free_port(), _free_port()
    (folder / "outputs").mkdir(parents=True)
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store_port)]
    replaced = {
        "store:9000": f"127.0.0.1:{store_port}",
        "mlflow:5000": f"127.0.0.1:{mlflow_port}",
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={mlflow_port}",
        "127.0.0.1:5000": f"127.0.0.1:{mlflow_port}",
        "/home/trainer/mlflow.db": str(folder / "mlflow.db"),
        "/tmp/ready": str(folder / "ready"),
        "docker/make_buckets.py": str(ROOT / "docker/make_buckets.py"),
        "configs/smoke.yaml": str(ROOT / "configs/smoke.yaml"),
    }

    def translated(text: str) -> str:
        return re.sub("|".join(map(re.escape, replaced)), lambda match: replaced[match[0]], text)

    def start(name: str, *more: str) -> Any:
        arguments = [translated(part) for part in described[name]["command"]]
        arguments[-1] = " ".join([arguments[-1], *more])
        environment = {key: translated(value) for key, value in described[name]["environment"].items()}
        return _process(name, arguments, environment, folder)

    with ExitStack() as stack:
        store = stack.enter_context(_process("store", moto, {}, folder))
        _wait("store", store, lambda: _answers(f"http://127.0.0.1:{store_port}/moto-api/"), 60, folder)
        mlflow, setup = stack.enter_context(start("mlflow")), stack.enter_context(start("setup"))
        _wait("setup", setup, lambda: (folder / "ready").exists(), 120, folder)
        _wait("mlflow", mlflow, lambda: _answers(f"http://127.0.0.1:{mlflow_port}/health"), 180, folder)
        trainer: subprocess.Popen[bytes] = stack.enter_context(start("trainer", *overrides))
        status = trainer.wait(timeout_s)
        return status, _objects(f"http://127.0.0.1:{store_port}", "mlflow")


@contextmanager
def _process(
    name: str, arguments: list[str], environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A service in the folder, output in NAME.log; it and its children end with the context."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment}
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(arguments, cwd=folder, env=own, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        for signal in (15, 9):
            try:
                os.killpg(process.pid, signal)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _objects(endpoint_url: str, bucket: str) -> list[str]:
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint_url, **keys)
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ())]


def _wait(name: str, process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float, folder: Path) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{name} did not become healthy:\n{(folder / f'{name}.log').read_text()[-3000:]}")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    status, artifacts = run(target, *sys.argv[2:])
    print((target / "trainer.log").read_text()[-4000:])
    print(f"{len(artifacts)} artifacts in the store, the last: {artifacts[-1:]}")
    raise SystemExit(status)
