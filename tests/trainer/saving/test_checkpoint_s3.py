"""Checkpoints below an s3:// prefix: the same layout and the same promise as on disk, without a rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.schema import Checkpoint
from data.s3 import DataError
from tests.data.conftest import ObjectStore, store  # noqa: F401 (a fixture)
from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.saving.parts import alone, numbered, parts_of, small_engine
from trainer.engines.engine import TensorPart
from trainer.saving import certificate, checkpoint_s3, checkpoint_store
from trainer.saving.certificate import CheckpointError
from trainer.saving.checkpoint import Checkpoints
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_s3 import S3Checkpoints
from trainer.saving.checkpoint_store import open_store

MIB = 1 << 20


@pytest.fixture
def prefix(store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[S3Checkpoints]:  # noqa: F811
    bucket = f"b{abs(hash(request.node.name))}"
    store.client.create_bucket(Bucket=bucket)
    place = open_store(f"s3://{bucket}/runs/one", store.endpoint_url)
    assert isinstance(place, S3Checkpoints)
    yield place


def values_of(place: S3Checkpoints, name: str) -> dict[str, torch.Tensor]:
    target = numbered(0)
    alone(place).read(name, parts_of(target))
    return target


def _save(url: str, endpoint_url: str) -> Any:
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    engine, checkpoints = small_engine(), alone(open_store(url, endpoint_url))
    rows = toy.cut(toy.batch(12, 0, torch.float32), dist.get_rank(), dist.get_world_size())
    velocity = engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"])
    engine.backward(toy.loss(velocity, rows, 12))
    engine.step(0.02)
    checkpoints.save(engine, 1, seconds=1.0)
    checkpoints.finish()
    return engine.full_state("online")


def _resume(url: str, endpoint_url: str) -> Any:
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    engine = small_engine()
    done = alone(open_store(url, endpoint_url)).resume(engine)
    return done.step, engine.full_state("online")


def test_what_two_ranks_upload_any_number_of_ranks_resumes_from(prefix: S3Checkpoints) -> None:
    saved = run_ranks(_save, 2, prefix.url, prefix.endpoint_url)[0]
    names = prefix.listing()["step_00000001"]
    assert len(names) == 3 and certificate.NAME in names
    for readers in (1, 3):
        step, found = run_ranks(_resume, readers, prefix.url, prefix.endpoint_url)[0]
        assert step == 1
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_large_files_are_uploaded_in_parts_and_read_by_ranges(
    prefix: S3Checkpoints,
    store: ObjectStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_s3, "_PART", 5 * MIB)
    whole = torch.randn(3 * MIB)
    name = alone(prefix).write(5, parts_of({"w": whole}), {})
    (file,) = (file for file in prefix.listing()[name] if file != certificate.NAME)
    head = store.client.head_object(Bucket=prefix.bucket, Key=f"{prefix.prefix}/{name}/{file}")
    assert head["ETag"].strip('"').endswith("-3"), "three parts"
    part = whole.new_empty(1000)
    reader = CheckpointReader(prefix, name)
    store.gets.clear()
    reader.fill([TensorPart("parameter", "w", (3 * MIB,), 1000, part)])
    assert torch.equal(part, whole[1000:2000])
    assert sum(store.gets.values()) == 2, "a header and one range, not the file"


@pytest.mark.parametrize("request_number", range(14))
def test_a_save_killed_at_any_request_leaves_the_earlier_or_the_new_checkpoint(
    prefix: S3Checkpoints, request_number: int
) -> None:
    """The child dies just before its request number `request_number`; it replaces step 10 and then removes step 5."""
    alone(prefix).write(5, parts_of(numbered(5)), {})
    alone(prefix).write(10, parts_of(numbered(1)), {})
    child = os.fork()
    if child == 0:
        _die_before_request(request_number)
        alone(prefix, keep_last=1).write(10, parts_of(numbered(10)), {})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    name = checkpoint_store.latest(prefix)
    assert name == "step_00000010"
    found = values_of(prefix, name)
    assert torch.equal(found["b"], numbered(10)["b"]) or torch.equal(found["b"], numbered(1)["b"])
    assert status == 9 or torch.equal(found["b"], numbered(10)["b"])
    alone(prefix, keep_last=1).write(15, parts_of(numbered(15)), {})
    assert list(prefix.listing()) == ["step_00000015"]
    assert len(prefix.listing()["step_00000015"]) == 2, "nothing is left behind"


def _die_before_request(number: int) -> None:
    left, original = [number], S3Checkpoints._request

    def dying(self: S3Checkpoints, *args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return original(self, *args, **kwargs)

    S3Checkpoints._request = dying  # type: ignore[method-assign]


class BusyForParts:
    """Answers 503 to the upload of part 2, `times` times, before the store's own answers."""

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.times = self.hits = 0
        server: Any = store._server._server
        self._app = server.app
        monkeypatch.setattr(server, "app", self)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if self.times and "partNumber=2" in environ["QUERY_STRING"]:
            self.times, self.hits = self.times - 1, self.hits + 1
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"]
        return self._app(environ, start_response)


def test_a_server_that_fails_amid_an_upload_costs_one_save_and_nothing_else(
    store: ObjectStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_s3, "_PART", 5 * MIB)
    store.client.create_bucket(Bucket="failing")
    big, busy = {"w": torch.randn(3 * MIB)}, BusyForParts(store, monkeypatch)
    place = open_store("s3://failing/run", store.endpoint_url, 3.0)
    checkpoints = alone(place)
    checkpoints.write(5, parts_of(big), {})
    busy.times = 10**6
    with pytest.raises(CheckpointError, match=r"s3://failing/run/step_00000010/rank_00000.*SlowDown"):
        checkpoints.write(10, parts_of(big), {})
    assert busy.hits > 1, "it was tried again"
    assert checkpoint_store.latest(place) == "step_00000005"
    assert "Uploads" in store.client.list_multipart_uploads(Bucket="failing")
    busy.times = 1
    checkpoints.write(15, parts_of(big), {})
    assert checkpoint_store.latest(place) == "step_00000015" and busy.times == 0
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket="failing"), "leftovers were removed"


@pytest.mark.parametrize("arrives", [True, False])
def test_an_upload_whose_completion_fails_is_there_or_says_why(
    prefix: S3Checkpoints, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """The answer alone was lost, or the store refuses: the look for the object must not hide the reason."""
    monkeypatch.setattr(checkpoint_s3, "_PART", 5 * MIB)
    original = S3Checkpoints._request

    def refused(self: S3Checkpoints, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation != "complete_multipart_upload":
            return original(self, operation, *args, **kwargs)
        if arrives:
            original(self, operation, *args, **kwargs)
        raise DataError("access refused")

    monkeypatch.setattr(S3Checkpoints, "_request", refused)
    big = parts_of({"w": torch.randn(3 * MIB)})
    if arrives:
        assert checkpoint_store.latest(prefix) is None and alone(prefix).write(5, big, {}) == "step_00000005"
        assert checkpoint_store.latest(prefix) == "step_00000005"
    else:
        with pytest.raises(CheckpointError, match="access refused"):
            alone(prefix).write(5, big, {})


def test_retention_takes_the_certificate_first(prefix: S3Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(prefix).write(5, parts_of(numbered(5)), {})
    deleted: list[str] = []
    original = S3Checkpoints._delete

    def noted(self: S3Checkpoints, path: str) -> None:
        deleted.append(path)
        original(self, path)

    monkeypatch.setattr(S3Checkpoints, "_delete", noted)
    alone(prefix, keep_last=1).write(10, parts_of(numbered(10)), {})
    assert deleted[0] == f"step_00000005/{certificate.NAME}" and len(deleted) == 2


def test_a_checkpoint_whose_part_is_gone_is_passed_over(prefix: S3Checkpoints, store: ObjectStore) -> None:  # noqa: F811
    for step in (5, 10):
        alone(prefix).write(step, parts_of(numbered(step)), {})
    (file,) = (file for file in prefix.listing()["step_00000010"] if file != certificate.NAME)
    store.client.delete_object(Bucket=prefix.bucket, Key=f"{prefix.prefix}/step_00000010/{file}")
    assert checkpoint_store.latest(prefix) == "step_00000005"


def test_a_bucket_that_does_not_exist_is_one_message(store: ObjectStore, tmp_path: Path) -> None:  # noqa: F811
    place = open_store("s3://nowhere-at-all/run", store.endpoint_url)
    with pytest.raises(CheckpointError, match=r"s3://nowhere-at-all/run.*no such bucket"):
        Checkpoints(place, Checkpoint(), {}).write(5, parts_of(numbered(5)), {})
