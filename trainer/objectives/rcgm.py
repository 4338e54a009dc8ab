"""RCGM: any-step consistency of order N without the fake flow (method 2.1 L_base; regimes in 2.4).

The production form with roles e2e:mul:any and no rectification. The paper's form is roles {any: 1}, distance l2,
interval_weight none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.objectives.twinflow import TwinFlow


@dataclass(frozen=True)
class RCGM(TwinFlow):
    roles: dict[str, int] = field(default_factory=lambda: {"e2e": 1, "mul": 1, "any": 1})
    """Integer weight of each role; in theory any alone."""
    rectification_weight: float = 0.0
    """Off: rectification belongs to TwinFlow."""
    time_distribution: str = "beta"
    """beta | logit_normal: distribution of t; published beta, with parameters 1, 1 (uniform)."""
