"""`twinflow checkpoint ls | diff | verify`, and exit statuses that tell the truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.saving.parts import alone, numbered, parts_of
from trainer.saving import certificate
from trainer.saving.checkpoints_cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 5 and 10."""
    folder = tmp_path / "run"
    checkpoints = alone(folder / "checkpoints")
    for step in (5, 10):
        checkpoints.write(step, parts_of(numbered(step)), {"optimizer_step": step})
    (folder / "run.json").write_text(json.dumps({"circumstance": {"checkpoint.dir": None}}))
    return folder


def test_ls_shows_what_is_complete_and_what_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step_00000010" / certificate.NAME).unlink()
    assert main(["ls", str(run)]) == 0
    said = capsys.readouterr().out
    assert "complete" in said and "fsdp2" in said and "0 min" in said and "no" in said
    assert main(["ls", str(run / "nothing")]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_diff_tells_equal_from_different(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    five, ten = (str(run / "checkpoints" / f"step_{step:08d}") for step in (5, 10))
    assert main(["diff", five, five]) == 0
    assert main(["diff", str(run), ten]) == 0, "a run means its newest"
    assert main(["diff", str(run / "step_00000005"), ten]) == 1, "a step of a run"
    said = capsys.readouterr().out
    assert "optimizer_step: 5 and 10" in said and "parameter/b" in said and "max" in said
    # b: 5 and 10 everywhere, so |a - b| / |b| = 0.5
    assert "0.5" in said and "5 and 10" in said
    assert main(["diff", five, ten, "--bound", "1"]) == 0


def test_diff_names_what_one_has_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = alone(tmp_path / "other").write(10, parts_of({**numbered(10), "c": torch.ones(3)}), {})
    assert main(["diff", str(run), str(tmp_path / "other" / other)]) == 1
    assert "only in b: parameter/c [3]" in capsys.readouterr().out


def test_verify_finds_what_is_not_finite_and_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert "2 tensors in parameter: all present, readable and finite" in capsys.readouterr().out.replace("\n", " ")
    folder = run / "checkpoints"
    bad = numbered(15)
    bad["w"][1, 2] = float("nan")
    path = folder / alone(folder).write(15, parts_of(bad), {})
    assert main(["verify", str(path)]) == 1
    assert "parameter/w: 1 elements are not finite" in capsys.readouterr().out
    file = path / "rank_00000.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert main(["verify", str(path)]) == 1
    assert "is damaged" in capsys.readouterr().out
    file.unlink()
    assert main(["verify", str(path)]) == 2
    assert "is missing" in capsys.readouterr().err
