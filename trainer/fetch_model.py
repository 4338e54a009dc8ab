"""Bring a base model from a hub, once, on a login node: python -m trainer.fetch_model REPO DEST [--revision main]

DEST is a folder, which appears complete or not at all, or s3://BUCKET/PREFIX, where model_index.json (of a single
component, config.json) comes last. An interrupted fetch goes on with the same command. Compute nodes read DEST
(model.path) and never talk to a hub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from configs.folders import write_json
from data.ending import exit_status
from data.store import S3Store, open_store
from models import hub

MARKER = "fetched.json"
"""Beside the model: which repository and commit it is."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="twinflow model fetch", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("repo", metavar="REPO", help="ORGANISATION/NAME on the hub (HF_ENDPOINT names another hub)")
    parser.add_argument("dest", metavar="DEST", help="folder to create, or s3://BUCKET/PREFIX")
    parser.add_argument("--revision", default="main", help="branch, tag or commit; default main")
    parser.add_argument("--subfolder", help="folder of the repository that holds the model")
    parser.add_argument("--endpoint-url", help="S3 endpoint for stores other than AWS")
    parser.add_argument(
        "--scratch", type=Path, help="where a folder for files on their way to s3:// is made; default TMPDIR"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _fetch(options), "the same command goes on", hub.HubError, OSError)


def _fetch(options: argparse.Namespace) -> int:
    snapshot = hub.find(options.repo, options.revision, options.subfolder)
    size = f"{len(snapshot.files)} files, {sum(snapshot.files.values()) / 1e9:.1f} GB, commit {snapshot.commit}"
    print(f"{options.repo}: {size}")
    store = open_store(options.dest, options.endpoint_url)
    if isinstance(store, S3Store):
        fresh = to_store(snapshot, store, _scratch(options.scratch, store.identity))
    else:
        fresh = to_folder(snapshot, Path(store.url))
    print(f"{options.dest}: {'complete' if fresh else 'already complete'}; set model.path={options.dest}")
    return 0


def _origin(snapshot: hub.Snapshot) -> dict[str, str]:
    return {"repo": snapshot.repo, "commit": snapshot.commit, "subfolder": snapshot.prefix}


def to_folder(snapshot: hub.Snapshot, dest: Path) -> bool:
    """Make the folder `dest`; False where it is this very snapshot already.

    Raises HubError where the download fails, FileExistsError where `dest` is something else.
    """
    if dest.exists():
        _refuse_other(snapshot, str(dest), (dest / MARKER).read_text() if (dest / MARKER).is_file() else None)
        return False
    staging = dest.with_name(f".{dest.name}.partial")
    root = hub.download(snapshot, snapshot.files, staging)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.relative_to(root).as_posix() not in snapshot.files:
            path.unlink()  # of the library, or of an earlier commit of the same branch
    for path in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    write_json(root / MARKER, _origin(snapshot))
    root.rename(dest)
    shutil.rmtree(staging, ignore_errors=True)
    return True


def to_store(snapshot: hub.Snapshot, store: S3Store, scratch: Path) -> bool:
    """Copy the snapshot below the store's prefix, file by file; False where all of it is there already.

    scratch: folder of this snapshot's files alone; made here, and removed at the end with all that is in it.
    Raises HubError or DataError where one of the two fails, FileExistsError where something else is there,
    PermissionError where others can write to scratch.
    """
    there = {name: entry.bytes for name, entry in store.files().items()}
    if there:
        _refuse_other(snapshot, store.url, store.read(MARKER).decode() if MARKER in there else None)
    missing = [name for name, size in snapshot.files.items() if there.get(name) != size]
    missing.sort(key=lambda name: name in (hub.INDEX, hub.CONFIG))  # last: what has one of them is complete
    _make_private(scratch)
    if not there:
        write_json(scratch / MARKER, _origin(snapshot))
        store.publish(scratch / MARKER, MARKER)
    for name in missing:
        # One by one: the disk of a login node may hold no 60 GB.
        store.publish(hub.download(snapshot, [name], scratch) / name, name)
    shutil.rmtree(scratch, ignore_errors=True)
    return bool(missing)


def _refuse_other(snapshot: hub.Snapshot, where: str, marker: str | None) -> None:
    """FileExistsError unless the marker at `where` is this snapshot's."""
    if marker is None or json.loads(marker) != _origin(snapshot):
        what = "no fetched model" if marker is None else f"another one: {marker.strip()}"
        raise FileExistsError(f"{where} exists and is {what}; choose another DEST or remove it")


def _scratch(parent: Path | None, identity: str) -> Path:
    """The same folder at every call, so that an interrupted fetch goes on; never one that the user named."""
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return (parent or Path(tempfile.gettempdir())).absolute() / f"twinflow-fetch-{digest}"


def _make_private(folder: Path) -> None:
    """Its name can be foreseen and /tmp is everybody's: who made it first would choose the weights, and what is removed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{folder} is a link, belongs to another user or can be written by others; set --scratch to a folder of yours"
        )


if __name__ == "__main__":
    sys.exit(main())
