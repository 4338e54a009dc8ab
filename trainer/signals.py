"""A request to stop: any of SIGTERM, SIGINT, SIGUSR1, heard between steps and passed on to all ranks by agreement."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """requested: 0, or the number of the signal that asked for it. Repeated signals change nothing: torchrun forwards
    what the terminal or SLURM has already sent to the workers."""

    def __init__(self) -> None:
        self.requested = 0

    def install(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or int(number)
