"""Malformed and malicious inputs: python -m tests.benchmarks.hostile [--quick]

Every case is a data set in a bucket (an rclone server), read through the shard cache and the loader in a process of its
own, or a tar that is indexed there. It must be read (with stand-ins) or refused with a message, within a time and a
memory, and the process may write to the cache alone, start no program and load no pickle: an audit hook of the
interpreter watches that. Prints a table and the messages; the last line is JSON; exit status 1 where a case fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data.index import index_tar
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.s3 import DataError
from tests.benchmarks.hostile_cases import TAR, Case, cases
from tests.data import rclone
from tests.data.rclone import RcloneServer

LIMIT_S = 20.0
BUDGET_S = 20.0
LIMIT_BYTES = 400 << 20
GLOBAL_BATCH_SIZE = 4
FORBIDDEN = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "ctypes.dlopen"}
)
CHANGES = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}
)


@dataclass
class Outcome:
    """verdict: read | replaced | refused, or what went wrong; violations: forbidden acts; grown: peak memory [bytes]."""

    verdict: str
    message: str
    violations: tuple[str, ...] = ()
    grown: int = 0

    @property
    def ok(self) -> bool:
        known = self.verdict in ("read", "replaced", "refused") and (self.verdict != "refused" or self.message)
        return bool(known) and not self.violations and self.grown <= LIMIT_BYTES


class Watch:
    """Audit hook: notes writes outside the allowed folder, programs started and pickled classes looked up."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.120}")
        elif event == "open" and isinstance(arguments[2], int):
            writing = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writing and not self._inside(arguments[0]):
                self.seen.append(f"open for writing {arguments[0]!r:.120}")
        elif event in CHANGES and not self._inside(arguments[0]):
            self.seen.append(f"{event} {arguments!r:.120}")

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):  # an open file, seen when it was opened
            return True
        assert self.allowed is not None
        return os.path.realpath(os.fsdecode(path)).startswith(self.allowed)


def serve(connection: Connection, endpoint_url: str, folder: Path) -> None:
    """A process that reads the cases it is told, until it is told no more."""
    logging.disable(logging.CRITICAL)
    watch, cache = Watch(), os.path.realpath(folder / "cache")
    index_tar(folder / "plain.tar")  # what is imported on first use is no finding
    read_set("s3://hostile/plain", endpoint_url, cache)
    while (case := connection.recv()) is not None:
        number, index = case
        before, watch.seen, watch.allowed = peak_bytes(), [], cache
        try:
            if index:
                verdict, message = "read", f"{len(index_tar(folder / 'hostile' / number / TAR).keys)} samples"
            else:
                replaced = read_set(f"s3://hostile/{number}", endpoint_url, cache)
                verdict, message = ("replaced" if replaced else "read"), f"{replaced} samples replaced"
        except DataError as error:
            verdict, message = "refused", str(error)
        except Exception as error:  # whatever else comes out is a finding
            verdict, message = type(error).__name__, str(error)
        watch.allowed = None
        connection.send(Outcome(verdict, message, tuple(watch.seen), peak_bytes() - before))


def read_set(url: str, endpoint_url: str, cache: str) -> int:
    """Read a set through the cache; how many samples were replaced."""
    manifest = read_manifest(url, endpoint_url, BUDGET_S)
    try:
        order = Order(manifest, seed=0, global_batch_size=GLOBAL_BATCH_SIZE)
    except ValueError as error:
        if "fewer" not in str(error):
            raise
        raise DataError(str(error)) from error  # a stream smaller than a batch: a mistake, and explained
    loader = Loader(order, manifest, steps=3, cache_dir=cache, endpoint_url=endpoint_url, read_budget_s=BUDGET_S)
    return sum(len(batch.replaced) for batch in loader)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reader:
    """Runs cases in a process that is replaced when it dies or hangs."""

    def __init__(self, endpoint_url: str, folder: Path) -> None:
        self._arguments = (endpoint_url, folder)
        self._process: Any = None

    def run(self, number: str, index: bool) -> Outcome:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
        self._connection.send((number, index))
        try:
            if self._connection.poll(LIMIT_S + 60):
                outcome: Outcome = self._connection.recv()
                return outcome
            verdict = "hang"
        except EOFError:
            verdict = "crash"
        self._process.kill()
        self._process.join()
        died, self._process = self._process.exitcode, None
        return Outcome(verdict, f"exit code {died}")

    def stop(self) -> None:
        if self._process:
            self._connection.send(None)
            self._process.join()


def run(folder: Path, damaged: int) -> list[tuple[Case, Outcome]]:
    served = folder / "hostile"
    os.environ |= {"AWS_ACCESS_KEY_ID": rclone.KEY, "AWS_SECRET_ACCESS_KEY": rclone.SECRET}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    todo = list(cases(folder, damaged))
    for number, case in enumerate([*todo, Case("", "", plain(folder))]):
        place = served / (f"{number:04d}" if case.kind else "plain")
        place.mkdir(parents=True)
        for name, body in case.files.items():
            (place / name).write_bytes(body)
    (folder / "plain.tar").write_bytes((served / "plain" / TAR).read_bytes())
    with RcloneServer(folder) as server:
        reader = Reader(server.endpoint_url, folder)
        outcomes = [(case, reader.run(f"{number:04d}", case.index)) for number, case in enumerate(todo)]
        reader.stop()
    return outcomes


def plain(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "base").iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hostile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 of each kind of random damage instead of 40")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        outcomes = run(Path(folder), 8 if options.quick else 40)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for case, outcome in outcomes:
        kinds[case.kind][outcome.verdict if outcome.ok else "FAILED"] += 1
    print(f"{'kind':<32}{'cases':>7}{'read':>7}{'replaced':>10}{'refused':>9}{'failed':>8}")
    for kind, counts in kinds.items():
        row = f"{counts['read']:>7}{counts['replaced']:>10}{counts['refused']:>9}{counts['FAILED']:>8}"
        print(f"{kind:<32}{counts.total():>7}{row}")
    print("\nevery named case, and every failure")
    for case, outcome in outcomes:
        if not case.name.isdigit() or not outcome.ok:
            mark = "" if outcome.ok else "FAILED "
            print(f"- {mark}{case.kind}, {case.name}: {outcome.verdict}: {outcome.message!r:.220}")
            if not outcome.ok:
                print(f"    {outcome.violations} {outcome.grown >> 20} MiB")
    failed = sum(not outcome.ok for _, outcome in outcomes)
    escaped = Path("/tmp/hostile-pickle-was-loaded").exists()
    ok = not failed and not escaped and (options.quick or len(outcomes) >= 300)
    print(json.dumps({"ok": ok, "cases": len(outcomes), "failed": failed, "pickle_loaded": escaped}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
