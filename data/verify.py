"""python -m data.verify DEST: read all of a data set and report everything that is wrong with it.

Sizes, ETags and digests of all files, the index of every shard against its tar, and every image decoded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.contents import Contents
from data.ending import exit_status
from data.index import Index, index_tar, parse_index
from data.manifest import Shard, read_manifest
from data.pool import Pool, tick
from data.s3 import DataError, Folder, open_folder
from data.samples import read_sample
from data.store import SCRATCH


class Task(NamedTuple):
    folder: Folder
    shard: Shard
    contents: Contents


def verify(url: str, endpoint_url: str | None = None, workers: int = 0) -> tuple[int, list[str]]:
    """Number of samples that the manifest of `url` names, and all problems, each naming its file.

    Raises DataError where the manifest cannot be read.
    """
    folder, manifest = open_folder(url, endpoint_url), read_manifest(url, endpoint_url)
    sizes = folder.sizes()
    problems, tasks = [], []
    for shard in manifest.shards:
        wrong = _wrong_sizes(folder, shard, sizes)
        problems += wrong
        if not wrong:
            tasks.append(Task(folder, shard, manifest.contents))
    known = {shard.name for shard in manifest.shards}
    strangers = sorted(name for name in sizes if name.endswith(".tar") and name not in known)
    problems += [
        f"{folder.url_of(name)}: the manifest does not name it; remove it, or run `twinflow data index`"
        for name in strangers
        if not name.startswith(f"{SCRATCH}/")
    ]
    total = sum(task.shard.samples for task in tasks)
    with Pool(workers) as pool:
        found = dict(pool.each(check_shard, tasks, "verifying", total))
    return manifest.samples, problems + [problem for number in sorted(found) for problem in found[number]]


def _wrong_sizes(folder: Folder, shard: Shard, sizes: dict[str, int]) -> list[str]:
    problems = []
    for name, size in ((shard.name, shard.bytes), (shard.index_name, shard.index_bytes)):
        if name not in sizes:
            problems.append(f"{folder.url_of(name)}: missing; copy it again")
        elif sizes[name] != size:
            problems.append(f"{folder.url_of(name)}: {sizes[name]} bytes where the manifest says {size}; copy it again")
    return problems


def check_shard(task: Task) -> list[str]:
    """All problems of one shard whose files have their sizes."""
    folder, shard, contents = task
    try:
        index = parse_index(folder.read(shard.index_name), shard)
        if (path := folder.local_path(shard.name)) is not None:
            return _check_tar(path, shard, index, contents)
        with tempfile.TemporaryDirectory(prefix="twinflow-verify-") as scratch:
            path = Path(scratch) / "shard.tar"
            with open(path, "wb") as file:
                folder.download(shard.name, file, shard.etag)
            return _check_tar(path, shard, index, contents)
    except DataError as error:
        tick(shard.samples)
        return [str(error)]
    except OSError as error:
        raise DataError(f"{shard.url}: cannot be verified ({error.strerror or error}); check TMPDIR") from error


def _check_tar(path: Path, shard: Shard, index: Index, contents: Contents) -> list[str]:
    problems = []
    with open(path, "rb") as file:
        if index.sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != index.sha256:
            problems.append(f"{shard.url}: its bytes are not those that were indexed (SHA-256); copy it again")
        try:
            found = index_tar(path, shard.url)
            places = {key: found.members(number) for number, key in enumerate(found.keys)}
        except DataError as error:
            tick(shard.samples)
            return [*problems, str(error)]
        for number, key in enumerate(index.keys):
            tick()
            if index.members(number) != places.get(key):
                problems.append(f"{shard.url}, sample {key}: not where its index says; run `twinflow data index`")
                continue
            try:
                read_sample(file.fileno(), shard, index, number, contents)
            except DataError as error:
                problems.append(str(error))
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", help="folder or s3:// prefix that holds manifest.json")
    workers = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=workers, help="processes; 0 none but this (%(default)s)")
    parser.add_argument("--endpoint-url", help="S3 endpoint of stores other than AWS")
    given = parser.parse_args(arguments)

    def work() -> int:
        samples, problems = verify(given.dest, given.endpoint_url, max(0, given.workers))
        for problem in problems:
            tqdm.write(problem)
        print(f"{given.dest}: {samples} samples, {len(problems)} problems")
        return 1 if problems else 0

    return exit_status(work, "nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
