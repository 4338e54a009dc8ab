import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.objectives.golden_sampler import check_sampler_file
from trainer.generate.sampler import PRESETS, Sampler, any_step, few, multi, preset

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("sample_*.npz"))


def test_there_are_recorded_sampler_files() -> None:
    assert len(GOLDEN) >= 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reproduces_the_recorded_trajectories(path: Path) -> None:
    check_sampler_file(path)


@pytest.mark.parametrize(
    ("sampler", "times"),
    [
        (Sampler(1, gaps=(0.001, 0.7)), [0.999, 0]),
        (Sampler(2, gaps=(0.001, 0.7)), [0.999, 0.7, 0]),
        (Sampler(2, gaps=(0.001, 0.6)), [0.999, 0.6, 0]),
        (Sampler(4, gaps=(0.001, 0.5)), [0.999, 0.832667, 0.666333, 0.5, 0]),
        (Sampler(8, gaps=(0.001, 0.5)), [0.999, 0.927714, 0.856429, 0.785143, 0.713857, 0.642571, 0.571286, 0.5, 0]),
        (few(4), [1, 0.833333, 0.666667, 0.5, 0]),
        (Sampler(5, order=2), [1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_grid_is_the_published_one(sampler: Sampler, times: list[float]) -> None:
    torch.testing.assert_close(sampler.grid(), torch.tensor(times, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_warped_grid_of_thirty_steps() -> None:
    grid = Sampler(30, gaps=(0.001, 0.0), warp=(1.17, 0.8, 1.1)).grid()
    expected = torch.tensor([0.99989, 0.98978, 0.97547, 0.08152, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grid[[0, 1, 2, -2, -1]], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", [*PRESETS, "any3", "multi7", "few1", "few16"])
def test_presets_start_at_one_and_cost_what_they_say(name: str) -> None:
    sampler, calls = preset(name), []

    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        calls.append((float(t[0]), float(r[0])))
        return torch.zeros_like(x_t)

    sampler.sample(velocity, torch.ones(2, 3), lambda i: torch.zeros(2, 3))
    assert calls[0][0] == 1.0
    assert len(calls) == sampler.nfe == int("".join(filter(str.isdigit, name)))
    assert all(0.0 <= r <= t for t, r in calls)


@pytest.mark.parametrize("name", ["few0", "5nfe", "any", "euler4", ""])
def test_unknown_preset_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="1nfe"):
        preset(name)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 2, "style": "most"},
        {"steps": 2, "order": 3},
        {"steps": 2, "gaps": (0.5, 0.5)},
        {"steps": 2, "gaps": (-0.1, 0.0)},
        {"steps": 2, "stochasticity": 1.1},
        {"steps": 2, "stochasticity": -0.1},
        {"steps": 2, "extrapolation": -1.0},
        {"steps": 2, "warp": (0.0, 1.0, 1.0)},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):
        Sampler(**options)


def test_target_times_of_the_styles() -> None:
    seen: dict[str, list[float]] = {}
    for style in ("few", "any", "multi", "mul"):
        targets = seen.setdefault(style, [])

        def velocity(x_t: Tensor, t: Tensor, r: Tensor, targets: list[float] = targets) -> Tensor:
            targets.append(float(r[0]))
            return x_t

        Sampler(2, style=style).sample(velocity, torch.ones(1, 2))  # type: ignore[arg-type]
    assert seen == {"few": [0.0, 0.0], "any": [0.5, 0.0], "multi": [1.0, 0.5], "mul": [1.0, 0.5]}


def test_any_step_is_exact_on_the_exact_mean_velocity() -> None:
    # dx/dt = a x: x_r = x_t exp(-a (t - r)), so F = x_t (1 - exp(-a (t - r))) / (t - r).
    a = 0.7
    noise = torch.tensor([[1.3, -0.4]], dtype=torch.float64)

    def mean_velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        span = (t - r)[:, None]
        return x_t * -torch.expm1(-a * span) / span

    for steps in (1, 2, 4):
        torch.testing.assert_close(
            any_step(steps).sample(mean_velocity, noise), noise * math.exp(-a), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("gaps", [(0.0, 0.0), (0.001, 0.0), (0.0, 0.25)])
def test_second_order_is_heun_on_a_linear_field(gaps: tuple[float, float]) -> None:
    a = 0.7
    sampler = Sampler(8, gaps=gaps, style="multi", order=2)
    noise = torch.tensor([[1.3, -0.4]], dtype=torch.float64)
    times = sampler.grid().tolist()
    expected = noise
    for t, s in pairwise(times[:-1]):
        h = a * (s - t)
        expected = expected * (1 + h + h * h / 2)
    expected = expected * (1 - a * times[-2])  # the last interval is not corrected
    torch.testing.assert_close(sampler.sample(lambda x, t, r: a * x, noise), expected, rtol=1e-13, atol=0)
    assert sampler.nfe == 7


def test_second_order_beats_first_order_at_equal_cost() -> None:
    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.cos(3 * t)[:, None] * x_t

    noise = torch.ones(1, 1, dtype=torch.float64)
    exact = math.exp(-math.sin(3) / 3)
    first = abs(float(Sampler(31, style="multi").sample(velocity, noise)) - exact)
    second = abs(float(Sampler(32, style="multi", order=2).sample(velocity, noise)) - exact)
    assert Sampler(32, style="multi", order=2).nfe == 31
    assert second < first / 2


@pytest.mark.parametrize(("style", "targets"), [("few", [0, 0, 0]), ("any", [0.5, 0.5, 0]), ("multi", [1, 0.5, 0.5])])
def test_target_times_of_the_second_evaluation(style: str, targets: list[float]) -> None:
    calls = []

    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        calls.append((float(t[0]), float(r[0])))
        return x_t

    Sampler(4, style=style, order=2).sample(velocity, torch.ones(1, 2))  # type: ignore[arg-type]
    assert calls == list(zip([1.0, 0.5, 0.5], targets, strict=True))


def test_two_steps_with_full_renoising_are_consistency_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, fresh, weight = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.tanh(x_t * weight) + t[:, None]

    x_hat = noise - velocity(noise, torch.ones(3, dtype=torch.float64), torch.zeros(3))
    x_t = 0.6 * fresh + 0.4 * x_hat
    expected = x_t - 0.6 * velocity(x_t, torch.full((3,), 0.6, dtype=torch.float64), torch.zeros(3))
    got = preset("2nfe").sample(velocity, noise, lambda i: fresh)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_sde_takes_its_share_from_every_step() -> None:
    sampler = Sampler(20, style="multi", stochasticity="SDE")
    fresh = torch.full((1, 1), 10.0, dtype=torch.float64)
    trajectory = sampler.trajectory(lambda x, t, r: torch.zeros_like(x), torch.ones(1, 1), lambda i: fresh)
    # With F = 0, x_hat = z_hat = x: x' = (1 - s) x + s (sqrt(1 - p) x + sqrt(p) eps), p of this very step.
    x, shares, times = 1.0, [], [1 - i / 20 for i in range(20)]
    for i, (t, s) in enumerate(pairwise(times)):
        p = min(1.0, 2 * t * (t - s) / s**2)
        shares.append(p)
        x = (1 - s) * x + s * (math.sqrt(1 - p) * x + math.sqrt(p) * 10.0)
        assert float(trajectory[i + 2]) == pytest.approx(x, rel=1e-12)
    assert shares[0] < shares[9] < 1.0 == shares[-1]  # the case covers unequal shares and the clamp


def test_fresh_noise_is_asked_for_only_where_it_is_used() -> None:
    asked: list[int] = []

    def eps(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros(1, 2)

    few(4).sample(lambda x, t, r: x, torch.ones(1, 2), eps)
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="fresh noise"):
        few(2).sample(lambda x, t, r: x, torch.ones(1, 2))
    few(1).sample(lambda x, t, r: x, torch.ones(1, 2))


def test_state_is_float64_and_the_sample_has_the_noise_dtype() -> None:
    dtypes = set()

    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        dtypes.update({x_t.dtype, t.dtype, r.dtype})
        return x_t.to(torch.bfloat16)

    sample = multi(3).sample(velocity, torch.ones(2, 3, dtype=torch.float32))
    assert dtypes == {torch.float64} and sample.dtype == torch.float32


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(1)
    noise, fresh = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def run(rows: slice) -> Tensor:
        return Sampler(4, style="any", stochasticity=0.5, extrapolation=0.3).sample(
            lambda x, t, r: torch.tanh(x) * t[:, None], noise[rows], lambda i: fresh[rows] + i
        )

    assert torch.equal(run(slice(None))[2:3], run(slice(2, 3)))
