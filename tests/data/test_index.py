import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data.buckets import Bucket
from data.index import Index, index_tar, parse_index, write_index
from data.manifest import Shard
from data.s3 import DataError
from tests.data.sets import write_tar

MEMBERS = {
    "b/1.png": b"image one",
    "b/1.txt": b"one",
    "a.source.png": b"source",
    "a.PNG": b"image a",
    "__meta__/x.txt": b"left out",
    "noextension": b"left out",
}


def test_index_finds_the_members_that_webdataset_finds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", MEMBERS)
    index, body = index_tar(path), path.read_bytes()
    ours = {
        key: {extension: body[o : o + n] for extension, (o, n) in index.members(i).items()}
        for i, key in enumerate(index.keys)
    }
    theirs = {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert ours == theirs
    assert ours == {"b/1": {"png": b"image one", "txt": b"one"}, "a": {"source.png": b"source", "png": b"image a"}}


def test_index_survives_writing_and_reading(tmp_path: Path) -> None:
    index = index_tar(write_tar(tmp_path / "x.tar", MEMBERS))
    shard = write_index(tmp_path, "x.tar", index, "a", Bucket(8, 8))
    assert (shard.samples, shard.bytes) == (2, (tmp_path / "x.tar").stat().st_size)
    assert shard.index_bytes == (tmp_path / "x.idx").stat().st_size
    again = parse_index((tmp_path / "x.idx").read_bytes(), shard)
    assert (again.keys, again.extensions) == (index.keys, index.extensions)
    assert np.array_equal(again.spans, index.spans)


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "PKL", "latent.pkl"])
def test_pickles_are_refused_by_name(tmp_path: Path, extension: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.png": b"", f"1.{extension}": b""})
    with pytest.raises(DataError, match=rf"x\.tar: member 1\.{extension} is a pickle"):
        index_tar(path)


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match=r"x\.tar: not a readable tar"):
        index_tar(path)


def test_a_changed_index_is_refused(tmp_path: Path) -> None:
    index = index_tar(write_tar(tmp_path / "x.tar", MEMBERS))
    shard = write_index(tmp_path, "x.tar", index, "a", Bucket(8, 8))
    body = (tmp_path / "x.idx").read_bytes()
    with pytest.raises(DataError, match=r"x\.idx: is not the index that the manifest names"):
        parse_index(body.replace(b"b/1", b"b/2"), shard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": ["a"]}, "malformed spans"),
        ({"spans": [[[0, 1]]]}, "malformed spans"),
        ({"spans": "x"}, "'spans' is 'x', not list"),
        ({"spans": [[["x", 1], None], [None, None]]}, "malformed spans"),
        ({"spans": [[[0, 10**9], None], [None, None]]}, "lies outside"),
        ({"spans": [[[2**62, 2**62], None], [None, None]]}, "lies outside"),
        ({"spans": [[[-5, 1], None], [None, None]]}, "lies outside"),
        ({"spans": [[[5, -1], None], [None, None]]}, "lies outside"),
        ({"extensions": ["pkl", "txt"]}, "is a pickle"),
    ],
)
def test_malformed_indexes_are_refused(change: dict[str, Any], message: str) -> None:
    head = {"format": "twinflow-index", "version": 1, "shard": "x.tar", "extensions": ["png", "txt"]}
    document = head | {"keys": ["a", "b"], "spans": [[[0, 5], None], [[5, 5], [10, 5]]]}
    plain = Shard("/f", "a", "x.tar", 100, None, 2, Bucket(8, 8), 0, "")

    def parse(entries: dict[str, Any]) -> Index:
        body = json.dumps(entries).encode()
        return parse_index(body, replace(plain, index_sha256=hashlib.sha256(body).hexdigest()))

    assert parse(document).members(0) == {"png": (0, 5)}
    with pytest.raises(DataError, match=message):
        parse(document | change)
