from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.schema import Checkpoint, Train
from data.manifest import read_manifest
from data.order import Order
from tests.data.sets import noise_shards, write_set
from tests.ranks import run_ranks
from trainer.bad_samples import BadSamples, TooManyBadSamples
from trainer.saving.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("bad") / "set", noise_shards(1, 40))


def order_of(folder: Path) -> Order:
    return Order(read_manifest(str(folder)), seed=0, global_batch_size=4)  # 10 steps an epoch


def test_the_ceiling_is_a_share_of_the_epoch_and_counts_anew_in_each(folder: Path) -> None:
    bad = BadSamples(order_of(folder), share=0.1)
    bad.add(0, 2)
    bad.add(9, 2)
    assert bad.in_epoch == 4
    bad.add(10, 4)
    assert bad.in_epoch == 4
    with pytest.raises(
        TooManyBadSamples, match=r"5 of the 40 samples of epoch 1 .*step 12.*data\.max_bad_samples=0\.1"
    ):
        bad.add(12, 1)


@pytest.mark.parametrize(("step", "counted"), [(3, 5), (10, 1)])
def test_the_count_goes_on_after_resume_within_its_epoch(folder: Path, step: int, counted: int) -> None:
    bad = BadSamples(order_of(folder), share=0.5, step=step, in_epoch=4)
    bad.add(step, 1)
    assert bad.in_epoch == counted


def test_nothing_is_allowed_at_a_share_of_zero(folder: Path) -> None:
    bad = BadSamples(order_of(folder), share=0.0)
    bad.add(0, 0)
    with pytest.raises(TooManyBadSamples):
        bad.add(1, 1)


class _Engine:
    def counters(self) -> dict[str, float]:
        return {}

    def load_counters(self, counters: dict[str, float]) -> None:
        pass

    def parts(self) -> list[Any]:
        return []


def test_a_checkpoint_carries_the_count(tmp_path: Path) -> None:
    engine: Any = _Engine()
    first = Checkpoints(tmp_path, Checkpoint(), {})
    first.save(engine, 7, 1.0, bad_samples=3)
    first.finish()
    assert Checkpoints(tmp_path, Checkpoint(), {}).resume(engine).bad_samples == 3


def stop_with(folder: str, counts: list[int]) -> tuple[str, int]:
    """The loop's agreement on a rank that replaced counts[rank] samples: what it raised, and the common count."""
    import torch.distributed as dist

    from trainer.engines.distributed import Agreement
    from trainer.loop import StepRefused, stop_agreed
    from trainer.objectives.twinflow import TwinFlow

    order, rank = order_of(Path(folder)), dist.get_rank()
    train = Train(steps=2, global_batch_size=4, micro_batch_size=1)
    run: Any = SimpleNamespace(
        step=0,
        order=order,
        objective=TwinFlow(teacher="online"),
        config=SimpleNamespace(train=train),
        stop=SimpleNamespace(requested=0),
        nets=SimpleNamespace(step_calls=(0, 0)),
        agreement=Agreement(30.0),
        bad_samples=BadSamples(order, 0.1),
    )
    batch: Any = SimpleNamespace(replaced=[SimpleNamespace(reason=f"s.tar, sample {n}") for n in range(counts[rank])])
    try:
        assert not stop_agreed(run, batch, None)
    except StepRefused as error:
        return str(error), run.bad_samples.in_epoch
    return "", run.bad_samples.in_epoch


@pytest.mark.slow
def test_ranks_agree_on_the_count_and_stop_together_above_the_ceiling(folder: Path) -> None:
    assert run_ranks(stop_with, 2, str(folder), [4, 0]) == [("", 4), ("", 4)]
    (first, _), (second, _) = run_ranks(stop_with, 2, str(folder), [4, 1])
    for message in (first, second):
        assert "5 of the 40 samples of epoch 0 could not be decoded" in message
    assert "s.tar, sample 3" in first
    assert "s.tar, sample 0" in second
