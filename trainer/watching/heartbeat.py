"""The sign of life that the launcher's watchdog looks for."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from configs.folders import HEARTBEAT, write_json

if TYPE_CHECKING:
    from trainer.run import Run

EVERY_S = 1.0
_log = logging.getLogger(__name__)


class Heartbeat:
    """Called with the name of every stage that begins, on rank 0: every rank takes part in every stage, so a rank that
    hangs silences it. Writes at most once in EVERY_S."""

    def __init__(self, run: Run) -> None:
        self._run, self._written, self._count = run, 0.0, 0

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        if now - self._written < EVERY_S:
            return
        self._written, self._count = now, self._count + 1
        beat = {"step": self._run.step, "stage": stage, "beat": self._count, "time": time.time()}
        try:
            write_json(self._run.folder.path / HEARTBEAT, beat)
        except OSError as error:  # a full disk is the checkpoint's business, which says so better
            _log.warning("no heartbeat: %s", error)
