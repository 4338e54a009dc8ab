"""What the launcher reads from a failure: whether the same start would fail again."""

from __future__ import annotations

import pytest

from data.s3 import DataError
from trainer.loop import PeerWithoutBatch, StepRefused
from trainer.preflight import PreflightRefused
from trainer.run_folder import RunRefused
from trainer.saving.certificate import CheckpointError
from trainer.session import vain
from trainer.stages import OutOfMemory


@pytest.mark.parametrize("error", [RunRefused("x"), StepRefused("nan"), OutOfMemory("x")])
def test_a_mistake_that_a_person_must_mend_is_vain(error: Exception) -> None:
    assert vain(error)


@pytest.mark.parametrize(
    "error",
    [
        DataError("S3"),
        CheckpointError("disk"),
        PeerWithoutBatch("x"),
        PreflightRefused("node"),
        RuntimeError("NCCL"),
        OSError("x"),
    ],
)
def test_trouble_of_the_surroundings_may_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    assert not vain(caught.value)
