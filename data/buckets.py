"""Target sizes. A shard holds images of one bucket, decided when the data is packed."""

from __future__ import annotations

from typing import NamedTuple


class Bucket(NamedTuple):
    """Size of every image of a shard [pixels]."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
