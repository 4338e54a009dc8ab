"""Target sizes. A shard holds images of one bucket, decided when the data is packed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar


class Bucket(NamedTuple):
    """Size of every image of a shard [pixels]."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Sizes(NamedTuple):
    """What a shard holds: the size of its images, and of the source images of edits."""

    image: Bucket
    source: Bucket | None = None

    def __str__(self) -> str:
        return str(self.image) if self.source is None else f"{self.image}-from-{self.source}"


_Size = TypeVar("_Size", Bucket, Sizes)


def bucket_table(resolution: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """Buckets of about resolution^2 pixels with sides that are multiples of `step`, from tall to wide.

    For every longer side up to max_aspect times the shorter one, the shorter side that brings the area closest.
    Raises ValueError where resolution is no multiple of step or max_aspect is below 1.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"the resolution {resolution} is not a multiple of the bucket step {step}; change one of them")
    if max_aspect < 1:
        raise ValueError(f"the largest aspect {max_aspect} is below 1; it is longer side / shorter side")
    found = set()
    for longer in range(resolution, int(resolution * max_aspect) + 1, step):
        shorter = int(resolution**2 / longer / step + 0.5) * step
        if 0 < longer <= max_aspect * shorter:
            found |= {Bucket(longer, shorter), Bucket(shorter, longer)}
    return tuple(sorted(found, key=lambda bucket: (bucket.width / bucket.height, bucket)))


def nearest_bucket(height: float, width: float, table: Iterable[Bucket]) -> Bucket:
    """The bucket whose ratio of sides is nearest to that of an image, on a logarithmic scale."""
    return min(table, key=lambda bucket: _distance(Bucket(height, width), bucket))  # type: ignore[arg-type]


def _distance(a: Bucket | Sizes, b: Bucket | Sizes) -> float:
    """Between the ratios of sides; of edits the sum over image and source."""
    if isinstance(a, Bucket) and isinstance(b, Bucket):
        return abs(math.log(a.width * b.height / (a.height * b.width)))
    assert isinstance(a, Sizes) and isinstance(b, Sizes), "sizes are compared with sizes"
    of_sources = 0.0 if a.source is None or b.source is None else _distance(a.source, b.source)
    return _distance(a.image, b.image) + of_sources


def merge_small(counts: Mapping[_Size, int], minimum: int) -> dict[_Size, _Size]:
    """Where the images of each bucket go so that none holds fewer than `minimum`, while there is more than one.

    The smallest bucket joins the nearest ratio that is left, until no bucket is too small.
    """
    left = {bucket: count for bucket, count in sorted(counts.items()) if count}
    target = {bucket: bucket for bucket in left}
    while len(left) > 1:
        smallest = min(left, key=lambda bucket: left[bucket])
        if left[smallest] >= minimum:
            break
        count = left.pop(smallest)
        heir = min(left, key=functools.partial(_distance, smallest))
        left[heir] += count
        target = {bucket: heir if now == smallest else now for bucket, now in target.items()}
    return target
