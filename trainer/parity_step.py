"""One training step at tiny size, on sharded ranks and in one plain float64 process (for trainer/parity.py)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Config
from models import lora, tiny
from models.target_time import Sinusoid
from trainer.engines.engine import Engine, whole
from trainer.objectives.objective import TEACHER, LossTerms, Nets, Objective, Rows
from trainer.objectives.passes import run_packed, run_unpacked
from trainer.objectives.roles import assign
from trainer.plugins import plugin

SEED = 7
"""Of the adapters' numbers."""
STEP = 5
"""Number of the step, so that the roles do not begin at the pattern's start."""


@dataclass(frozen=True)
class Case:
    """How a step is computed. engine: plug-in; replicate: copies of the model (HSDP); dtype: of the model."""

    engine: str
    ranks: int
    dtype: str
    accumulation: int = 1
    checkpointing: bool = False
    packed: bool = True
    replicate: int = 1

    def __str__(self) -> str:
        words = [f"{self.name} {self.dtype} on {self.ranks} ranks", f"accumulation {self.accumulation}"]
        words += ["activation checkpointing"] if self.checkpointing else []
        return ", ".join([*words, "packed" if self.packed else "unpacked"])

    @property
    def name(self) -> str:
        return "hsdp" if self.replicate > 1 else self.engine


@dataclass(frozen=True)
class Subject:
    """What is computed. config: the user's; folder: of the tiny model; rows: samples of the global batch."""

    config: Config
    folder: str
    rows: int

    @property
    def objective(self) -> Objective:
        made: Objective = plugin("objective", self.config.objective)[1]
        return made

    def backbone(self, dtype: str, adapted: bool = True) -> Any:
        """The tiny backbone on meta, as a run builds it; adapted: with the adapters that the configuration names."""
        cls, options = plugin("model", self.config.model | {"path": self.folder, "latents": "vae", "dtype": dtype})
        backbone = cls.from_folder(options.path, latents=options.latents, dtype=getattr(torch, dtype))
        if adapted and self.adapted:
            lora.add(backbone, self.config.lora, self.objective.teacher)
        return backbone

    @property
    def adapted(self) -> bool:
        return self.config.lora.rank is not None

    def load(self, module: Any) -> None:
        """Fill a backbone as a run does; adapters with numbers under which no gradient vanishes."""
        module.load(self.folder)
        if getattr(module, "adapters", None) is not None:
            lora.initialise(module, SEED, scatter=True)


@dataclass
class Measured:
    """Of one step: the loss and its terms summed over rows, the gradient norm, all gradients by parameter name."""

    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: LossTerms) -> None:
        for name, value in {"loss": loss.total, **{f"loss/{name}": v for name, v in loss.terms.items()}}.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(value.detach())


class PlainNets:
    """Networks without an engine: whole modules in this process."""

    def __init__(self, online: nn.Module, teacher: nn.Module | None) -> None:
        self.shares_module = teacher is None
        self._online, self._teacher = online, teacher

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        taught = self._teacher is not None and weights is not None and int(weights[0]) == TEACHER
        result: Tensor = (self._teacher if taught and self._teacher else self._online)(x_t, t, r, cond)
        return result


def reference(subject: Subject, dtype: str) -> Measured:
    """The step in float64 in one process, without an engine: the whole batch in one pass, every call on its own.

    dtype: of the runs to compare with. For float32 ones the times and their sinusoids, and nothing else, are float32
    here, too: these turn by up to 1000 radians, and rounding that makes errors of 1e-5 in gradients which say nothing of
    an engine.
    """
    case = Case(engine="none", ranks=1, dtype="float64", packed=False)
    model = plain_module(subject, dtype)
    teacher = None
    if subject.objective.teacher == "frozen" and subject.adapted:
        teacher = plain_module(subject, dtype, adapted=False)
    elif subject.objective.teacher != "online":
        teacher = copy.deepcopy(model).requires_grad_(False)
    moved = {name: p for name, p in model.named_parameters() if p.requires_grad or not subject.adapted}
    with torch.no_grad():
        for name, factor in factors(moved).items():
            moved[name].mul_(factor)
    found = Measured()
    for loss in losses(PlainNets(model, teacher), subject, case, rank=0, times=getattr(torch, dtype)):
        loss.total.backward()
        found.add(loss)
    idle = set(model.idle_parameters())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in idle}
    found.gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    found.grad_norm = float(torch.stack([g.square().sum() for g in found.gradients.values()]).sum().sqrt())
    return found


def plain_module(subject: Subject, dtype: str, adapted: bool = True) -> Any:
    """A whole backbone in this process, float64, see `reference`; without adapters it is the teacher that is their base."""
    model = subject.backbone("float64", adapted).to_empty(device="cpu")
    subject.load(model)
    if dtype == "float32":  # before what adapters make of the times
        model.register_forward_pre_hook(_with_rounded_times, prepend=True)
    for module in model.modules():
        if dtype == "float32" and isinstance(module, Sinusoid):
            module.register_forward_pre_hook(_rounded_times)
            module.register_forward_hook(_as_float64)
    return model


def _with_rounded_times(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x_t, t, r, *others = arguments
    return (x_t, t.float(), r.float(), *others)


def _rounded_times(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].float(),)


def _as_float64(module: nn.Module, arguments: tuple[Tensor], features: Tensor) -> Tensor:
    return features.double()


def sharded(subject: Subject, case: Case) -> Measured | None:
    """The same step by an engine on this rank's rows; the result on rank 0."""
    engine = build_engine(subject, case)
    found = Measured()
    for loss in losses(engine.nets, subject, case, dist.get_rank()):
        engine.backward(loss.total)
        found.add(loss)
    options = subject.config.optimizer
    found.grad_norm = float(engine.step(options.learning_rate))
    totals = torch.tensor(list(found.losses.values()), dtype=torch.float64)
    dist.all_reduce(totals)
    found.losses = dict(zip(found.losses, totals.tolist(), strict=True))
    # The first moment of a first update is (1 - beta_1) times the clipped gradient, whatever the engine keeps.
    clipped = min(1.0, options.max_grad_norm / (found.grad_norm + 1e-6)) if options.max_grad_norm else 1.0
    moments = whole(engine, "exp_avg")
    found.gradients = {name: moment / ((1 - options.betas[0]) * clipped) for name, moment in moments.items()}
    return found if dist.get_rank() == 0 else None


def build_engine(subject: Subject, case: Case) -> Engine:
    """The user's engine options where it is the user's engine, those that the case names replaced; blocks in float32."""
    given = subject.config.engine
    section = given if given["name"] == case.engine else {"name": case.engine}
    cls, options = plugin("engine", section)
    changes = {"activation_checkpointing": case.checkpointing, "block_dtype": "float32", "reduce_dtype": "float32"}
    changes |= {"base_dtype": "float32"} if hasattr(options, "base_dtype") else {}
    if hasattr(options, "replicate"):
        changes["replicate"] = case.replicate
    optimizer = subject.config.optimizer
    if optimizer.name == "adamw8bit":  # a GPU's; its gradients are those of adamw
        optimizer = replace(optimizer, name="adamw")
    backbone = subject.backbone(case.dtype)
    engine: Engine = cls(
        replace(options, **changes),
        backbone,
        optimizer,
        subject.config.ema,
        subject.objective.teacher,
        load=subject.load,
    )
    scale_online(engine)
    return engine


def scale_online(engine: Engine) -> None:
    """Move the online parameters away from a separate teacher's, and the target-time embedding from its origin."""
    parameters = {part.name: part.local for part in engine.parts() if part.group == "parameter"}
    for name, factor in factors(parameters).items():
        parameters[name].mul_(factor)
    engine.load_counters(engine.counters())


def factors(named: dict[str, Tensor]) -> dict[str, float]:
    """A factor between 1 and 1.25 for each parameter, exact in every dtype."""
    return {name: 1 + (index % 5) / 16 for index, name in enumerate(sorted(named))}


def losses(
    nets: Nets, subject: Subject, case: Case, rank: int, times: torch.dtype | None = None
) -> Iterator[LossTerms]:
    """The losses of a rank's micro-batches, one after the other; inputs and draws are float32 numbers in any dtype.

    times: dtype that the times of rows are computed in, by default the case's.
    """
    objective, dtype = subject.objective, getattr(torch, case.dtype)
    size = subject.rows // case.ranks
    mine = slice(rank * size, (rank + 1) * size)
    all_x, all_cond, all_null = tiny.example(subject.backbone("float32"), subject.rows)
    x, cond, null = all_x[mine], all_cond[mine], all_null[mine]
    roles = assign(objective.role_weights, STEP, subject.rows, rank, case.ranks, objective.published_partition)
    rows = Rows(subject.config.run.seed, STEP, torch.arange(subject.rows)[mine], roles)
    draws = objective.draw(rows, tuple(x.shape[1:]), "cpu", torch.float32)
    numbers = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
    found = {name: n for name, n in numbers.items() if isinstance(n, Tensor) and n.is_floating_point()}
    floats = {name: n.to(dtype if n.dim() > 1 else times or dtype) for name, n in found.items()}
    targets = objective.targets(
        nets,
        x.to(dtype),
        cond.to("cpu", dtype),
        null.to("cpu", dtype) if objective.needs_null else None,
        roles,
        replace(draws, **floats),
        subject.config.train.chunk_rows,
        run_packed if case.packed else run_unpacked,
    )
    micro_batch_size = len(targets) // case.accumulation
    for begin in range(0, len(targets), micro_batch_size):
        yield objective.loss(nets, targets[begin : begin + micro_batch_size])
