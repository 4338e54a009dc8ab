"""Which streams an order draws from, and in how many lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.order import Stream

_MOST_LANES = 64


def default_lanes(global_batch_size: int, shards: int) -> int:
    """The largest divisor of the batch that is at most the shards of the stream, and not very large."""
    most = min(_MOST_LANES, shards)
    return max(n for n in range(1, most + 1) if global_batch_size % n == 0)


def large_enough(streams: Sequence[Stream], global_batch_size: int, small_buckets: str) -> tuple[Stream, ...]:
    """The streams that an order draws from. small_buckets: see Order.

    Raises ValueError where one is refused, or none is left.
    """
    if small_buckets not in ("refuse", "repeat", "drop"):
        raise ValueError(f"small_buckets is {small_buckets!r}; it is one of refuse, repeat, drop")
    kept: list[Stream] = []
    for stream in streams:
        if stream.per_epoch >= global_batch_size:
            kept.append(stream)
        elif small_buckets == "refuse" or not stream.total:
            raise ValueError(
                f"stream {stream.name} has {stream.total} samples and weight {stream.weight}: fewer than "
                f"train.global_batch_size={global_batch_size} in an epoch; lower the batch size, raise the weight, "
                "or merge the bucket into its neighbour when packing"
            )
        elif small_buckets == "repeat":
            kept.append(replace(stream, weight=Fraction(global_batch_size, stream.total)))
    if not kept:
        raise ValueError(f"no stream has {global_batch_size} samples (train.global_batch_size) in an epoch")
    return tuple(kept)
