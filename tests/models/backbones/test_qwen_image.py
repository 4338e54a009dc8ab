"""The Qwen-Image backbone: shapes, masks, precision, gradients, sharding, size and cost."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage, pack, unpack
from tests.models.conftest import Rows


def doubled(cond: Conditioning) -> Conditioning:
    return cond.to("cpu", torch.float64)


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    tokens = pack(latents, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 2, 6, 8), latents)
    other = torch.randn(2, 3, 6, 12)
    assert torch.equal(unpack(pack(other, 3), 3, 6, 12), other)


@torch.no_grad()
def test_padding_does_not_leak(backbone: QwenImage, rows: Rows) -> None:
    x_t, t, r, cond = rows
    velocity = backbone(x_t, t, r, cond)
    scrambled = cond.embeds.masked_fill(~cond.mask[..., None], 100.0)
    torch.testing.assert_close(backbone(x_t, t, r, Conditioning(scrambled, cond.mask)), velocity, rtol=0, atol=0)
    alone = Conditioning(cond.embeds[1:2, :3], cond.mask[1:2, :3])
    torch.testing.assert_close(backbone(x_t[1:2], t[1:2], r[1:2], alone), velocity[1:2], rtol=0, atol=2e-6)
    unmasked = Conditioning(cond.embeds, torch.ones_like(cond.mask))
    assert (backbone(x_t, t, r, unmasked)[1:] - velocity[1:]).abs().max() > 1e-3


@torch.no_grad()
def test_float64_model_is_exact_to_float64(backbone: QwenImage, rows: Rows) -> None:
    """A second difference vanishes like h^2 = 1e-10, unless a cast to float32 on the way leaves its noise of 1e-7."""
    x_t, t, r, cond = rows
    model = copy.deepcopy(backbone).double()
    seen: set[torch.dtype] = set()
    for module in model.modules():
        module.register_forward_hook(lambda _m, _a, output: seen.update(x.dtype for x in _tensors(output)))
    exact = model(x_t.double(), t.double(), r.double(), doubled(cond))
    assert exact.dtype == torch.float64
    assert seen <= {torch.float64, torch.complex64}
    torch.testing.assert_close(exact.float(), backbone(x_t, t, r, cond), rtol=0, atol=1e-5)
    shift = torch.randn(3, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = 1e-5
    ahead, behind = (model(x_t.double() + s * h * shift, t.double(), r.double(), doubled(cond)) for s in (1, -1))
    assert 0 < (ahead + behind - 2 * exact).abs().max() < 1e-8


def _tensors(output: object) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def test_every_parameter_but_the_idle_ones_gets_a_gradient(backbone: QwenImage, rows: Rows) -> None:
    x_t, t, r, cond = rows
    backbone(x_t, t, r, cond).square().sum().backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == list(backbone.idle_parameters())
    assert len(without) == 6
    for name, parameter in backbone.named_parameters():
        if name.startswith("time_text_embed_2."):
            assert parameter.grad is not None
            assert parameter.grad.norm() > 0, name


def test_checkpoint_units_recompute_to_the_same_gradients(backbone: QwenImage, rows: Rows) -> None:
    x_t, t, r, cond = rows
    wrapped = copy.deepcopy(backbone)
    assert list(backbone.checkpoint_units()) == ["transformer_blocks.0", "transformer_blocks.1"]
    for name in wrapped.checkpoint_units():
        parent, _, child = name.rpartition(".")
        wrapped.get_submodule(parent).register_module(child, checkpoint_wrapper(wrapped.get_submodule(name)))
    for model in (backbone, wrapped):
        model(x_t, t, r, cond).square().sum().backward()
    for (name, a), b in zip(backbone.named_parameters(), wrapped.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_rank")
def test_sharded_bfloat16_blocks_keep_times_and_ends_in_float32(backbone: QwenImage, rows: Rows) -> None:
    """The engine's policy: bfloat16 in the blocks, float32 in the root and out of the last block."""
    x_t, t, r, cond = rows
    reference = backbone(x_t, t, r, cond)
    mesh = init_device_mesh("cpu", (1,))
    units = backbone.shard_units()
    assert list(units) == list(backbone.transformer_blocks)
    for unit in units:
        last = unit is units[-1]
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32 if last else None)
        fully_shard(unit, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(backbone, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    inside: dict[str, torch.dtype] = {}
    for name in (
        "time_text_embed",
        "time_text_embed_2",
        "img_in",
        "txt_in",
        "proj_out",
        "transformer_blocks.0.img_mlp",
    ):
        backbone.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: inside.update({name: out.dtype})
        )
    velocity = backbone(x_t, t, r, cond)
    assert inside.pop("transformer_blocks.0.img_mlp") == torch.bfloat16
    assert set(inside.values()) == {torch.float32}
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, reference, rtol=0, atol=0.05)
    assert not torch.equal(backbone(x_t, t - 0.01, r, cond), velocity)
    velocity.square().sum().backward()
    gradient = dict(backbone.named_parameters())["time_text_embed_2.timestep_embedder.linear_1.weight"].grad
    assert gradient is not None
    assert gradient.to_local().norm() > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("batch", "text"), [(1, 5), (3, 8)])
def test_flops_are_those_that_torch_counts(backbone: QwenImage, batch: int, text: int) -> None:
    cond = Conditioning(torch.randn(batch, text, 16), torch.ones(batch, text, dtype=torch.bool))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(torch.randn(batch, 4, 6, 8), torch.rand(batch), None, cond)
    assert backbone.flops(batch, tokens=12, text_tokens=text) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_published_architecture_has_its_size_on_meta() -> None:
    model = QwenImage({}, device="meta")
    second = sum(p.numel() for name, p in model.named_parameters() if name.startswith("time_text_embed_2."))
    assert second == 10_229_760
    assert sum(p.numel() for p in model.parameters()) == 20_430_401_088 + second
    assert all(p.is_meta for p in model.parameters())
    assert model.latent_shape((1024, 768)) == (16, 128, 96)


def test_materialised_meta_model_equals_one_built_on_the_cpu(folder: Path, backbone: QwenImage, rows: Rows) -> None:
    x_t, t, r, cond = rows
    model = QwenImage.from_folder(folder).to_empty(device="cpu")
    model.load(str(folder))
    assert torch.equal(model(x_t, t, r, cond), backbone(x_t, t, r, cond))


def test_latent_shape_follows_the_kind_of_latents(folder: Path, backbone: QwenImage) -> None:
    assert backbone.latent_shape((64, 32)) == (4, 8, 4)
    assert QwenImage.from_folder(folder, latents="pixels").latent_shape((64, 32)) == (4, 64, 32)
    with pytest.raises(ValueError, match="multiples of 16"):
        backbone.latent_shape((64, 40))


def test_misuse_is_named(folder: Path, backbone: QwenImage, rows: Rows, tmp_path: Path) -> None:
    x_t, t, _, cond = rows
    with pytest.raises(ValueError, match="takes 4 channels"):
        backbone(x_t[:, :3], t, None, cond)
    with pytest.raises(ValueError, match="divisible by 2"):
        backbone(x_t[:, :, :5], t, None, cond)
    with pytest.raises(ValueError, match="3 latents came with 2 conditions"):
        backbone(x_t, t, None, cond[:2])
    with pytest.raises(NotImplementedError, match="reference latents"):
        backbone(x_t, t, None, dataclasses.replace(cond, references=(x_t,)))
    with pytest.raises(ValueError, match="zero_cond_t"):
        QwenImage({"zero_cond_t": True}, device="meta")
    with pytest.raises(ValueError, match="choose one of vae, pixels"):
        QwenImage.from_folder(folder, latents="wavelets")
    with pytest.raises(FileNotFoundError, match=r"model\.path"):
        QwenImage.from_folder(tmp_path)


def test_it_is_the_diffusers_class(backbone: QwenImage) -> None:
    assert isinstance(backbone, QwenImageTransformer2DModel)
