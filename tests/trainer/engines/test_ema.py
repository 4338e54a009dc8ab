"""Averaged weights against the numbers of the published recursion (method 2.3)."""

import pytest
import torch

from trainer.engines.ema import Ema

K_099 = {1: 0.495, 2: 0.61999, 3: 0.69029, 5: 0.77005, 10: 0.85604, 50: 0.95892, 100: 0.97577, 500: 0.98914}
K_0999 = {1: 0.4995, 10: 0.86060, 100: 0.98070, 1000: 0.99748}


@pytest.mark.parametrize(("decay", "expected"), [(0.99, K_099), (0.999, K_0999)])
def test_the_decay_in_force_warms_up_along_the_published_values(decay: float, expected: dict[int, float]) -> None:
    ema, found = Ema(decay, [torch.zeros(1)], [torch.zeros(1)]), {}
    for call in range(1, max(expected) + 1):
        found[call] = ema.k  # k after the published call number `call`; the copy at start was call 1
        ema.update()
    # The published table is rounded to five digits.
    assert {call: found[call] for call in expected} == pytest.approx(expected, abs=1.01e-5)


def test_updates_after_the_step_equal_the_published_updates_before_use() -> None:
    online = [torch.randn(3, dtype=torch.float64) for _ in range(5)]
    published, k, before_use = torch.zeros(3, dtype=torch.float64), 0.0, []
    for weights in online:
        published = k * published + (1 - k) * weights
        k += (1 - k) * (0.99 - k) / 2
        before_use.append(published)
    live, averaged = online[0].clone(), online[0].clone()
    ema, after_step = Ema(0.99, [averaged], [live]), [averaged.clone()]
    for weights in online[1:]:
        live.copy_(weights)
        ema.update()
        after_step.append(averaged.clone())
    torch.testing.assert_close(torch.stack(after_step), torch.stack(before_use), rtol=1e-14, atol=1e-14)
    assert ema.k == pytest.approx(k, abs=1e-15)


def test_swapping_twice_restores_every_bit() -> None:
    averaged, online = torch.randn(5), torch.randn(5)
    kept = averaged.clone(), online.clone()
    ema = Ema(0.9, [averaged], [online])
    ema.swap()
    assert torch.equal(online, kept[0]) and torch.equal(averaged, kept[1])
    ema.swap()
    assert torch.equal(averaged, kept[0]) and torch.equal(online, kept[1])


def test_a_decay_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema\.decay"):
        Ema(1.0, [], [])


def test_averages_may_lie_on_another_device_than_the_weights() -> None:
    """As those of a teacher on a GPU do beside masters in host memory; meta stands for the GPU."""
    ema = Ema(0.9, [torch.zeros(3, device="meta")], [torch.ones(3)])
    ema.update()
    assert ema.k > 0.45
