"""Packing of no-grad network calls: rows whose inputs are ready share one pass (law 1, method 8).

A term of an objective is a generator (a Task): it yields the calls it can make now and receives their outputs. All
tasks advance in rounds; the calls of a round are one pass per module. The number of rounds is the longest chain of
dependent calls, whatever the rows, so every rank makes the same passes in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.objectives.objective import ONLINE, TEACHER, Nets


@dataclass(frozen=True)
class Call:
    """Rows of one velocity call. x_t: [n, ...]; t, r: [n] on the CPU; cond: [n] int64 rows of the step's conditions, on
    the CPU; teacher: whose weights; most: the largest n that any rank can have (for equal chunks)."""

    x_t: Tensor
    t: Tensor
    r: Tensor
    cond: Tensor
    most: int
    teacher: bool = False


Task = Generator[list[Call], list[Tensor], Any]
Runner = Callable[[Sequence[Task], Nets, Any, int | None], list[Any]]


def run_packed(tasks: Sequence[Task], nets: Nets, conditions: Any, chunk_rows: int | None = None) -> list[Any]:
    """Drive the tasks in lock-step; their return values in order.

    With separate modules the teacher runs first in a round, and online calls that its outputs make ready join the same
    round (a frozen teacher's guidance, then consistency by the online network).
    """
    results: list[Any] = [None] * len(tasks)
    waiting: dict[int, list[Call]] = {}

    def resume(index: int, outputs: list[Tensor] | None) -> None:
        try:
            waiting[index] = next(tasks[index]) if outputs is None else tasks[index].send(outputs)
        except StopIteration as stop:
            waiting.pop(index, None)
            results[index] = stop.value

    for index in range(len(tasks)):
        resume(index, None)
    while waiting:
        for kind in (None,) if nets.shares_module else (True, False):
            chosen = [i for i in sorted(waiting) if kind is None or waiting[i][0].teacher == kind]
            if chosen:
                outputs = _pass([call for i in chosen for call in waiting[i]], nets, conditions, chunk_rows)
                for i in chosen:
                    count = len(waiting[i])
                    resume(i, outputs[:count])
                    outputs = outputs[count:]
    return results


def run_unpacked(tasks: Sequence[Task], nets: Nets, conditions: Any, chunk_rows: int | None = None) -> list[Any]:
    """The reference: one task after the other, every call a pass of its own."""
    results = []
    for task in tasks:
        outputs: list[Tensor] | None = None
        while True:
            try:
                calls = next(task) if outputs is None else task.send(outputs)
            except StopIteration as stop:
                results.append(stop.value)
                break
            outputs = [_pass([call], nets, conditions, chunk_rows)[0] for call in calls]
    return results


def _pass(calls: Sequence[Call], nets: Nets, conditions: Any, chunk_rows: int | None) -> list[Tensor]:
    """One velocity call for the rows of all calls, or equally many chunks on every rank; outputs per call."""
    x_t = torch.cat([call.x_t for call in calls])
    t, r = torch.cat([call.t for call in calls]), torch.cat([call.r for call in calls])
    cond = torch.cat([call.cond for call in calls])
    weights = torch.cat([torch.full(call.t.shape, TEACHER if call.teacher else ONLINE) for call in calls])
    most = sum(call.most for call in calls)
    chunks = -(-most // chunk_rows) if chunk_rows else 1
    bounds = [len(t) * i // chunks for i in range(chunks + 1)]
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        rows = slice(begin, end)
        if begin < end:
            outputs.append(_velocity(nets, x_t[rows], t[rows], r[rows], conditions, cond[rows], weights[rows]))
        else:
            _dummy(nets, x_t, t, conditions, calls[0].teacher)
    return list((torch.cat(outputs) if outputs else x_t).split([len(call.t) for call in calls]))


def _velocity(nets: Nets, x_t: Tensor, t: Tensor, r: Tensor, conditions: Any, cond: Tensor, weights: Tensor) -> Tensor:
    device = x_t.device
    return nets.velocity(
        x_t,
        t.to(device, non_blocking=True),
        r.to(device, non_blocking=True),
        conditions[cond.to(device, non_blocking=True)],
        weights if weights.any() else None,
    )


def _dummy(nets: Nets, x_t: Tensor, t: Tensor, conditions: Any, teacher: bool) -> None:
    """One row of weight 0, so that a rank without rows makes the same passes as the others."""
    zero, first = t.new_zeros(1), torch.zeros(1, dtype=torch.int64)
    weights = torch.full((1,), TEACHER if teacher else ONLINE)
    _velocity(nets, x_t.new_zeros((1, *x_t.shape[1:])), zero, zero, conditions, first, weights)
