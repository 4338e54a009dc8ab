"""Checks of the objectives against numbers recorded from the published implementation in float64 (tests/golden)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.trainer.objectives.toy import GoldenNet, ToyNets, VectorConditions
from trainer.engines.ema import Ema
from trainer.generate.sampler import kumaraswamy
from trainer.objectives.consistency import consistency_residual, enhance, path_integral
from trainer.objectives.losses import graded_loss, interval_weight, row_loss
from trainer.objectives.objective import Roles, Targets
from trainer.objectives.passes import Call
from trainer.objectives.rcgm import RCGM
from trainer.objectives.roles import assign, published_partition
from trainer.objectives.transport import clean_estimate, interpolate, noise_estimate
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull, TwinFlowFullDraws
from trainer.objectives.twinflow_random import TwinFlowDraws

RTOL, ATOL = 1e-9, 1e-12
EQUAL_ROLES = {"e2e": 1, "mul": 1, "any": 1, "adv": 1}


class Recording:
    """Arrays of one file as float64 tensors; `draw("normal")` hands out the recorded draws in order."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.config: dict[str, Any] = json.loads(str(self.arrays["config_json"]))
        self.prefix, self._next = prefix, 0

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        name = self.prefix + name if self.prefix + name in self.arrays else name
        return torch.from_numpy(self.arrays[name])

    def step(self, index: int) -> Recording:
        """The same file at step `index` of several, with a fresh cursor over that step's draws."""
        other = copy.copy(self)
        other.prefix, other._next = (f"s{index}_" if self.config["nsteps"] > 1 else ""), 0
        return other

    def draw(self, kind: str) -> Tensor:
        name = f"draw{self._next:02d}_{kind}"
        assert name in self, f"the next recorded draw is not {name}"
        self._next += 1
        return self[name]

    def times(self, kind: str) -> Tensor:
        return self.draw(kind).flatten()

    def net(self, group: str = "net") -> GoldenNet:
        return GoldenNet(*(self[f"{group}.{name}"].clone() for name in ("W1", "b1", "W2", "b2")))


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual.detach(), expected.to(actual.dtype), rtol=RTOL, atol=ATOL, msg=lambda text: f"{name}: {text}"
    )


# -------------------------------------------------------------------- one training step
def production_objective(config: dict[str, Any]) -> TwinFlow:
    distance = config["loss_func_type"]
    alpha, beta, scale = config["time_dist_ctrl"]
    rate = config["ema_decay_rate"]
    return TwinFlow(
        order=config["estimate_order"],
        roles=EQUAL_ROLES,
        published_partition=True,
        teacher="online" if rate == 0 else "frozen" if rate == 1 else "ema",
        enhanced_ratio=config["enhanced_ratio"],
        enhanced_range=tuple(config["enhanced_range"]),
        image_free=config["use_image_free"],
        consistency_ratio=config["consistc_ratio"],
        rectification_weight=config["dist_match_cof"],
        distance="l2" if distance["type"] == "l2" else "barron",
        barron_alpha=distance.get("alpha", 1.0),
        barron_scale=distance.get("c", 1e-3),
        time_alpha=alpha,
        time_beta=beta,
        time_max=scale,
    )


def production_draws(record: Recording, objective: TwinFlow, roles: Roles) -> TwinFlowDraws:
    t, u_r, u_r_min = record.times("beta"), record.times("uniform"), record.times("uniform")
    none = record["x"][:0]
    z_image_free = record.draw("normal")[roles.rows("e2e", "mul", "any")] if objective.image_free else none
    z_adv = record.draw("normal") if roles.total("adv") else none
    z = record.draw("normal")
    matches = objective.consistency_ratio == 1
    z_rectify = record.draw("normal") if matches else none
    t_rectify = record.times("beta") if matches else none.flatten()
    return TwinFlowDraws(t, u_r, u_r_min, z, z_image_free, z_adv, z_rectify, t_rectify)


def check_production_step(path: Path) -> None:
    record = Recording(path)
    objective = production_objective(record.config)
    rows = len(record["x"])
    roles = assign(objective.role_weights, 0, rows, published=True)
    for name in ("e2e", "mul", "any", "adv"):
        if f"mask_{name}" in record:
            assert roles.rows(name).tolist() == torch.nonzero(record[f"mask_{name}"]).flatten().tolist()

    def one_step(nets: ToyNets, record: Recording) -> Tensor:
        x = record["x"].clone()
        draws = production_draws(record, objective, roles)
        cond, null = VectorConditions(record["c"]), VectorConditions(record["e"])
        targets = objective.targets(nets, x, cond, null, roles, draws)
        compare_production(record, objective, roles, targets)
        assert torch.equal(x, record["x"]), "the caller's batch was written to"
        return objective.loss(nets, targets).total

    check_steps(record, objective.teacher, one_step)


def compare_production(record: Recording, objective: TwinFlow, roles: Roles, targets: Targets) -> None:
    """Inputs, guided velocity and weights of the graded rows against the recorded intermediates, where present."""
    if "pi_x_t" in record:
        close(targets.x_t, record["pi_x_t"], "x_t")
        close(targets.t, record["pi_t"].flatten(), "t")
        close(targets.r, record["pi_tt"].flatten(), "r")
    if "rcgm_in_target0" in record:  # enh_target is recorded before E2 replaces it
        close(targets.velocity, record["rcgm_in_target0"], "guided velocity")
    if "dm_F_grad" in record and objective.rectifies and targets.gap is not None:
        close(targets.gap[roles.rows("e2e")], record["dm_F_grad"], "velocity gap")
    if "weighting" in record and objective.order >= 1:
        close(targets.weight * len(targets), record["weighting"].flatten(), "weight")


def paper_objective(config: dict[str, Any]) -> TwinFlowFull | RCGM:
    rate = config["ema_decay_rate"]
    common: dict[str, Any] = {
        "order": config["estimate_order"],
        "teacher": "online" if rate == 0 else "frozen" if rate == 1 else "ema",
        "enhanced_ratio": max(config["enhanced_ratio"], 0.0),
        "enhanced_range": (-1.0, 2.0),
        "distance": "l2",
    }
    if config["using_twinflow"]:
        return TwinFlowFull(**common)
    return RCGM(roles={"any": 1}, interval_weight="none", **common)


def check_paper_step(path: Path) -> None:
    record = Recording(path)
    objective = paper_objective(record.config)
    roles = assign(objective.role_weights, 0, len(record["x"]))

    def one_step(nets: ToyNets, record: Recording) -> Tensor:
        t, u_r, z = record.times("uniform"), record.times("uniform"), record.draw("normal")
        draws: Any
        if isinstance(objective, TwinFlowFull):
            draws = TwinFlowFullDraws(t, u_r, z, record.draw("normal"), record.times("uniform"))
        else:
            none = z[:0]
            draws = TwinFlowDraws(t, u_r, u_r, z, none, none, none, none.flatten())
        cond, null = VectorConditions(record["c"]), VectorConditions(record["e"])
        targets = objective.targets(nets, record["x"], cond, null, roles, draws)
        if "enh_target" in record:
            per_sample = targets.velocity[:: objective.rows_per_sample]
            close(per_sample, record["enh_target"], "guided velocity")
        return objective.loss(nets, targets).total

    check_steps(record, objective.teacher, one_step)


def check_steps(record: Recording, teacher_kind: str, one_step: Any) -> None:
    """Loss, gradients, EMA and plain SGD of all steps of a file. Our EMA moves after the update (law 4): the copy made
    at the start is the published first update, and every later one equals the published update before use."""
    online = record.net()
    start = "ema0" if teacher_kind == "frozen" and "ema0.W1" in record else "net"
    teacher = record.net(start) if teacher_kind != "online" else None
    ema = None
    if teacher_kind == "ema" and teacher is not None:
        shards = ([p.data for p in net.parameters()] for net in (teacher, online))
        ema = Ema(record.config["ema_decay_rate"], *shards)
    for index in range(record.config["nsteps"]):
        at = record.step(index)
        if ema is not None and index:
            ema.update()
        loss = one_step(ToyNets(online, teacher), at)
        close(loss, at["loss"], f"loss of step {index}")
        online.zero_grad()
        loss.backward()
        for name, parameter in online.named_parameters():
            assert parameter.grad is not None
            close(parameter.grad, at[f"grad.{name}"], f"gradient of {name}, step {index}")
            if teacher is not None and f"ema_after.{name}" in at:
                close(teacher.get_parameter(name), at[f"ema_after.{name}"], f"EMA of {name}, step {index}")
            if record.config["nsteps"] > 1:
                parameter.data.sub_(parameter.grad, alpha=record.config["sgd_lr"])
                close(parameter, at[f"net_after.{name}"], f"{name} after step {index}")
        if ema is not None:
            close(torch.tensor(ema.k, dtype=torch.float64), at["ema_decay_after"].reshape(()), "EMA decay")


# -------------------------------------------------------------------- single parts
def drive(task: Any, net: GoldenNet, c: Tensor) -> tuple[Any, list[tuple[Call, Tensor]]]:
    """Run a task alone with a network; its result, and its calls with their outputs."""
    seen: list[tuple[Call, Tensor]] = []
    outputs: list[Tensor] | None = None
    with torch.no_grad():
        while True:
            try:
                calls = next(task) if outputs is None else task.send(outputs)
            except StopIteration as stop:
                return stop.value, seen
            outputs = [net(call.x_t, call.t, call.r, c[call.cond]) for call in calls]
            seen += list(zip(calls, outputs, strict=True))


def check_unit(path: Path) -> None:
    name = path.stem.removeprefix("unit_").split("_")[0]
    UNIT_CHECKS[name](Recording(path))


def check_rcgm(record: Recording) -> None:
    order, rows = record.config["N"], torch.arange(len(record["x_t"]))
    x_t, t, r, c = record["x_t"], record["t"].flatten(), record["tt"].flatten(), record["c"]
    far = t >= r + 0.01
    coefficient = torch.where(far, (t - r) / 0.01, torch.ones_like(t))
    for which in ("a", "b"):
        velocity = record[f"target_{which}"]
        integral, _ = drive(
            consistency_residual(x_t, velocity, t, r, rows, len(rows), order, 0.01, teacher=False), record.net(), c
        )
        expected = record[f"out_{which}"]
        check_target(record["F"], velocity, coefficient, integral, expected)
    total, calls = drive(path_integral(x_t, t, r, rows, len(rows), order, teacher=False), record.net(), c)
    last, output = calls[-1]
    close(total, record["mf_pred"], "integral")
    close(clean_estimate(last.x_t, output, last.t), record["mf_x"], "x_hat")
    close(noise_estimate(last.x_t, output, last.t), record["mf_z"], "z_hat")


def check_target(prediction: Tensor, velocity: Tensor, coefficient: Tensor, integral: Tensor, expected: Tensor) -> None:
    """The target that the graded pass regresses on, seen through the gradient of its l2 loss."""
    leaf = prediction.clone().requires_grad_()

    class Fixed:
        shares_module = True

        def velocity(self, *_: Any) -> Tensor:
            return leaf

    rows = len(leaf)
    targets = Targets(
        sample=torch.arange(rows),
        x_t=leaf,
        t=coefficient,
        r=coefficient,
        cond=None,
        velocity=velocity,
        weight=torch.ones(rows, dtype=leaf.dtype),
        groups=torch.ones(rows, 1),
        group_names=("all",),
        consistent=torch.ones(rows, dtype=torch.bool),
        coefficient=coefficient,
        integral=integral,
    )
    graded_loss(Fixed(), targets, "l2", 1.0, 1e-3, residual_clamp=1.0).total.backward()
    assert leaf.grad is not None
    elements = leaf[0].numel()
    close(prediction - leaf.grad * elements / 2, expected, "consistency target")


def check_enhance(record: Recording) -> None:
    target, rows = record["target"], torch.arange(len(record["target"]))
    chosen = record["idx"] if record["idx"].dtype == torch.bool else torch.isin(rows, record["idx"])
    checked = 0
    for name in record.arrays:
        if name.startswith("out_"):
            everywhere = name.startswith("out_all_")
            t = torch.where(chosen | everywhere, 0.5, 1.0)
            task = enhance(target, target, t, rows, rows, len(rows), float(name.split("_")[-1]), (0.0, 1.0), False)
            calls = next(task)
            inside = calls[0].cond
            try:
                task.send([record["pred_c"][inside], record["pred_u"][inside]])
            except StopIteration as stop:
                close(stop.value, record[name], name)
                checked += 1
    assert checked


def check_losses(record: Recording) -> None:
    checked = 0
    for name in record.arrays:
        if name.endswith("_dpred") or not (name == "l2" or name.startswith("barron")):
            continue
        kind, _, options = name.partition("_")
        alpha, scale = (float(part[1:]) for part in options.split("_")) if options else (1.0, 1e-3)
        prediction = record["pred"].clone().requires_grad_()
        values = row_loss(prediction - record["target"], kind, alpha, scale)
        close(values, record[name], name)
        values.sum().backward()
        assert prediction.grad is not None
        close(prediction.grad, record[f"{name}_dpred"], f"{name} gradient")
        checked += 1
    assert checked


def check_dist_match(record: Recording) -> None:
    net, x, c = record.net(), record["x"], record["c"]
    for prefix, kind, clamp in (("", "beta", 1.0), ("noclamp_", "uniform", np.inf)):
        z, s = record[f"{prefix}draw00_normal"], record[f"{prefix}draw01_{kind}"].flatten()
        y = interpolate(x, z, s)
        with torch.no_grad():
            fake, real = net(y, -s, -s, c), net(y, s, s, c)
        close((fake - real).clamp(-clamp, clamp), record[f"{prefix}F_grad"], f"{prefix}F_grad")
        gap = clean_estimate(y, fake, -s) - clean_estimate(y, real, s)
        close(gap.clamp(-clamp, clamp), record[f"{prefix}x_grad"], f"{prefix}x_grad")


def check_forward(record: Recording) -> None:
    x_t, t, r = record["x_t"], record["t"].flatten(), record["tt"].flatten()
    prediction = record.net()(x_t, t, r, record["c"])
    close(prediction, record["F"], "F")
    close(clean_estimate(x_t, prediction, t), record["x_hat"], "x_hat")
    close(noise_estimate(x_t, prediction, t), record["z_hat"], "z_hat")


def check_schedules(record: Recording) -> None:
    for rows, *expected in record["partition"].long().tolist():
        order = published_partition(EQUAL_ROLES, rows)
        assert [order.count(i) for i in range(4)] == expected, f"partition of {rows} rows"
    for name in record.arrays:
        if name.startswith("ema_decay_used_"):
            ema, used = Ema(float(name.rsplit("_", 1)[1]), [torch.ones(1)], [torch.ones(1)]), [0.0]  # 0: the copy
            for _ in record[name][1:]:
                used.append(ema.k)
                ema.update()
            close(torch.tensor(used, dtype=torch.float64), record[name], name)
        if name.startswith("kuma_"):
            warp = tuple(float(part) for part in name.split("_")[1:])
            close(kumaraswamy(record["s"], warp), record[name], name)
    close(interval_weight(torch.ones(1), torch.zeros(1)), torch.ones(1), "omega(1)")


UNIT_CHECKS = {
    "rcgm": check_rcgm,
    "enhance": check_enhance,
    "losses": check_losses,
    "dist": check_dist_match,
    "forward": check_forward,
    "schedules": check_schedules,
}
