"""Process groups and the step's agreement between ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailedError, run_ranks
from trainer.engines.distributed import (
    Agreement,
    UnequalScheduleError,
    Word,
    default_device,
    process_group,
    schedule_hash,
)


def _agree() -> tuple[list[object], list[str]]:
    rank, agreement, found, refused = dist.get_rank(), Agreement(30), [], []
    plan = schedule_hash("targets", 3, ("e2e", 4))
    found.append(agreement.agree(0, Word(schedule=plan)))
    found.append(agreement.agree(1, Word(stop=15 if rank == 1 else 0, bad_samples=rank + 1, schedule=plan)))
    pending = agreement.start(2, Word(data_error=rank == 1, schedule=plan))
    other_work = torch.ones(1)
    dist.all_reduce(other_work)  # the default group is free while the word is under way
    found.append(pending.wait())
    for step, schedule, calls in ((3, plan + rank, 2), (4 + rank, plan, 2), (6, plan, 2 + rank)):
        try:
            agreement.agree(step, Word(schedule=schedule, calls=(calls, 1)))
        except UnequalScheduleError as error:
            refused.append(str(error))
    return found, refused


def test_all_ranks_hear_the_same_stop_error_and_counts() -> None:
    for found, refused in run_ranks(_agree, 2):
        assert [(agreed.stop, agreed.data_errors, agreed.bad_samples) for agreed in found] == [
            (0, (), 0),
            (15, (), 3),
            (0, (1,), 0),
        ]
        plan = schedule_hash("targets", 3, ("e2e", 4))
        assert f"rank 0: step 3, schedule {plan:x}; rank 1: step 3, schedule {plan + 1:x}" in refused[0]
        assert "rank 0: step 4" in refused[1] and "rank 1: step 5" in refused[1]
        assert "calls in step 5 (rank 0: 2 no-grad, 1 graded; rank 1: 3 no-grad, 1 graded)" in refused[2]


def _agree_without_rank_one() -> None:
    dist.barrier()
    agreement = Agreement(2)
    if dist.get_rank() == 1:
        time.sleep(4)
        return
    agreement.agree(7, Word())


def test_a_silent_rank_is_an_error_within_the_timeout() -> None:
    with pytest.raises(RankFailedError, match="rank 0 did not hear from all ranks at step 7"):
        run_ranks(_agree_without_rank_one, 2)


def test_a_schedule_hash_follows_from_the_content_alone() -> None:
    assert schedule_hash("a", 1) != schedule_hash("a", 2)
    assert schedule_hash("a", 1) == 0x4D3F9C37E8D7D956  # not salted by the process, unlike hash()
    assert all(0 <= schedule_hash(number) < 2**63 for number in range(100))


def test_without_torchrun_the_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(30, "cpu") as world:
        assert (world.rank, world.world_size, world.local_rank, world.device.type) == (0, 1, 0, "cpu")
        assert default_device().type == "cpu"
        assert Agreement(30).agree(0, Word(stop=2)).stop == 2
    assert not dist.is_initialized()


def test_an_incomplete_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match=r"not .*MASTER_ADDR.*torchrun"), process_group(5, "cpu"):
        pass


def _environment() -> tuple[str, str, int]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], dist.get_world_size()


def test_ranks_join_through_torchruns_environment() -> None:
    assert run_ranks(_environment, 2) == [("0", "0", 2), ("1", "1", 2)]
