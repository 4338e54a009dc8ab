"""Text encoder and VAE of every backbone on the device against the CPU."""

from __future__ import annotations

import pytest
import torch

from models import tiny
from tests.gpu.conftest import Places
from trainer.plugins import plugin

CAPTIONS = ["a red bicycle", "two owls on a fence, at night", "a red bicycle"]


@pytest.mark.parametrize("name", sorted(tiny.SMALLEST))
@torch.no_grad()
def test_captions_and_images_are_encoded_as_on_the_cpu(device: torch.device, places: Places, name: str) -> None:
    place, backbone = places(name), plugin("model", {"name": name})[0]
    cpu = torch.device("cpu")
    here, there = (backbone.text_encoder(place, d, torch.float32, 16, "").encode(CAPTIONS) for d in (cpu, device))
    assert there.embeds.device.type == device.type
    assert torch.equal(there.mask.cpu(), here.mask)
    torch.testing.assert_close(there.embeds.cpu(), here.embeds, rtol=1e-4, atol=1e-4)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vaes = [backbone.latent_encoder(place, "vae", d, torch.float32, "mean", False) for d in (cpu, device)]
    latents = [vae.encode(pixels.to(d)) for vae, d in zip(vaes, (cpu, device), strict=True)]
    torch.testing.assert_close(latents[1].cpu(), latents[0], rtol=1e-4, atol=1e-4)
    again = [vae.decode(latent) for vae, latent in zip(vaes, latents, strict=True)]
    torch.testing.assert_close(again[1].cpu(), again[0], rtol=1e-3, atol=1e-3)
