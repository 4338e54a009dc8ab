"""`twinflow train` with DeepSpeed ZeRO-3 in place of the recipe's engine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.trainer.test_train import ENVIRONMENT, ROOT, assets, command

__all__ = ["assets"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_zero3_is_stopped_at_its_end_and_goes_on_with_fsdp2(assets: Path, tmp_path: Path) -> None:
    """The recipe's keep_gathered, which ZeRO has not, does not stand in the way; the checkpoint fits either engine."""
    run = tmp_path / "run"
    legs = (("engine.name=zero3", "train.steps=2"), ("train.steps=3", "--allow-change", "train.steps"))
    for leg, (engine, steps) in zip(legs, (("zero3", 2), ("fsdp2", 3)), strict=True):
        done = subprocess.run(
            [*command(assets, run), *leg], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Ninja" not in done.stdout + done.stderr
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["engine"], summary["world_size"], summary["steps"]) == (engine, 2, steps)
        passes = summary["passes_per_step"]
        assert (passes["no_grad"], passes["graded"], passes["rows_graded"]) == (2.0, 2.0, 8.0)
    assert "engine.name was zero3 and is fsdp2 from here on" in done.stdout + done.stderr
