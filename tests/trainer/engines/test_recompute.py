"""Which blocks compute twice, what they keep, and what the gathers become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Ema
from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.engines.running import OPTIMIZER, RATE, ROWS, own_rows, velocity
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.recompute import checkpoint_blocks

BLOCKS, RANKS = 4, 2


def _counts(options: dict[str, Any]) -> dict[str, int]:
    """Multiplications of all matrix products, and gathers, of one graded pass and its backward pass."""
    model = toy.ToyBackbone(blocks=BLOCKS)
    engine = FSDP2(FSDP2Options(**options), model, OPTIMIZER, Ema(decay=0.0), "online")
    rows = own_rows(0, torch.float32)

    def both_passes() -> None:
        engine.backward(toy.loss(velocity(engine, rows), rows, ROWS))

    with FlopCounterMode(display=False) as flops:
        both_passes()
    engine.step(RATE)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        both_passes()
    gathers = sum(event.count for event in trace.key_averages() if event.key == "c10d::_allgather_base_")
    return {"products": flops.get_total_flops() // 2, "gathers": gathers}


BLOCK = ROWS // RANKS * (toy.WIDTH**2 + 2 * 10 * toy.WIDTH)
"""Multiplications of a block's three products on one rank."""


def _all(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [_counts(options) for options in cases]


CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"activation_checkpointing": False}, 0, 2 * BLOCKS + 1),
    ({}, BLOCKS, 2 * BLOCKS + 1),
    ({"checkpoint_every": 2}, BLOCKS // 2, 2 * BLOCKS + 1),
    ({"checkpoint_keep": "products"}, 0, 2 * BLOCKS + 1),
    ({"checkpoint_group": 2}, BLOCKS, 2 * BLOCKS // 2 + 1),
    ({"checkpoint_group": 2, "checkpoint_every": 2}, BLOCKS // 2, 2 * 3 + 1),
    ({"checkpoint_group": 4, "checkpoint_keep": "products"}, 0, 2 + 1),
]
"""Options, blocks whose products are computed again, gathers."""


def test_chosen_blocks_compute_again_and_nothing_else() -> None:
    for of_rank in run_ranks(_all, RANKS, [options for options, _, _ in CASES]):
        kept = of_rank[0]["products"]
        for (options, again, gathers), found in zip(CASES, of_rank, strict=True):
            assert found["products"] - kept == again * BLOCK, options
            assert found["gathers"] == gathers, options


def test_groups_of_what_is_no_chain_are_refused() -> None:
    class Uneven(toy.ToyBackbone):
        def shard_units(self) -> Any:
            return [self.blocks]

    with pytest.raises(ValueError, match=r"Uneven has not; set engine\.checkpoint_group=1"):
        checkpoint_blocks(Uneven(), every=1, group=2, keep="nothing")


def test_groups_end_where_a_list_of_blocks_ends() -> None:
    """Blocks of different lists hand on different things: they are not one chain."""

    class TwoLists(toy.ToyBackbone):
        def checkpoint_units(self) -> Any:
            return ["blocks.0", "blocks.1", "blocks.2", "more.0", "more.1"]

        def shard_units(self) -> Any:
            return [*self.blocks, *self.more]

    model = TwoLists(blocks=3)
    model.more = torch.nn.ModuleList([toy.ToyBlock(), toy.ToyBlock()])
    units = checkpoint_blocks(model, every=1, group=2, keep="nothing")
    assert [[model.shard_units().index(block) for block in unit] for unit in units] == [[0, 1], [2], [3, 4]]
