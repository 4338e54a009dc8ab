"""The samplers as a diffusers scheduler. Exported folders carry this file, with the sampler's put in place of its import
(models/exported/bundle.py); it runs without this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from trainer.generate.sampler import Sampler, preset, read_out


class TwinFlowScheduler(SchedulerMixin, ConfigMixin):
    """Grid, target times and re-noising of a sampler of order 1, one `step` after each network evaluation.

    preset: sampler of a call that asks for none: 1nfe, 2nfe, 4nfe, or fewN, anyN, multiN with N steps. A number of steps
    alone means the default preset's family with that many. call_defaults: arguments of the pipeline's call where the
    user gives none. num_train_timesteps: what pipelines take for t = 1. single_time: the network is asked at t - r/2 in
    place of (t, r).

    `timesteps` are float32; the exact times of the evaluation at hand come from `now()`.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        preset: str = "2nfe",
        call_defaults: dict[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        single_time: bool = False,
    ) -> None:
        self._generator: Any = None
        self._chosen: Sampler | None = None
        self.set_timesteps()

    def choose(self, name: str | None = None, steps: int | None = None) -> Sampler:
        """The sampler of a preset's name, a number of steps or both; with neither the default one.

        Raises ValueError for an unknown name, and where the two contradict each other.
        """
        sampler = preset(name or self.config.preset)
        if steps is None or steps == sampler.steps:
            return sampler
        if name is not None:
            raise ValueError(
                f"preset={name} makes {sampler.steps} steps, not num_inference_steps={steps}; give one of the two"
            )
        return preset(f"{sampler.style}{steps}")

    @contextmanager
    def sampling(self, sampler: Sampler, generator: Any = None) -> Iterator[None]:
        """Within the context `set_timesteps` takes the grid of this sampler, and fresh noise comes from `generator`, a
        torch.Generator, one for each row, or None for torch's own."""
        self._chosen, self._generator = sampler, generator
        try:
            yield
        finally:
            self._chosen, self._generator = None, None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a trajectory. sigmas: pipelines hand in their even grid, of which only the number counts; mu: ignored.

        Raises ValueError for other sigmas: the times are the preset's.
        """
        steps = num_inference_steps if sigmas is None else len(sigmas)
        if sigmas is not None and any(abs(x - (1.0 - i / len(sigmas))) > 1e-3 for i, x in enumerate(sigmas)):
            raise ValueError("the times of this model's samplers follow from the preset; leave `sigmas` out")
        self._sampler = self._chosen or self.choose(steps=steps)
        self._times: list[float] = self._sampler.grid().tolist()
        self._index = 0
        scale = self.config.num_train_timesteps
        self.timesteps = torch.tensor([scale * t for t in self._times[:-1]], dtype=torch.float32, device=device)
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Number of the next evaluation."""
        self._index = begin_index

    def now(self) -> tuple[float, float]:
        """Time t and target time r of the evaluation at hand, in [0, 1], as the network takes them."""
        t, s = self._times[self._index : self._index + 2]
        r = self._sampler.target(t, s)
        return (t - r / 2, t - r / 2) if self.config.single_time else (t, r)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From x_t [B, ...] and the velocity at it, noise minus data, to x_s, in the dtype of `sample`.

        generator: of the fresh noise, see `sampling`. Raises ValueError after the last step.
        """
        if self._index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done; call set_timesteps first")
        t, s = self._times[self._index : self._index + 2]
        exact = torch.float32 if sample.device.type == "mps" else torch.float64
        x_hat, z_hat = read_out(sample.to(exact), t, model_output.to(exact))

        def fresh() -> Tensor:
            # Drawn in float32 whatever the model's dtype, so that a seed means the same image up to rounding.
            noise: Tensor = randn_tensor(sample.shape, generator or self._generator, sample.device, torch.float32)
            return noise

        following = x_hat if s == 0.0 else self._sampler.jump(x_hat, z_hat, t, s, fresh)
        self._index += 1
        following = following.to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
