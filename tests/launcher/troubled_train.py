"""trainer.train with a trouble that happens once: python -m tests.launcher.troubled_train TRAINER_ARGUMENTS...

TROUBLE=<kind>:<step> in the environment. The kinds: none; hang and kill (rank 1, in that step); unsaved (one save from that
step on fails on rank 1); full (every save from that step on fails on rank 0, until TROUBLE_LOG exists). TROUBLE_LOG: a
file that remembers that the trouble is over. PACE_S: least seconds of a step, so that there is time to interfere.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    from trainer import loop, train
    from trainer.saving import checkpoint

    kind, _, at = os.environ.get("TROUBLE", "none:0").partition(":")
    log = Path(os.environ["TROUBLE_LOG"])
    pace, rank = float(os.environ.get("PACE_S", "0")), int(os.environ["RANK"])
    step, commit = loop.train_step, checkpoint.Checkpoints._commit

    def troubled_step(run: Any, *arguments: Any) -> Any:
        time.sleep(pace)
        if kind in ("hang", "kill") and rank == 1 and run.step == int(at) and happens_once(log):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return step(run, *arguments)

    def troubled_commit(self: Any, at_step: int, *arguments: Any) -> Any:
        self.__dict__.pop("_write", None)
        unsaved = kind == "unsaved" and rank == 1 and at_step >= int(at) and happens_once(log)
        if unsaved or (kind == "full" and rank == 0 and at_step >= int(at) and not log.exists()):
            self._write = raise_no_space
        return commit(self, at_step, *arguments)

    loop.train_step, checkpoint.Checkpoints._commit = troubled_step, troubled_commit  # type: ignore[method-assign]
    return train.main()


def happens_once(log: Path) -> bool:
    if log.exists():
        return False
    log.touch()
    return True


def raise_no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    sys.exit(main())
