"""What a rank does in the tests of the launcher: python -m tests.launcher.stand_in FOLDER WHAT."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stopped.append(number))
    print(f"rank {rank} is up", flush=True)
    (folder / f"up_{rank}").touch()
    if what == "raise" and rank == 1:
        raise ValueError("the shard digits-000003.tar is missing")
    if what == "finish":
        return end(folder, rank, "finished")
    if what == "deaf":
        time.sleep(600)
    deadline = time.monotonic() + 60
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    if what == "raise" or what == "killed":
        return 1  # as a rank whose peer is gone
    time.sleep(0.5)  # saving
    return end(folder, rank, "stopped")


def end(folder: Path, rank: int, state: str) -> int:
    if rank == 0:
        content = {"state": state, "step": 7, "message": f"{state} at 7", "checkpoint": "ck", "pictures": ["a.png"]}
        (folder / "status.json").write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
