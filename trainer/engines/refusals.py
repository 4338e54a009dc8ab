"""What every engine refuses, with the remedy."""

from __future__ import annotations

from typing import Any

from configs.schema import Ema as EmaOptions


def refuse_dtypes(options: Any) -> None:
    """ValueError where an option of an engine that is a dtype names no choice."""
    for knob in ("block_dtype", "reduce_dtype", "base_dtype"):
        if getattr(options, knob, "float32") not in ("float32", "bfloat16"):
            raise ValueError(f"engine.{knob} is {getattr(options, knob)!r}; choose float32 or bfloat16")


def refuse_teacher(teacher: str, ema: EmaOptions) -> None:
    """ValueError where there is no such teacher."""
    if teacher not in ("online", "ema", "frozen"):
        raise ValueError(f"teacher is {teacher!r}; choose online, ema or frozen")
    if teacher == "ema" and not ema.decay:
        raise ValueError(
            "an ema teacher with ema.decay 0 is the online network itself: set teacher online, or ema.decay"
        )


def refuse_weights(which: str, averaged: bool) -> None:
    """ValueError where there are no such weights."""
    if which not in ("online", "ema"):
        raise ValueError(f"weights are {which!r}; choose online or ema")
    if which == "ema" and not averaged:
        raise ValueError("no averaged weights are kept: set ema.decay above 0, or use the online weights")
