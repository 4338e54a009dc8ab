"""Adapters on a frozen backbone: where they are, which rows see which, and the file that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import Lora
from models import lora, lora_files, tiny, weights
from models.backbones.qwen_image import QwenImage
from models.weights import CheckpointError
from tests.models.conftest import Rows
from trainer.engines.autocast import compute_in_bfloat16
from trainer.plugins import plugin

OPTIONS = Lora(rank=3, alpha=2)


def adapted(folder: Path, teacher: str = "online", options: Lora = OPTIONS, dtype: torch.dtype = torch.float32) -> Any:
    """A backbone from meta whose adapters change what it computes; the averaged ones unlike the online ones."""
    model = QwenImage.from_folder(folder, dtype=dtype)
    lora.add(model, options, teacher)
    model.to_empty(device="cpu")
    model.load(str(folder))
    lora.initialise(model, seed=1, scatter=True)
    for name, parameter in model.named_parameters():
        if ".lora_B.ema." in name:
            parameter.data *= -1
    return model


def plain(folder: Path, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> QwenImage:
    model = QwenImage.from_folder(folder, device="cpu", dtype=dtype)
    model.load(str(folder))
    if state is not None:
        model.load_state_dict(state)
    return model


def merged(folder: Path, model: Any, adapter: str = "default") -> QwenImage:
    """A backbone without adapters that computes what one of the adapters makes of the base."""
    base = plain(folder, torch.float64)
    values = {name.replace(f".{adapter}.", ".default."): p for name, p in model.named_parameters() if adapter in name}
    base.load_state_dict(lora_files.merge(values, base.state_dict(), OPTIONS))
    return base


@pytest.mark.parametrize("single_time", [False, True])
@pytest.mark.parametrize("teacher", ["ema", "frozen"])
@torch.no_grad()
def test_one_pass_serves_rows_of_both_kinds(folder: Path, rows: Rows, teacher: str, single_time: bool) -> None:
    """Online rows see the online adapters, teacher rows the averages or the base alone; with one time all are asked at
    t - r/2, but the base at t."""
    x_t, t, r, cond = (rows[0].double(), rows[1].double(), rows[2].double(), rows[3].to("cpu", torch.float64))
    options = Lora(rank=3, alpha=2, variant="single_time" if single_time else "second_embedding")
    model = adapted(folder, teacher, options, torch.float64)
    at = (t - r / 2, t - r / 2) if single_time else (t, r)
    online = merged(folder, model)(x_t, *at, cond)
    if teacher == "frozen":
        taught = plain(folder, torch.float64)(x_t, t, t if single_time else r, cond)
    else:
        taught = merged(folder, model, "ema")(x_t, *at, cond)
    assert (online - taught).abs().max() > 1e-3
    for marks in ([0, 1, 0], [1, 1, 1], [0, 0, 0]):
        kinds = torch.tensor(marks)
        found = model(x_t, t, r, cond, weights=kinds)
        expected = torch.where(kinds.bool().view(-1, 1, 1, 1), taught, online)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x_t, t, r, cond), online, rtol=0, atol=1e-12)


@torch.no_grad()
def test_adapters_begin_as_no_change_and_the_base_stays_the_base(folder: Path, rows: Rows) -> None:
    """Bit for bit: at r = t a fresh adapted model is the base model; later its rows without adapters are."""
    x_t, t, _, cond = rows
    base = plain(folder, torch.float32)(x_t, t, t, cond)
    model = adapted(folder, "frozen")
    trained = model(x_t, t, t, cond)
    assert torch.equal(model(x_t, t, None, cond), trained)
    assert not torch.allclose(trained, base)
    assert torch.equal(model(x_t, t, t, cond, weights=torch.ones(3, dtype=torch.int64)), base)
    lora.initialise(model, seed=1)
    assert torch.equal(model(x_t, t, t, cond), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_time_tells_targets_and_signs_apart(folder: Path, rows: Rows, dtype: torch.dtype) -> None:
    """Also where the blocks compute in bfloat16: times a hundredth apart differ, and so does their sign."""
    x_t, t, r, cond = rows
    model = adapted(folder, options=Lora(rank=3, variant="single_time"))
    if dtype == torch.bfloat16:
        compute_in_bfloat16(model, "cpu")
    outcome = model(x_t, t, r, cond)
    for other in ((t, r - 0.02), (t - 0.01, r), (-t, -r)):
        assert not torch.equal(model(x_t, *other, cond), outcome)


def test_graded_passes_hold_online_rows_alone(folder: Path, rows: Rows) -> None:
    x_t, t, r, cond = rows
    model = adapted(folder, "ema")
    with pytest.raises(RuntimeError, match="graded passes hold online rows alone"):
        model(x_t, t, r, cond, weights=torch.tensor([0, 1, 0]))
    with torch.no_grad():
        expected = model(x_t, t, r, cond)
        model(x_t, t, r, cond, weights=torch.tensor([0, 1, 0]))
        with pytest.raises(ValueError, match="do not fit"):
            model(x_t[:, :1], t, r, cond, weights=torch.tensor([0, 1, 0]))
    graded = model(x_t, t, r, cond)
    torch.testing.assert_close(graded, expected)
    graded.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".default." in name for name in with_gradient) and len(with_gradient) == 50


def test_the_published_targets_have_the_published_size() -> None:
    """Some 420 million parameters at rank 64 (TwinFlow, B.2); none where no gradient arrives."""
    model = QwenImage({}, device="meta")
    lora.add(model, Lora(rank=64, variant="single_time"), "online")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(model.get_parameter(name).numel() for name in trained) == 422_920_192
    assert all(model.get_parameter(name).is_meta for name in trained)
    assert not any(name.startswith(("time_text_embed_2", "transformer_blocks.59.txt_mlp")) for name in trained)
    assert any(name.startswith("transformer_blocks.58.txt_mlp") for name in trained)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["attn.to_qq"], r"ends in 'attn.to_qq'; near: attn.to_q, "),
        (["to_q", "norm_out"], "ends in 'norm_out'; near: .*norm_out.linear"),
        (["transformer_blocks.1.attn.to_add_out"], "ever gets a gradient"),
    ],
)
def test_targets_that_match_nothing_are_refused(folder: Path, targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.add(QwenImage.from_folder(folder), Lora(rank=2, targets=targets), "online")


def test_chosen_targets_are_all_that_is_adapted(folder: Path) -> None:
    model = QwenImage.from_folder(folder)
    lora.add(model, Lora(rank=2, targets=["0.attn.to_q", "proj_out"]), "online")
    assert sorted(lora.layers(model)) == ["proj_out", "transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize("parts", [2, 3])
def test_initial_adapters_do_not_depend_on_how_they_are_cut(folder: Path, parts: int) -> None:
    whole, pieces = dict(adapted(folder).named_parameters()), dict[str, list[Tensor]]()
    for part in range(parts):
        model = adapted(folder)
        for name, parameter in model.named_parameters():
            local = torch.full((parameter.numel(),), float("nan")).chunk(parts)[part].clone()
            start = sum(piece.numel() for piece in pieces.get(name, []))
            parameter.flat_part = weights.FlatPart(tuple(parameter.shape), start, local)
            pieces.setdefault(name, []).append(local)
        model.load(str(folder))
        lora.initialise(model, seed=1, scatter=True)
    for name, parameter in whole.items():
        assert torch.equal(torch.cat(pieces[name]), parameter.detach().flatten()), name


# ---- files


@pytest.fixture
def pipeline(folder: Path) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(folder, local_files_only=True)


def draw(pipeline: QwenImagePipeline, noise: Tensor) -> Tensor:
    """One Euler step from t = 1, no guidance: a sample of one evaluation at r = 0 where one time says both."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 48, "width": 64, "output_type": "latent", "true_cfg_scale": 1.0}
    tokens = QwenImagePipeline._pack_latents(noise, 1, *noise.shape[1:])
    drawn = pipeline("a handwritten two", latents=tokens, num_inference_steps=1, sigmas=[1.0], **size).images
    return QwenImagePipeline._unpack_latents(drawn, 48, 64, pipeline.vae_scale_factor)[:, :, 0]


@torch.no_grad()
def test_plain_diffusers_draws_the_same_with_the_saved_adapters(
    folder: Path, pipeline: QwenImagePipeline, tmp_path: Path
) -> None:
    options = Lora(rank=3, alpha=2, variant="single_time")
    model = adapted(folder, options=options)
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    encoder = QwenImage.text_encoder(folder, "cpu", torch.float32, 512, "")
    one, zero = torch.ones(1), torch.zeros(1)
    own = noise - model(noise, one, zero, encoder.encode(["a handwritten two"]))
    untrained = draw(pipeline, noise)
    lora_files.save(tmp_path, model.state_dict(), options)
    pipeline.load_lora_weights(tmp_path)
    assert (draw(pipeline, noise) - own).abs().max() <= 1e-5
    assert (untrained - own).abs().max() > 1e-2


@pytest.mark.parametrize("name", sorted(tiny.SMALLEST))
@torch.no_grad()
def test_diffusers_finds_a_place_for_every_adapter(name: str, tmp_path: Path) -> None:
    """Of every backbone: what the pipeline makes of the file is what `merge` makes of the weights."""
    tiny.write(tmp_path / "model", tiny.SMALLEST[name], seed=0)
    options = Lora(rank=2, alpha=3, variant="single_time")
    backbone_class, _ = plugin("model", {"name": name})
    model = backbone_class.from_folder(tmp_path / "model")
    lora.add(model, options, "online")
    model.to_empty(device="cpu")
    model.load(str(tmp_path / "model"))
    lora.initialise(model, seed=1, scatter=True)
    lora_files.save(tmp_path, model.state_dict(), options)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    expected = lora_files.merge(model.state_dict(), dict(pipeline.transformer.state_dict()), options)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6, msg=key)


@torch.no_grad()
def test_the_file_goes_round(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if lora.Adapters.holds(name)}
    file = lora_files.save(tmp_path / "out", model.state_dict(), OPTIONS)
    saved = lora_files.read(tmp_path / "out")
    assert saved.options == OPTIONS and saved.tensors.keys() == state.keys()
    lora.initialise(model, seed=2, given=saved.tensors)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(FileExistsError, match="choose another folder"):
        lora_files.save(tmp_path / "out", state, OPTIONS)
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    narrow = adapted(folder, options=Lora(rank=2, targets=["attn.to_q"]))
    misfit = r"do not fit lora.rank, lora.targets(.|\n)*shape \(3, 32\) instead of \(2, 32\)(.|\n)*unexpected"
    with pytest.raises(CheckpointError, match=misfit):
        lora.initialise(narrow, seed=2, given=saved.tensors)
    with pytest.raises(CheckpointError, match="holds tensors like"):
        lora_files.read(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lora_files.read(tmp_path)
    with pytest.raises(ValueError, match="trained in full"):
        lora_files.save(tmp_path / "none", plain(folder, torch.float32).state_dict(), OPTIONS)


def described(**more: Any) -> dict[str, str]:
    """The header of a file of adapters, as diffusers writes it."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in more.items()})}


def write_foreign(file: Path, header: dict[str, str]) -> Path:
    names = [f"transformer.transformer_blocks.0.attn.to_q.lora_{matrix}.weight" for matrix in "AB"]
    save_file({names[0]: torch.ones(4, 8), names[1]: torch.ones(8, 4)}, file, metadata=header)
    return file


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (described(lora_alpha=8, use_rslora=True), "adapters with use_rslora; .*fuse_lora"),
        (described(lora_alpha=8, alpha_pattern={"transformer_blocks.0.attn.to_q": 2}), "adapters with alpha_pattern"),
        (described(lora_alpha=8, rank_pattern={"transformer_blocks.0.attn.to_q": 4}), "adapters with rank_pattern"),
        (described(lora_alpha=8, use_dora=True), "adapters with use_dora"),
        (described(lora_alpha=1.5), "adapters with lora_alpha 1.5"),
        (described(lora_alpha=float("nan")), "adapters with lora_alpha nan"),
        (described(lora_alpha=None), "adapters with lora_alpha None"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON .* again"),
        ({"lora_adapter_metadata": "3"}, "lora_adapter_metadata is no JSON object"),
        ({"twinflow_lora": "{"}, "twinflow_lora is no JSON"),
    ],
)
def test_a_file_whose_scale_would_be_misread_is_refused(tmp_path: Path, header: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lora_files.read(write_foreign(tmp_path / "foreign.safetensors", header))


def test_the_scale_of_a_file_of_others_is_read(tmp_path: Path) -> None:
    plain = described(r=4, lora_alpha=8.0, use_rslora=False, alpha_pattern={}, rank_pattern={}, use_dora=False)
    for header, scale in ((plain, 8), ({}, 4)):
        options = lora_files.read(write_foreign(tmp_path / "foreign.safetensors", header)).options
        assert (options.rank, options.alpha, options.variant) == (4, scale, "single_time")
