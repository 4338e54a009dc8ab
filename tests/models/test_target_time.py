"""Target time: exact at r = t, in force elsewhere, in the precision of the times whatever the parameters are."""

import copy

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from models.backbones.qwen_image import QwenImage
from models.target_time import Sinusoid


@torch.no_grad()
def embedding(model: QwenImage, t: Tensor, r: Tensor) -> Tensor:
    hidden = torch.zeros(1, dtype=model.img_in.weight.dtype)
    with model.times(t, r):
        # The first argument is what diffusers hands over: a time cast to the activations' dtype.
        result: Tensor = model.time_text_embed(t.to(hidden.dtype), hidden)
    return result


def test_embedding_is_the_published_sum(backbone: QwenImage) -> None:
    with torch.no_grad():
        backbone.time_text_embed_2.timestep_embedder.linear_2.weight.mul_(1.5)
        t, r, hidden = torch.tensor([1.0, -0.7]), torch.tensor([0.0, 0.2]), torch.zeros(1)
        first = backbone.time_text_embed.timestep_embedder(Timesteps(256, True, 0, 1000)(t))
        second = backbone.time_text_embed_2(r, hidden)
    torch.testing.assert_close(embedding(backbone, t, r), first + (t - r)[:, None] * second, rtol=0, atol=0)


def test_sign_of_time_is_seen(backbone: QwenImage) -> None:
    t = torch.tensor([0.4])
    assert (embedding(backbone, t, t) - embedding(backbone, -t, -t)).abs().max() > 1e-2
    features, mirrored = Sinusoid(256, True, 0, 1000)(t), Sinusoid(256, True, 0, 1000)(-t)
    assert torch.equal(features[:, :128], mirrored[:, :128])
    assert torch.equal(features[:, 128:], -mirrored[:, 128:])


def test_bfloat16_parameters_still_see_times_that_bfloat16_cannot_hold(backbone: QwenImage) -> None:
    model = copy.deepcopy(backbone).to(torch.bfloat16)
    t, near = torch.tensor([0.5003]), torch.tensor([0.5001])
    assert t.bfloat16() == near.bfloat16()
    result = embedding(model, t, t)
    assert result.dtype == torch.bfloat16
    assert not torch.equal(result, embedding(model, near, near))
    assert not torch.equal(embedding(model, t, t * 0), embedding(model, t, near * 0 + 1e-4))
    torch.testing.assert_close(result.float(), embedding(backbone, t, t), rtol=0.05, atol=0.02)


def test_sinusoid_is_float64_for_float64_times_and_diffusers_otherwise() -> None:
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    ours, theirs = Sinusoid(256, True, 0, 1000), Timesteps(256, True, 0, 1000)
    assert torch.equal(ours(t.float()), theirs(t.float()))
    assert ours(t).dtype == torch.float64
    frequency = 10000 ** (-3 / 128)
    torch.testing.assert_close(ours(t)[:, 128 + 3], torch.sin(1000 * t * frequency), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(t).float(), theirs(t.float()), rtol=0, atol=2e-4)


def test_a_copy_of_the_model_has_its_own_second_embedding(backbone: QwenImage) -> None:
    t, r = torch.tensor([0.8]), torch.tensor([0.1])
    before = embedding(backbone, t, r)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        twin.time_text_embed_2.timestep_embedder.linear_2.bias.add_(1)
    assert torch.equal(embedding(backbone, t, r), before)
    assert not torch.equal(embedding(twin, t, r), before)


def test_embedding_without_times_is_refused(backbone: QwenImage) -> None:
    with pytest.raises(RuntimeError, match="call the model itself"):
        backbone.time_text_embed(torch.tensor([0.5]), torch.zeros(1))
