import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.buckets import Bucket
from data.contents import Contents
from data.index import index_tar, write_index
from data.s3 import DataError
from data.samples import Sample, SampleError, read_sample
from tests.data.sets import write_tar


def png(array: np.ndarray, image_format: str = "PNG") -> bytes:
    body = io.BytesIO()
    Image.fromarray(array).save(body, format=image_format)
    return body.getvalue()


GRAY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOR = np.stack([GRAY, GRAY + 1, GRAY + 2], axis=-1)


def read(folder: Path, members: dict[str, bytes], channels: int = 3, cut: bool = False) -> Sample:
    index = index_tar(write_tar(folder / "x.tar", members))
    shard = write_index(folder, "x.tar", index, "a", Bucket(3, 4))
    if cut:
        os.truncate(folder / "x.tar", 600)
    with open(folder / "x.tar", "rb") as file:
        return read_sample(file.fileno(), shard, index, 0, Contents(channels=channels))


def test_pixels_are_scaled_to_minus_one_to_one_with_channels_first(tmp_path: Path) -> None:
    sample = read(tmp_path, {"k.png": png(COLOR), "k.txt": b" a caption\n"})
    assert (sample.key, sample.caption) == ("k", "a caption")
    assert sample.pixels.dtype == np.float32
    expected = np.moveaxis(COLOR, -1, 0) / 255 * 2 - 1
    np.testing.assert_allclose(sample.pixels, expected, atol=1e-6)


@pytest.mark.parametrize(("image", "channels"), [(COLOR, 1), (GRAY, 3), (GRAY, 1)])
def test_images_are_converted_to_the_channels_of_the_manifest(tmp_path: Path, image: np.ndarray, channels: int) -> None:
    assert read(tmp_path, {"k.png": png(image), "k.txt": b""}, channels).pixels.shape == (channels, 3, 4)


def test_caption_may_come_from_json(tmp_path: Path) -> None:
    caption = json.dumps({"caption": "schön", "label": 3}).encode()
    assert read(tmp_path, {"k.png": png(GRAY), "k.json": caption}).caption == "schön"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.png": png(GRAY.T), "k.txt": b""}, r"x\.tar, sample k\.png: image of 4x3 pixels in a shard of 3x4"),
        ({"k.png": b"no image", "k.txt": b""}, r"sample k\.png: cannot be decoded"),
        ({"k.png": png(GRAY)[:45], "k.txt": b""}, r"sample k\.png: cannot be decoded"),
        ({"k.npy": b"x", "k.txt": b""}, r"sample k: no image among its members \['npy', 'txt'\]"),
        ({"k.png": png(GRAY, "GIF"), "k.txt": b""}, r"k\.png: cannot be decoded as an image .none of PNG, JPEG, WEBP"),
        ({"k.png": png(GRAY) + bytes(17 << 20), "k.txt": b""}, r"k\.png: \d+ bytes where at most \d+ are taken"),
        ({"k.png": png(GRAY), "k.txt": b"a" * (2 << 20)}, r"k\.txt: 2097152 bytes where at most 1048576 are taken"),
        (
            {"k.png": png(GRAY), "k.json": b'{"caption": ["a", 3]}'},
            "sample k: unreadable caption .*a list in place of a text",
        ),
        ({"k.png": png(GRAY)}, "sample k: no caption"),
        ({"k.png": png(GRAY), "k.txt": b"\xff"}, "sample k: unreadable caption"),
        ({"k.png": png(GRAY), "k.json": b"{}"}, "sample k: unreadable caption"),
        ({"k.png": png(GRAY), "k.json": b"[1]"}, "sample k: unreadable caption"),
    ],
)
def test_unusable_samples_name_shard_and_key(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        read(tmp_path, members)


def test_a_machine_without_memory_chooses_no_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*given: object, **more: object) -> None:
        raise MemoryError

    body = png(GRAY)
    monkeypatch.setattr("PIL.Image.open", exhausted)
    with pytest.raises(MemoryError):
        read(tmp_path, {"k.png": body, "k.txt": b""})


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the shard is cut short") as error:
        read(tmp_path, {"k.png": png(np.zeros((3, 4), np.uint8)), "k.txt": b"caption"}, cut=True)
    assert not isinstance(error.value, SampleError), "no stand-in may hide a damaged disk"
