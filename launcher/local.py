"""Run a job on this machine: start torchrun, show rank 0, pass signals on, say how it ended."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TextIO

import psutil

from launcher.job import Job, environment, torchrun

POLL_S = 0.1
LOOK_S = 1.0
"""Between two looks at which processes torchrun has started."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
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
    """Owns one torchrun and its ranks from start to end. lock: what sole_owner gave; torchrun holds it too, so that a
    run whose launcher was killed still has its folder to itself. stop_file: once it is there, the ranks are asked to save
    and stop. shared_signals: who signals this process has signalled torchrun and the ranks too, as SLURM does."""

    job: Job
    lock: int | None = None
    stop_file: Path | None = None
    shared_signals: bool = False
    asked: int = 0
    process: subprocess.Popen[bytes] | None = None
    _shown: dict[Path, tuple[BinaryIO, codecs.IncrementalDecoder]] = field(default_factory=dict)
    _ranks: list[psutil.Process] = field(default_factory=list)

    def run(self) -> Outcome:
        """Start, follow and wait. SIGINT, SIGTERM, SIGUSR1 and SIGHUP (a closed terminal) to this process ask the ranks
        to save and stop; a second one ends them at once.

        Raises:
            LaunchError: runtime.port is in use.
        """
        if self.job.port:
            refuse_used_port(self.job.port)
        self.job.log_dir.mkdir(parents=True, exist_ok=True)
        own = self.job.log_dir / "torchrun.log"
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in STOPS if not (nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            self.process = self._start(own)
            if self.asked:
                self.process.send_signal(signal.SIGTERM)
            code = self._follow(self.process, own)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill(torchrun_too=True)
            for file, _ in self._shown.values():
                file.close()
        return Outcome(code, self.asked, _first_death(own))

    def _start(self, own: Path) -> subprocess.Popen[bytes]:
        """A session of its own: the terminal's Ctrl-C reaches this process alone, which asks politely."""
        columns, lines = shutil.get_terminal_size()  # for rank 0's progress bar, which writes to a file
        known = {**os.environ, "COLUMNS": str(columns), "LINES": str(lines)}
        with open(own, "ab") as log:
            process = subprocess.Popen(
                torchrun(self.job),
                env=environment(self.job, known),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=() if self.lock is None else (self.lock,),
            )
        if self.lock is not None:
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, f"{process.pid} on {socket.gethostname()}".encode(), 0)
        return process

    def _follow(self, process: subprocess.Popen[bytes], own: Path) -> int:
        deadline, looked = None, -LOOK_S
        while (code := process.poll()) is None:
            self._show_rank_0()
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._ranks = _descendants(process.pid) or self._ranks
                self._obey_stop_file(process)
            if deadline is None and not self.asked and _CLOSING in own.read_bytes():
                deadline = time.monotonic() + DEATH_GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                self._kill(torchrun_too=False)  # it still has to say which rank died
            time.sleep(POLL_S)
        self._show_rank_0()
        return code

    def _show_rank_0(self) -> None:
        """Copy what rank 0 has written since to this terminal, as it is: a progress bar stays one line."""
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            path = rank_log(self.job.log_dir, 0, name)
            if path is None:
                continue
            if path not in self._shown:
                # Incremental: a read may end within a character, and a bar is made of characters of three bytes.
                self._shown[path] = open(path, "rb"), codecs.getincrementaldecoder("utf-8")("replace")  # noqa: SIM115
            file, decoder = self._shown[path]
            if new := file.read():
                _write(stream, decoder.decode(new))

    def _obey_stop_file(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the ranks alone: a signal to torchrun would cost their exit codes."""
        if self.asked or self.stop_file is None or not self.stop_file.exists():
            return
        self.asked = signal.SIGUSR1
        for rank in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.shared_signals:
            self.asked = self.asked or number
            return
        if self.asked:
            _write(sys.stderr, "\nending all ranks now, without saving\n")
            self._kill(torchrun_too=True)
            return
        self.asked = number
        _write(sys.stderr, "\nasked to stop: finishing the step and saving; once more ends at once\n")
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def _kill(self, torchrun_too: bool) -> None:
        """SIGKILL to the ranks and all that they started; torchrun gives every rank a session of its own. Ranks that
        torchrun left behind when it was killed itself are known from before; psutil kills no reused number."""
        doomed = self._ranks
        if self.process is not None and self.process.poll() is None:
            doomed = _descendants(self.process.pid)
            if torchrun_too:
                self.process.kill()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _descendants(number: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(number).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def rank_log(log_dir: Path, local_rank: int, name: str) -> Path | None:
    """stdout or stderr file of a rank, once torchrun has made it."""
    return next(iter(sorted(log_dir.glob(f"*/attempt_*/{local_rank}/{name}.log"))), None)


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of a run; empty where there is none."""
    path = folder / "status.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def status_stamp(folder: Path) -> int:
    """Changes with every write of a run's status.json; 0 where there is none."""
    path = folder / "status.json"
    return path.stat().st_mtime_ns if path.exists() else 0


@contextlib.contextmanager
def sole_owner(folder: Path) -> Iterator[int]:
    """Hold a run's folder: two trainings in one folder would write over each other. Yields the lock's descriptor.

    Raises:
        LaunchError: another launcher holds it.
    """
    path = folder / "logs" / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            named = f" (torchrun {holder}; a SIGTERM makes it save and stop)" if holder else ""
            raise LaunchError(
                f"{folder} is being trained by another process{named}; wait for it or stop it, or start a new run "
                "beside it with --fresh"
            ) from error
        except OSError as error:
            _write(sys.stderr, f"{path} cannot be locked ({error.strerror}): start no second training in this folder\n")
        yield file.fileno()


def count_gpus() -> int:
    """GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() and entry.strip() != "-1"])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            "nvidia-smi does not answer within 60 s: the driver of this machine is in trouble. Set runtime.nproc and "
            "CUDA_VISIBLE_DEVICES to start without it"
        ) from error
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


def _write(stream: TextIO, text: str) -> None:
    """A terminal or pipe that is gone must not end a run; the same text is in the log files."""
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


def _first_death(torchrun_log: Path) -> tuple[int, int] | None:
    match = _DIED.search(torchrun_log.read_bytes())
    return (int(match[2]), int(match[1])) if match else None
