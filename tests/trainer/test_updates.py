"""A loss or gradient that is not finite on one rank leaves the update out on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.engines.running import make_engine, own_rows, velocity
from trainer.updates import Made, NotFinite, Updates, guarded

NAN = float("nan")


def made(step: int, norm: float, loss: float = 1.0) -> Made:
    return Made(step, (f"sample {step}",), torch.tensor(loss), torch.tensor(norm))


def test_a_finite_loss_keeps_every_bit_of_itself_and_its_gradient() -> None:
    x = torch.randn(50, requires_grad=True, generator=torch.Generator().manual_seed(0))
    plain = (x.sin() / 3).sum()
    (expected,) = torch.autograd.grad(plain, x, retain_graph=True)
    (found,) = torch.autograd.grad(guarded(plain), x)
    assert torch.equal(guarded(plain), plain) and torch.equal(found, expected)


@pytest.mark.parametrize("loss", [float("inf"), -float("inf"), NAN])
def test_a_loss_that_is_not_finite_spoils_gradients_that_are(loss: float) -> None:
    x = torch.ones(3, requires_grad=True)
    guarded(x.sum() + torch.tensor(loss)).backward()
    assert x.grad is not None and x.grad.isnan().all()


def test_the_policy_to_stop_names_step_and_samples() -> None:
    updates = Updates()
    for each in (made(3, 1.0), made(4, float("inf")), made(5, 1.0)):
        updates.add(each)
    with pytest.raises(NotFinite, match=r"step 4: .*gradient was not; samples of rank 0: sample 4\. Look"):
        updates.judge("stop", 10)


def test_the_policy_to_skip_counts_and_bears_a_ceiling_in_a_row_across_looks() -> None:
    updates = Updates(skipped=7)
    for step, norm in enumerate((NAN, NAN, 1.0, NAN)):
        updates.add(made(step, norm))
    assert [line.split(":")[0] for line in updates.judge("skip", 2)] == ["step 0", "step 1", "step 3"]
    assert (updates.skipped, updates.in_row) == (10, 1)
    assert updates.judge("skip", 2) == []
    updates.add(made(4, NAN))
    assert len(updates.judge("skip", 2)) == 1
    updates.add(made(5, NAN))
    with pytest.raises(NotFinite, match=r"^3 updates in a row .* train\.max_skips"):
        updates.judge("skip", 2)


def one_bad_loss() -> Any:
    """Step 1 has a loss that is not finite on rank 1 alone, with finite gradients; parameters before and after it."""
    engine, updates = make_engine(), Updates()
    states = []
    for step in range(3):
        loss = velocity(engine, own_rows(step, torch.float64)).square().mean()
        if step == 1 and dist.get_rank() == 1:
            loss = loss + float("inf")
        engine.backward(guarded(loss))
        updates.add(Made(step, (f"{step}-{dist.get_rank()}",), loss.detach(), engine.step(1e-2)))
        states.append([part.local.clone() for part in engine.parts()])
    said = updates.judge("skip", 1)[0]
    same = [all(torch.equal(a, b) for a, b in zip(states[i], states[i + 1], strict=True)) for i in (0, 1)]
    return same, said, engine.counters()["optimizer_step"]


def test_a_loss_of_one_rank_leaves_the_update_out_on_all_and_all_name_it() -> None:
    for same, said, updates in run_ranks(one_bad_loss, 2, timeout=120):
        assert same == [True, False] and updates == 2
        assert said == "step 1: a loss was not finite; samples of rank 1: 1-1"
