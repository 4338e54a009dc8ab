"""The processor that a rank computes on: its health by nvidia-smi, its memory, its speed."""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Iterator

import torch

from trainer.health.findings import GREEN, RED, YELLOW, Finding

QUERY = (
    "driver_version",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
_TIMEOUT_S = 10.0
_TAKEN, _MOSTLY_TAKEN = 0.9, 0.5
"""Shares of the memory that should, and must, be free before the model is loaded."""
_PRODUCT_S = 0.1


def processor(device: torch.device) -> Iterator[Finding]:
    """What this rank computes on; red where GPUs are there that PyTorch cannot use."""
    if device.type == "cuda":
        yield from _gpu(device)
    elif os.path.exists("/dev/nvidia0") and not torch.cuda.is_available():
        yield Finding(
            "GPU",
            RED,
            f"/dev/nvidia0 is there, but PyTorch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
            "install a PyTorch built for CUDA that the driver supports; nvidia-smi shows the driver's version",
        )
    else:
        yield Finding("GPU", GREEN, f"none in use; {len(os.sched_getaffinity(0))} CPU cores")


def _gpu(device: torch.device) -> Iterator[Finding]:
    known = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    value = f"{known.name}, {free / 2**30:.0f} GiB free of {total / 2**30:.0f}"
    level = GREEN if free >= _TAKEN * total else YELLOW if free >= _MOSTLY_TAKEN * total else RED
    remedy = "" if level == GREEN else "end what else runs on this GPU (nvidia-smi shows it), or ask for whole nodes"
    yield Finding("GPU", level, value, remedy)
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(QUERY)}",
        "--format=csv,noheader,nounits",
        "-i",
        f"GPU-{known.uuid}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("GPU health", YELLOW, f"nvidia-smi: {error}", "run nvidia-smi on the node; restart its driver")
        return
    yield gpu_health(done.stdout)


def gpu_health(text: str) -> Finding:
    """The verdict on one line of nvidia-smi's answer to QUERY. Fields that a GPU does not know read [N/A]."""
    row = next(iter(csv.reader(text.strip().splitlines(), skipinitialspace=True)), [])
    if len(row) != len(QUERY):
        return Finding("GPU health", YELLOW, f"nvidia-smi said {text.strip()!r:.100}", "run nvidia-smi on the node")
    values = dict(zip(QUERY, row, strict=True))
    driver, temperature, errors = (values[name] for name in QUERY[:3])
    slow = [name.rpartition(".")[2] for name in QUERY[3:] if values[name] == "Active"]
    value = f"driver {driver}, {temperature} C, uncorrected ECC errors {errors}"
    if errors.isdigit() and int(errors):
        return Finding("GPU health", RED, value, "drain the node: reset the GPU or replace it")
    if slow:
        remedy = "check the node's cooling and power supply; this GPU slows all others down"
        return Finding("GPU health", YELLOW, f"{value}; slowed down: {', '.join(slow)}", remedy)
    return Finding("GPU health", GREEN, value)


def speed(device: torch.device) -> float:
    """Matrix products on this device [1e12 operations a second]: in bfloat16 on a GPU, in float32 on the CPU."""
    edge, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a = torch.ones(edge, edge, device=device, dtype=dtype)
    torch.mm(a, a)
    _synchronize(device)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < _PRODUCT_S:
        torch.mm(a, a)
        _synchronize(device)
        products += 1
    return 2 * edge**3 * products / (time.perf_counter() - began) / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
