"""Rows and FLOPs of a step, predicted without a network, against what torch counts while the step runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Lora
from models import lora
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from models.tiny_pipelines.qwen_image import TRANSFORMERS
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import Nets, Rows
from trainer.objectives.rcgm import RCGM
from trainer.objectives.roles import assign
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TERMS, TwinFlowFull
from trainer.observe.counting import CountedNets, PassCounts
from trainer.observe.flops import PassFlops, RoleRows, rows_by_role, step_flops

SAMPLES, STEP = 8, 6
LATENT, TOKENS = (4, 4, 6), 6
OBJECTIVES = {
    "twinflow": TwinFlow(order=2),
    "twinflow guided": TwinFlow(order=2, enhanced_ratio=0.5),
    "twinflow image-free": TwinFlow(order=1, image_free=True, enhanced_ratio=0.5),
    "twinflow of order 0": TwinFlow(order=0),
    "twinflow full": TwinFlowFull(order=2, enhanced_ratio=0.5),
    "rcgm": RCGM(order=2, roles={"e2e": 1, "mul": 1, "any": 1, "one": 1}, enhanced_ratio=0.5),
    "flow matching": FlowMatching(),
}


@dataclass
class PlainNets:
    model: QwenImage
    shares_module = True

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(x_t, t, r, cond)
        return out


def backbone(activation_checkpointing: bool = False) -> QwenImage:
    """A tiny transformer as an engine prepares it: idle parameters frozen, blocks recomputed if asked."""
    model = QwenImage(TRANSFORMERS["pipeline"], pixels_per_latent=1)
    for name in model.idle_parameters():
        model.get_parameter(name).requires_grad_(False)
    for name in model.checkpoint_units() if activation_checkpointing else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, checkpoint_wrapper(model.get_submodule(name)))
    return model


def rows_of(objective: Any, rank: int = 0, world_size: int = 1, samples: int = SAMPLES) -> Rows:
    size = samples // world_size
    roles = assign(objective.role_weights, STEP, samples, rank, world_size, objective.published_partition)
    return Rows(0, STEP, torch.arange(rank * size, (rank + 1) * size), roles)


def run_step(objective: Any, nets: Nets, rows: Rows, text_tokens: int) -> int:
    """FLOPs that torch counts in a whole step: draws, targets, loss, backward."""
    samples = len(rows.ids)
    x = torch.randn(samples, *LATENT)
    embeds = torch.randn(2 * samples, text_tokens, 16)
    both = Conditioning(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
    # The reference attention is plain matrix products, which the counter sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        draws = objective.draw(rows, LATENT, "cpu", torch.float32)
        targets = objective.targets(nets, x, both[:samples], both[samples:], rows.roles, draws)
        for begin in range(0, len(targets), 8):
            objective.loss(nets, targets[begin : begin + 8]).total.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_flops_of_a_step_are_those_that_torch_counts(objective: Any, activation_checkpointing: bool) -> None:
    model, rows = backbone(activation_checkpointing), rows_of(objective)
    for text_tokens in (2, 20):
        by_role = step_flops(objective, model, rows, TOKENS, text_tokens, activation_checkpointing)
        counted = run_step(objective, PlainNets(model), rows, text_tokens)
        assert sum(by_role.values()) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_every_role_is_charged_its_own_rows(ratio: float) -> None:
    """e2e: sample and two velocities; guided rows two; consistent rows N where an interior is left; adv a sample."""
    objective = TwinFlow(order=3, enhanced_ratio=ratio, roles={"e2e": 1, "mul": 2, "any": 2, "one": 2, "adv": 1})
    rows = rows_of(objective, samples=64)
    t, r = objective.times(rows.roles, objective.draw(rows, (1,)))
    far = t >= r + objective.time_step
    guided = 2 if ratio else 0

    def expected(name: str, each: int) -> RoleRows:
        mine = rows.roles.rows(name)
        inner = 0 if name == "adv" else 3 * int(far[mine].sum())
        return RoleRows(no_grad=each * len(mine) + inner, graded=len(mine))

    per_row = {"e2e": 3, "mul": guided, "any": guided, "one": guided, "adv": 1}
    assert rows_by_role(objective, rows) == {name: expected(name, each) for name, each in per_row.items()}
    assert 0 < int(far[rows.roles.rows("mul")].sum()) < len(rows.roles.rows("mul"))


def test_terms_of_the_paper_form_are_graded_roles() -> None:
    objective = TwinFlowFull(order=2)
    counted = rows_by_role(objective, rows_of(objective))
    assert set(counted) == {"all", *TERMS}
    assert {counted[term] for term in TERMS} == {RoleRows(no_grad=0, graded=SAMPLES)}
    assert counted["all"].graded == 0
    # Sample and two velocities, and at most order sub-steps of each of two jumps.
    assert 3 * SAMPLES + 2 * SAMPLES < counted["all"].no_grad <= (3 + 2 * 2) * SAMPLES


def test_ranks_add_up_and_dummy_rows_belong_to_no_role() -> None:
    objective = TwinFlow(roles={"e2e": 1, "mul": 1, "any": 1, "adv": 1}, enhanced_ratio=0.5)
    whole = rows_by_role(objective, rows_of(objective, samples=4))
    alone = [rows_by_role(objective, rows_of(objective, rank, 4, samples=4)) for rank in range(4)]
    for name, expected in whole.items():
        assert sum(part[name].no_grad for part in alone) == expected.no_grad
        assert sum(part[name].graded for part in alone) == expected.graded == 1
    rank = next(rank for rank in range(4) if alone[rank]["adv"].graded)
    model = backbone()
    nets = CountedNets(PlainNets(model), PassFlops(model))
    run_step(objective, nets, rows_of(objective, rank, 4, samples=4), text_tokens=3)
    # Guidance, two sub-steps: in the first pass an adv row is sampled, the other passes hold a dummy row.
    assert sum(of_role.no_grad for of_role in alone[rank].values()) == 1
    assert nets.counts.no_grad_rows == nets.counts.no_grad_passes == 3


@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_counted_networks_report_model_flops_whatever_is_recomputed(activation_checkpointing: bool) -> None:
    objective = OBJECTIVES["twinflow guided"]
    rows, model = rows_of(objective), backbone(activation_checkpointing)
    nets = CountedNets(PlainNets(model), PassFlops(model))
    with nets.aside():
        run_step(objective, nets, rows, text_tokens=5)
    assert nets.counts == PassCounts()
    assert nets.step_calls == (0, 0) and nets.calls > 0  # while it lasts, too: another thread compares ranks by them
    executed = run_step(objective, nets, rows, text_tokens=5)
    recomputed = model.recompute_flops(SAMPLES, TOKENS, 5) if activation_checkpointing else 0
    assert nets.drain().flops == pytest.approx(executed - recomputed, rel=1e-3)
    assert nets.drain() == PassCounts()


def test_adapters_spare_the_gradients_of_frozen_weights() -> None:
    """Two blocks as wide as the published ones, 512 x 512 pixels and 100 text tokens, on meta."""
    model: Any = QwenImage({"num_layers": 2}, device="meta")
    lora.add(model, Lora(rank=64), "online")
    cond = Conditioning(torch.empty(1, 100, 3584, device="meta"), torch.ones(1, 100, dtype=torch.bool, device="meta"))
    x_t, t = torch.empty(1, 16, 64, 64, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x_t, t, t, cond).sum().backward()
    assert PassFlops(model)(x_t, cond, graded=True) == pytest.approx(counter.get_total_flops(), rel=0.1)
    del model.adapters
    assert PassFlops(model)(x_t, cond, graded=True) > 1.3 * counter.get_total_flops()
