from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.slurm_runs import make_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What small runs under a real SLURM train on."""
    return make_assets(tmp_path_factory.mktemp("assets"))
