import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.index import index_tar, write_index
from data.manifest import read_manifest, write_manifest
from data.pack import main as pack
from data.verify import main, verify
from tests.data.conftest import ObjectStore
from tests.data.pictures import SMALL, body, picture, write_folder
from tests.data.sets import write_tar


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("verify")
    assert pack([str(write_folder(base / "pets", 24)), str(base / "packed"), *SMALL, "--workers", "0"]) == 0
    return base / "packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_what_was_packed_has_no_problem(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed), "--workers", "1"]) == 0
    assert f"{packed}: 24 samples, 0 problems" in capsys.readouterr().out


def test_the_demo_set_has_no_problem(digits_folder: Path) -> None:
    assert verify(str(digits_folder / "train")) == (1257, [])


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _flip_a_pixel(tar: Path) -> None:
    index = index_tar(tar)
    offset, size = index.members(0).get("jpg") or index.members(0)["png"]
    _flip(tar, offset + size - 3)


def _reorder(tar: Path) -> None:
    with tarfile.open(tar) as file:
        members = {m.name: file.extractfile(m).read() for m in file}  # type: ignore[union-attr]
    size = tar.stat().st_size
    write_tar(tar, dict(reversed(members.items())))
    assert tar.stat().st_size == size, "or the size alone gives it away"


def _lose_a_sample(tar: Path) -> None:
    document = json.loads(tar.with_suffix(".idx").read_bytes())
    document["keys"].pop()
    tar.with_suffix(".idx").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("harm", "messages"),
    [
        (Path.unlink, ["missing; copy it again"]),
        (lambda tar: tar.with_suffix(".idx").unlink(), ["missing; copy it again"]),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-512]), ["bytes where the manifest says"]),
        (_flip_a_pixel, ["SHA-256"]),
        (lambda tar: _flip(tar, 0), ["SHA-256", "not a readable tar"]),
        (_reorder, ["SHA-256", "not where its index says"]),
        (lambda tar: tar.write_bytes(bytes(tar.stat().st_size)), ["SHA-256"]),
        (lambda tar: _flip(tar.with_suffix(".idx"), 30), ["not the index that the manifest names"]),
        (_lose_a_sample, ["bytes where the manifest says"]),
        (lambda tar: shutil.copy(tar, tar.with_name("stray.tar")), ["the manifest does not name it"]),
    ],
)
def test_every_harm_is_found_and_named(copy: Path, harm: Callable[[Path], None], messages: list[str]) -> None:
    tar = copy / read_manifest(str(copy)).shards[1].name
    harm(tar)
    samples, problems = verify(str(copy))
    assert samples == 24
    for message in messages:
        assert any(message in problem for problem in problems), problems
    others = {shard.name for shard in read_manifest(str(copy)).shards} - {tar.name}
    assert not any(name in problem for problem in problems for name in others), "sound shards are accused"


def test_all_problems_are_reported_and_the_exit_status_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = read_manifest(str(copy)).shards
    (copy / first.name).unlink()
    _flip_a_pixel(copy / second.name)
    assert main([str(copy), "--workers", "0"]) == 1
    output = capsys.readouterr().out
    assert first.name in output and second.name in output and "24 samples, 2 problems" in output


def test_images_that_cannot_be_decoded_are_named_by_key(tmp_path: Path) -> None:
    members = {}
    for n in range(5):
        content = body(picture(16, 16, n))
        members[f"{n}.png"] = content[: len(content) // 2] if n in (1, 3) else content
        members[f"{n}.txt"] = b"\xff\xfe" if n == 4 else b"a caption"
    tar = write_tar(tmp_path / "x.tar", members)
    shard = write_index(tmp_path, "x.tar", index_tar(tar), "x", (16, 16))  # type: ignore[arg-type]
    write_manifest(tmp_path, "x", 3, [shard])
    _, problems = verify(str(tmp_path))
    assert len(problems) == 3
    assert [f"sample {n}" in problem for n, problem in zip((1, 3, 4), problems, strict=True)] == [True] * 3


def test_an_object_that_changed_on_s3_is_found(
    packed: Path, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    url = store.upload(packed, "verified", "pets")
    where = ["--workers", "0", "--endpoint-url", store.endpoint_url]
    assert main([url, *where]) == 0
    shard = read_manifest(url, store.endpoint_url).shards[0]
    content = np.frombuffer((packed / shard.name).read_bytes(), np.uint8)[::-1].tobytes()
    store.client.put_object(Bucket="verified", Key=f"pets/{shard.name}", Body=content)
    capsys.readouterr()
    assert main([url, *where]) == 1
    assert f"{url}/{shard.name}" in capsys.readouterr().out


def test_a_folder_without_manifest_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
