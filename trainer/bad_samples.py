"""The count of undecodable samples: replaced and allowed up to a share of an epoch, the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from data.batch import Replacement
from data.order import Order
from trainer.ledger import Ledger


class TooManyBadSamples(RuntimeError):
    """More samples of an epoch were undecodable than data.max_bad_samples allows."""


class BadSamples:
    """Replaced samples of all ranks within an epoch of the run.

    share: of an epoch's samples that may be bad; step, in_epoch: steps done and what was counted in the epoch of the
    last of them, as a checkpoint says. in_epoch then goes on; it starts anew with every epoch. ledger: where each of
    them is written down.
    """

    def __init__(
        self, order: Order, share: float, step: int = 0, in_epoch: int = 0, ledger: Ledger | None = None
    ) -> None:
        self.share, self.in_epoch, self._ledger = share, in_epoch, ledger
        self._order, self._epoch = order, order.epoch(max(step - 1, 0))

    def add(self, step: int, count: int, replaced: Sequence[Replacement] = ()) -> None:
        """Count what `step` replaced on all ranks; replaced: the part of this rank. A collective where count > 0.

        Raises TooManyBadSamples above the ceiling of its epoch.
        """
        if count and self._ledger is not None:
            self._ledger.add(step, replaced)
        if (epoch := self._order.epoch(step)) != self._epoch:
            self._epoch, self.in_epoch = epoch, 0
        self.in_epoch += count
        samples = (
            self._order.steps_through(epoch) - self._order.steps_through(epoch - 1)
        ) * self._order.global_batch_size
        if self.in_epoch > math.floor(self.share * samples):
            raise TooManyBadSamples(
                f"{self.in_epoch} of the {samples} samples of epoch {epoch} could not be decoded by step {step}, more "
                f"than data.max_bad_samples={self.share:g} of them. Each rank's log names them: repair or repack their "
                "shards, or raise data.max_bad_samples; the same command goes on from the last checkpoint"
            )
