import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from data.buckets import Bucket
from data.manifest import Manifest, Shard, read_manifest, write_manifest
from data.s3 import DataError


def shard(source: str = "a", name: str = "x-0.tar", bucket: tuple[int, int] = (8, 8), samples: int = 10) -> Shard:
    return Shard("/somewhere", source, name, 1000, None, samples, Bucket(*bucket), 100, "0" * 64)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = [shard(name="x-0.tar"), shard(name="x-1.tar", bucket=Bucket(8, 16), samples=3)]
    write_manifest(tmp_path, "a", 3, shards)
    manifest = read_manifest(str(tmp_path))
    assert manifest.channels == 3
    assert manifest.samples == 13
    assert [(s.name, s.bucket, s.samples, s.bytes) for s in manifest.shards] == [
        ("x-0.tar", (8, 8), 10, 1000),
        ("x-1.tar", (8, 16), 3, 1000),
    ]
    assert manifest.shards[0].folder == str(tmp_path)
    assert manifest.shards[0].index_name == "x-0.idx"
    assert manifest.digest == Manifest(tuple(shards), 3).digest


def test_digest_follows_content_and_not_place() -> None:
    def digest(**changes: Any) -> str:
        fields = {f: getattr(shard(), f) for f in Shard.__slots__} | changes
        return Manifest((Shard(**fields),), 1).digest

    assert digest(folder="s3://elsewhere", etag="abc", bytes=5) == digest()
    for change in ({"samples": 11}, {"index_sha256": "1" * 64}, {"bucket": Bucket(8, 16)}, {"name": "y.tar"}):
        assert digest(**change) != digest()


def test_streams_are_one_per_source_and_bucket() -> None:
    wide = Bucket(8, 16)
    a = Manifest((shard(name="0.tar"), shard(name="1.tar", bucket=wide), shard(name="2.tar")), 1)
    b = Manifest((shard(source="b", samples=4),), 1)
    mixed = Manifest.mix([(a, 1), (b, "1/3")])
    found = {s.name: (s.shards.tolist(), s.samples.tolist(), s.weight) for s in mixed.streams()}
    assert found == {
        "a/8x8": ([0, 2], [10, 10], 1),
        "a/8x16": ([1], [10], 1),
        "b/8x8": ([3], [4], Fraction(1, 3)),
    }
    assert mixed.digest != Manifest.mix([(a, 1), (b, "1/2")]).digest


def test_mixtures_that_make_no_sense_are_refused() -> None:
    a, b = Manifest((shard(),), 1), Manifest((shard(source="b"),), 1)
    with pytest.raises(ValueError, match="same name: a"):
        Manifest.mix([(a, 1), (a, 1)])
    with pytest.raises(ValueError, match="weight of source b is not positive"):
        Manifest.mix([(a, 1), (b, 0)])
    with pytest.raises(ValueError, match="1 and with 3 image channels"):
        Manifest.mix([(a, 1), (Manifest(b.shards, 3), 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "format version 9, this program reads 1"),
        ({"format": "other"}, "not a twinflow-manifest file"),
        ({"channels": 2}, "channels is 2"),
        ({"channels": True}, "'channels' is True, not int"),
        ({"shards": []}, "names no shard"),
        ({"shards": ["x"]}, "shard 0: is 'x', not an object"),
    ],
)
def test_malformed_manifests_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_manifest(tmp_path, "a", 1, [shard()])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as error:
        read_manifest(str(tmp_path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, r"x-0.tar\): holds no sample"),
        ({"samples": "10"}, "'samples' is '10', not int"),
        ({"bucket": [8, 0]}, r"bucket is \[8, 0\]"),
        ({"bucket": [8, 8, 8]}, "not .height, width."),
        ({"name": "../x.tar"}, "is not the name of a .tar below"),
        ({"name": "/etc/x.tar"}, "is not the name of a .tar below"),
        ({"name": "x.zip"}, "is not the name of a .tar below"),
        ({"etag": 3}, "'etag' is 3, not str"),
    ],
)
def test_malformed_shards_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_manifest(tmp_path, "a", 1, [shard()])
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        read_manifest(str(tmp_path))


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, "a", 1, [shard(), shard()])
    with pytest.raises(DataError, match="names a shard twice"):
        read_manifest(str(tmp_path))


def test_a_missing_manifest_and_a_broken_one_name_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: No such file"):
        read_manifest(str(tmp_path / "nowhere"))
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON .* write it again"):
        read_manifest(str(tmp_path))
