"""Weights: round trips, sharded reads, and which keys may be absent."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import weights
from models.backbones.qwen_image import QwenImage
from models.weights import CheckpointError

FILE = "diffusion_pytorch_model.safetensors"


def perturbed(backbone: QwenImage) -> dict[str, Tensor]:
    """A state whose second embedding is no longer a copy of the first."""
    generator = torch.Generator().manual_seed(2)
    return {name: p.detach() + torch.randn(p.shape, generator=generator) for name, p in backbone.named_parameters()}


def fresh(folder: Path) -> QwenImage:
    model = QwenImage.from_folder(folder).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def assert_holds(model: QwenImage, state: dict[str, Tensor]) -> None:
    held = dict(model.named_parameters())
    assert held.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(held[name], tensor), name


def test_base_checkpoint_starts_the_second_embedding_as_a_copy(folder: Path) -> None:
    model = fresh(folder)
    model.load(str(folder))
    stored = load_file(folder / "transformer" / FILE)
    copies = {key.replace("time_text_embed.", "time_text_embed_2."): x for key, x in stored.items() if "embed." in key}
    assert len(copies) == 4
    assert_holds(model, stored | copies)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_that_begin_and_end_within_rows_are_filled_from_the_files(folder: Path, parts: int) -> None:
    """As an engine holds them that cuts flattened parameters; a base checkpoint's second embedding is a copy here, too."""
    whole = fresh(folder)
    whole.load(str(folder))
    pieces: dict[str, list[Tensor]] = {}
    for part in range(parts):
        model = fresh(folder)
        for name, parameter in model.named_parameters():
            size = -(-parameter.numel() // parts)
            start = min(part * size, parameter.numel())
            local = torch.full((min(size, parameter.numel() - start),), float("nan"))
            parameter.flat_part = weights.FlatPart(tuple(parameter.shape), start, local)  # type: ignore[attr-defined]
            pieces.setdefault(name, []).append(local)
        model.load(str(folder))
        assert all(parameter.isnan().all() for parameter in model.parameters()), "a whole parameter was filled"
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat(pieces[name]), parameter.detach().flatten()), name


def test_trained_second_embedding_survives_the_round_trip(folder: Path, backbone: QwenImage, tmp_path: Path) -> None:
    state = perturbed(backbone)
    backbone.export(str(tmp_path / "out"), state)
    model = fresh(folder)
    model.load(str(tmp_path / "out"))
    assert_holds(model, state)


def test_sharded_files_load_like_a_single_one(folder: Path, backbone: QwenImage, tmp_path: Path) -> None:
    state = perturbed(backbone)
    out = tmp_path / "out"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    weights.export(out, state, "QwenImageTransformer2DModel", config, set(state), max_shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    model = fresh(folder)
    model.load(str(out))
    assert_holds(model, state)


def test_export_is_a_diffusers_folder(backbone: QwenImage, tmp_path: Path) -> None:
    state = perturbed(backbone)
    backbone.export(str(tmp_path / "out"), state)
    base = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out", local_files_only=True)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, state[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / FILE).stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_export_refuses_an_existing_folder_and_a_foreign_state(backbone: QwenImage, tmp_path: Path) -> None:
    state = perturbed(backbone)
    with pytest.raises(FileExistsError, match="choose another folder"):
        backbone.export(str(tmp_path), state)
    del state["proj_out.bias"]
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        backbone.export(str(tmp_path / "out"), state)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(backbone: QwenImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        backbone.export(str(tmp_path / "out"), perturbed(backbone))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "mesh_shape"), [(1, (2,)), (2, (3,)), (4, (5,)), (3, (2, 2))])
def test_every_rank_of_a_sharded_model_reads_its_rows(
    folder: Path, backbone: QwenImage, tmp_path: Path, rank: int, mesh_shape: tuple[int, ...]
) -> None:
    """Rows do not divide evenly by 3 and leave the last of 5 ranks none of 16; 2 x 2 keeps two copies of the rows.

    No communication is needed, so one process plays the rank; torch caches meshes by shape, hence one rank of each.
    """
    state = perturbed(backbone)
    backbone.export(str(tmp_path / "trained"), state)
    base = dict(backbone.named_parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh_shape))
    try:
        model = QwenImage.from_folder(folder)
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
        for unit in (*model.shard_units(), model):
            fully_shard(unit, mesh=mesh)
        model.to_empty(device="cpu")
        for source, expected in ((tmp_path / "trained", state), (folder, base)):
            model.load(str(source))
            for name, parameter in model.named_parameters():
                chunks = expected[name].chunk(mesh_shape[-1])
                position = rank % mesh_shape[-1]
                rows = chunks[position] if position < len(chunks) else expected[name][:0]
                assert torch.equal(parameter.to_local(), rows), name  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def remove(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(key)


def add(key: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("img_in.bias"), r"missing: img_in\.bias"),
        (remove("time_text_embed_2.timestep_embedder.linear_1.bias"), r"missing: time_text_embed_2\.timestep_emb"),
        (add("surprise", (1,)), "unexpected: surprise"),
        (add("img_in.bias", (7,)), r"shape \(7,\) instead of \(32,\): img_in\.bias"),
    ],
)
def test_keys_that_do_not_fit_are_listed_and_nothing_changes(
    folder: Path, backbone: QwenImage, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = perturbed(backbone)
    change(state)
    save_file(state, tmp_path / FILE)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    with pytest.raises(CheckpointError, match=message) as caught:
        backbone.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert_holds(backbone, before)


def test_damaged_folders_are_named(folder: Path, backbone: QwenImage, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        backbone.load(str(tmp_path))
    (tmp_path / FILE).write_bytes((folder / "transformer" / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        backbone.load(str(tmp_path))
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"proj_out.bias": "lost.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lost\.safetensors"):
        backbone.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        backbone.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"proj_out.bias": "../secret/FILE"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"proj_out.bias": "ABSOLUTE"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"proj_out.bias": ".."}}, "not the name of a file in the same folder"),
        ({"weight_map": {"proj_out.bias": 3}}, "not the name of a file in the same folder"),
        ({"weight_map": ["proj_out.bias"]}, "has no weight_map"),
        ({"metadata": {}}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "is no JSON"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    folder: Path, backbone: QwenImage, tmp_path: Path, index: object, said: str
) -> None:
    """Above all one that leads out of its folder: the weights there are whole, and would be loaded."""
    secret, model = tmp_path / "secret", tmp_path / "model"
    secret.mkdir()
    model.mkdir()
    stored = load_file(folder / "transformer" / FILE)
    save_file(stored, secret / FILE)
    text = "{" if index is None else json.dumps(index)
    if "FILE" in text or "ABSOLUTE" in text:
        file = f"../secret/{FILE}" if "FILE" in text else str(secret / FILE)
        text = json.dumps({"weight_map": dict.fromkeys(stored, file)})
    (model / f"{FILE}.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        backbone.load(str(model))


def test_meta_parameters_are_refused(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="materialised"):
        QwenImage.from_folder(folder).load(str(folder))
