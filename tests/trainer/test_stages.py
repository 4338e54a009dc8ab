import pytest
import torch

from trainer.stages import REMEDIES, OutOfMemory, Stages


def test_memory_that_runs_out_names_the_stage_and_the_remedy() -> None:
    stages = Stages()
    with pytest.raises(OutOfMemory, match=r"stage 'graded pass'.*\n.*micro_batch_size"), stages("graded pass"):
        torch.empty(1 << 50)  # a petabyte: the CPU allocator really refuses


def test_other_errors_pass_through() -> None:
    stages = Stages()
    with pytest.raises(RuntimeError, match="shape"), stages("targets"):
        raise RuntimeError("shape mismatch")


def test_time_is_added_up_by_stage_and_drained() -> None:
    stages = Stages()
    for _ in range(2):
        with stages("data"):
            pass
    with stages("encode"):
        pass
    assert stages.drain().keys() == {"data", "encode"}
    assert stages.drain() == {}


def test_every_stage_of_a_step_that_computes_has_a_remedy() -> None:
    assert REMEDIES.keys() == {"encode", "targets", "graded pass", "optimizer step", "sample"}
