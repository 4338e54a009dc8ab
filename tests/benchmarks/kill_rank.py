"""One rank of a run that dies at a named point: the trainer's own entry with traps around what it calls.

The benchmark's forkserver imports this module once, so that a rank starts in a second and not in ten.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow  # noqa: F401 (the forkserver imports it for all ranks)
import psutil
import torch

from trainer import loop, session, train
from trainer.engines.fsdp2 import FSDP2
from trainer.observe import journal, sender
from trainer.saving import checkpoint, checkpoint_store, durable
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_s3 import S3Checkpoints
from trainer.saving.checkpoint_store import LocalCheckpoints
from trainer.saving.tensor_file import StagedFile

assert session is not None  # imported here for the forkserver's sake

RESUMED = "resumed.jsonl"


@dataclass(frozen=True)
class Point:
    """Where to die: at the nth time (from 1) that this rank comes by."""

    name: str
    rank: int
    nth: int = 1
    s3: bool = False
    workers: int = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Countdown:
    """True at the nth call, and never again."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self) -> bool:
        self._left -= 1
        return self._left == 0


def _before(owner: Any, name: str, due: Countdown, applies: Callable[..., bool] = lambda *_, **__: True) -> None:
    original = getattr(owner, name)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if applies(*args, **kwargs) and due():
            die()
        return original(*args, **kwargs)

    setattr(owner, name, trapped)


def _after(owner: Any, name: str, due: Countdown) -> None:
    original = getattr(owner, name)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if due():
            die()
        return result

    setattr(owner, name, trapped)


def _mid_shard_write(due: Countdown) -> None:
    original = durable.write_all

    def half(descriptor: int, piece: memoryview) -> None:
        if len(piece) > 1 << 20 and due():
            original(descriptor, piece[: len(piece) // 2])
            die()
        original(descriptor, piece)

    durable.write_all = half


def _mid_certificate(due: Countdown) -> None:
    original = durable.write_text

    def half(path: Path, text: str) -> None:
        if due():
            original(path, text[: len(text) // 2])
            die()
        original(path, text)

    durable.write_text = half


def _mid_journal(due: Countdown) -> None:
    original = journal.os.write

    def half(descriptor: int, data: bytes) -> int:
        if b'"kind": "metrics"' in data and due():
            original(descriptor, data[: len(data) // 2])
            die()
        return original(descriptor, data)

    journal.os.write = half  # type: ignore[assignment]


def _loader_worker(due: Countdown) -> None:
    """Kill a loader process of this rank, not the rank: it must end by itself."""
    original = loop.train_step

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if due():
            own = psutil.Process()
            processes = [child for child in own.children(recursive=True) if child.ppid() != own.pid]
            assert processes, "no loader process"
            for process in processes:
                process.kill()
        return original(*args, **kwargs)

    loop.train_step = trapped


def _request(operation: str) -> Callable[[Countdown], None]:
    return lambda due: _before(S3Checkpoints, "_request", due, lambda self, called, *_, **__: called == operation)


def _certificate_put(due: Countdown) -> None:
    _before(S3Checkpoints, "_put", due, lambda self, path, body: path.endswith("certificate.json"))


TRAPS: dict[str, Callable[[Countdown], None]] = {
    "mid shard write": _mid_shard_write,
    "after staging": lambda due: _after(StagedFile, "fill", due),
    "before publication": lambda due: _before(LocalCheckpoints, "publish", due),
    "mid certificate": _mid_certificate,
    "before the rename": lambda due: _before(checkpoint_store.durable, "sync_folder", due),
    "after publication": lambda due: _before(checkpoint.Checkpoints, "_retain", due),
    "after the save": lambda due: _after(checkpoint.Checkpoints, "_commit", due),
    "amid retention": lambda due: _before(
        checkpoint_store.shutil, "rmtree", due, lambda path, *_: "step_" in str(path)
    ),
    "mid upload": _request("upload_part"),
    "before the upload ends": _request("complete_multipart_upload"),
    "before the certificate's put": _certificate_put,
    "after the certificate's put": lambda due: _after(S3Checkpoints, "publish", due),
    "amid retention on S3": _request("delete_object"),
    "during resume": lambda due: _before(CheckpointReader, "_read", due),
    "in a loader worker": _loader_worker,
    "in the journal": _mid_journal,
    "in the tracker": lambda due: _before(sender.State, "save", due),
    "before the update": lambda due: _before(FSDP2, "step", due),
    "before the average": lambda due: _before(FSDP2, "update_ema", due),
    "in the agreement": lambda due: _before(loop, "stop_agreed", due),
}


def main(
    rank: int, port: int, arguments: list[str], log: str, point: Point | None, environment: dict[str, str]
) -> None:
    """Be a rank of two until the run ends or the point is reached."""
    os.setsid()
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)
    if rank == 0:
        _note_resumption(Path(log).parent / RESUMED)
    if point is not None and point.rank == rank:
        TRAPS[point.name](Countdown(point.nth))
    code = train.main(arguments)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _note_resumption(path: Path) -> None:
    """Write down at which step this start goes on."""
    original = checkpoint.Checkpoints.resume

    def noted(self: checkpoint.Checkpoints, engine: Any) -> checkpoint.Progress:
        progress = original(self, engine)
        with path.open("a") as file:
            file.write(json.dumps(progress.step) + "\n")
        return progress

    checkpoint.Checkpoints.resume = noted  # type: ignore[method-assign]
