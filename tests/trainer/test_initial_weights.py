"""A new run starts from an earlier run's weights, at any engine and number of ranks, or from a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import load as configuration
from configs.schema import Checkpoint, Config, Ema
from models.weights import CheckpointError
from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.engines.running import OPTIMIZER, make_engine, train_step
from trainer import initial_weights
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.zero3 import Zero3, Zero3Options
from trainer.saving.checkpoint import Checkpoints

FLOAT32 = torch.float32


def config(path: Path | str | None, weights: str = "ema") -> Config:
    made = configuration.load(
        [], ["run.name=x", "data.manifest=d", "train.steps=1", "train.global_batch_size=1", "train.micro_batch_size=1"]
    )
    made.init_from.path, made.init_from.weights = None if path is None else str(path), weights
    return made


class Toy(toy.ToyBackbone):
    """Its base model is what it was built with."""

    def load(self, path: str, seed: int) -> None:
        assert seed == 42


def train_and_save(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Two steps on this rank's shards, saved; rank 0 returns the full states."""
    engine = make_engine(FLOAT32)
    for step in range(2):
        train_step(engine, step, FLOAT32, accumulation=1)
    checkpoints = Checkpoints(folder / "checkpoints", Checkpoint(), {})
    checkpoints.write(2, engine.parts(), engine.counters())
    return {which: engine.full_state(which) for which in ("online", "ema")}


def start_from(folder: str, weights: str, engine_name: str, teacher: str) -> dict[str, Any]:
    """A new engine over other initial numbers; what it starts with, on rank 0."""
    load = initial_weights.loader(config(folder, weights), resumes=False, teacher=teacher)
    backbone = Toy(seed=5)
    if engine_name == "zero3":
        engine: Any = Zero3(Zero3Options(), backbone, OPTIMIZER, Ema(decay=0.9), teacher, load=load)
    else:
        engine = FSDP2(FSDP2Options(), backbone, OPTIMIZER, Ema(decay=0.9), teacher, load=load)
    return {which: engine.full_state(which) for which in ("online", "ema")} | {"counters": engine.counters()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("earlier")
    return folder, run_ranks(train_and_save, 2, folder)[0]


@pytest.mark.parametrize(
    ("weights", "engine", "ranks", "place"),
    [
        ("ema", "fsdp2", 3, "checkpoints"),
        ("online", "fsdp2", 1, "checkpoints/step_00000002"),
        ("ema", "zero3", 2, "checkpoints"),
    ],
)
def test_a_run_starts_from_another_runs_weights(
    source: tuple[Path, dict[str, dict[str, Tensor]]], weights: str, engine: str, ranks: int, place: str
) -> None:
    folder, states = source
    assert not torch.equal(states["ema"]["into.weight"], states["online"]["into.weight"])
    begun = run_ranks(start_from, ranks, str(folder / place), weights, engine, "online")[0]
    for which in ("online", "ema"):  # the averages begin as what the run starts from
        for name, tensor in begun[which].items():
            assert torch.equal(tensor, states[weights][name]), name
    assert begun["counters"]["optimizer_step"] == 0


def test_a_source_that_does_not_fit_is_refused(source: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder, _ = source
    load = initial_weights.loader(config(folder / "checkpoints"), resumes=False, teacher="online")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.3\.down\.bias(.|\n)*Set model\.path"):
        load(Toy(blocks=4))
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.2"):
        load(Toy(blocks=2))
    wider = Toy()
    wider.out = torch.nn.Linear(toy.WIDTH, 5)
    before = wider.into.weight.clone()
    with pytest.raises(CheckpointError, match=r"shape \(4, 7\) instead of \(5, 7\): out\.weight"):
        load(wider)
    assert torch.equal(wider.into.weight, before)


def test_other_precision_is_converted(source: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder, states = source
    model = Toy(dtype=torch.float64)
    initial_weights.loader(config(folder / "checkpoints", "online"), resumes=False, teacher="online")(model)
    assert torch.equal(model.into.weight, states["online"]["into.weight"].double())


class Recorder:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, path: str, seed: int) -> None:
        self.loaded.append(path)


def test_resuming_ignores_the_source_but_for_a_frozen_teacher(tmp_path: Path) -> None:
    """The checkpoint that follows has the weights; a frozen teacher is in no checkpoint."""
    (tmp_path / "transformer").mkdir()
    settings = config(tmp_path)
    settings.model["path"] = "base"
    for resumes, teacher, expected in (
        (False, "online", str(tmp_path)),
        (True, "online", "base"),
        (True, "frozen", str(tmp_path)),
    ):
        module = Recorder()
        initial_weights.loader(settings, resumes, teacher)(module)
        assert module.loaded == [expected]
    module = Recorder()
    initial_weights.loader(config(None), False, "online")(module)
    assert module.loaded == [None]


def test_a_wrong_place_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of a run and no fitting diffusers model"):
        initial_weights.loader(config(tmp_path / "nothing"), False, "online")(Toy())


def test_it_is_the_runs_identity() -> None:
    assert configuration.identity(config("a"))["init_from.path"] == "a"
    with pytest.raises(configuration.ConfigError, match=r"init_from\.weights is 'best'; choose ema or online"):
        configuration.load(
            [],
            [
                "init_from.weights=best",
                "run.name=x",
                "data.manifest=d",
                "train.steps=1",
                "train.global_batch_size=1",
                "train.micro_batch_size=1",
            ],
        )
