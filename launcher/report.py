"""How a run ended, for the person at the terminal: where its results are, or which rank died and why."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.job import Job
from launcher.local import Outcome, rank_log, read_status, status_stamp

_PROGRESS = re.compile(r"\d+%\|")


def consoles() -> tuple[Console, Console]:
    """Standard output and standard error. Text is printed as it is: messages and paths hold [brackets] of their own."""
    return (
        Console(markup=False, emoji=False, highlight=False),
        Console(stderr=True, markup=False, emoji=False, highlight=False),
    )


def report(outcome: Outcome, job: Job, folder: Path, command: str, stamp: int = 0) -> int:
    """Print how the run ended and where its results are; the exit code.

    torchrun loses the ranks' exit codes once it has got a signal, so the run's status file decides. stamp: its
    status_stamp before the start, which tells this run's words from those of an earlier one.
    """
    status = read_status(folder)
    state, spoke = status.get("state"), status_stamp(folder) != stamp
    if state == "finished" and (outcome.code == 0 or spoke):
        _say("finished", "green", [status["message"], *_results(status, folder)])
        return 0
    again = f"go on with: {command}"
    if state == "stopped" and (outcome.code == 0 or outcome.signal):
        _say("stopped and saved", "yellow", [status["message"], *_results(status, folder), again])
        return 128 + (outcome.signal or signal.SIGTERM)
    checkpoint = status.get("checkpoint")
    kept = f"saved so far: {checkpoint}; {again}" if checkpoint else f"no checkpoint yet; start again with: {command}"
    if outcome.signal and outcome.died is None:
        _say("stopped without saving", "red", [f"run: {folder}", kept, f"logs: {job.log_dir}"], error=True)
        return 128 + outcome.signal
    _say("run failed", "red", [*_cause(outcome, job), "", f"run: {folder}", kept, f"logs: {job.log_dir}"], error=True)
    return 128 + outcome.signal if outcome.signal else 1


def refuse(title: str, message: str) -> None:
    """Print why nothing was started."""
    _say(title, "red", [message], error=True)


def _say(title: str, style: str, lines: list[str], *, error: bool = False) -> None:
    """A heading and lines that the terminal wraps itself, so that paths and commands can be copied."""
    console = consoles()[error]
    console.rule(title, style=style, align="left")
    for line in lines:
        console.print(line, soft_wrap=True)


def _results(status: dict[str, Any], folder: Path) -> list[str]:
    lines = [f"run         {folder}", f"checkpoint  {status.get('checkpoint')}"]
    lines += [f"picture     {picture}" for picture in status.get("pictures", [])]
    mlflow = status.get("mlflow") or {}
    if mlflow.get("run_id"):
        uri = str(mlflow["uri"])
        opened = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        lines.append(f"MLflow      {opened}   (run {mlflow['run_id']})")
    return lines


def _cause(outcome: Outcome, job: Job) -> list[str]:
    """Which rank died first, of what, and its last words."""
    if outcome.died is None:
        return [f"torchrun ended with status {outcome.code}", *readable(job.log_dir / "torchrun.log")[-12:]]
    rank, code = outcome.died
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (if no person did it: the kernel, for want of memory; see dmesg)" if code == -signal.SIGKILL else ""
    lines = [f"rank {rank} {how}{hint}", "", *_last_words(job, rank)]
    if code > 0:
        lines += _others(job, rank)
    return [*lines, "", f"output of rank {rank}: {rank_log(job.log_dir, rank, 'stderr')}"]


def _others(job: Job, first: int) -> list[str]:
    """What other ranks say that is not the same. Two that fail within a tenth of a second have no sure order, and the
    one named first may only have missed the other."""
    lines: list[str] = []
    known = [_message(_last_words(job, first))]
    for rank in range(job.nproc):
        words = _last_words(job, rank)
        said = any(_begins_alike(_message(words), other) for other in known)
        if words and words[0].startswith(f"rank {rank} failed") and not said:
            known.append(_message(words))
            lines += ["", *words]
    return lines


def _message(words: list[str]) -> list[str]:
    return [re.sub(r"^rank \d+ failed", "", words[0]), *words[1:]] if words else []


def _begins_alike(words: list[str], other: list[str]) -> bool:
    """Whether one message is the other or its beginning: rank 0 goes on to speak for the tracker."""
    both = min(len(words), len(other))
    return both > 0 and words[:both] == other[:both]


def _last_words(job: Job, rank: int, count: int = 20) -> list[str]:
    """From `rank N failed` on where the trainer explains itself, else the last lines; at most `count`."""
    lines = readable(rank_log(job.log_dir, rank, "stderr"))
    begin = max((at for at, line in enumerate(lines) if line.startswith(f"rank {rank} failed")), default=0)
    return lines[begin:] if len(lines) - begin <= count else lines[-count:]


def readable(path: Path | None) -> list[str]:
    """Lines of a log without blank ones and progress bars."""
    if path is None or not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip() and not _PROGRESS.search(line)]
