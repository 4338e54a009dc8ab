"""Acting together: an error is never lost, not even one that says nothing."""

from __future__ import annotations

import pytest

from data.s3 import DataError
from trainer.saving.certificate import CheckpointError
from trainer.unison import Unison


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("the disk is full"), "rank 0: the disk is full"),
        (DataError(), r"rank 0: DataError\(\)"),
        (KeyError("w"), r"rank 0: KeyError\('w'\)"),
    ],
)
def test_what_fails_here_raises_everywhere(error: Exception, said: str) -> None:
    def action() -> None:
        raise error

    with pytest.raises(CheckpointError, match=said) as caught:
        Unison(1.0).together(action)
    assert caught.value.__cause__ is error
