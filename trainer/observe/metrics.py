"""Means over micro-batches, steps and ranks without touching the host between two logged steps; and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

Key = tuple[str, str]
"""(kind, name): a term is reported per step, a mean per count."""


class Tally:
    """Sums and counts by name, kept on the device until `reduce`.

    Names may differ between ranks and steps (a role without rows): what no rank counted is absent from the result.
    """

    def __init__(self, device: torch.device | str, group: dist.ProcessGroup | None = None) -> None:
        self._device = torch.device(device)
        self._group = group
        self._sums: dict[tuple[Key, ...], Tensor] = {}  # by the names that arrived together: [names, 2]
        self._host: dict[Key, list[float]] = {}
        self._known: tuple[Key, ...] = ()
        self._steps = 0

    def add(self, tally: Mapping[str, Tensor]) -> None:
        """name -> [2] (sum, count) of some rows; reported as sum / count over everything since the last reduce."""
        self._accumulate({("mean", name): value for name, value in tally.items()})

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """name -> scalar part of the step's loss; reported as the sum over micro-batches and ranks, per step."""
        self._accumulate(
            {("term", name): torch.stack([value, torch.ones_like(value)]) for name, value in terms.items()}
        )

    def add_scalars(self, values: Mapping[str, Tensor]) -> None:
        """name -> scalar (grad_norm); reported as the mean over calls and ranks."""
        self.add({name: torch.stack([value, torch.ones_like(value)]) for name, value in values.items()})

    def add_value(self, name: str, value: float) -> None:
        """A number of the host; reported as the mean over calls and ranks."""
        pair = self._host.setdefault(("mean", name), [0.0, 0.0])
        pair[0] += value
        pair[1] += 1.0

    def end_step(self) -> None:
        """Count a step; terms are reported per step."""
        self._steps += 1

    @torch.no_grad()
    def _accumulate(self, pairs: Mapping[Key, Tensor]) -> None:
        # Two small kernels whatever the number of names: one stack, one addition.
        if not pairs:
            return
        names = tuple(sorted(pairs))
        arrived = torch.stack([pairs[name].detach() for name in names]).to(self._device, torch.float64)
        if names in self._sums:
            self._sums[names] += arrived
        else:
            self._sums[names] = arrived

    @torch.no_grad()
    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call, then start anew. A collective, and the one wait for the device.

        One all-reduce; only where a rank brings a name that the ranks have not agreed on yet are names exchanged and
        those reduced by a second one.
        """
        local = self._merge()
        totals, strangers = self._sum_over_ranks(self._known, local, len(set(local) - set(self._known)))
        if strangers:
            unknown = tuple(sorted(self._gather_names(set(local) - set(self._known))))
            totals |= self._sum_over_ranks(unknown, local, 0)[0]
            self._known = tuple(sorted({*self._known, *unknown}))
        steps, self._steps = max(self._steps, 1), 0
        self._sums, self._host = {}, {}
        result = {}
        for (kind, name), (total, count) in sorted(totals.items()):
            if count > 0:
                result[name] = total / (steps if kind == "term" else count)
        return result

    def _merge(self) -> dict[Key, Tensor]:
        merged: dict[Key, Tensor] = {}
        for names, sums in self._sums.items():
            for name, pair in zip(names, sums.unbind(0), strict=True):
                merged[name] = merged[name] + pair if name in merged else pair
        if self._host:
            values = torch.tensor(list(self._host.values()), dtype=torch.float64).to(self._device)
            for name, pair in zip(self._host, values.unbind(0), strict=True):
                merged[name] = merged[name] + pair if name in merged else pair
        return merged

    def _sum_over_ranks(
        self, names: tuple[Key, ...], local: Mapping[Key, Tensor], strangers: int
    ) -> tuple[dict[Key, tuple[float, float]], int]:
        nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
        note = torch.tensor([float(strangers), 0.0], dtype=torch.float64).to(self._device)
        flat = torch.stack([local.get(name, nothing) for name in names] + [note])
        if self._ranks() > 1:
            dist.all_reduce(flat, group=self._group)
        *rows, last = flat.tolist()
        return {name: (row[0], row[1]) for name, row in zip(names, rows, strict=True)}, int(last[0])

    def _gather_names(self, names: set[Key]) -> set[Key]:
        if self._ranks() == 1:
            return names
        gathered: list[set[Key] | None] = [None] * self._ranks()
        dist.all_gather_object(gathered, names, group=self._group)
        return set().union(*(some for some in gathered if some))

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_initialized() else 1


class Clock:
    """Throughput of this process between two logged steps.

    On a GPU the host runs ahead within the interval, but reading the metrics waits for the device, so an interval that
    ends there is true. `now` returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._waited = 0.0
        self._images = 0
        self._steps = 0
        self._paused = 0.0
        self._start = now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around work that is not training (sampling, evaluation): outside the interval."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def step(self, images: int) -> None:
        """Count an optimizer step of `images` samples over all ranks."""
        self._steps += 1
        self._images += images

    def interval(self) -> dict[str, float]:
        """images_per_second, step_seconds, data_wait_share of the interval since the last call; empty without steps."""
        end = self._now()
        seconds = end - self._start - self._paused
        result: dict[str, float] = {}
        if self._steps and seconds > 0:
            result = {
                "images_per_second": self._images / seconds,
                "step_seconds": seconds / self._steps,
                "data_wait_share": self._waited / seconds,
            }
        self._start, self._waited, self._paused, self._images, self._steps = end, 0.0, 0.0, 0, 0
        return result
