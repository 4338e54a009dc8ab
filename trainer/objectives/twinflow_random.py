"""The random numbers of a TwinFlow step, by name and row (law 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.objectives.objective import Rows
from trainer.objectives.random_streams import betas, normals, purpose_id, uniforms

DATA_ROLES = ("e2e", "mul", "any", "one")
"""Roles on the real flow; adv is the fake flow."""


@dataclass(frozen=True)
class TwinFlowDraws:
    """Every random number of a step. t: [B] in [0, 1] before the scaling by time_max; u_r, u_r_min: [B] uniform, place
    r below t; z: [B, ...] noise; z_image_free: noise of the rows that are not adv; z_adv: of the adv rows; z_rectify,
    t_rectify: noise and time of the e2e rows' velocity gap."""

    t: Tensor
    u_r: Tensor
    u_r_min: Tensor
    z: Tensor
    z_image_free: Tensor
    z_adv: Tensor
    z_rectify: Tensor
    t_rectify: Tensor


def draw_twinflow(
    rows: Rows,
    t: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    image_free: bool,
    rectifies: bool,
) -> TwinFlowDraws:
    """All noise of a step in one evaluation of the stream; rows that a noise is not needed for get none. t: [B]."""
    adv, e2e = rows.roles.rows("adv"), rows.roles.rows("e2e")
    wanted = {
        "z": torch.arange(len(rows.ids)),
        "z_image_free": rows.roles.rows(*DATA_ROLES) if image_free else adv[:0],
        "z_adv": adv,
        "z_rectify": e2e if rectifies else e2e[:0],
    }
    ids = torch.cat([rows.ids[which] for which in wanted.values()])
    purposes = torch.cat([torch.full((len(which),), purpose_id(name)) for name, which in wanted.items()])
    noise = normals(rows.seed, rows.step, purposes, ids, shape, device, dtype)
    parts = noise.split([len(which) for which in wanted.values()])
    times = uniforms(rows.seed, rows.step, purpose_id("times"), rows.ids, 3).to(dtype)
    return TwinFlowDraws(
        t=t.to(dtype),
        u_r=times[:, 0],
        u_r_min=times[:, 1],
        t_rectify=times[wanted["z_rectify"], 2],
        **dict(zip(wanted, parts, strict=True)),
    )


def draw_t(rows: Rows, distribution: str, beta: tuple[float, float], logit_normal: tuple[float, float]) -> Tensor:
    """[B] float64 times in [0, 1]: Beta(*beta), or the sigmoid of Normal(mean, standard deviation)."""
    if distribution == "logit_normal":
        mean, std = logit_normal
        normal = normals(rows.seed, rows.step, purpose_id("t"), rows.ids, (1,), dtype=torch.float64)[:, 0]
        return torch.sigmoid(mean + std * normal)
    return betas(rows.seed, rows.step, "t", rows.ids, *beta)
