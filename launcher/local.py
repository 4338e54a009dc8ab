"""Run a job on this machine: start torchrun, show rank 0, pass signals on, say how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import psutil

from launcher.job import Job, environment, torchrun

POLL_S = 0.1
DEATH_GRACE_S = 15.0
"""After a rank has died the others fail at their next collective; what still hangs after this time is killed."""
_CLOSING = b"closing signal"  # what torchrun says first when it ends the other ranks after a death
_DIED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


class LaunchError(RuntimeError):
    """The job could not be started; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How torchrun ended. code: its exit status; signal: the signal that this launcher passed on, or 0; died: (local
    rank, exit code, negative for a signal) of the rank that failed first."""

    code: int
    signal: int
    died: tuple[int, int] | None


@dataclass
class Runner:
    """Owns one torchrun process group from start to end."""

    job: Job
    asked: int = 0
    shown: dict[Path, BinaryIO] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Start, follow and wait. SIGINT, SIGTERM and SIGUSR1 to this process ask the ranks to save and stop; a second
        one ends them at once."""
        if self.job.port:
            refuse_used_port(self.job.port)
        self.job.log_dir.mkdir(parents=True, exist_ok=True)
        own = self.job.log_dir / "torchrun.log"
        with open(own, "ab") as log:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which asks politely.
            self.process = subprocess.Popen(
                torchrun(self.job),
                env=environment(self.job, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            code = self._follow(own)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill(torchrun_too=True)
        return Outcome(code, self.asked, _first_death(own))

    def _follow(self, own: Path) -> int:
        deadline = None
        while (code := self.process.poll()) is None:
            self._show_rank_0()
            if deadline is None and not self.asked and _CLOSING in own.read_bytes():
                deadline = time.monotonic() + DEATH_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                self._kill(torchrun_too=False)  # it still has to say which rank died
            time.sleep(POLL_S)
        self._show_rank_0()
        return code

    def _show_rank_0(self) -> None:
        """Copy what rank 0 has written since to this terminal, bytes as they are: a progress bar stays one line."""
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            path = rank_log(self.job.log_dir, 0, name)
            if path is None:
                continue
            if path not in self.shown:
                self.shown[path] = open(path, "rb")  # noqa: SIM115 (open as long as the job runs)
            if new := self.shown[path].read():
                stream.write(new.decode(errors="replace"))
                stream.flush()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            print("\nending all ranks now, without saving", file=sys.stderr, flush=True)
            self._kill(torchrun_too=True)
            return
        self.asked = number
        print("\nasked to stop: finishing the step and saving; once more ends at once", file=sys.stderr, flush=True)
        self.process.send_signal(signal.SIGTERM)

    def _kill(self, torchrun_too: bool) -> None:
        """SIGKILL to the ranks and all that they started; torchrun gives every rank a session of its own."""
        try:
            own = psutil.Process(self.process.pid)
            doomed = [*own.children(recursive=True), *([own] if torchrun_too else [])]
        except psutil.NoSuchProcess:
            return
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def rank_log(log_dir: Path, local_rank: int, name: str) -> Path | None:
    """stdout or stderr file of a rank, once torchrun has made it."""
    return next(iter(sorted(log_dir.glob(f"*/attempt_*/{local_rank}/{name}.log"))), None)


def last_lines(path: Path | None, count: int = 12) -> str:
    """The end of a rank's output, its progress bars left out."""
    if path is None or not path.exists():
        return ""
    lines = [line.split("\r")[-1].rstrip() for line in path.read_text(errors="replace").splitlines()]
    return "\n".join([line for line in lines if line and "it/s]" not in line and "step/s" not in line][-count:])


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run; empty where there is none."""
    path = folder / "status.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def count_gpus() -> int:
    """GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() and entry.strip() != "-1"])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return len([line for line in listed.stdout.splitlines() if line.startswith("GPU ")])


def refuse_used_port(port: int) -> None:
    """LaunchError where another process listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LaunchError(
                f"port {port} (runtime.port) is in use ({error.strerror}); choose another, or leave runtime.port out"
            ) from error


def _first_death(torchrun_log: Path) -> tuple[int, int] | None:
    match = _DIED.search(torchrun_log.read_bytes())
    return (int(match[2]), int(match[1])) if match else None
