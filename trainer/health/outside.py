"""What a run needs from elsewhere: its data, the store of its checkpoints, the tracking server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from configs.schema import Config, Source
from data.manifest import Manifest, read_manifest
from data.s3 import DataError, open_folder
from trainer.health.findings import GREEN, RED, YELLOW, Finding
from trainer.observe import mlflow_store
from trainer.saving.checkpoint_s3 import S3Checkpoints
from trainer.saving.checkpoint_store import open_store

BUDGET_S = 10.0
"""Longest time lost on one object; a run itself is more patient (data.read_budget_s)."""
_SLOW = 20e6
"""Bytes a second below which one connection is called slow."""
_TELLING = 1 << 20
_REMEDY = "the message says what to look at; data.manifest, data.endpoint_url and the credentials decide what is read"


def manifests(config: Config) -> list[str]:
    """The places that a run reads data from."""
    data = config.data
    sources = data.sources or [Source(str(data.manifest))]
    return [source.manifest for source in sources] + ([data.held_out] if data.held_out else [])


def data_set(config: Config, url: str, node: int, size: int) -> Iterator[Finding]:
    """Read the manifest at `url`, and `size` bytes of a shard; nodes take different shards."""
    check, began = f"data {url}", time.perf_counter()
    try:
        manifest = read_manifest(url, config.data.endpoint_url, BUDGET_S)
        manifest_s = time.perf_counter() - began
        speed = _read(manifest, config.data.endpoint_url, node, size)
    except DataError as error:
        yield Finding(check, RED, str(error), _REMEDY)
        return
    value = f"{len(manifest.shards)} shards, {manifest.samples} samples, manifest in {manifest_s:.2f} s"
    value += f", {speed / 1e6:.0f} MB/s by one connection" if speed else ""
    if speed and speed < _SLOW:
        remedy = "measure the network to the store; more data.fetch_threads read side by side"
        yield Finding(check, YELLOW, value, remedy)
    else:
        yield Finding(check, GREEN, value)


def _read(manifest: Manifest, endpoint_url: str | None, node: int, size: int) -> float | None:
    """Bytes a second of a shard's beginning; None where the shard is too small to tell."""
    shard = manifest.shards[node % len(manifest.shards)]
    folder, wanted = open_folder(shard.folder, endpoint_url, BUDGET_S), min(size, shard.bytes)
    began = time.perf_counter()
    body = folder.read(shard.name, 0, wanted, shard.etag)
    if len(body) != wanted:
        raise DataError(f"{shard.url}: {len(body)} bytes where {wanted} were asked; write the shard again")
    return wanted / (time.perf_counter() - began) if wanted >= _TELLING else None


def checkpoints(config: Config) -> Iterator[Finding]:
    """Whether an object can be written to the s3:// prefix of checkpoint.dir, read and removed."""
    options = config.checkpoint
    store = open_store(str(options.dir), options.endpoint_url or config.data.endpoint_url, BUDGET_S)
    assert isinstance(store, S3Checkpoints)
    began = time.perf_counter()
    try:
        store.probe()
    except DataError as error:
        remedy = "allow this run to put, get and delete objects there, or set checkpoint.dir to another place"
        yield Finding("checkpoint store", RED, str(error), remedy)
        return
    yield Finding(
        "checkpoint store", GREEN, f"{store.url}: an object there and back in {time.perf_counter() - began:.2f} s"
    )


def tracking(config: Config) -> Iterator[Finding]:
    """Whether MLflow answers. Without it a run goes on and sends everything later, so it is never red."""
    uri, shown = config.tracking.uri, mlflow_store.without_password(config.tracking.uri)
    began = time.perf_counter()
    try:
        experiments = mlflow_store.reach(uri)
    except Exception as error:  # MLflow's, requests', the database's: all mean the same here
        remedy = (
            "check tracking.uri and MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN; a run keeps all and sends it later"
        )
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        yield Finding("MLflow", YELLOW, f"{shown}: {reason.replace(uri, shown)}", remedy)
        return
    yield Finding("MLflow", GREEN, f"{shown}: {experiments} in {time.perf_counter() - began:.1f} s")


def is_remote(path: str | Path | None) -> bool:
    return "://" in str(path or "") and not str(path).startswith("file://")
