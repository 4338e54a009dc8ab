"""This machine: versions, limits, shared memory, name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from trainer.health.findings import GREEN, RED, YELLOW, Finding

ROOT = Path(__file__).resolve().parents[2]
_DOCKER_SHM = 64 << 20
"""Bytes of /dev/shm in a container that asks for none."""
_COMFORTABLE_SHM = 1 << 30
_FILES, _FEW_FILES = 4096, 256


def requirements(root: Path = ROOT) -> list[Requirement]:
    """What pyproject.toml asks for, or the installed package where the code was copied without it.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = root / "pyproject.toml"
    if path.exists():
        asked = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            asked = importlib.metadata.requires("twinflow-trainer") or []
        except importlib.metadata.PackageNotFoundError as error:
            raise FileNotFoundError(f"{path} is absent, and the package is not installed") from error
    found = [Requirement(text) for text in asked]
    return [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate({"extra": ""})]


def installed(names: Iterable[str]) -> dict[str, str]:
    """Version of every distribution that is there."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def software() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | installed(("diffusers", "transformers", "deepspeed", "flash-attn", "safetensors"))


def versions(asked: Iterable[Requirement], found: dict[str, str]) -> Iterator[Finding]:
    """Whether `found` is what is `asked` for."""
    wrong = []
    for wanted in asked:
        version = found.get(wanted.name)
        if version is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} (asked for {wanted.specifier})")
    own = ", ".join(f"{name} {version}" for name, version in software().items())
    if wrong:
        yield Finding(
            "versions", RED, "; ".join(wrong), "install what pyproject.toml asks for: make setup, or the image"
        )
    else:
        yield Finding("versions", GREEN, own)


def shared_memory(workers: int, folder: str = "/dev/shm") -> Iterator[Finding]:
    """Loader processes hand batches over in shared memory, NCCL talks through it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        yield Finding("shared memory", YELLOW, f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}")
        return
    value = f"{folder}: {usage.free / 1e9:.2f} GB free of {usage.total / 1e9:.2f}"
    remedy = "start the container with --shm-size=16g or --ipc=host, or remount with a larger size"
    level = GREEN
    if usage.free < _COMFORTABLE_SHM:
        level = RED if usage.free <= _DOCKER_SHM and (workers or torch.cuda.is_available()) else YELLOW
    yield Finding("shared memory", level, value, remedy if level != GREEN else "")


def limits(several_nodes: bool) -> Iterator[Finding]:
    """Open files, processes, and on GPUs of several nodes locked memory, which RDMA registers."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    value = f"open files {_limit(files)}, processes {_limit(processes)}, locked memory {_limit(locked)}"
    problems, level = [], GREEN
    if files != resource.RLIM_INFINITY and files < _FILES:
        level = RED if files < _FEW_FILES else YELLOW
        problems.append("ulimit -n 65536 (loader processes and S3 connections are files)")
    if several_nodes and torch.cuda.is_available() and locked != resource.RLIM_INFINITY:
        level = max(level, YELLOW, key=(GREEN, YELLOW, RED).index)
        problems.append(
            "ulimit -l unlimited (InfiniBand and EFA lock their buffers; else NCCL falls back to TCP or fails)"
        )
    yield Finding("limits", level, value, "; ".join(problems))


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def host_name(several_nodes: bool, name: str | None = None) -> Iterator[Finding]:
    """Whether this machine's name leads to an address that others can use; gloo takes it unless it is told otherwise."""
    name = name or socket.gethostname()
    remedy = "add the name to DNS or /etc/hosts with the cluster's address, or set GLOO_SOCKET_IFNAME"
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        told = "GLOO_SOCKET_IFNAME" in os.environ or not several_nodes
        yield Finding("host name", GREEN if told else YELLOW, f"{name}: {error}", "" if told else remedy)
        return
    loops = all(address.startswith("127.") or address == "::1" for address in addresses)
    bad = loops and several_nodes and "GLOO_SOCKET_IFNAME" not in os.environ
    yield Finding("host name", YELLOW if bad else GREEN, f"{name} is {', '.join(addresses)}", remedy if bad else "")
