"""Time and memory of the sample order: 10^9 samples in 10^5 shards, global batch 1024.

    python -m tests.benchmarks.order [--quick]

Every row is measured in two processes that make the order, ask for one step (the first) and then for those after it.
Times are CPU time of the calling thread, of each step the smaller one of the two: what another program on the machine
costs it does not cost twice. MB is the growth of the process from before the streams were made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from data.order import Order, Stream

SAMPLES, SHARDS, GLOBAL_BATCH = 10**9, 10**5, 1024
FIRST_MS, LATER_MS, MEMORY_MB = 100.0, 5.0, 100.0


@dataclass(frozen=True)
class Case:
    """weights: of the sources; the buckets are dealt to them in turn. step: the first that is asked for."""

    buckets: int
    weights: tuple[str, ...]
    step: int


@dataclass(frozen=True)
class Result:
    case: Case
    make_ms: float
    first_ms: float
    median_ms: float
    worst_ms: float
    memory_mb: float

    @property
    def ok(self) -> bool:
        return self.first_ms < FIRST_MS and self.worst_ms < LATER_MS and self.memory_mb < MEMORY_MB


class Synthetic:
    """Streams of shards with between 9,000 and 11,000 samples."""

    digest = "synthetic"

    def __init__(self, case: Case) -> None:
        samples = SAMPLES // SHARDS + np.arange(SHARDS) % 2001 - 1000
        samples[-1] += SAMPLES - samples.sum()
        self._streams = tuple(
            Stream(
                source=f"source{b % len(case.weights)}",
                bucket=(512, 512 + b),
                weight=Fraction(case.weights[b % len(case.weights)]),
                shards=np.arange(b, SHARDS, case.buckets),
                samples=samples[b :: case.buckets],
            )
            for b in range(case.buckets)
        )

    def streams(self) -> tuple[Stream, ...]:
        return self._streams


def measure(case: Case, steps: int) -> tuple[float, float, list[float], float]:
    """Times of making the order, of the first step and of those after it [ms], and memory [MB], of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = Synthetic(case)
    make_ms, order = timed(lambda: Order(manifest, seed=0, global_batch_size=GLOBAL_BATCH))
    first_ms, references = timed(lambda: order.step(case.step))
    assert len(references.index) == GLOBAL_BATCH
    later = [timed(lambda s=s: order.step(s))[0] for s in range(case.step + 1, case.step + 1 + steps)]  # type: ignore[misc]
    memory_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return make_ms, first_ms, later, memory_mb


def result(case: Case, steps: int) -> Result:
    both = []
    for _ in range(2):
        # A spawned process has nothing warm.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            both.append(pool.submit(measure, case, steps).result())
    make_ms, first_ms = min(one[0] for one in both), min(one[1] for one in both)
    later = np.minimum(both[0][2], both[1][2])
    return Result(case, make_ms, first_ms, float(np.median(later)), float(later.max()), max(one[3] for one in both))


def timed(work):  # type: ignore[no-untyped-def]
    """CPU time of `work` [ms] and its result."""
    began = time.thread_time()
    result = work()
    return (time.thread_time() - began) * 1e3, result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.order", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 steps after the first in place of 5,000")
    steps = 200 if parser.parse_args().quick else 5000
    cases = [
        Case(buckets, weights, step)
        for buckets, weights in ((1, ("1",)), (20, ("1",)), (20, ("1/2", "1", "3")))
        for step in (0, 10**6)
    ]
    results = []
    print(f"{'buckets':>7} {'weights':>9} {'from step':>9} {'make ms':>8} {'first ms':>9} ", end="")
    print(f"{'median ms':>9} {'worst ms':>9} {'MB':>6}  ok")
    for case in cases:
        r = result(case, steps)
        results.append(r)
        print(
            f"{case.buckets:>7} {','.join(case.weights):>9} {case.step:>9} {r.make_ms:>8.2f} {r.first_ms:>9.2f} ",
            end="",
        )
        print(f"{r.median_ms:>9.3f} {r.worst_ms:>9.3f} {r.memory_mb:>6.1f}  {r.ok}", flush=True)
    ok = all(r.ok for r in results)
    bars = {"first_ms": FIRST_MS, "worst_ms": LATER_MS, "memory_mb": MEMORY_MB}
    print(
        json.dumps({"benchmark": "order", "ok": ok, "steps": steps, "bars": bars, "rows": [asdict(r) for r in results]})
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
