"""The scheduler that exported folders carry makes the sampler's own images, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.generate.sampler import preset
from trainer.generate.scheduler import TwinFlowScheduler

SHAPE = (3, 2, 4, 4)


def field(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return torch.tanh(x_t + t[:, None, None, None]) * (1.0 + t - r)[:, None, None, None]


def drawn(scheduler: TwinFlowScheduler, name: str, start: Tensor, generator: torch.Generator) -> Tensor:
    """A sample as pipelines draw it."""
    sampler = scheduler.choose(name)
    with scheduler.sampling(sampler, generator):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / sampler.steps, sampler.steps), mu=0.7)
        scheduler.set_begin_index(0)
        x = start
        for time in scheduler.timesteps:
            t, r = (torch.full((len(x),), value, dtype=x.dtype) for value in scheduler.now())
            torch.testing.assert_close(time.to(x), 1000 * t[0], rtol=1e-6, atol=0)
            x = scheduler.step(field(x, t, r), time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["1nfe", "2nfe", "4nfe", "few7", "any2", "any4", "multi5"])
def test_the_scheduler_draws_what_the_sampler_draws(name: str) -> None:
    start = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    expected = preset(name).sample(field, start, lambda _: torch.randn(SHAPE, generator=ours))
    found = drawn(TwinFlowScheduler(), name, start, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_number_of_steps_means_the_default_family() -> None:
    scheduler = TwinFlowScheduler(preset="any4")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 500.0]
    assert scheduler.choose(steps=8) == preset("any8") and scheduler.choose() == preset("any4")
    assert scheduler.choose("2nfe", 2) == preset("2nfe")


def test_a_sample_follows_its_own_generator() -> None:
    scheduler, start = TwinFlowScheduler(), torch.randn(SHAPE)
    one, again, other = (drawn(scheduler, "4nfe", start, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and (one - other).abs().max() > 0.01


def test_the_configuration_survives_a_folder(tmp_path: object) -> None:
    TwinFlowScheduler(preset="any2", call_defaults={"height": 64}).save_pretrained(str(tmp_path))
    found = TwinFlowScheduler.from_pretrained(str(tmp_path))
    assert found.config.preset == "any2" and found.config.call_defaults == {"height": 64}


def test_what_contradicts_is_refused() -> None:
    scheduler = TwinFlowScheduler()
    with pytest.raises(ValueError, match=r"preset=2nfe makes 2 steps, not num_inference_steps=4"):
        scheduler.choose("2nfe", 4)
    with pytest.raises(ValueError, match="unknown sampler 'fast'; choose"):
        scheduler.choose("fast")
    with pytest.raises(ValueError, match="leave `sigmas` out"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9])
    scheduler.set_timesteps(1)
    scheduler.step(torch.zeros(1), 1000.0, torch.zeros(1))
    with pytest.raises(ValueError, match="all 1 steps are done"):
        scheduler.step(torch.zeros(1), 1000.0, torch.zeros(1))
