"""One or several data sets as the data of a run, and their place in the order's identity."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import load
from configs.schema import Config
from data.pack import main as pack_main
from tests.data.pictures import write_folder
from tests.trainer.precomputing import PACK, SMOKE, settings
from trainer.build import build_order, held_out_batch
from trainer.engines.distributed import World
from trainer.training_data import read_data


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    for name, count in (("cats", 12), ("dogs", 6)):
        write_folder(path / f"{name}-source", count, ((32, 32),))
        assert pack_main([str(path / f"{name}-source"), str(path / name), *PACK, "--name", name]) == 0
    return path


def config_of(sets: Path, sources: str, **more: Any) -> Config:
    given = {"data__manifest": "null", "data__sources": sources, "train__global_batch_size": 4} | more
    return load.load([SMOKE], settings(sets / "model", sets / "cats", sets / "run", **given))


def identity(config: Config) -> dict[str, Any]:
    return build_order(config, read_data(config)).identity()


def test_weighted_sources_are_one_run(sets: Path) -> None:
    config = config_of(sets, f"[{{manifest: {sets}/cats}}, {{manifest: {sets}/dogs, weight: 0.7}}]")
    order = build_order(config, read_data(config))
    assert {stream.name: (stream.total, str(stream.weight)) for stream in order.streams} == {
        "cats/32x32": (12, "1"),
        "dogs/32x32": (6, "7/10"),
    }
    epochs = 20
    drawn = [order.stream(step).source for step in range(order.steps_through(epochs - 1))]
    assert (drawn.count("cats"), drawn.count("dogs")) == (12 * epochs // 4, 6 * 7 * epochs // 40)


def test_sources_and_weights_belong_to_the_identity_of_the_order(sets: Path) -> None:
    def pair(weight: float) -> str:
        return f"[{{manifest: {sets}/cats}}, {{manifest: {sets}/dogs, weight: {weight}}}]"

    alone = identity(config_of(sets, f"[{{manifest: {sets}/cats}}]"))
    first, second = identity(config_of(sets, pair(1))), identity(config_of(sets, pair(2)))
    assert len({alone["manifest"], first["manifest"], second["manifest"]}) == 3
    assert first == identity(config_of(sets, pair(1.0)))


def test_small_buckets_are_refused_repeated_or_dropped_as_asked(sets: Path) -> None:
    both, large = f"[{{manifest: {sets}/cats}}, {{manifest: {sets}/dogs}}]", {"train__global_batch_size": 8}
    with pytest.raises(ValueError, match=r"stream dogs/32x32 has 6 samples"):
        identity(config_of(sets, both, **large))
    dropped = identity(config_of(sets, both, data__small_buckets="drop", **large))
    assert dropped["lanes"].keys() == {"cats/32x32"} and dropped["small_buckets"] == "drop"
    repeated = identity(config_of(sets, both, data__small_buckets="repeat", **large))
    assert repeated["lanes"].keys() == {"cats/32x32", "dogs/32x32"}


def test_held_out_data_smaller_than_the_global_batch_is_repeated_in_it(sets: Path) -> None:
    held_out = {"data__held_out": sets / "dogs", "train__global_batch_size": 12}
    config = config_of(sets, f"[{{manifest: {sets}/cats}}]", **held_out)
    batch = held_out_batch(config, World(0, 1, 0, torch.device("cpu")))
    assert batch is not None and sorted(Counter(batch.keys).values()) == [2] * 6


def test_the_same_set_twice_is_refused(sets: Path) -> None:
    with pytest.raises(ValueError, match="two sources have the same name"):
        read_data(config_of(sets, f"[{{manifest: {sets}/cats}}, {{manifest: {sets}/cats}}]"))
