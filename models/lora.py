"""Low-rank adapters by peft on a frozen backbone, and which rows of a pass see which of them.

Every adapted linear layer computes W x + alpha / rank B A x. The online rows of a pass see the adapter `default`, the
rows of a teacher the adapter `ema` (averaged weights) or none (the frozen base): one pass serves all. peft's layers do
the arithmetic; hooks clear, row by row, what an adapter adds where it is not meant. (peft's own mixed batches are for
inference and split a batch by adapter name.)

The second time embedding is adapted like any other layer, not trained in full: a row without adapters is then exactly
the base model, an average needs no second set of modules, and what a run has learnt is one file that diffusers reads.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from configs.schema import Lora
from models import weights

ONLINE, AVERAGED = "default", "ema"
"""peft's names of the adapters; `default` is the one that peft and diffusers expect."""


class Adapters:
    """The adapters of one backbone: what a pass computes with. A backbone that has them carries them as `adapters`.

    teacher: whose rows those with weights[i] != 0 are: online | ema | frozen. single_time: the network is asked at
    t - r/2 (method 2.5) instead of (t, r); rows of the frozen base at t, the time that it was trained with: the
    published code asks it at t/2 (method 6.1, defect 1).
    """

    def __init__(self, backbone: nn.Module, teacher: str, single_time: bool) -> None:
        self.teacher, self.single_time = teacher, single_time
        self._time_rows = getattr(backbone, "time_rows", 1)
        self._signature = inspect.signature(backbone.forward)
        # The very list that all layers look into. A gathering of single layers (ZeRO-3) must be the same on all ranks,
        # so which adapters are computed depends on torch's grad mode alone, never on a rank's rows.
        self._active = [ONLINE]
        self._online: Tensor | None = None
        for layer in layers(backbone).values():
            layer._active_adapter = self._active
            layer.lora_B[ONLINE].register_forward_hook(self._keep_online)
            if teacher == "ema":
                layer.lora_B[AVERAGED].register_forward_hook(self._keep_averaged)
        backbone.register_forward_pre_hook(self._begin, with_kwargs=True)
        backbone.register_forward_hook(self._end, always_call=True)

    def average_of(self, name: str) -> str | None:
        """The parameter that holds the average of a trained one within the backbone; None without an EMA teacher."""
        return weights.ADAPTER.sub(rf".\1.{AVERAGED}.weight", name) if self.teacher == "ema" else None

    @staticmethod
    def holds(name: str) -> bool:
        """Whether a parameter is trained: the online adapters; all others are the frozen base, or averages."""
        found = weights.ADAPTER.search(name)
        return found is not None and found[2] == ONLINE

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = self._signature.bind(*args, **kwargs).arguments
        t, r, marks = given["t"], given["r"], given.get("weights")
        taught = torch.zeros(t.shape, dtype=torch.bool) if marks is None else marks != 0
        if torch.is_grad_enabled():
            if taught.any():
                raise RuntimeError("rows of a teacher in a pass with gradient; graded passes hold online rows alone")
        elif self.teacher != "online":
            self._online = ~taught.to(t.device, non_blocking=True)
            self._active[:] = [ONLINE, AVERAGED] if self.teacher == "ema" else [ONLINE]
        if self.single_time:
            at = t - (t if r is None else r) / 2
            of_base = self.teacher == "frozen" and marks is not None
            given["t"] = torch.where(taught.to(t.device, non_blocking=True), t, at) if of_base else at
            given["r"] = None
        return (), given

    def _end(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What recomputes in the backward pass must find the state of its graded pass."""
        self._active[:], self._online = [ONLINE], None

    def _keep_online(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._online is None else self._keep(self._online, output)

    def _keep_averaged(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._online is not None, "averaged adapters are computed in passes without gradient alone"
        return self._keep(~self._online, output)

    def _keep(self, rows: Tensor, output: Tensor) -> Tensor:
        """The rows that are meant, of all, or of the times of all and of their references (Qwen-Image-Edit-2511)."""
        if len(output) == self._time_rows * len(rows):
            rows = rows.repeat(self._time_rows)
        if len(output) != len(rows):
            raise RuntimeError(
                f"an adapted layer computes {len(output)} rows in a pass of {len(rows)}: it cannot tell whose they are; "
                "leave it out of lora.targets"
            )
        return torch.where(rows.view(-1, *(1,) * (output.dim() - 1)), output, 0.0)


def add(backbone: Any, options: Lora, teacher: str) -> None:
    """Freeze a backbone and put adapters on its linear layers, in place; on meta nothing is allocated.

    options: with a rank; teacher: online | ema | frozen. Their values come from `initialise`. Layers whose parameters
    are all idle get none. Sets `backbone.adapters`.

    Raises:
        ValueError: a target that matches no linear layer, with the nearest names.
    """
    assert options.rank is not None, "a backbone that is trained in full has no adapters"
    names = target_layers(backbone, options)
    backbone.requires_grad_(False)
    for adapter in (ONLINE, AVERAGED) if teacher == "ema" else (ONLINE,):
        described = LoraConfig(
            r=options.rank, lora_alpha=alpha(options), target_modules="|".join(map(re.escape, names))
        )
        inject_adapter_in_model(described, backbone, adapter, low_cpu_mem_usage=True)
        del backbone.peft_config  # peft's note to itself; it would warn of the second adapter
    for name, parameter in backbone.named_parameters():
        if weights.ADAPTER.search(name):
            base = backbone.get_submodule(name.split(".lora_")[0]).base_layer.weight
            parameter.data = torch.empty(parameter.shape, dtype=base.dtype, device=base.device)
        parameter.requires_grad_(Adapters.holds(name))
    backbone.adapters = Adapters(backbone, teacher, options.variant == "single_time")


def alpha(options: Lora) -> int:
    """lora.alpha, by default the rank."""
    assert options.rank is not None
    return options.rank if options.alpha is None else options.alpha


def described(options: Lora) -> dict[str, Any]:
    """What tells one set of adapters from another; empty where the model is trained in full."""
    if options.rank is None:
        return {}
    return {"rank": options.rank, "alpha": alpha(options), "variant": options.variant}


def summary(backbone: nn.Module) -> str:
    """Words on what is trained."""
    sizes = {name: p.numel() for name, p in backbone.named_parameters() if not name.endswith(f".{AVERAGED}.weight")}
    trained = sum(size for name, size in sizes.items() if Adapters.holds(name))
    rest = sum(sizes.values()) - trained
    return f"{trained / 1e6:.4g} M parameters on {len(layers(backbone))} layers, trained beside {rest / 1e6:.6g} M frozen ones"


def layers(backbone: nn.Module) -> dict[str, Any]:
    """The adapted layers by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLinear)}


def target_layers(backbone: Any, options: Lora) -> list[str]:
    """Names of the linear layers that get an adapter, in the backbone's order; see `add`."""
    linear = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    idle = set(backbone.idle_parameters())
    single_time, second = options.variant == "single_time", f"{backbone.time_embedding}_2."
    chosen = set[str]()
    for target in options.targets or backbone.lora_targets:
        matching = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matching:
            raise ValueError(f"lora.targets: no linear layer's name ends in {target!r}; {_near(target, linear)}")
        chosen |= matching
    trained = [
        name
        for name, module in linear.items()
        if name in chosen
        and not all(f"{name}.{parameter}" in idle for parameter, _ in module.named_parameters())
        # With one time the second embedding counts for nothing: its factor t - r is 0.
        and not (single_time and name.startswith(second))
    ]
    if not trained:
        raise ValueError("lora.targets: none of the layers that match ever gets a gradient; name others")
    return trained


def _near(target: str, names: Iterable[str]) -> str:
    """Words on the ends of names that look like the target; block numbers aside."""
    ends = sorted({re.sub(r"^.*\.\d+\.(?=\D)", "", name) for name in names})
    near = difflib.get_close_matches(target, ends, n=5, cutoff=0.4)
    return f"near: {', '.join(near or ends[:20])}"


@torch.no_grad()
def initialise(
    backbone: nn.Module, seed: int, given: Mapping[str, Tensor] | None = None, scatter: bool = False
) -> None:
    """Fill the (possibly sharded) adapters, averages with the same numbers as what they average: A normal with peft's
    variance 1 / (3 inputs), drawn by seed and name and so the same on all ranks, whatever their number; B zero.

    given: values in place of that, by name (models/lora_files.py). scatter: draw B as A is, for tests: while B is zero
    adapters change nothing and A gets no gradient.

    Raises:
        CheckpointError: `given` has other names or shapes.
    """
    targets: dict[str, list[Any]] = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if weights.ADAPTER.search(name):
            targets.setdefault(online_name(name), []).append(getattr(tensor, "flat_part", tensor))
    if given is not None:
        _refuse_misfits(given, {name: tuple(places[0].shape) for name, places in targets.items()})
    for name, places in targets.items():
        value = given[name] if given is not None else _first_value(name, tuple(places[0].shape), seed, scatter)
        for place in places:
            weights.fill(place, value)


def online_name(name: str) -> str:
    """Of a parameter of any adapter: its name in the online one, without wrappers."""
    return weights.ADAPTER.sub(rf".\1.{ONLINE}.weight", weights.plain_name(name))


def _first_value(name: str, shape: tuple[int, ...], seed: int, scatter: bool) -> Tensor:
    if ".lora_B." in name and not scatter:
        return torch.zeros(shape)
    drawn_by = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(drawn_by)) * (3 * shape[1]) ** -0.5


def _refuse_misfits(given: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    problems = [
        f"shape {tuple(given[name].shape)} instead of {shape}: {name}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems += [f"missing: {name}" for name in sorted(wanted.keys() - given.keys())]
    problems += [f"unexpected: {name}" for name in sorted(given.keys() - wanted.keys())]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise weights.CheckpointError(
            f"these adapters do not fit lora.rank, lora.targets and lora.variant ({len(problems)} problems):\n  {shown}"
        )
