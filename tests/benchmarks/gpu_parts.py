"""The parts of the GPU benchmark: (a) speed, (b) adapters in limited memory, (c) cost of a step, (d) bytes of state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs import load as configuration
from configs.knobs import ROOT
from tests.benchmarks.gpu_ledger import Ledger, NotHere, Row, Values
from tests.benchmarks.gpu_model import Builder, Subject, held_bytes, largest, peak_bytes, seconds, using
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import Objective
from trainer.objectives.passes import run_unpacked
from trainer.objectives.twinflow import TwinFlow
from trainer.plugins import plugin

ATTENTION: dict[str, tuple[str, str | None]] = {
    "native": ("native", None),
    "cudnn": ("native", "cudnn"),
    "efficient": ("native", "efficient"),
    "math": ("native", "math"),
    "flash": ("flash", None),
    "flash3": ("flash3", None),
}
"""Name in the rows -> model.attention, and the kernel that PyTorch is confined to."""
MEMORY_OPTIONS: dict[str, dict[str, Any]] = {
    "per block": {},
    "groups of 4": {"checkpoint_group": 4},
    "offload": {"cpu_offload": True},
}
CARD_80 = 78e9
"""Bytes for tensors on a card of 80 GB: the rest is CUDA's context and NCCL's buffers."""
STATE_SHARE, WORKING_BYTES = 0.85, 14e9
"""Of a card: what state may take in part (a), and what a pass of four large images needs beside it."""


@dataclass
class Bench:
    """What all parts share. layers: of the model trained in full; most_rows: micro-batch that the search stops at."""

    ledger: Ledger
    builder: Builder
    repeats: int = 3
    most_rows: int = 48

    @property
    def device(self) -> torch.device:
        return self.builder.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def all_layers(self) -> int:
        return int(self.builder.size.config["num_layers"])

    @property
    def layers(self) -> int:
        """As many layers as can be trained in full on this card, 16 bytes a parameter."""
        if not self.on_gpu:
            return self.all_layers
        room = STATE_SHARE * torch.cuda.get_device_properties(self.device).total_memory - WORKING_BYTES
        return max(1, min(self.all_layers, int(room / (16 * 339_831_296))))


def matmul_rate(bench: Bench) -> Row:
    """Rate of one large product in bfloat16, the measure of all others."""
    edge = 8192 if bench.on_gpu else 256

    def measure() -> Values:
        a, b = (torch.randn(edge, edge, device=bench.device).bfloat16() for _ in range(2))
        took = seconds(lambda: [a @ b for _ in range(10)], bench.device, warm_up=2, repeats=5) / 10
        return {"tflops": 2 * edge**3 / took / 1e12}

    return Row("rate of bfloat16 products", 10, measure)


def speed(bench: Bench, rate: float) -> Iterator[Row]:
    """(a) Graded passes with full recomputation, and whole steps of order 2. share: of `rate` [TFLOP/s]."""
    objective = recipe("full", teacher="online", enhanced_ratio=0.0)
    size = bench.builder.size
    for compiled in (False, True):
        for name, (attention, sdpa) in ATTENTION.items():
            if name == "math" and bench.on_gpu:
                continue  # it writes out all scores
            for pixels, rows in reversed(list(zip(size.pixels, size.rows, strict=True))):
                for what in ("graded pass", "step"):
                    yield Row(
                        f"a {what} {pixels} {name} {'compiled' if compiled else 'eager'}",
                        (120 if compiled else 45) if bench.on_gpu else 1,
                        _speed_of(bench, objective, attention, sdpa, compiled, what, rows, pixels, rate),
                    )


def _speed_of(
    bench: Bench,
    objective: Objective,
    attention: str,
    sdpa: str | None,
    compiled: bool,
    what: str,
    rows: int,
    pixels: int,
    rate: float,
) -> Callable[[], Values]:
    def measure() -> Values:
        if sdpa in ("cudnn", "efficient") and not bench.on_gpu:
            raise NotHere(f"{sdpa} attention runs on GPUs")
        backend = {"compile_backend": "inductor" if bench.on_gpu else "aot_eager"} if compiled else {}
        subject = bench.builder.get(objective, bench.layers, attention=attention, compile=compiled, **backend)
        flops = list[int]()

        def once() -> None:
            if what == "step":
                flops.append(subject.step(2 * rows, pixels, rows))
            else:
                flops.append(subject.graded_pass(rows, pixels))

        with using(sdpa):
            took = seconds(once, bench.device, warm_up=2, repeats=bench.repeats)
        if what == "graded pass":
            subject.update()  # frees the gradients
        executed = sum(flops[2:]) / bench.repeats
        values = {"layers": bench.layers, "rows": rows, "s": took, "tflops": executed / took / 1e12}
        return values | {"share": values["tflops"] / rate, "peak_gb": peak_bytes(bench.device) / 1e9}

    return measure


def adapters(bench: Bench) -> Iterator[Row]:
    """(b) LoRA of the whole model in large images: the largest micro-batch of a graded pass, and then a whole step."""
    pixels = bench.builder.size.pixels[-1]
    for card in ("80 GB", "whole card"):
        for name, options in MEMORY_OPTIONS.items():
            key = f"b {name}, {card}"
            found = bench.ledger.take(
                Row(f"{key}: largest micro-batch", 150 if bench.on_gpu else 1, _search(bench, options, card, pixels))
            )
            if found is not None and (rows := found.get("micro_batch")):
                expected = 4 * found["graded_s"] + 30 if bench.on_gpu else 1
                yield Row(f"{key}: step", expected, _step_of_adapters(bench, options, card, pixels, rows))


def _search(bench: Bench, options: dict[str, Any], card: str, pixels: int) -> Callable[[], Values]:
    def measure() -> Values:
        took: dict[int, float] = {}
        peaks: dict[int, int] = {}

        def fits(rows: int) -> bool:
            with contextlib.suppress(torch.OutOfMemoryError):
                subject = _with_adapters(bench, options)
                took[rows] = seconds(lambda: subject.graded_pass(rows, pixels), bench.device, warm_up=0, repeats=1)
                subject.update()
                peaks[rows] = peak_bytes(bench.device)
                return True
            bench.builder.free()  # not within: the error holds what the pass had made
            return False

        with limited(bench, card) as limit:
            peak_bytes(bench.device)
            if not fits(1):
                return {"micro_batch": 0}
            guess = 2
            if bench.on_gpu and fits(2):
                guess = 1 + int((0.97 * limit - peaks[1]) / max(peaks[2] - peaks[1], 1))
            rows = largest(lambda n: n in peaks or fits(n), guess, bench.most_rows)
        return {"micro_batch": rows, "graded_s": took[rows], "peak_gb": peaks[rows] / 1e9}

    return measure


def _step_of_adapters(bench: Bench, options: dict[str, Any], card: str, pixels: int, rows: int) -> Callable[[], Values]:
    def measure() -> Values:
        with limited(bench, card):
            subject = _with_adapters(bench, options)
            took = seconds(lambda: subject.step(rows, pixels, rows), bench.device, warm_up=0, repeats=1)
        values = {"micro_batch": rows, "s": took, "images_per_s": rows / took}
        return values | {"peak_gb": peak_bytes(bench.device) / 1e9}

    return measure


def _with_adapters(bench: Bench, options: dict[str, Any]) -> Subject:
    return bench.builder.get(recipe("lora"), bench.all_layers, adapters=True, attention="auto", **options)


class limited:
    """Within the context tensors may take 80 GB, or the whole card; as a value the bytes. A CPU has no limit."""

    def __init__(self, bench: Bench, card: str) -> None:
        self._bench, self._share, self._total = bench, 1.0, 0
        if bench.on_gpu:
            self._total = torch.cuda.get_device_properties(bench.device).total_memory
            if card == "80 GB":
                self._share = min(1.0, CARD_80 / self._total)

    def __enter__(self) -> float:
        if self._bench.on_gpu:
            self._bench.builder.free()
            torch.cuda.set_per_process_memory_fraction(self._share, self._bench.device)
        return self._share * self._total

    def __exit__(self, *error: object) -> None:
        if self._bench.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, self._bench.device)


def step_costs(bench: Bench) -> Iterator[Row]:
    """(c) A whole step, packed and not, in multiples of plain flow matching on the same rows."""
    size, objective = bench.builder.size, recipe("full", teacher="online")
    pixels, rows = size.pixels[0], 2 * size.rows[0]

    def timed(of: Objective, **how: Any) -> float:
        subject = bench.builder.get(objective, bench.layers)
        subject.next_step = 0  # the same draws, whatever is compared
        step = lambda: subject.step(rows, pixels, size.rows[0], objective=of, **how)  # noqa: E731
        return seconds(step, bench.device, warm_up=1, repeats=bench.repeats)

    def measure() -> Values:
        plain = timed(FlowMatching())
        packed, unpacked = timed(objective), timed(objective, run=run_unpacked)
        return {"flow_matching_s": plain, "packed": packed / plain, "unpacked": unpacked / plain, "rows": rows}

    yield Row(f"c step, guided, in multiples of flow matching, {pixels}", 120 if bench.on_gpu else 2, measure)


def state(bench: Bench) -> Iterator[Row]:
    """(d) Bytes of state by arithmetic, those that the engine holds, and the device's own count, at rest and at most."""
    size = bench.builder.size

    def measured(make: Callable[[], Subject]) -> Callable[[], Values]:
        def measure() -> Values:
            bench.builder.free()
            before = torch.cuda.memory_allocated(bench.device) if bench.on_gpu else 0
            peak_bytes(bench.device)
            subject = make()
            at_rest = torch.cuda.memory_allocated(bench.device) - before if bench.on_gpu else 0
            subject.step(2, size.pixels[-1], 2)
            expected = sum(n for name, n in subject.bytes.items() if name != "gradients")
            values = {"arithmetic_gb": expected / 1e9, "held_gb": held_bytes(subject.engine) / 1e9}
            values |= {"held_share": held_bytes(subject.engine) / expected}
            if bench.on_gpu:
                values |= {"device_share": at_rest / expected, "gradients_gb": subject.bytes["gradients"] / 1e9}
                values |= {"peak_gb": peak_bytes(bench.device) / 1e9}
            return values

        return measure

    wanted = 60 if bench.on_gpu else 1
    full = recipe("full", teacher="online")
    yield Row(
        f"d state, {bench.layers} layers in full", wanted, measured(lambda: bench.builder.get(full, bench.layers))
    )
    yield Row("d state, adapters", wanted, measured(lambda: _with_adapters(bench, {})))


def recipe(name: str, **changes: Any) -> TwinFlow:
    """The objective of configs/qwen_image/<name>.yaml, with other options."""
    config = configuration.load([ROOT / f"configs/qwen_image/{name}.yaml"], [])
    objective: TwinFlow = replace(plugin("objective", config.objective)[1], **changes)
    return objective
