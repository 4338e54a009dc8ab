"""Process group of a run, and the one small message that all ranks exchange in every step (contract Agreement)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among the others. rank: 0 .. world_size - 1; local_rank: the same within this machine, of
    local_world_size."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1


@contextlib.contextmanager
def process_group(timeout_s: float, device_type: str | None = None) -> Iterator[World]:
    """Join the ranks that torchrun started, or be a world of one without it; leave in order at the end.

    device_type: "cuda" | "cpu"; None takes a GPU per process where there are GPUs. CPU tensors travel over gloo, GPU
    tensors over NCCL. timeout_s: a collective that waits longer raises. After an exception the group is not taken
    down, since peers may be gone: the process is expected to end.

    Raises:
        RuntimeError: torchrun's environment is incomplete, more processes than GPUs, or the peers were not reached.
    """
    world = _read_environment(device_type)
    timeout = timedelta(seconds=timeout_s)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend, device_id = "cpu:gloo,cuda:nccl", world.device
    else:
        backend, device_id = "gloo", None
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, init_method="env://", timeout=timeout, device_id=device_id)
            # Joining is no barrier: a rank that left early would break the connections that others still make.
            dist.all_reduce(torch.zeros(1))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RuntimeError(
                f"rank {world.rank} of {world.world_size} could not join the others at {where}: {error}. Check that "
                "the address is reachable from every machine and that one torchrun call started all ranks"
            ) from error
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id)
    yield world
    dist.destroy_process_group()


def _read_environment(device_type: str | None) -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, local_rank = 0, 1, 0
    if "RANK" in os.environ:
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise RuntimeError(f"the environment has RANK but not {', '.join(missing)}: start the ranks with torchrun")
        rank, world_size, local_rank = (int(os.environ[name]) for name in names[:3])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cpu":
        return World(rank, world_size, local_rank, torch.device("cpu"), local_world_size)
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise RuntimeError(
            f"rank {rank} is process {local_rank} of its machine, which shows {gpus} GPUs: start at most {gpus} "
            "processes here (runtime.nproc) or check CUDA_VISIBLE_DEVICES"
        )
    return World(rank, world_size, local_rank, torch.device("cuda", local_rank), local_world_size)


def default_device() -> torch.device:
    """Where this process computes: its GPU if the process group talks NCCL, else the CPU."""
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def schedule_hash(*passes: object) -> int:
    """A number for the planned passes of a step, equal on two ranks exactly if the reprs of `passes` are (63 bits)."""
    return int.from_bytes(hashlib.blake2b(repr(passes).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Word:
    """What one rank says in a step. stop: 0, or a reason to stop after this step (the largest wins); data_error: this
    rank has no batch; bad_samples: samples that it could not read since the last step; schedule: schedule_hash; calls:
    no-grad and graded network calls that it made in the step before."""

    stop: int = 0
    data_error: bool = False
    bad_samples: int = 0
    schedule: int = 0
    calls: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Agreed:
    """What all ranks said. stop: largest; data_errors: the ranks without a batch; bad_samples: sum over ranks."""

    stop: int
    data_errors: tuple[int, ...]
    bad_samples: int


class UnequalScheduleError(RuntimeError):
    """Ranks would make different passes, or are at different steps: going on would hang in a collective."""


class PendingAgreement:
    """A message on its way; `wait` once, before anything that depends on it."""

    def __init__(self, step: int, rank: int, said: Tensor, work: dist.Work) -> None:
        self._step, self._rank, self._said, self._work = step, rank, said, work

    def wait(self) -> Agreed:
        """Wait for every rank's word.

        Raises:
            UnequalScheduleError: naming the step and what each rank plans, or the calls that each rank has made.
            RuntimeError: a rank is gone, or silent for longer than the group's timeout.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._rank} did not hear from all ranks at step {self._step}: one has died or hangs. The "
                f"first error in the other ranks' logs is the cause ({error})"
            ) from error
        rows = self._said.tolist()
        if len({(row[0], row[4]) for row in rows}) > 1:
            plans = "; ".join(f"rank {rank}: step {row[0]}, schedule {row[4]:x}" for rank, row in enumerate(rows))
            raise UnequalScheduleError(
                f"the ranks disagree on the passes of step {self._step} ({plans}). Roles and passes must follow from "
                "configuration, step and row position alone: check that all ranks run the same code and configuration"
            )
        if len({(row[5], row[6]) for row in rows}) > 1:
            made = "; ".join(f"rank {rank}: {row[5]} no-grad, {row[6]} graded" for rank, row in enumerate(rows))
            raise UnequalScheduleError(
                f"the ranks made different network calls in step {self._step - 1} ({made}). Calls must follow from "
                "configuration, step and row position alone, never from data or rank"
            )
        return Agreed(
            stop=max(row[1] for row in rows),
            data_errors=tuple(rank for rank, row in enumerate(rows) if row[2]),
            bad_samples=sum(row[3] for row in rows),
        )


class Agreement:
    """One small collective a step, on a gloo group of its own, so that it never waits for the device.

    Words are gathered, not reduced: 56 bytes per rank buy messages that name ranks. Call it from one thread only (two
    threads on one gloo group abort the process). Building it is collective.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def start(self, step: int, word: Word) -> PendingAgreement:
        """Send this rank's word for `step`; the answer may be awaited after other work."""
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        mine = torch.tensor([[step, word.stop, int(word.data_error), word.bad_samples, word.schedule, *word.calls]])
        said = mine.new_empty((size, mine.shape[1]))
        work = dist.all_gather_into_tensor(said, mine, group=self._group, async_op=True)
        return PendingAgreement(step, rank, said, work)

    def agree(self, step: int, word: Word) -> Agreed:
        """Send and wait; see PendingAgreement.wait."""
        return self.start(step, word).wait()
