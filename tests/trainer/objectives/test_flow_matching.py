import pytest
import torch
from scipy import stats

from tests.trainer.objectives.cases import SHAPE, close, column, make, role_rows, samples, toy_nets
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import Rows


def test_rows_regress_on_noise_minus_data_at_their_own_time() -> None:
    batch, nets = samples(6), toy_nets("online")
    targets, out, _, draws = make(FlowMatching(), nets, batch)
    t = column(draws.t)
    close(targets.x_t, t * draws.z + (1 - t) * batch.x)
    assert torch.equal(targets.t, draws.t) and torch.equal(targets.r, draws.t)
    prediction = nets.online(targets.x_t, draws.t, draws.t, batch.cond.vectors)
    close(out.total, (prediction - (draws.z - batch.x)).square().mean())
    assert len(nets.calls) == 1


def test_barron_is_an_option_of_the_distance() -> None:
    nets, batch = toy_nets("online"), samples(6)
    l2 = make(FlowMatching(), nets, batch)[1].total
    scaled = make(FlowMatching(distance="barron", barron_alpha=2.0, barron_scale=0.5), nets, batch)[1].total
    close(scaled, l2 / 0.5)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_follow_their_distribution(distribution: str) -> None:
    objective = FlowMatching(time_distribution=distribution, time_mean=0.4, time_std=0.7)
    rows = Rows(1, 2, torch.arange(5000), role_rows(objective, 2, 5000))
    t = objective.draw(rows, SHAPE, "cpu", torch.float64).t
    if distribution == "uniform":
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    else:
        assert stats.kstest(torch.logit(t).numpy(), stats.norm(0.4, 0.7).cdf).pvalue > 1e-3
