"""What the batch shell of a job becomes: python -m launcher.batch SUBMISSION -- STEP...

It starts the step (srun and one launcher.node per node), hears SLURM's signals, watches the progress, and decides what
follows when the step has ended. Everything that it knows is in files of the run's folder before it acts, since SLURM may
kill it at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from launcher import local, scheduler
from launcher.chain import FOLDER, Attempt, Chain, Decision, Facts, close_silent, decide, excluded
from launcher.notify import notify
from launcher.records import checkpoint_step, grace_warning, set_status
from launcher.scheduler import SchedulerError
from launcher.slurm import Submission
from launcher.step import Step, read_nodes, suspects_of

PREEMPTED = "pre-empted by SLURM"


class Batch:
    """One start of a job of the chain. requeues: whether it may put the job back into the queue; not in an allocation
    that a person holds."""

    def __init__(self, submission: Submission, command: list[str], requeues: bool = True) -> None:
        self.submission, self.run_folder, self.requeues = submission, submission.run, requeues
        self.job = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        start = str(self.restart) if requeues else submission.folder.name  # an allocation may hold several starts
        self.logs = self.run_folder / "logs" / f"job_{self.job}_{start}"
        self.step = Step(submission, command, self.logs, self.job)
        self.signals: list[int] = []
        self.warned, self.cancelled, self.trouble = "", False, ""
        self.told = False
        self.chain = Chain.read(self.run_folder) or Chain(self.run_folder / FOLDER)

    def run(self) -> int:
        """Run the step and act on its end; the exit status of the job."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)
        self.logs.mkdir(parents=True, exist_ok=True)
        attempt = self._open()
        if attempt is None:
            return 1
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(local.sole_owner(self.run_folder))
            except local.LaunchError as error:
                return self._end(Decision("end", "failed", str(error)), attempt)
            stamp = local.status_stamp(self.run_folder)
            try:
                code = self.step.follow(self._look)
            except SchedulerError as error:
                return self._end(Decision("end", "failed", str(error)), attempt)
            facts = self._facts(code, stamp)
        attempt.end, attempt.checkpoint_after = time.time(), checkpoint_step(self.run_folder)
        attempt.suspects, attempt.preempted = list(facts.suspects), facts.warned == PREEMPTED
        decision = decide(facts, self.chain.current(), self.submission.cluster)
        if decision.action == "requeue" and not self.requeues:
            decision = Decision("end", "stopped" if facts.state == "stopped" else "failed", decision.reason)
        return self._requeue(decision, attempt) if decision.action == "requeue" else self._end(decision, attempt)

    def _open(self) -> Attempt | None:
        """Write down that this start begins; None where earlier ones have used up the chain's patience."""
        saved, chain = checkpoint_step(self.run_folder), self.chain
        chain.submission, chain.job = self.submission.folder.name, self.job
        last = chain.current()[-1] if chain.current() else None
        unsaid = last is not None and last.end is None
        close_silent(chain.attempts, saved)
        if unsaid and last is not None:
            _say(f"the start before this one: {last.reason}")
            decision = decide(
                Facts(stop=chain.stop_wanted(), trouble=last.reason), chain.current(), self.submission.cluster
            )
            if decision.action == "end":
                self._end(decision, last)
                return None
        nodes = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])
        attempt = Attempt(chain.submission, self.job, self.restart, nodes, time.time(), saved)
        chain.attempts.append(attempt)
        chain.state, chain.reason = "running", ""
        chain.write()
        _say(f"start {len(chain.current())} of submission {chain.submission} on {','.join(nodes)}; logs: {self.logs}")
        return attempt

    def _look(self) -> str:
        """Called while the step runs; why it has to be ended now, or an empty text."""
        while self.signals:
            number = self.signals.pop(0)
            if number == signal.SIGUSR1:
                self.warned = (
                    "asked to stop" if self.chain.stop_wanted() else self.warned or "warned before the time limit"
                )
            elif number == signal.SIGINT:
                self.warned = "asked to stop by Ctrl-C"
            else:
                self._ended_by_slurm()
            self.step.ask_to_stop()
        if not self.trouble:
            self.trouble = self.step.trouble()
        return self.trouble

    def _ended_by_slurm(self) -> None:
        """SIGTERM: SLURM requeues the job, or has ended it for good, or somebody has signalled this process alone."""
        found = self._queued()
        if found is None or found.restarts > self.restart or found.preempted:
            self.warned = PREEMPTED
            self.chain.attempts[-1].preempted, self.chain.attempts[-1].reason = True, PREEMPTED
            self.chain.write()
        elif found.state == "COMPLETING":
            self.cancelled = True
            # SLURM kills this process soon, perhaps before the step has ended.
            self._end(
                decide(Facts(cancelled=True), self.chain.current(), self.submission.cluster), self.chain.attempts[-1]
            )
        else:
            self.warned = self.warned or "a SIGTERM from outside"

    def _facts(self, code: int, stamp: int) -> Facts:
        while self.signals:
            self._look()
        status = local.read_status(self.run_folder) if local.status_stamp(self.run_folder) != stamp else {}
        state = str(status.get("state", ""))
        stop = self.chain.stop_wanted()
        if state == "stopped" and not (stop or self.cancelled or self.warned):
            # SLURM tells the ranks of a pre-emption before it tells this process.
            found = self._queued()
            self.warned = PREEMPTED if found is not None and found.preempted else ""
        nodes = read_nodes(self.logs, self.submission.cluster.nodes)
        quiet = bool(self.warned or self.cancelled or stop)
        suspects = (
            () if quiet or state in ("finished", "stopped") else suspects_of(nodes, self.chain.attempts[-1].nodes)
        )
        trouble = self.trouble or ("" if quiet else self.step.explain(nodes, code))
        return Facts(
            state=state if state != "running" else "",
            message=str(status.get("message", "")),
            vain=bool(status.get("vain", False)),
            stop=stop,
            cancelled=self.cancelled,
            warned=self.warned,
            trouble=trouble,
            suspects=tuple(suspects),
        )

    def _requeue(self, decision: Decision, attempt: Attempt) -> int:
        cluster = self.submission.cluster
        try:
            without, warning = excluded(self.chain.current(), cluster, scheduler.usable_nodes(cluster.partition))
            attempt.reason = decision.reason
            attempt.action = "requeued" + (f" without {','.join(without)}" if without else "")
            self.chain.state, self.chain.reason = "queued", decision.reason
            self.chain.write()
            set_status(self.run_folder, "stopped", f"requeued as job {self.job}: {decision.reason}")
            _say(f"{attempt.action}: {decision.reason}")
            for text in filter(None, (warning, grace_warning(self.run_folder, cluster))):
                _say(f"warning: {text}")
            found = self._queued()
            if found is None or found.restarts == self.restart:
                scheduler.requeue(self.job)
            if without:
                scheduler.exclude(self.job, without)
        except SchedulerError as error:
            return self._end(
                Decision("end", "failed", f"{decision.reason}; and it cannot be requeued: {error}"), attempt
            )
        return 1  # where SLURM does not kill this process first

    def _end(self, decision: Decision, attempt: Attempt) -> int:
        attempt.reason, attempt.action = decision.reason, f"ended: {decision.state}"
        attempt.end = attempt.end or time.time()
        self.chain.state, self.chain.reason = decision.state, decision.reason
        self.chain.write()
        set_status(self.run_folder, decision.state, decision.reason)
        _say(f"the chain ends, {decision.state}: {decision.reason}")
        message = {
            "run": self.submission.name,
            "folder": str(self.run_folder),
            "job": self.job,
            "state": decision.state,
            "reason": decision.reason,
        }
        cluster = self.submission.cluster
        if self.told:
            return int(decision.state == "failed")
        self.told = True
        for problem in notify(cluster.notify_command, cluster.notify_url, message):
            _say(f"warning: {problem}")
        return int(decision.state == "failed")

    def _queued(self) -> scheduler.QueuedJob | None:
        try:
            return scheduler.job(self.job)
        except SchedulerError as error:
            _say(f"warning: {error}")
            return None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def main() -> int:
    folder, separator, *command = sys.argv[1:]
    assert separator == "--", "the batch script puts -- before the step"
    return Batch(Submission.read(Path(folder)), command).run()


if __name__ == "__main__":
    sys.exit(main())
