"""What holds for every backbone: times, masks, precision, gradients, sharding, cost, refusals."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.backbone import Conditioning
from models.weights import CheckpointError, named_tensors
from tests.flop_counting import flop_counter
from tests.models.backbones.families import FAMILIES, Family, Rows, first, second
from trainer.engines.recompute import checkpoint_blocks
from trainer.engines.sharding import Layout, shard, sharded_parameters


def recomputing(model: Any) -> Any:
    """A copy whose checkpoint units recompute, as an engine arranges it."""
    wrapped = copy.deepcopy(model)
    for name in wrapped.checkpoint_units():
        parent, _, child = name.rpartition(".")
        wrapped.get_submodule(parent).register_module(child, checkpoint_wrapper(wrapped.get_submodule(name)))
    return wrapped


def gradients(model: Any, given: Rows) -> dict[str, Tensor | None]:
    x_t, t, r, cond = given
    model(x_t, t, r, cond).square().sum().backward()
    return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}


@torch.no_grad()
def test_equal_times_give_the_diffusers_model_bit_for_bit(family: Family, place: Path, model: Any, given: Rows) -> None:
    x_t, t, r, cond = given
    expected = family.plain(place, x_t, t, cond)
    assert torch.equal(model(x_t, t, t, cond), expected)
    assert torch.equal(model(x_t, t, None, cond), expected)
    assert not torch.allclose(model(x_t, t, r, cond), expected, atol=1e-3)
    # Captions of one length take another way through attention in some of them.
    whole = dataclasses.replace(cond, mask=torch.ones_like(cond.mask))
    assert torch.equal(model(x_t, t, t, whole), family.plain(place, x_t, t, whole))


@torch.no_grad()
def test_times_far_apart_and_of_either_sign_are_different_times(model: Any, given: Rows) -> None:
    """Also at the ends, where published code confuses 0 with 1 and 1 with -1 (method 6.3)."""
    x_t, _, _, cond = given
    one = torch.ones(3)
    outputs = [model(x_t, t * one, r * one, cond) for t, r in ((1, 0), (1, 1), (1, 0.5), (-1, -1), (0.4, 0.4))]
    outputs += [model(x_t, -0.4 * one, -0.4 * one, cond), model(x_t, 0.4 * one, 0.39 * one, cond)]
    for index, output in enumerate(outputs):
        for other in outputs[:index]:
            assert (output - other).abs().max() > 1e-5
    assert torch.equal(model(x_t, 0 * one, 0 * one, cond), model(x_t, -0.0 * one, 0 * one, cond))


@torch.no_grad()
def test_embedding_is_the_published_sum(family: Family, place: Path, model: Any, given: Rows) -> None:
    """E1 of the base model, asked at t, plus (t - r) E2, in float32; of the rows' own times, which come first."""
    x_t, _, _, cond = given
    t, r = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.0, 0.2, -0.2])
    enlarged(model)
    (alone, _), (total, _) = (heard(first(model), lambda at=at: model(x_t, t, at, cond)) for at in (t, r))
    part, argument = heard(second(model), lambda: model(x_t, t, r, cond))
    assert torch.equal(argument[:3], family.second_time(t, r))
    assert len(total) == len(alone) == len(part)
    for whole, a, b in zip(total, alone, part, strict=True):
        torch.testing.assert_close(whole[:3], a[:3] + (t - r)[:, None] * b[:3], rtol=0, atol=1e-6)
        assert (whole - a).abs().max() > 1e-2


@torch.no_grad()
def test_bfloat16_parameters_still_see_times_that_bfloat16_cannot_hold(model: Any, given: Rows) -> None:
    x_t, _, _, cond = given
    enlarged(model)
    small = copy.deepcopy(model).to(torch.bfloat16)
    t, near = torch.full((3,), 0.5003), torch.full((3,), 0.5001)
    assert t.bfloat16()[0] == near.bfloat16()[0]
    found, other, third = (
        heard(first(small), lambda at=at: small(x_t, *at, cond))[0] for at in ((t, t), (near, near), (t, near * 0))
    )
    exact, _ = heard(first(model), lambda: model(x_t, t, t, cond))
    for a, b, c, d in zip(found, other, third, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert not torch.equal(a, b) and not torch.equal(a, c)
        torch.testing.assert_close(a.float(), d, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_copy_of_the_model_has_its_own_second_embedding(model: Any, given: Rows) -> None:
    x_t, t, r, cond = given
    before = model(x_t, t, r, cond)
    twin = copy.deepcopy(model)
    for parameter in second(twin).parameters():
        parameter.add_(0.1)
    assert torch.equal(model(x_t, t, r, cond), before)
    assert not torch.equal(twin(x_t, t, r, cond), before)


def test_embedding_without_times_is_refused(model: Any) -> None:
    with pytest.raises(RuntimeError, match="call the model itself"):
        first(model)(torch.tensor([0.5]))


def enlarged(model: Any) -> None:
    """Give E2 large numbers, so that target times matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in second(model).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def heard(module: Any, run: Callable[[], Any]) -> tuple[list[Tensor], Tensor]:
    """What a module gives in `run`, and its first input."""
    found: list[Any] = []
    handle = module.register_forward_hook(lambda _m, args, output: found.append((list(tensors(output)), args[0])))
    run()
    handle.remove()
    assert len(found) == 1
    outputs, argument = found[0]
    return outputs, argument


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_padding_does_not_leak(model: Any, given: Rows, recompute: bool) -> None:
    x_t, t, r, cond = given
    model = recomputing(model) if recompute else model
    if not model.masked_text:
        padded = dataclasses.replace(cond, mask=torch.arange(5) < torch.tensor([[5], [3], [1]]))
        with pytest.raises(RuntimeError, match="must not be padded"):
            model(x_t, t, r, padded)
        return
    velocity, expected = model(x_t, t, r, cond), gradients(copy.deepcopy(model), given)
    poisoned = dataclasses.replace(cond, embeds=cond.embeds.masked_fill(~cond.mask[..., None], torch.nan))
    assert torch.equal(model(x_t, t, r, poisoned), velocity)
    for name, gradient in gradients(copy.deepcopy(model), (x_t, t, r, poisoned)).items():
        assert gradient is expected[name] is None or torch.equal(gradient, expected[name]), name  # type: ignore[arg-type]
    for row, length in enumerate(cond.mask.sum(dim=1).tolist()):
        one = slice(row, row + 1)
        alone = dataclasses.replace(cond[one], embeds=cond.embeds[one, :length], mask=cond.mask[one, :length])
        torch.testing.assert_close(model(x_t[one], t[one], r[one], alone), velocity[one], rtol=0, atol=2e-6)
    unmasked = dataclasses.replace(cond, mask=torch.ones_like(cond.mask))
    assert (model(x_t, t, r, unmasked)[1:] - velocity[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_float64_model_is_exact_to_float64(model: Any, given: Rows) -> None:
    """A second difference vanishes like h^2 = 1e-10, unless a cast to float32 on the way leaves its noise of 1e-7."""
    x_t, t, r, cond = given
    double = copy.deepcopy(model).double()
    seen: set[torch.dtype] = set()
    for module in double.modules():
        module.register_forward_hook(lambda _m, _a, output: seen.update(x.dtype for x in tensors(output)))
    of_double = cond.to("cpu", torch.float64)
    exact = double(x_t.double(), t.double(), r.double(), of_double)
    assert exact.dtype == torch.float64
    assert seen <= {torch.float64, torch.complex64}
    torch.testing.assert_close(exact.float(), model(x_t, t, r, cond), rtol=0, atol=2e-5)
    shift = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = 1e-5
    ahead, behind = (double(x_t.double() + s * h * shift, t.double(), r.double(), of_double) for s in (1, -1))
    assert 0 < (ahead + behind - 2 * exact).abs().median() < 1e-9  # not the largest: SANA's ReLUs have kinks


def tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)


def test_every_parameter_but_the_idle_ones_gets_a_gradient(family: Family, model: Any, given: Rows) -> None:
    found = gradients(model, given)
    without = [name for name, gradient in found.items() if gradient is None]
    assert without == list(model.idle_parameters())
    assert len(without) == family.idle
    for name, gradient in found.items():
        if name.startswith(f"{model.time_embedding}_2."):
            assert gradient is not None
            assert gradient.norm() > 0, name


def test_checkpoint_units_recompute_to_the_same_gradients(model: Any, given: Rows) -> None:
    units = [model.get_submodule(name) for name in model.checkpoint_units()]
    assert units == list(model.shard_units())
    pairs = copy.deepcopy(model)
    checkpoint_blocks(pairs, every=1, group=2, keep="nothing")
    expected = gradients(copy.deepcopy(model), given)
    for twin in (recomputing(model), pairs):
        again = gradients(twin, given)
        for name, gradient in expected.items():
            assert gradient is again[name] is None or torch.equal(gradient, again[name]), name  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_rank")
def test_sharded_bfloat16_blocks_keep_times_and_ends_in_float32(family: Family, model: Any, given: Rows) -> None:
    """The engine's policy: bfloat16 in the blocks, float32 in the root and out of the last block."""
    x_t, t, r, cond = given
    reference = model(x_t, t, r, cond)
    shard(model, Layout(init_device_mesh("cpu", (1,)), block_dtype="bfloat16"))
    new = [p for name, p in sharded_parameters(model).items() if name.startswith(f"{model.time_embedding}_2.")]
    inside: dict[str, set[torch.dtype]] = {}
    for name in (*family.root, family.block):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: inside.update({name: {x.dtype for x in tensors(out)}})
        )
    velocity = model(x_t, t, r, cond)
    assert inside.pop(family.block) == {torch.bfloat16}
    assert set(inside) == set(family.root)
    assert set.union(*inside.values()) == {torch.float32}
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, reference, rtol=0, atol=0.1)
    for other_t, other_r in ((t - 0.01, r), (t, r - 0.01), (-t, r)):
        assert not torch.equal(model(x_t, other_t, other_r, cond), velocity)
    velocity.square().sum().backward()
    assert len(new) == len(list(second(model).parameters())) >= 4
    for parameter in new:
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.to_local().norm() > 0


@pytest.mark.parametrize(("batch", "text", "latent"), [(1, 5, (48, 64)), (3, 40, (96, 96))])
def test_flops_are_those_that_torch_counts(
    family: Family, model: Any, batch: int, text: int, latent: tuple[int, int]
) -> None:
    references = family.reference_latents(model, batch)
    x_t = torch.randn(batch, *model.latent_shape(latent))
    pooled = None if model.pooled_width is None else torch.randn(batch, model.pooled_width)
    embeds, mask = torch.randn(batch, text, model.text_width), torch.ones(batch, text, dtype=torch.bool)
    cond = Conditioning(embeds, mask, pooled, references)
    size = batch, sum(model.tokens(image.shape) for image in (x_t, *references)), text
    for name in model.idle_parameters():
        model.get_parameter(name).requires_grad_(False)
    recomputed = recomputing(model)
    with sdpa_kernel(SDPBackend.MATH):
        with flop_counter() as forward:
            velocity = model(x_t, torch.rand(batch), None, cond)
        with flop_counter() as backward:
            velocity.square().sum().backward()
        velocity = recomputed(x_t, torch.rand(batch), None, cond)
        with flop_counter() as again:
            velocity.square().sum().backward()
    assert model.flops(*size) == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert model.backward_flops(*size) == pytest.approx(backward.get_total_flops(), rel=1e-3)
    extra = again.get_total_flops() - backward.get_total_flops()
    assert model.recompute_flops(*size) == pytest.approx(extra, rel=1e-3)


def test_published_architecture_has_its_size_on_meta(family: Family) -> None:
    model = family.backbone(family.config, device="meta")
    assert model.class_name in {base.__name__ for base in type(model).__mro__}
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in second(model).parameters()) == family.second
    assert sum(p.numel() for p in model.parameters()) == family.size + family.second
    assert model.latent_shape((1024, 768)) == family.latent


def test_a_pass_never_waits_for_the_device(family: Family, place: Path, given: Rows) -> None:
    """Meta tensors have no values: whatever the host wanted to read of them would raise."""
    model = family.backbone.from_folder(place)
    x_t, t, r, cond = given
    on_meta = cond.to("meta")
    for read in (lambda: on_meta.mask.sum(dim=1).tolist(), lambda: on_meta.embeds[on_meta.mask]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    velocity = model(x_t.to("meta"), t.to("meta"), r.to("meta"), on_meta)
    assert velocity.shape == x_t.shape
    velocity.square().sum().backward()


def test_materialised_meta_model_equals_one_built_on_the_cpu(
    family: Family, place: Path, model: Any, given: Rows
) -> None:
    x_t, t, r, cond = given
    materialised = family.backbone.from_folder(place).to_empty(device="cpu")
    materialised.load(str(place))
    assert torch.equal(materialised(x_t, t, r, cond), model(x_t, t, r, cond))


def test_a_trained_second_embedding_is_kept(family: Family, model: Any, tmp_path: Path) -> None:
    """Exported and loaded again; a checkpoint with half of it is refused."""
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in named_tensors(model)}
    model.export(str(tmp_path / "whole"), state)
    model.load(str(tmp_path / "whole"))
    for name, tensor in named_tensors(model):
        assert torch.equal(tensor, state[name]), name
    half = next(name for name in state if name.startswith(f"{model.time_embedding}_2."))
    (tmp_path / "half").mkdir()
    others = {name: tensor for name, tensor in state.items() if name != half}
    save_file(others, tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {half}"):
        model.load(str(tmp_path / "half"))


def test_misuse_is_named(family: Family, place: Path, model: Any, given: Rows, tmp_path: Path) -> None:
    x_t, t, _, cond = given
    with pytest.raises(ValueError, match="takes 4 channels"):
        model(x_t[:, :3], t, None, cond)
    if model.patch > 1:
        with pytest.raises(ValueError, match=f"divisible by {model.patch}"):
            model(x_t[:, :, :5], t, None, cond)
    with pytest.raises(ValueError, match="3 latents came with 2 conditions"):
        model(x_t, t, None, cond[:2])
    with pytest.raises(ValueError, match="conditions of width 7"):
        model(x_t, t, None, dataclasses.replace(cond, embeds=cond.embeds[..., :7]))
    pooled = torch.zeros(3, 5) if cond.pooled is None else None
    with pytest.raises(ValueError, match=r"\(pooled: "):
        model(x_t, t, None, dataclasses.replace(cond, pooled=pooled))
    edge = model.pixels_per_latent * model.patch
    with pytest.raises(ValueError, match=f"multiples of {edge}"):
        model.latent_shape((edge, edge + 1))
    with pytest.raises(ValueError, match="choose one of vae, pixels"):
        family.backbone.from_folder(place, latents="wavelets")
    with pytest.raises(FileNotFoundError, match=r"model\.path"):
        family.backbone.from_folder(tmp_path)
    for other in FAMILIES.values():
        if other.backbone is not family.backbone:
            with pytest.raises(ValueError, match=f"holds a {family.backbone.class_name}, but model.name=.*set model."):
                other.backbone.from_folder(place)
    shutil.copytree(place, tmp_path / "mixed")
    config = tmp_path / "mixed" / "vae" / "config.json"
    described = json.loads(config.read_text())
    described |= {key: 8 for key in ("z_dim", "latent_channels") if key in described}
    config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="latents of 8 channels, its transformer generates 4"):
        family.backbone.from_folder(tmp_path / "mixed")


def test_latents_may_be_pixels(family: Family, place: Path, model: Any) -> None:
    pixels = model.pixels_per_latent
    assert model.latent_shape((64, 32)) == (4, 64 // pixels, 32 // pixels)
    assert family.backbone.from_folder(place, latents="pixels").latent_shape((64, 32)) == (4, 64, 32)
