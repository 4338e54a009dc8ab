"""The reader through faults: python -m tests.benchmarks.faults [--quick]

Every row reads the same two shards of noise images through a fault proxy, each time into an empty cache, with a read
budget of 2 s. Transient faults must leave every sample byte-equal to the files on disk; permanent ones must raise one
DataError within the budget that names the URL and the remedy. Servers: moto, and rclone for the read path again, for
credentials (moto accepts any) and for a server that is killed and restarted (moto would forget its objects). The row of
the full disk mounts a small tmpfs, which takes root. Three rows run once through two gloo ranks and the loop's own
agreement. The last line is JSON; exit status 1 where a row is not ok.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.s3 import DataError
from tests.benchmarks.fault_bench import BUDGET_S, MOTO, RCLONE, SAMPLES, TAR, URL, Bench, batches, same
from tests.benchmarks.fault_ranks import read_on_rank
from tests.benchmarks.fault_rows import ROWS, Row, nothing
from tests.ranks import run_ranks


@dataclass
class Result:
    row: str
    ok: int = 0
    runs: int = 0
    faults: int = 0
    slowest_s: float = 0.0
    says: str = ""
    problems: list[str] = field(default_factory=list)


def read_once(bench: Bench, row: Row, server: str, cache: Path, result: Result, rng: np.random.Generator) -> None:
    """One reading of the set through the row's fault, judged into `result`."""
    proxy = bench.proxies[server]
    before = proxy.hits
    proxy.inject(row.fault(bench, server, rng))
    problem = ""
    with row.changes(bench, server) if row.changes else contextlib.nullcontext():
        began = time.monotonic()
        try:
            found = batches(URL, proxy.endpoint_url, cache)
            if row.error is not None:
                problem = "no error"
            elif not same(found, bench.expected):
                problem = "other samples than on disk"
        except DataError as error:
            result.says = str(error)
            if row.error is None or not re.search(row.error, str(error), re.DOTALL):
                problem = f"unexpected error: {error}"
        except Exception as error:  # anything else is what this benchmark looks for
            problem = f"not a DataError: {error!r}"
        seconds = time.monotonic() - began
    proxy.inject(None)
    bench.put(server, TAR, (bench.set / TAR).read_bytes())
    if row.fault is not nothing and proxy.hits == before:
        problem = problem or "the fault never happened"
    if seconds > BUDGET_S:
        problem = problem or f"took {seconds:.2f} s of {BUDGET_S:g} s"
    tally(result, problem, seconds, proxy.hits - before)


def tally(result: Result, problem: str, seconds: float, faults: int) -> None:
    result.runs += 1
    result.ok += not problem
    result.faults += faults
    result.slowest_s = max(result.slowest_s, seconds)
    result.problems += [problem] if problem else []


def read_on_two_ranks(bench: Bench, row: Row, rng: np.random.Generator) -> Result:
    """The same through two real ranks that share a cache and agree in every step as the training loop does."""
    result = Result(f"{row.name}, 2 ranks")
    proxy = bench.proxies[MOTO]
    with bench.empty_cache() as cache:
        before, began = proxy.hits, time.monotonic()
        proxy.inject(row.fault(bench, MOTO, rng))
        said = run_ranks(read_on_rank, 2, URL, proxy.endpoint_url, str(cache), BUDGET_S, SAMPLES)
        seconds = max(answer[2] for answer in said)
        proxy.inject(None)
        bench.put(MOTO, TAR, (bench.set / TAR).read_bytes())
    problem = "" if proxy.hits > before else "the fault never happened"
    errors = [error for _, error, _ in said]
    if row.error is None:
        keys = [sum((keys for keys in parts), ()) for parts in zip(*(keys for keys, _, _ in said), strict=True)]
        if any(errors) or keys != [batch.keys for batch in bench.expected]:
            problem = f"errors {errors} or other samples"
    elif not all(errors) or not any(re.search(row.error, error, re.DOTALL) for error in errors):
        problem = f"errors {errors}"
    result.says = errors[0]
    tally(result, problem or (f"took {seconds:.2f} s" if seconds > BUDGET_S else ""), seconds, proxy.hits - before)
    assert time.monotonic() - began < 120
    return result


def full_disk(bench: Bench, times: int) -> Result | None:
    """Reading into a cache folder on a file system that is too small; None where mounting is not allowed."""
    result = Result("full cache disk")
    mount = bench.folder / "small"
    mount.mkdir()
    size = f"size={bench.size // 2}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(mount)], capture_output=True).returncode:
        return None
    try:
        row = Row(result.row, nothing, rf"{mount}/cache: cannot cache {URL}/noise-\d.tar: No space.*data\.cache_dir")
        for number in range(times):
            read_once(bench, row, (MOTO, RCLONE)[number % 2], mount / "cache", result, np.random.default_rng(number))
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    return result


def measure(bench: Bench, row: Row, times: int) -> Result:
    """At least `times` readings, shared evenly among the row's servers."""
    result, rng = Result(row.name), np.random.default_rng(len(row.name))
    for number in range(times):
        with bench.empty_cache() as cache:
            read_once(bench, row, row.servers[number % len(row.servers)], cache, result, rng)
    return result


def show(result: Result) -> None:
    print(f"{result.row:<32}{result.ok:>4} of{result.runs:>4}{result.faults:>8}{result.slowest_s:>10.2f}", flush=True)
    for problem in sorted(set(result.problems))[:3]:
        print(f"    {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 readings a row instead of 20")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    times = 4 if options.quick else 20
    with contextlib.ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))), stack)
        for proxy in bench.proxies.values():  # the first client of a process takes a while
            with bench.empty_cache() as cache:
                assert same(batches(URL, proxy.endpoint_url, cache), bench.expected)
        print(f"{'fault':<32}{'ok':>11}{'faults':>8}{'slowest s':>10}")
        results = []
        for row in ROWS:
            results.append(measure(bench, row, times))
            show(results[-1])
        disk = full_disk(bench, times)
        if disk is None:
            print("full cache disk: not run, mounting a small tmpfs takes root")
        results += [disk] if disk else []
        for row in ROWS:
            if row.ranks:
                results.append(read_on_two_ranks(bench, row, np.random.default_rng(1)))
        for result in results[len(ROWS) :]:
            show(result)
    print("\nmessages of the permanent faults")
    for result in results:
        if result.says:
            print(f"- {result.row}: {result.says}")
    ok = all(result.ok == result.runs for result in results)
    counts = {result.row: [result.ok, result.runs, round(result.slowest_s, 2)] for result in results}
    print(json.dumps({"ok": ok, "read_budget_s": BUDGET_S, "full_disk_run": disk is not None, "rows": counts}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
