"""The fault benchmark's data set, on disk and in two stores behind fault proxies."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from data.batch import Batch
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from tests.data import rclone
from tests.data.conftest import ObjectStore
from tests.data.fault_proxy import FaultProxy
from tests.data.rclone import RcloneServer
from tests.data.sets import noise_shards, write_set

BUDGET_S = 2.0
SAMPLES = 24
BUCKET, PREFIX = "faults", "set"
URL = f"s3://{BUCKET}/{PREFIX}"
TAR = "noise-1.tar"
MOTO, RCLONE = "moto", "rclone"


class Bench:
    """The data set on disk and in two stores, each behind a proxy."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        os.environ |= {"AWS_ACCESS_KEY_ID": rclone.KEY, "AWS_SECRET_ACCESS_KEY": rclone.SECRET}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
        self.folder, self.set = folder, write_set(folder / "plain", noise_shards(2, SAMPLES))
        self.served = folder / "served" / BUCKET / PREFIX
        shutil.copytree(self.set, self.served)
        self.moto = ObjectStore()
        stack.callback(self.moto.stop)
        self.moto.upload(self.set, BUCKET, PREFIX)
        self.rclone = stack.enter_context(RcloneServer(folder / "served"))
        ports = {MOTO: int(self.moto.endpoint_url.rsplit(":", 1)[1]), RCLONE: self.rclone.port}
        self.proxies = {name: stack.enter_context(FaultProxy(port)) for name, port in ports.items()}
        self.expected = batches(self.set.as_uri(), None, None)
        self.size = (self.set / TAR).stat().st_size

    def put(self, server: str, name: str, body: bytes | None) -> None:
        """Replace an object, or remove it."""
        if server == MOTO:
            at = {"Bucket": BUCKET, "Key": f"{PREFIX}/{name}"}
            _ = self.moto.client.put_object(**at, Body=body) if body else self.moto.client.delete_object(**at)
        elif body:
            (self.served / name).write_bytes(body)
        else:
            (self.served / name).unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill rclone now and start it again a moment later."""
        self.rclone.kill()
        threading.Timer(0.3, self.rclone.start).start()

    @contextlib.contextmanager
    def empty_cache(self) -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(dir=self.folder, prefix="cache-"))
        yield path
        shutil.rmtree(path)


def batches(url: str, endpoint_url: str | None, cache: Path | None) -> list[Batch]:
    """All samples of the set in order of step, over a budget of BUDGET_S."""
    manifest = read_manifest(url, endpoint_url, BUDGET_S)
    loader = Loader(
        Order(manifest, seed=0, global_batch_size=SAMPLES),
        manifest,
        steps=2,
        cache_dir=str(cache) if cache else None,
        endpoint_url=endpoint_url,
        read_budget_s=BUDGET_S,
    )
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.pixels, y.pixels) and (x.keys, x.captions, x.replaced) == (y.keys, y.captions, ())
        for x, y in zip(a, b, strict=True)
    )
