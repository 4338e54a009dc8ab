from pathlib import Path

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from data.demo import CAPTIONS, digits, main
from data.manifest import read_manifest
from tests.data.conftest import ObjectStore


def test_digits_are_the_stratified_split() -> None:
    train_x, train_y, test_x, test_y = digits()
    assert (train_x.shape, train_y.shape, test_x.shape, test_y.shape) == ((1257, 64), (1257,), (540, 64), (540,))
    assert train_x.dtype == test_x.dtype == np.float32
    assert (train_x.min(), train_x.max()) == (-1, 1)
    assert np.bincount(test_y).min() >= 52  # a tenth of 540, give or take the uneven classes
    both = np.concatenate([train_x, test_x])
    assert sorted(map(bytes, both)) == sorted(map(bytes, (load_digits().data / 8 - 1).astype(np.float32)))


def test_plain_webdataset_reads_the_digits_back(digits_folder: Path) -> None:
    train_x, train_y, test_x, test_y = digits()
    for name, x, y in (("train", train_x, train_y), ("heldout", test_x, test_y)):
        urls = sorted(str(path) for path in (digits_folder / name).glob("*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert len(samples) == len(y)
        for sample, pixels, label in zip(samples, x, y, strict=True):
            assert sample["json"]["label"] == label
            assert sample["txt"] == sample["json"]["caption"] == CAPTIONS[label]
            decoded = np.asarray(sample["png"].convert("L"), dtype=np.float64) / 127.5 - 1
            assert np.abs(decoded.ravel() - pixels).max() <= 1 / 255


def test_shards_have_the_asked_size(digits_folder: Path) -> None:
    manifest = read_manifest(str(digits_folder / "train"))
    assert [shard.samples for shard in manifest.shards] == [128] * 9 + [105]
    assert manifest.channels == 1
    assert {shard.bucket for shard in manifest.shards} == {(8, 8)}


def test_a_second_call_finds_the_work_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "new" / "digits"
    assert main([str(destination), "--size", "16", "--shard-size", "1000"]) == 0
    files = {path: path.stat().st_mtime_ns for path in destination.rglob("*")}
    assert read_manifest(str(destination / "train")).shards[0].bucket == (16, 16)
    assert main([str(destination), "--size", "16"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in destination.rglob("*")} == files
    assert [path.name for path in destination.parent.iterdir()] == ["digits"]


def test_other_content_is_never_overwritten(
    tmp_path: Path, digits_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([str(tmp_path)]) == 1
    assert "choose another DEST" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert main([str(digits_folder), "--size", "16"]) == 1
    assert "something else than digits of 16x16" in capsys.readouterr().err


def test_a_damaged_set_is_reported(digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = digits_folder / "heldout" / "digits-000001.tar"
    body = lost.read_bytes()
    lost.unlink()
    try:
        assert main([str(digits_folder)]) == 1
        assert "digits-000001.tar is missing" in capsys.readouterr().err
    finally:
        lost.write_bytes(body)


def test_digits_go_to_s3_and_again_without_harm(store: ObjectStore) -> None:
    store.client.create_bucket(Bucket="demo")
    arguments = ["s3://demo/digits", "--endpoint-url", store.endpoint_url]
    assert main(arguments) == 0
    for name, samples in (("train", 1257), ("heldout", 540)):
        manifest = read_manifest(f"s3://demo/digits/{name}", store.endpoint_url)
        assert sum(shard.samples for shard in manifest.shards) == samples
    assert main(arguments) == 0


def test_a_missing_bucket_is_named(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["s3://nobucket/digits", "--endpoint-url", store.endpoint_url]) == 1
    assert "nobucket" in capsys.readouterr().err
