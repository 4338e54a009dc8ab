"""What `sample` and `export` read of a run: its configuration, taken literally."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import load as configuration
from configs.folders import OURS
from tests.trainer.precomputing import SMOKE
from trainer import origin


def test_a_runs_own_configuration_reads_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder may be anyone's, and checkpoints of earlier versions do not hold their configuration."""
    monkeypatch.setenv("HUB_TOKEN", "a secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / OURS).write_text("{}")
    config = configuration.load([SMOKE], [f"model.path={tmp_path}", "encoder.null_prompt=PROMPT"])
    (run / "config.yaml").write_text(configuration.to_yaml(config).replace("PROMPT", "'${oc.env:HUB_TOKEN}'"))
    without = SimpleNamespace(url=str(run), certificate=SimpleNamespace(metadata={}))
    monkeypatch.setattr(origin, "reader", lambda *_: without)
    assert origin.find(str(run), None, None).config.encoder.null_prompt == "${oc.env:HUB_TOKEN}"
