"""One test per recorded file of the published implementation, at rtol 1e-9 in float64."""

import os
from pathlib import Path

import pytest

from tests.trainer.objectives.golden import check_paper_step, check_production_step, check_unit
from tests.trainer.objectives.golden_sampler import check_sampler_file

FOLDER = Path(os.environ.get("TWINFLOW_GOLDEN", Path(__file__).parents[2] / "golden"))
CHECKS = {
    "prod_step_": check_production_step,
    "paper_step_": check_paper_step,
    "unit_": check_unit,
    "sample_": check_sampler_file,
}
FILES = sorted(path for prefix in CHECKS for path in FOLDER.glob(f"{prefix}*.npz"))


def test_recorded_files_are_found() -> None:
    assert FILES, f"no recorded file in {FOLDER}; TWINFLOW_GOLDEN names the folder"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    prefix = next(prefix for prefix in CHECKS if path.name.startswith(prefix))
    CHECKS[prefix](path)
