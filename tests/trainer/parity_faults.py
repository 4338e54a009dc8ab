"""Faults planted in the ranks of trainer/parity.py: each is `parity_step.sharded` in a process that computes wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from models.backbones.qwen_image import QwenImage
from trainer.engines.fsdp2 import FSDP2
from trainer.engines.zero3 import Zero3
from trainer.objectives.twinflow import TwinFlow
from trainer.parity_step import Case, Measured, Subject, sharded


@contextmanager
def wrapped(owner: type, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with patch.object(owner, name, change(getattr(owner, name))):
        yield


def wrong_sign(subject: Subject, case: Case) -> Measured | None:
    """The rectification gap is real minus fake."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        def task(self: TwinFlow, *args: Any) -> Any:
            gap = yield from original(self, *args)
            return -gap

        return task

    with wrapped(TwinFlow, "_rectify_task", change):
        return sharded(subject, case)


def detached_times(subject: Subject, case: Case) -> Measured | None:
    """No gradient flows from the blocks to the time embeddings."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, **inputs: original(self, **(inputs | {"temb": inputs["temb"].detach()}))

    with wrapped(QwenImageTransformerBlock, "forward", change):
        return sharded(subject, case)


def divided_by_ranks(subject: Subject, case: Case) -> Measured | None:
    """The engine averages over ranks."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, loss: original(self, loss / dist.get_world_size())

    with wrapped(FSDP2, "backward", change), wrapped(Zero3, "backward", change):
        return sharded(subject, case)


def divided_by_accumulation(subject: Subject, case: Case) -> Measured | None:
    """The engine averages over micro-batches."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, loss: original(self, loss / case.accumulation)

    with wrapped(FSDP2, "backward", change), wrapped(Zero3, "backward", change):
        return sharded(subject, case)


def dropped_mask(subject: Subject, case: Case) -> Measured | None:
    """Padded text tokens are attended to."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: QwenImage, x_t: Any, t: Any, r: Any, cond: Any, weights: Any = None) -> Any:
            return original(self, x_t, t, r, replace(cond, mask=torch.ones_like(cond.mask)), weights)

        return forward

    with wrapped(QwenImage, "forward", change):
        return sharded(subject, case)


def idle_time_embedding(subject: Subject, case: Case) -> Measured | None:
    """The embedding of target times is left out of the graph altogether."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: original(self, *args).detach()

    with wrapped(QwenImage, "_add_second_embedding", change):
        return sharded(subject, case)
