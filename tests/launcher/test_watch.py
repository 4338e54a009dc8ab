from __future__ import annotations

import json
from pathlib import Path

from launcher.watch import Watch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(folder: Path, step: int, number: int) -> None:
    content = {"step": step, "stage": "targets", "beat": number}
    (folder / "heartbeat.json").write_text(json.dumps(content))


def test_a_start_without_a_sign_of_life_has_its_own_budget(tmp_path: Path) -> None:
    clock = Clock()
    beat(tmp_path, 3, 1)  # of an earlier start
    watch = Watch(tmp_path, startup_s=50, silence_s=10, clock=clock)
    clock.now += 49
    assert watch.look() == ""
    clock.now += 2
    assert "no sign of life 51 s after the start (startup_s=50)" in watch.look()


def test_silence_is_named_with_the_step_and_stage(tmp_path: Path) -> None:
    clock = Clock()
    watch = Watch(tmp_path, startup_s=50, silence_s=10, clock=clock)
    for number in range(20):  # as long as it goes on all is well
        beat(tmp_path, 4, number)
        assert watch.look() == ""
        clock.now += 9
    clock.now += 2
    assert "no progress for 11 s (silence_s=10), last seen in stage 'targets' of step 4" in watch.look()
