import torch
from torch import Tensor

from trainer.objectives.transport import clean_estimate, interpolate, jump, noise_estimate

T = torch.tensor([0.0, 0.1, 0.35, 0.8, 1.0, -0.35, -1.0], dtype=torch.float64)


def rows(seed: int) -> Tensor:
    return torch.randn((len(T), 2, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_the_path_runs_from_data_to_noise_and_mixes_with_the_size_of_the_time() -> None:
    x, z = rows(0), rows(1)
    x_t = interpolate(x, z, T)
    close(x_t[0], x[0])
    close(x_t[4], z[4])
    close(x_t[6], z[6])
    close(x_t[2], 0.35 * z[2] + 0.65 * x[2])
    close(interpolate(x, z, -T), x_t)


def test_read_outs_of_the_true_velocity_are_data_and_noise() -> None:  # R1
    x, z = rows(0), rows(1)
    x_t = interpolate(x, z, T)
    close(clean_estimate(x_t, z - x, T), x)
    close(noise_estimate(x_t, z - x, T), z)


def test_mixing_the_read_outs_at_another_time_is_the_euler_step() -> None:  # R2
    x_t, velocity = rows(2), rows(3)
    t, s = T.abs(), torch.tensor([0.0, 0.05, 0.6, 0.3, 0.999, 0.0, 1.0], dtype=torch.float64)
    mixed = interpolate(clean_estimate(x_t, velocity, t), noise_estimate(x_t, velocity, t), s)
    close(jump(x_t, velocity, t, s), mixed)


def test_two_jumps_along_a_constant_velocity_are_one() -> None:
    x_t, velocity = rows(2), rows(3)
    t, s, r = torch.full_like(T, 0.9), torch.full_like(T, 0.4), torch.full_like(T, 0.1)
    close(jump(jump(x_t, velocity, t, s), velocity, s, r), jump(x_t, velocity, t, r))
