"""The sinusoid of times; what backbones make of it: tests/models/backbones/test_target_times.py."""

import torch
from diffusers.models.embeddings import Timesteps

from models.target_time import Sinusoid


def test_negative_times_mirror_the_sines() -> None:
    t = torch.tensor([0.4])
    features, mirrored = Sinusoid(256, True, 0, 1000)(t), Sinusoid(256, True, 0, 1000)(-t)
    assert torch.equal(features[:, :128], mirrored[:, :128])
    assert torch.equal(features[:, 128:], -mirrored[:, 128:])


def test_sinusoid_is_float64_for_float64_times_and_diffusers_otherwise() -> None:
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    ours, theirs = Sinusoid(256, True, 0, 1000), Timesteps(256, True, 0, 1000)
    assert torch.equal(ours(t.float()), theirs(t.float()))
    assert ours(t).dtype == torch.float64
    frequency = 10000 ** (-3 / 128)
    torch.testing.assert_close(ours(t)[:, 128 + 3], torch.sin(1000 * t * frequency), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(t).float(), theirs(t.float()), rtol=0, atol=2e-4)
