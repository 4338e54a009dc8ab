"""Qwen-Image with random weights on an engine, at its published size or tiny, and what is asked of it: steps, times."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.schema import Ema, Lora, Optimizer
from models import lora
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from models.tiny_pipelines.qwen_image import TRANSFORMERS
from models.weights import ADAPTER
from tests.benchmarks.gpu_ledger import NotHere
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.sharding import local_part, sharded_parameters
from trainer.objectives.objective import Objective, Rows
from trainer.objectives.passes import Runner, run_packed
from trainer.objectives.roles import assign
from trainer.observe.counting import CountedNets
from trainer.observe.flops import PassFlops

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
_DEVIATION = 0.02


@dataclass(frozen=True)
class Size:
    """config: of the transformer; pixels: edges of images; rows: of a graded pass at each; text: padded tokens."""

    config: dict[str, Any]
    pixels: tuple[int, ...]
    rows: tuple[int, ...]
    text: int
    rank: int


REAL = Size({"num_layers": 60}, (512, 1024), (16, 4), 256, 64)
TINY = Size(TRANSFORMERS["pipeline"], (64, 128), (4, 4), 6, 2)


@dataclass
class Subject:
    """An engine over Qwen-Image. engine_options: of FSDP2, as they were given; bytes: of its state, by arithmetic;
    next_step: keys the random numbers of a step."""

    backbone: QwenImage
    engine: FSDP2
    objective: Objective
    size: Size
    engine_options: dict[str, Any]
    attention: str
    bytes: dict[str, int]
    nets: CountedNets = field(init=False)
    next_step: int = 0

    def __post_init__(self) -> None:
        self.nets = CountedNets(self.engine.nets, PassFlops(self.backbone))

    def samples(self, rows: int, pixels: int) -> tuple[Tensor, Conditioning, Conditioning]:
        """Latents and conditions, of a quarter to all of the text tokens, and null conditions of one."""
        device = self.engine.device
        shape = self.backbone.latent_shape((pixels, pixels))
        real = (torch.arange(rows, device=device) % 4 + 1) * self.size.text // 4
        mask = torch.arange(self.size.text, device=device) < real[:, None]
        embeds = torch.randn(rows, self.size.text, self.backbone.text_width, device=device)
        null = Conditioning(embeds[:, :1], mask[:, :1])
        return torch.randn(rows, *shape, device=device), Conditioning(embeds, mask), null

    def graded_pass(self, rows: int, pixels: int) -> int:
        """Forward and backward; FLOPs executed, with those of recomputation."""
        x, cond, _ = self.samples(rows, pixels)
        t = torch.linspace(-0.9, 0.9, rows, device=x.device)
        self.engine.backward(self.nets.velocity(x, t, t / 2, cond).square().mean())
        return self._executed(pixels)

    def step(
        self,
        rows: int,
        pixels: int,
        micro_batch_size: int,
        objective: Objective | None = None,
        run: Runner = run_packed,
    ) -> int:
        """Draws, targets, loss, backward, update, average; FLOPs executed in networks."""
        objective = objective or self.objective
        x, cond, null = self.samples(rows, pixels)
        roles = assign(objective.role_weights, self.next_step, rows)
        draws = objective.draw(Rows(0, self.next_step, torch.arange(rows), roles), x.shape[1:], x.device, x.dtype)
        given = {} if run is run_packed else {"run": run}
        targets = objective.targets(self.nets, x, cond, null, roles, draws, chunk_rows=micro_batch_size, **given)
        for begin in range(0, len(targets), micro_batch_size):
            part = targets[begin : begin + micro_batch_size]
            self.engine.backward(objective.loss(self.nets, part).total)
        self.update()
        self.next_step += 1
        return self._executed(pixels)

    def update(self) -> None:
        self.engine.step(1e-7)
        self.engine.update_ema()

    def _executed(self, pixels: int) -> int:
        counts = self.nets.drain()
        if not self.engine_options.get("activation_checkpointing", True):
            return counts.flops
        tokens = self.backbone.tokens(self.backbone.latent_shape((pixels, pixels)))
        return counts.flops + self.backbone.recompute_flops(counts.graded_rows, tokens, self.size.text)


class Builder:
    """Builds subjects one at a time: the one before is freed first, the one that fits is kept."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self._kept: tuple[Any, Subject] | None = None

    def get(
        self, objective: Objective, layers: int, adapters: bool = False, attention: str = "native", **options: Any
    ) -> Subject:
        """attention: of models/attention.py. Raises NotHere where that kernel does not run here."""
        key = (objective, layers, adapters, attention, options)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self.free()
        backbone = QwenImage({**self.size.config, "num_layers": layers}, device="meta")
        try:
            backbone.use_attention(attention, self.device, torch.bfloat16)
        except ValueError as reason:
            raise NotHere(str(reason)) from reason
        if adapters:
            lora.add(backbone, Lora(rank=self.size.rank), objective.teacher)
        ema = Ema(decay=0.99 if objective.teacher == "ema" else 0.0)
        expected = state_bytes(backbone, adapters, averages=bool(ema.decay))
        base = {"base_dtype": "bfloat16"} if adapters else {}
        made = FSDP2Options(block_dtype="bfloat16", **base, **options)
        engine = FSDP2(made, backbone, Optimizer(), ema, objective.teacher, self.device, load=scatter)
        subject = Subject(backbone, engine, objective, self.size, options, attention, expected)
        self._kept = (key, subject)
        return subject

    def free(self) -> None:
        """Before a subject is built, and after memory has run out."""
        self._kept = None
        torch.compiler.reset()  # compiled code holds the blocks that it was made for
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def scatter(module: nn.Module) -> None:
    """Random weights, drawn where the shards lie; gains of norms 1."""
    for name, parameter in sharded_parameters(module).items():
        local = local_part(parameter)
        if local.dim() == 1 and name.endswith("weight"):
            local.fill_(1.0)
        else:
            local.normal_(0.0, _DEVIATION)


def state_bytes(backbone: QwenImage, adapters: bool, averages: bool) -> dict[str, int]:
    """Bytes by arithmetic from the shapes: parameters, moments, averages, and gradients from the first backward on.

    Master weights, moments, averages and gradients are float32, the frozen base of adapters is bfloat16 in the blocks.
    """
    idle = set(backbone.idle_parameters())
    in_blocks = {id(p) for unit in backbone.shard_units() for p in unit.parameters()}
    found = dict.fromkeys(("parameters", "moments", "averages", "gradients"), 0)
    for name, parameter in backbone.named_parameters():
        adapter = ADAPTER.search(name)
        trained = lora.Adapters.holds(name) if adapters else name not in idle
        size = parameter.numel()
        halved = adapters and adapter is None and id(parameter) in in_blocks
        if adapters and adapter is not None and not trained:
            found["averages"] += 4 * size
            continue
        found["parameters"] += (2 if halved else 4) * size
        if trained:
            found["moments"] += 8 * size
            found["gradients"] += 4 * size
            found["averages"] += 4 * size if averages and not adapters else 0
    return found


def held_bytes(engine: FSDP2) -> int:
    """Bytes of the state that the engine holds between steps, counted in its own tensors."""
    tensors = [part.local for part in (*engine.parts(), *engine.unsaved())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def using(sdpa: str | None) -> Iterator[None]:
    """Within the context PyTorch's attention is this kernel; None: whatever it chooses."""
    with sdpa_kernel(SDPA[sdpa]) if sdpa else contextlib.nullcontext():
        yield


def seconds(action: Callable[[], Any], device: torch.device, warm_up: int, repeats: int) -> float:
    """Median wall time of an action with all that it started on the device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for index in range(warm_up + repeats):
        wait()
        began = time.perf_counter()
        action()
        wait()
        if index >= warm_up:
            found.append(time.perf_counter() - began)
    return median(found)


def peak_bytes(device: torch.device) -> int:
    """Most device memory in tensors since the last call; 0 on a CPU, which keeps no count."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def largest(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest n in 0 .. most with fits(n), which holds for every smaller one; two tries where the guess is right."""
    low, high = 0, most + 1
    n, stride = min(max(guess, 1), most), 1
    while high - low > 1:
        if fits(n):
            low = n
        else:
            high = n
        if low and high <= most:
            n = (low + high) // 2
        else:
            n = min(low + stride, most) if low else max(high - stride, 1)
        stride *= 2
    return low
