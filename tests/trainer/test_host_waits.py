"""No step waits for the device, except at logging and where the ranks agree (counted, tests/trainer/host_waits.py)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Ema, Lora, Optimizer
from models import lora, tiny
from tests.trainer.bare_run import EVEN, bare_run, unloaded
from tests.trainer.host_waits import HostWaits
from trainer import loop
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.networks import Networks
from trainer.engines.recompute import checkpoint_blocks
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import ONLINE, TEACHER
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull
from trainer.observe.flops import PassFlops
from trainer.observe.metrics import Tally

ROWS = 4
OBJECTIVES: dict[str, Any] = {
    "twinflow": TwinFlow(order=2, teacher="online", roles={**EVEN}, enhanced_ratio=0.5),
    "image-free, of an average": TwinFlow(order=1, roles={**EVEN}, enhanced_ratio=0.5, image_free=True, teacher="ema"),
    "frozen teacher": TwinFlow(order=1, roles={**EVEN}, enhanced_ratio=4.0, teacher="frozen"),
    "order 0": TwinFlow(order=0, teacher="online", roles={**EVEN}),
    "twinflow full": TwinFlowFull(order=1, enhanced_ratio=0.5),
    "rcgm": RCGM(order=1),
    "flow matching": FlowMatching(),
}


@dataclass
class MetaEngine:
    """The networks of an engine over meta parameters; its update is counted on the CPU (below)."""

    nets: Any
    device: torch.device = field(default_factory=lambda: torch.device("meta"))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> Tensor:
        return torch.zeros((), device="meta")

    def update_ema(self) -> None:
        """As in step."""


def run_on_meta(backbone: Any, objective: Any, adapters: bool) -> SimpleNamespace:
    """With recomputing blocks, and a second module where the teacher needs one."""
    if adapters:
        lora.add(backbone, Lora(rank=2), objective.teacher)
    for name in backbone.idle_parameters():
        backbone.get_parameter(name).requires_grad_(False)
    separate = objective.teacher != "online" and not adapters
    teacher = copy.deepcopy(backbone).requires_grad_(False) if separate else None
    flops = PassFlops(backbone)
    checkpoint_blocks(backbone, every=1, group=1, keep="nothing")
    return bare_run(backbone, flops, objective, MetaEngine(Networks(backbone, teacher)), ROWS)


def bring_tables(run: SimpleNamespace) -> None:
    """Tables of positions come to the device in the first pass of every module."""
    x, cond, _ = run.encoding.encode(run.batch)
    times = torch.zeros(ROWS, device="meta")
    with torch.no_grad(), run.nets.aside():
        for kind in (ONLINE, TEACHER):
            run.nets.velocity(x, times, times, cond, torch.full((ROWS,), kind))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def place(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"host_waits_{name}"
        tiny.write(path, tiny.SMALLEST[name], seed=0)
        return path

    return place


CASES = [
    *(("qwen_image", objective, False) for objective in OBJECTIVES),
    *((name, "twinflow", False) for name in sorted(tiny.SMALLEST) if name != "qwen_image"),
    ("qwen_image", "twinflow", True),
    ("qwen_image", "image-free, of an average", True),
]


@pytest.mark.parametrize(("name", "objective", "adapters"), CASES)
def test_a_step_never_waits_for_the_device(
    places: Callable[[str], Path], name: str, objective: str, adapters: bool
) -> None:
    run = run_on_meta(unloaded(name, places(name)), OBJECTIVES[objective], adapters)
    bring_tables(run)
    with HostWaits() as waits:
        loop.train_step(run, run.batch, Tally("meta"))
    assert waits.found == []
    assert run.nets.counts.graded_rows == ROWS * run.objective.rows_per_sample


def test_editing_with_a_time_of_references_waits_once_a_pass(tmp_path: Path) -> None:
    """Qwen-Image-Edit-2511: diffusers copies to the device, in every pass, which tokens are references."""
    tiny.write(tmp_path / "model", "edit_plus", seed=0)
    backbone = unloaded("qwen_image", tmp_path / "model")
    x, cond, _ = (part.to("meta") for part in tiny.example(backbone, 2))
    cond, t = dataclasses.replace(cond, references=(x,)), torch.zeros(2, device="meta")
    backbone(x, t, None, cond)
    with HostWaits() as waits:
        backbone(x, t, None, cond)
    assert len(waits.found) == 1
    assert waits.found[0].startswith("tensor(..., device=) at qwen_image.py")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"checkpoint_group": 2, "block_dtype": "bfloat16", "keep_gathered": True}])
@pytest.mark.usefixtures("one_rank")
def test_neither_passes_nor_updates_of_the_engine_wait(places: Callable[[str], Path], options: dict[str, Any]) -> None:
    backbone = unloaded("qwen_image", places("qwen_image"))
    backbone.to_empty(device="cpu").load(str(places("qwen_image")))
    x, cond, _ = tiny.example(backbone, 2)
    t = torch.tensor([0.9, -0.3])
    engine = FSDP2(FSDP2Options(**options), backbone, Optimizer(max_grad_norm=1.0), Ema(decay=0.9), "online")

    def step() -> None:
        with torch.no_grad():
            engine.nets.velocity(x, t, t, cond)
        engine.backward(engine.nets.velocity(x, t, t, cond).square().mean())
        engine.step(1e-4)
        engine.update_ema()

    step()
    with HostWaits("cpu") as waits:
        step()
    assert waits.found == []


def test_the_counter_sees_what_waits() -> None:
    far, near, index = torch.zeros(3, 2, device="meta"), torch.zeros(3, 2), torch.tensor([0, 1])

    def raises(read: Callable[[], Any]) -> None:
        with pytest.raises(NotImplementedError):
            read()

    waiting: list[Callable[[], Any]] = [
        lambda: float(far.sum()),
        lambda: bool(far.any()),
        lambda: far.tolist(),
        lambda: far.cpu(),
        lambda: far.to("cpu", non_blocking=True),
        lambda: raises(lambda: far[far > 0]),
        lambda: raises(lambda: far.nonzero()),
        lambda: raises(lambda: torch.equal(far, far)),
        lambda: far[index],
        lambda: far[[0, 1]],
        lambda: far.index_select(0, index),
        lambda: near.to("meta"),
        lambda: far.copy_(near),
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: torch.as_tensor(3, device="meta"),
        lambda: far.new_tensor([1.0]),
    ]
    for wait in waiting:
        with HostWaits() as waits:
            wait()
        assert len(waits.found) == 1, waits.found
        assert "test_host_waits.py" in waits.found[0]
    with HostWaits() as waits:
        near.to("meta", non_blocking=True)
        far[index.to("meta", non_blocking=True)]
        far.copy_(near, non_blocking=True)
        torch.full((2,), 3.0, device="meta").add(far.new_zeros(()))
        torch.arange(3, device="meta")
        float(near.sum()), near[near > 0], near[index]
    assert waits.found == []
    with HostWaits("cpu") as waits:
        float(near.sum())
        near.clone()
    assert len(waits.found) == 1
