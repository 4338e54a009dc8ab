"""Updates that were left out because a loss or a gradient was not finite: decided on the device, judged on the host.

The engine leaves an update out, on all ranks alike, where the global gradient norm is not finite. `guarded` makes a
loss that is not finite show there. The host looks at the norms where it reads metrics back anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_SAMPLES = 16
"""Samples of one rank and step that a message names."""
_STEPS = 4


class NotFinite(RuntimeError):
    """An update was left out and the policy says stop; the message names steps, ranks and samples."""


def guarded(loss: Tensor) -> Tensor:
    """The same loss, bit for bit; where it is not finite all its gradients become NaN.

    Some losses that are not finite have finite gradients (a clamp, a where); their step must not count either.
    """
    return loss * (loss.detach() * 0 + 1)


@dataclass(frozen=True)
class Made:
    """A step: the samples of this rank, its loss and the global gradient norm, both scalars on the device."""

    step: int
    keys: Sequence[str]
    loss: Tensor
    norm: Tensor


class Updates:
    """The updates of a run. skipped: left out so far, over all starts; in_row: the newest ones of them, without a
    break."""

    def __init__(self, skipped: int = 0) -> None:
        self.skipped, self.in_row = skipped, 0
        self._made: list[Made] = []

    def add(self, made: Made) -> None:
        self._made.append(made)

    def judge(self, policy: str, most_in_row: int) -> list[str]:
        """What was left out since the last call, one line a step, the same on all ranks.

        policy: stop | skip. Waits for the device. Collective where an update was left out, which all ranks know.

        Raises:
            NotFinite: on all ranks, where the policy is to stop or more than most_in_row updates were left out in a row.
        """
        made, self._made = self._made, []
        if not made:
            return []
        finite = torch.isfinite(torch.stack([each.norm.detach() for each in made])).tolist()
        longest = 0
        for fine in finite:
            self.in_row = 0 if fine else self.in_row + 1
            longest = max(longest, self.in_row)
        left_out = [each for each, fine in zip(made, finite, strict=True) if not fine]
        if not left_out:
            return []
        self.skipped += len(left_out)
        lines = _explain(left_out)
        if policy == "stop" or longest > most_in_row:
            raise NotFinite(_refusal(lines, policy, longest))
        return lines


def _explain(left_out: Sequence[Made]) -> list[str]:
    """A line per step: the ranks whose loss was not finite and their samples; all ranks' where only a gradient was."""
    own = [(each.step, bool(torch.isfinite(each.loss)), tuple(each.keys[:_SAMPLES])) for each in left_out]
    ranks = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, own)
    lines = []
    for index, (step, _, _) in enumerate(own):
        of_step = [said[index] for said in ranks]
        guilty = [rank for rank, (_, fine, _) in enumerate(of_step) if not fine]
        what = "a loss was not finite" if guilty else "the losses were finite, a gradient was not"
        named = [f"rank {rank}: {', '.join(of_step[rank][2])}" for rank in (guilty or range(len(ranks)))[:_STEPS]]
        lines.append(f"step {step}: {what}; samples of {'; '.join(named)}")
    return lines


def _refusal(lines: Sequence[str], policy: str, longest: int) -> str:
    why = "" if policy == "stop" else f"{longest} updates in a row were not finite, more than train.max_skips allows. "
    remedy = "Look at them or lower optimizer.learning_rate"
    if policy == "stop":
        remedy += ", or set train.non_finite=skip to go on without such updates"
    shown = "; ".join(lines[:_STEPS]) + (f"; and {len(lines) - _STEPS} more steps" if len(lines) > _STEPS else "")
    return f"{why}An update was left out on all ranks. {shown}. {remedy}; the same command goes on from the last checkpoint"
