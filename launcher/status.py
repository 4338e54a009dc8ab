"""Where a run stands, and how to stop it: from its folder, and from SLURM where it was submitted."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from configs.folders import HEARTBEAT, OURS, write_json
from launcher import scheduler
from launcher.chain import FOLDER, STOP, Attempt, Chain
from launcher.local import LaunchError, read_status
from launcher.records import checkpoint_step
from launcher.scheduler import SchedulerError
from launcher.slurm import Submission


def describe(run: Path, lines: int = 5) -> list[str]:
    """What a person wants to know of a run, line by line.

    Raises:
        LaunchError: there is no run in the folder.
    """
    chain = Chain.read(run)
    if chain is None and not (run / OURS).exists():
        raise LaunchError(f"{run} is no run of this trainer (no {OURS} and never submitted)")
    status = read_status(run)
    beat = _heartbeat(run)
    step = max(int(status.get("step", 0)), int(beat.get("step", 0)) if status.get("state") == "running" else 0)
    said = [f"run         {run}", f"state       {status.get('state', 'not started')}, step {step}{_of_all(run)}"]
    if beat and status.get("state") == "running":
        said.append(f"progress    stage '{beat['stage']}' of step {beat['step']}")
    if status.get("message"):
        said.append(f"message     {status['message']}")
    saved = checkpoint_step(run)
    said.append(f"checkpoint  {status.get('checkpoint') or (f'step {saved}' if saved else 'none')}")
    if (status.get("mlflow") or {}).get("run_id"):
        said.append(f"MLflow      {status['mlflow']['uri']}   (run {status['mlflow']['run_id']})")
    if chain is not None:
        said += _chain_lines(run, chain)
    return said + [f"  {line}" for line in last_lines(run, lines)]


def stop(run: Path) -> str:
    """Ask a run to save and end; what was done, in a sentence.

    Raises:
        LaunchError: nothing of it runs or waits, or it runs on another machine. SchedulerError.
    """
    chain = Chain.read(run)
    if chain is not None and chain.job and scheduler.alive(found := scheduler.job(chain.job)):
        write_json(run / FOLDER / STOP, {"submission": chain.submission, "job": chain.job})
        if found is not None and found.state == "PENDING":
            scheduler.run("scancel", chain.job)
            chain.state, chain.reason = "stopped", "stopped on request while it waited in the queue"
            chain.write()
            write_json(run / "status.json", {**read_status(run), "state": "stopped", "message": chain.reason})
            return f"job {chain.job} has left the queue; what it had saved is kept"
        scheduler.run("scancel", "--batch", "--signal=USR1", chain.job)
        return f"job {chain.job} finishes its step, saves and ends; twinflow status {run} shows it"
    return _stop_local(run)


def last_lines(run: Path, count: int) -> list[str]:
    """The newest words of the ranks: the end of the file that was written to last."""
    files = [path for pattern in ("std*.log", "torchrun.log") for path in (run / "logs").glob(f"**/{pattern}")]
    files = [path for path in files if path.stat().st_size]
    if not files or count < 1:
        return []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    with open(newest, "rb") as file:
        file.seek(max(newest.stat().st_size - 20_000, 0))
        text = file.read().decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [str(newest), *[line for line in lines if line][-count:]]


def _chain_lines(run: Path, chain: Chain) -> list[str]:
    try:
        found = scheduler.job(chain.job)
        queue = _queue(found)
        if chain.state in ("queued", "running") and not scheduler.alive(found):
            queue += "; it ended without a word: twinflow submit goes on"
    except SchedulerError as error:
        queue = f"unknown: {error}"
    said = [f"chain       {chain.state}{f': {chain.reason}' if chain.reason else ''}"]
    said.append(f"job         {chain.job} {queue}; log: {run / 'logs' / f'job_{chain.job}.log'}")
    return said + [_attempt_line(attempt) for attempt in chain.attempts[-8:]]


def _queue(found: scheduler.QueuedJob | None) -> str:
    if found is None:
        return "not in the queue"
    return found.state.lower() + (f" ({found.reason})" if found.reason != "None" else "")


def _attempt_line(attempt: Attempt) -> str:
    where = f"job {attempt.job}.{attempt.restart} on {','.join(attempt.nodes)}"
    if attempt.end is None:
        return f"  {where}: running since step {attempt.checkpoint_before}"
    steps = f"steps {attempt.checkpoint_before} to {attempt.checkpoint_after}"
    return f"  {where}: {steps}; {attempt.action}: {attempt.reason.splitlines()[0] if attempt.reason else ''}"


def _of_all(run: Path) -> str:
    chain = Chain.read(run)
    if chain is None or not (run / FOLDER / chain.submission).is_dir():
        return ""
    return f" of {Submission.read(run / FOLDER / chain.submission).steps}"


def _heartbeat(run: Path) -> dict[str, Any]:
    path = run / HEARTBEAT
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _stop_local(run: Path) -> str:
    """The lock of a run names its torchrun and the machine."""
    path = run / "logs" / "lock"
    holder = path.read_text().strip() if path.exists() else ""
    number, _, host = holder.partition(" on ")
    if not number.isdigit() or read_status(run).get("state") != "running":
        raise LaunchError(f"nothing of {run} is running")
    if host != socket.gethostname():
        raise LaunchError(f"{run} runs on {host}: call twinflow stop there")
    try:
        os.kill(int(number), signal.SIGTERM)
    except ProcessLookupError as error:
        raise LaunchError(f"nothing of {run} is running any more: its torchrun {number} is gone") from error
    return f"torchrun {number} has been asked: the ranks finish their step, save and end"
