"""Every backbone in turn: its family, its tiny folder (written once), its model, rows to push through it."""

from pathlib import Path
from typing import Any

import pytest

from models import tiny
from tests.models.backbones.families import FAMILIES, Family, Rows


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def place(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / family.preset
    assert tiny.write(path, family.preset, seed=0)
    return path


@pytest.fixture
def model(family: Family, place: Path) -> Any:
    return family.load(place)


@pytest.fixture
def given(family: Family, model: Any) -> Rows:
    return family.rows(model)
