"""Every test here runs on the CPU at tiny size and, marked `gpu`, with the same body on a CUDA GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models import tiny
from trainer.engines.distributed import World, process_group

Places = Callable[[str], Path]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Float32 products are float32 on either."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    kept = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")
    for switch, allowed in zip(switches, kept, strict=True):
        switch.allow_tf32 = allowed


@pytest.fixture
def world(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One rank on the device: NCCL on a GPU, gloo on the CPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group(60.0, device.type) as world:
        yield world


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Folder of a backbone's smallest model."""

    def place(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"gpu_{name}"
        tiny.write(path, tiny.SMALLEST[name], seed=0)
        return path

    return place
