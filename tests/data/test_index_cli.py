import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.index_cli import main
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.store import S3Store, Stored
from data.verify import verify
from tests.data.conftest import ObjectStore
from tests.data.pictures import body, contents, picture
from tests.data.sets import write_tar

HERE = ("--workers", "0")


def plain_webdataset(folder: Path, sizes: tuple[tuple[int, int], ...] = ((16, 24), (16, 24), (32, 16))) -> Path:
    """Tars as webdataset's own writer makes them, 6 samples each, of one size each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"part-{n}.tar")) as writer:
            for k in range(6):
                image = picture(*size, 10 * n + k)
                writer.write({"__key__": f"{n}/{k}", "png": image, "txt": f"picture {n}.{k}", "cls": k})
    return folder


def test_tars_of_plain_webdataset_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plain_webdataset(tmp_path / "set")
    tars = contents(folder)
    assert main([str(folder), "--workers", "1"]) == 0
    assert "16x24: 12 samples in 2 shards" in capsys.readouterr().out
    assert tars.items() <= contents(folder).items(), "a tar was changed"
    manifest = read_manifest(str(folder))
    assert {stream.name: stream.total for stream in manifest.streams()} == {"set/16x24": 12, "set/32x16": 6}
    order = Order(manifest, seed=0, global_batch_size=6)
    seen = {}
    for batch in Loader(order, manifest, steps=order.steps_through(0)):
        for row, key in enumerate(batch.keys):
            seen[key] = (batch.captions[row], batch.pixels[row].numpy())
    assert len(seen) == 18
    for key, (caption, pixels) in seen.items():
        n, k = map(int, key.split("/"))
        assert caption == f"picture {n}.{k}"
        expected = np.asarray(picture(*((32, 16) if n == 2 else (16, 24)), 10 * n + k), dtype=np.float32)
        assert np.abs(np.moveaxis(pixels, 0, -1) - (expected / 127.5 - 1)).max() < 1e-6
    assert verify(str(folder)) == (18, [])


def test_mixed_sizes_in_a_tar_are_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {f"{n}.png": body(picture(16, 16 + 8 * (n == 3), n)) for n in range(5)}
    write_tar(tmp_path / "set" / "x.tar", members | {f"{n}.txt": b"text" for n in range(5)})
    assert main([str(tmp_path / "set"), *HERE]) == 1
    error = capsys.readouterr().err
    assert "x.tar" in error and "sample 0 has 16x16" in error and "3 has 16x24" in error and "data pack" in error
    assert contents(tmp_path / "set").keys() == {"x.tar"}


def test_samples_that_cannot_be_trained_on_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    members = {f"{n}.png": body(picture(16, 16, n)) for n in range(4)} | {f"{n}.txt": b"text" for n in range(6)}
    members |= {"6.png": body(picture(16, 16, 6)), "7.png": b"broken", "7.txt": b"text"}
    members |= {"8.jpg": body(picture(16, 16, 8), "JPEG", exif=exif), "8.txt": b"turned"}
    write_tar(tmp_path / "set" / "x.tar", members)
    assert main([str(tmp_path / "set"), *HERE]) == 0
    output = capsys.readouterr().out
    assert "16x16: 4 samples in 1 shards" in output
    assert "left out: 2 samples: no image" in output and "left out: 1 samples: no caption" in output
    assert "left out: 1 samples: cannot be decoded" in output and "left out: 1 samples: EXIF" in output
    assert verify(str(tmp_path / "set")) == (4, [])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.pyd": b""}, "is a pickle"),
        ({"1.PTH": b""}, "is a pickle"),
        ({"a/../../1.png": b""}, "leads outside"),
        ({"/etc/1.png": b""}, "leads outside"),
        ({"1.txt": b"alone"}, "holds no image with a caption"),
        ({}, "holds no image"),
    ],
)
def test_hostile_and_useless_tars_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "set" / "x.tar", members)
    assert main([str(tmp_path / "set"), *HERE]) == 1
    error = capsys.readouterr().err
    assert message in error and "x.tar" in error
    assert contents(tmp_path / "set").keys() == {"x.tar"}


def test_indexes_newer_than_their_tar_stay(tmp_path: Path) -> None:
    folder = plain_webdataset(tmp_path / "set")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert main([str(folder), *HERE]) == 0
    before, times = contents(folder), {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}
    (folder / "manifest.json").unlink()
    plain_webdataset(folder / "new", ((16, 24),))
    (folder / "new" / "part-0.tar").rename(folder / "part-1.tar")  # another tar of the same name, and newer
    (folder / "new").rmdir()
    assert main([str(folder), *HERE]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}
    assert {name for name in after if after[name] != times[name]} == {"part-1.idx"}
    assert contents(folder)["part-1.idx"] != before["part-1.idx"]
    assert verify(str(folder)) == (18, [])


def test_tars_on_s3_get_manifest_and_indexes_there(tmp_path: Path, store: ObjectStore) -> None:
    folder = plain_webdataset(tmp_path / "set")
    url = store.upload(folder, "indexed", "sets/set")
    assert main([url, *HERE, "--endpoint-url", store.endpoint_url]) == 0
    assert main([str(folder), *HERE]) == 0
    there, here = read_manifest(url, store.endpoint_url), read_manifest(str(folder))
    assert there.digest == here.digest
    assert all(shard.etag for shard in there.shards)
    assert verify(url, store.endpoint_url) == (18, [])


@pytest.mark.parametrize("name", ["../outside.tar", "/outside.tar", "a/../../outside.tar"])
def test_object_names_that_lead_outside_are_refused_unread(
    tmp_path: Path,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    url = store.upload(plain_webdataset(tmp_path / "set", ((16, 24),)), f"hostile{len(name)}", "set")
    monkeypatch.setattr(S3Store, "files", lambda self: {name: Stored(10, 0.0, None)})
    monkeypatch.setattr(S3Store, "download", lambda *given: pytest.fail("it was fetched"))
    assert main([url, *HERE, "--endpoint-url", store.endpoint_url]) == 1
    assert f"the name {name!r} leads outside of it" in capsys.readouterr().err


def test_folders_without_tars_and_unfinished_packings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *HERE]) == 1
    assert "no .tar files" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), *HERE]) == 1
    assert "no such folder" in capsys.readouterr().err
    plain_webdataset(tmp_path)
    (tmp_path / "pack.json").write_text("{}")
    assert main([str(tmp_path), *HERE]) == 1
    assert "its packing is not finished" in capsys.readouterr().err
