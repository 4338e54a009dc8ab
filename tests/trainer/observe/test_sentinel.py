import math

import pytest
import torch
from torch import Tensor, nn

from trainer.observe.sentinel import CollapseAlarm, collapse_score, spread

CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])


class Toy(nn.Module):
    """x = G(z | group), fitted by E |G(z) - x|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, z: Tensor, group: Tensor) -> Tensor:
        return self.net(torch.cat([z, nn.functional.one_hot(group, 3).float()], dim=1))


def train(paired: bool) -> Toy:
    """paired: noise and data are coupled by the true map; else independent, whose minimiser is the mean: a collapse."""
    torch.manual_seed(0)
    toy = Toy()
    optimizer = torch.optim.Adam(toy.parameters(), 1e-2)
    for _ in range(200):
        group, z, other = torch.randint(3, (256,)), torch.randn(256, 2), torch.randn(256, 2)
        x = CENTRES[group] + 0.3 * (z if paired else other)
        loss = (toy(z, group) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return toy


def samples(toy: Toy) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([toy(torch.randn(64, 2), torch.full((64,), group)) for group in range(3)])


@pytest.fixture(scope="module")
def reference() -> Tensor:
    torch.manual_seed(2)
    return spread(CENTRES[:, None] + 0.3 * torch.randn(3, 500, 2))


def test_alarm_trips_on_a_collapsed_generator_and_not_on_a_healthy_one(reference: Tensor) -> None:
    healthy, collapsed = (collapse_score(samples(train(paired)), reference) for paired in (True, False))
    assert healthy > 0.8 and collapsed < 0.1
    alarm = CollapseAlarm()
    assert all(alarm.check(healthy) is None for _ in range(5))
    message = alarm.check(collapsed)
    assert message is not None and "collapsed" in message


def test_variation_between_conditions_does_not_count(reference: Tensor) -> None:
    assert collapse_score(CENTRES[:, None].expand(3, 8, 2), reference) == 0.0


def test_one_group_that_explodes_does_not_hide_the_others(reference: Tensor) -> None:
    groups = CENTRES[:, None].expand(3, 8, 2).clone()
    groups[0] += 1e6 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert collapse_score(groups, reference) == pytest.approx(1 / 3)
    groups[0] = float("nan")
    assert collapse_score(groups, reference) == 0.0


def test_blurred_start_is_not_an_alarm_but_staying_there_is() -> None:
    alarm = CollapseAlarm(patience=4)
    assert [alarm.check(0.05) for _ in range(3)] == [None] * 3
    message = alarm.check(0.05)
    assert message is not None and "never reached" in message
    alarm = CollapseAlarm(patience=4)
    assert [alarm.check(score) for score in (0.05, 0.1, 0.35, 0.9, 0.8)] == [None] * 5


def test_a_fall_from_the_best_is_an_alarm_before_the_bottom() -> None:
    alarm = CollapseAlarm()
    assert alarm.check(0.9) is None and alarm.check(0.5) is None
    message = alarm.check(0.3)
    assert message is not None and "collapsing" in message


def test_state_survives_a_resume() -> None:
    resumed = CollapseAlarm(best=0.9, checks=7)
    assert resumed.check(0.1) is not None and resumed.checks == 8


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        spread(torch.zeros(3, 1, 2))
    with pytest.raises(ValueError, match="positive"):
        collapse_score(torch.zeros(3, 4, 2), 0.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        CollapseAlarm().check(math.nan)
