import re
from pathlib import Path

import pytest
import torch

from trainer import stages
from trainer.saving.certificate import CheckpointError
from trainer.stages import REMEDIES, OutOfMemory, Stages


def test_memory_that_runs_out_names_the_stage_and_the_remedy() -> None:
    with pytest.raises(OutOfMemory, match=r"stage 'graded pass'.*\n.*micro_batch_size"), Stages()("graded pass"):
        torch.empty(1 << 50)  # a petabyte: the CPU allocator really refuses


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shape"), Stages()("targets"):
        raise RuntimeError("shape mismatch")


def test_time_is_added_up_by_stage_and_drained() -> None:
    timed = Stages()
    for _ in range(2):
        with timed("data"):
            pass
    with timed("encode"):
        pass
    assert timed.drain().keys() == {"data", "encode"}
    assert timed.drain() == {}


def test_every_stage_has_a_remedy() -> None:
    sources = (Path(stages.__file__).parent).rglob("*.py")
    named = {name for source in sources for name in re.findall(r'\.stages\("([^"]+)"\)', source.read_text())}
    assert named == REMEDIES.keys() and "save" in named


def test_memory_that_runs_out_in_a_save_is_told_as_such() -> None:
    """What a checkpoint makes of it has the allocator's words in it."""
    with pytest.raises(OutOfMemory, match=r"stage 'save'.*\n.*more ranks"), Stages()("save"):
        raise CheckpointError('rank 0: RuntimeError("DefaultCPUAllocator: can\'t allocate memory")')
