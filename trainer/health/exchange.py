"""What ranks tell each other during an examination: by the store that they met in, since a collective with a rank that
is silent would only hang, and would not say which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.watching.whereabouts import own_connection


class Exchange:
    """Words of all ranks, by topic; a rank says one word to a topic. Building it is not collective."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._store = own_connection("health", ranks)

    def say(self, topic: str, word: Any) -> None:
        """word: what JSON can hold."""
        self._store.set(f"{topic}/{self.rank}", json.dumps(word))

    def hear(self, topic: str, timeout_s: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """The words of `ranks` (default: all) by rank; those that said nothing within the time are absent."""
        keys = {f"{topic}/{rank}": rank for rank in (range(self.ranks) if ranks is None else ranks)}
        try:
            self._store.wait(list(keys), timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            keys = {key: rank for key, rank in keys.items() if self._store.check([key])}
        if not keys:
            return {}
        said = self._store.multi_get(list(keys))
        return {rank: json.loads(text) for rank, text in zip(keys.values(), said, strict=True)}
