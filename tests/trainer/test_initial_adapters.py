"""A run of adapters starts from earlier adapters, or puts new ones on a whole model; what does not fit is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import load as configuration
from configs.schema import Checkpoint, Config, Lora
from models import lora, lora_files, tiny
from models.backbones.qwen_image import QwenImage
from models.weights import CheckpointError
from tests.data.conftest import ObjectStore
from tests.data.conftest import store as store
from trainer import initial_weights
from trainer.engines.engine import TensorPart
from trainer.plugins import plugin
from trainer.saving.checkpoint import Checkpoints

OPTIONS = Lora(rank=2, alpha=3)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write(path, tiny.SMALLEST["qwen_image"], seed=0)
    return path


def config(base: Path, path: Path | str | None, options: Lora = OPTIONS, weights: str = "online") -> Config:
    made = configuration.load(
        [], ["run.name=x", "data.manifest=d", "train.steps=1", "train.global_batch_size=1", "train.micro_batch_size=1"]
    )
    made.model["path"], made.lora = str(base), options
    made.init_from.path, made.init_from.weights = None if path is None else str(path), weights
    return made


def started(settings: Config, resumes: bool = False) -> State:
    """The tensors that a run of this configuration starts with."""
    model: Any = plugin("model", {"name": settings.model["name"]})[0].from_folder(settings.model["path"])
    if settings.lora.rank is not None:
        lora.add(model, settings.lora, "ema")
    model.to_empty(device="cpu")
    initial_weights.loader(settings, resumes, "ema")(model)
    state: State = model.state_dict()
    return state


def adapters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if lora.Adapters.holds(name)}


def frozen(state: State) -> State:
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def earlier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    """A run's checkpoint of adapters, and what is in it."""
    folder = tmp_path_factory.mktemp("earlier")
    return folder, write_earlier(base, folder, {"config": {"lora": asdict(OPTIONS)}})


def write_earlier(base: Path, folder: Path, metadata: dict[str, Any]) -> dict[str, State]:
    fresh = adapters(started(config(base, None)))
    states = {which: {n: t + factor for n, t in fresh.items()} for which, factor in (("online", 0.1), ("ema", 0.2))}
    groups = {"online": "parameter", "ema": "ema"}
    parts = [
        TensorPart(groups[which], name, tuple(tensor.shape), 0, tensor.reshape(-1))
        for which, state in states.items()
        for name, tensor in state.items()
    ]
    Checkpoints(folder / "checkpoints", Checkpoint(), metadata).write(5, parts, {})
    return states


@pytest.mark.parametrize("weights", ["online", "ema"])
def test_adapters_of_a_run_go_on(base: Path, earlier: tuple[Path, dict[str, State]], weights: str) -> None:
    folder, states = earlier
    begun = started(config(base, folder / "checkpoints", weights=weights))
    assert_equal(adapters(begun), states[weights])
    assert_equal(frozen(begun), frozen(started(config(base, None))))
    averages = {name.replace(".ema.", ".default."): tensor for name, tensor in begun.items() if ".ema." in name}
    assert_equal(averages, states[weights])


def test_adapters_of_a_file_go_on(base: Path, earlier: tuple[Path, dict[str, State]], tmp_path: Path) -> None:
    states = earlier[1]
    file = lora_files.save(tmp_path, states["online"], OPTIONS)
    for path in (tmp_path, file):
        assert_equal(adapters(started(config(base, path))), states["online"])


def test_adapters_on_s3_go_on(
    base: Path, earlier: tuple[Path, dict[str, State]], store: ObjectStore, tmp_path: Path
) -> None:
    states = earlier[1]
    store.client.create_bucket(Bucket="adapters")
    file = lora_files.save(tmp_path, states["online"], OPTIONS)
    for key in ("run/" + lora_files.FILE, "mixed/mine.safetensors", "mixed/other.safetensors"):
        body = b"other" if "other" in key else file.read_bytes()
        store.client.put_object(Bucket="adapters", Key=key, Body=body)
    for path in ("run", "run/" + lora_files.FILE, "mixed/mine.safetensors"):
        settings = config(base, f"s3://adapters/{path}")
        settings.data.endpoint_url, settings.data.cache_dir = store.endpoint_url, str(tmp_path / "cache")
        assert_equal(adapters(started(settings)), states["online"])
    assert not list((tmp_path / "cache").rglob("other.safetensors"))
    settings.init_from.path = "s3://adapters/mixed"
    with pytest.raises(CheckpointError, match="neither a diffusers model nor adapters"):
        started(settings)


def test_new_adapters_lie_on_a_whole_model(base: Path, tmp_path: Path) -> None:
    """Also when the run is resumed: the base is in none of its checkpoints."""
    model = QwenImage.from_folder(base, device="cpu")
    model.load(str(base))
    trained = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    model.export(str(tmp_path / "export"), trained)
    fresh = started(config(base, None))
    for resumes in (False, True):
        begun = started(config(base, tmp_path / "export"), resumes)
        assert_equal(frozen(begun), trained)
        assert_equal(adapters(begun), adapters(fresh))
        assert all(not tensor.any() for name, tensor in adapters(begun).items() if ".lora_B." in name)


def test_the_runs_own_checkpoint_replaces_adapters_when_it_is_resumed(
    base: Path, earlier: tuple[Path, dict[str, State]]
) -> None:
    begun = started(config(base, earlier[0] / "checkpoints"), resumes=True)
    assert_equal(begun, started(config(base, None)))


def test_a_checkpoint_of_adapters_is_restored_for_sampling(base: Path, earlier: tuple[Path, dict[str, State]]) -> None:
    folder, states = earlier
    model: Any = QwenImage.from_folder(base)
    lora.add(model, OPTIONS, "online")
    model.to_empty(device="cpu")
    source = initial_weights.reader(str(folder / "checkpoints"), None)
    initial_weights.restore_adapters(config(base, None), source, "ema", model)
    assert_equal(adapters(model.state_dict()), states["ema"])
    assert_equal(frozen(model.state_dict()), frozen(started(config(base, None))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Lora(), "holds adapters, and lora.rank is null"),
        (Lora(rank=2), "are others than this run's; set lora.alpha=3"),
        (Lora(rank=4, alpha=3, variant="single_time"), "set lora.rank=2 lora.variant=second_embedding"),
        (Lora(rank=2, alpha=3, targets=["attn.to_q"]), r"unexpected: (.|\n)*Set lora.targets to those of that run"),
    ],
)
def test_other_adapters_are_refused(
    base: Path, earlier: tuple[Path, dict[str, State]], options: Lora, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        started(config(base, earlier[0] / "checkpoints", options))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not say of which rank, .* twinflow export RUN DEST --adapters"),
        ({"config": {}}, "does not say of which rank"),
        ({"config": {"lora": {"rank": None}}}, "does not say of which rank"),
        ({"config": {"lora": asdict(OPTIONS) | {"dora": True}}}, r"lora\.dora, which is unknown here"),
    ],
)
def test_a_checkpoint_that_does_not_describe_its_adapters_is_refused(
    base: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    write_earlier(base, tmp_path, metadata)
    with pytest.raises(CheckpointError, match=message):
        started(config(base, tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", ["sana", "sd3", "z_image"])
def test_the_base_under_adapters_does_not_depend_on_the_runs_seed(name: str, tmp_path: Path) -> None:
    """Its second time embedding is drawn at random, and lies in no checkpoint and no file of adapters."""
    tiny.write(tmp_path / "model", tiny.SMALLEST[name], seed=0)
    begun = []
    for seed in (1, 2):
        settings = config(tmp_path / "model", None)
        settings.model, settings.run.seed = {"name": name, "path": settings.model["path"]}, seed
        begun.append(started(settings))
    assert_equal(frozen(begun[0]), frozen(begun[1]))
    assert any(not torch.equal(begun[0][key], begun[1][key]) for key in adapters(begun[0]))
    settings.lora = Lora()
    assert_differ(started(settings), frozen(begun[0]))  # all of it is trained, and saved


def assert_differ(found: State, other: State) -> None:
    assert found.keys() == other.keys()
    assert any(not torch.equal(found[name], tensor) for name, tensor in other.items())
