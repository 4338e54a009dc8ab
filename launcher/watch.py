"""Does a run still make progress? The trainer's heartbeat against two budgets; nothing here stops anything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from configs.folders import HEARTBEAT


@dataclass
class Watch:
    """folder: of the run; startup_s: until the first heartbeat of this start; silence_s: between two. A heartbeat is new
    when its content is: the clocks of two machines are never compared."""

    folder: Path
    startup_s: float
    silence_s: float
    clock: Callable[[], float] = time.monotonic
    _content: str = field(init=False, default="")
    _since: float = field(init=False, default=0.0)
    _alive: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._content, self._since = self._read(), self.clock()

    def look(self) -> str:
        """Why the run has to be ended, or an empty text."""
        content, now = self._read(), self.clock()
        if content != self._content:
            self._content, self._since, self._alive = content, now, True
        silent = now - self._since
        if not self._alive and silent > self.startup_s:
            return f"no sign of life {silent:.0f} s after the start (startup_s={self.startup_s:g})"
        if self._alive and silent > self.silence_s:
            beat = json.loads(self._content)
            return (
                f"a rank hangs: no progress for {silent:.0f} s (silence_s={self.silence_s:g}), last seen in stage "
                f"'{beat['stage']}' of step {beat['step']}"
            )
        return ""

    def _read(self) -> str:
        path = self.folder / HEARTBEAT
        return path.read_text() if path.exists() else ""
