"""How well lanes mix, against a perfect shuffle: python -m tests.benchmarks.shuffle [--quick]

One epoch of 256 shards of 1,000 samples in batches of 256, by lanes. A perfect shuffle is a random permutation of all
samples. Per batch: different shards that it draws from, and the chance that two of its samples come from one shard. Per
window of 16 batches (what a moving average of gradients sees): the same chance. Distance: mean difference of the stored
positions of samples that follow each other, 1 in a perfect shuffle. Correlation: Spearman's, of stored position and
step, root mean square over seeds. More lanes must mix better in every respect that lanes decide. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from data.order import Order, Stream
from data.permutation import Integers

SHARDS, SAMPLES, GLOBAL_BATCH, WINDOW = 256, 1000, 256, 16
LANES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Quality:
    lanes: str
    shards_a_batch: float
    same_shard_in_batch: float
    same_shard_in_window: float
    distance: float
    correlation: float


class OneStream:
    digest = "shuffle"

    def streams(self) -> tuple[Stream, ...]:
        shards = np.arange(SHARDS)
        return (Stream("set", (512, 512), Fraction(1), shards, np.full_like(shards, SAMPLES)),)


def by_order(lanes: int, seed: int) -> Integers:
    """Stored positions of an epoch's samples in the order of training, [steps, GLOBAL_BATCH]."""
    order = Order(OneStream(), seed=seed, global_batch_size=GLOBAL_BATCH, lanes=lanes)
    steps = [order.step(step) for step in range(order.steps_through(0))]
    return np.stack([references.shard * SAMPLES + references.index for references in steps])


def perfect(seed: int) -> Integers:
    return np.random.default_rng(seed).permutation(SHARDS * SAMPLES).reshape(-1, GLOBAL_BATCH)


def same_shard(rows: Integers) -> float:
    """Chance that two samples of a row [n, k] of stored positions come from one shard."""
    counts = np.stack([np.bincount(row // SAMPLES, minlength=SHARDS) for row in rows])
    return float((counts * (counts - 1)).sum() / (len(rows) * rows.shape[1] * (rows.shape[1] - 1)))


def quality(name: str, epochs: Callable[[int], Integers], seeds: int) -> Quality:
    found = []
    for seed in range(seeds):
        steps = epochs(seed)
        flat, total = steps.ravel(), steps.size
        # Positions are a permutation, so their ranks are themselves; samples of a step share its rank.
        rank = np.repeat(np.arange(len(steps)), steps.shape[1])
        whole = len(steps) // WINDOW * WINDOW
        found.append(
            (
                float(np.mean([len(np.unique(row // SAMPLES)) for row in steps])),
                same_shard(steps),
                same_shard(steps[:whole].reshape(-1, WINDOW * steps.shape[1])),
                float(np.abs(np.diff(flat)).mean() / (total / 3)),
                float(np.corrcoef(flat, rank)[0, 1] ** 2),
            )
        )
    shards, batch, window, distance, square = np.mean(found, axis=0).tolist()
    return Quality(name, shards, batch, window, distance, square**0.5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.shuffle", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds instead of 8")
    seeds = 2 if parser.parse_args().quick else 8
    results = [quality(str(lanes), lambda seed, lanes=lanes: by_order(lanes, seed), seeds) for lanes in LANES]  # type: ignore[misc]
    results.append(quality("perfect", perfect, seeds))
    print(f"{'lanes':>8} {'shards a batch':>15} {'same shard, batch':>18} {'same shard, window':>19} ", end="")
    print(f"{'distance':>9} {'correlation':>12}")
    for r in results:
        print(f"{r.lanes:>8} {r.shards_a_batch:>15.1f} {r.same_shard_in_batch:>18.4f} ", end="")
        print(f"{r.same_shard_in_window:>19.4f} {r.distance:>9.3f} {r.correlation:>12.3f}")
    better = all(
        a.shards_a_batch < b.shards_a_batch
        and a.same_shard_in_batch > b.same_shard_in_batch
        and a.same_shard_in_window > b.same_shard_in_window
        for a, b in itertools.pairwise(results)
    )
    enough = all(r.shards_a_batch >= lanes for r, lanes in zip(results, LANES, strict=False))
    ok = better and enough
    print(json.dumps({"benchmark": "shuffle", "ok": ok, "seeds": seeds, "rows": [asdict(r) for r in results]}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
