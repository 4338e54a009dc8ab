"""Recorded sampler numbers (tests/golden/sample_*.npz) against trainer/generate/sampler.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.generate.sampler import Sampler

RTOL = 1e-9


def check_sampler_file(path: str | Path) -> None:
    """Assert that every case of the file is reproduced: grid, target times, network inputs, trajectory.

    Of cases with stochast_ratio "SDE" only trajectory entries 0, 1, 2 and the first two network inputs are required:
    the published sampler keeps the first step's ratio, the correct rule takes each step's own.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    cases = json.loads(str(arrays["config_json"]))["cases"]
    recorded = {name.split("_")[0] for name in arrays if name.startswith("case")}
    assert cases and recorded == set(cases), f"{path}: cases {sorted(cases)}, recorded {sorted(recorded)}"
    for name in sorted(cases):
        _check_case(f"{Path(path).name} {name} {cases[name]}", name, cases[name], arrays)


def _check_case(label: str, name: str, options: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    sampler = sampler_of(options)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    network = _network(arrays)

    def velocity(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        calls.append((x_t, t, r))
        return network(x_t, t, r)

    fresh = arrays.get(f"{name}_noise")
    eps = None if fresh is None else lambda i: torch.from_numpy(fresh[i])
    trajectory = sampler.trajectory(velocity, torch.from_numpy(arrays["noise"]), eps).numpy()

    times, targets = arrays[f"{name}_t"], arrays[f"{name}_tt"]
    assert len(calls) == len(times) == sampler.nfe, f"{label}: {len(calls)} evaluations, recorded {len(times)}"
    _close(f"{label} grid", sampler.grid().numpy(), np.append(times, 0.0))
    for i, (_, t, r) in enumerate(calls):
        _close(f"{label} t[{i}]", t.numpy(), np.full(len(t), times[i]))
        _close(f"{label} r[{i}]", r.numpy(), np.full(len(r), targets[i]))
    wanted = arrays[f"{name}_traj"]
    assert trajectory.shape == wanted.shape, f"{label}: {trajectory.shape}, recorded {wanted.shape}"
    binding = 3 if sampler.stochasticity == "SDE" else len(wanted)
    _close(f"{label} trajectory", trajectory[:binding], wanted[:binding])
    if f"{name}_xcur" in arrays:
        inputs = np.stack([x.numpy() for x, _, _ in calls])
        _close(f"{label} inputs", inputs[: binding - 1], arrays[f"{name}_xcur"][: binding - 1])


def sampler_of(options: dict[str, Any]) -> Sampler:
    """The sampler of a recorded case; an option this does not know fails the check."""
    names = {
        "sampling_steps": "steps",
        "stochast_ratio": "stochasticity",
        "extrapol_ratio": "extrapolation",
        "sampling_order": "order",
        "sampling_style": "style",
        "time_dist_ctrl": "warp",
        "rfba_gap_steps": "gaps",
    }
    unknown = set(options) - set(names)
    assert not unknown, f"unknown sampler options in the recording: {sorted(unknown)}"
    return Sampler(**{names[k]: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _network(arrays: dict[str, np.ndarray]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    w1, b1, w2, b2, c = (torch.from_numpy(arrays[k]) for k in ("net.W1", "net.b1", "net.W2", "net.b2", "c"))

    def network(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = torch.stack([t, r, t * r, torch.sin(2 * t), torch.cos(3 * r)], dim=1)
        hidden = torch.tanh(torch.cat([x_t.flatten(1), times, c], dim=1) @ w1.T + b1)
        return (hidden @ w2.T + b2).reshape(x_t.shape)

    return network


def _close(label: str, got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=RTOL, atol=1e-12, err_msg=label)
