"""python -m data.demo DEST: scikit-learn's handwritten digits as WebDataset shards, to train on without a download.

DEST is a folder or an s3:// prefix. DEST/train and DEST/heldout hold 1257 and 540 of the 1797 images (stratified,
random_state 0). A pixel value v of 0..16 is stored as round(v * 255 / 16), so that reading gives v / 8 - 1 within
1 / 255.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from data.buckets import Bucket
from data.index import index_tar, write_index
from data.manifest import MANIFEST, read_manifest, write_manifest
from data.s3 import DataError
from data.store import open_store, sole_writer

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {name}" for name in NAMES)
SOURCE = "digits"


def split() -> tuple[Integers, Integers]:
    """Indices into load_digits of the 1257 training and 540 test images."""
    labels = load_digits().target
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return train, test


def digits() -> tuple[Floats, Integers, Floats, Integers]:
    """train_x [1257, 64], train_y, test_x [540, 64], test_y: float32 pixels in [-1, 1] (x / 8 - 1), int64 labels."""
    bunch, (train, test) = load_digits(), split()
    x, y = (bunch.data / 8 - 1).astype(np.float32), bunch.target.astype(np.int64)
    return x[train], y[train], x[test], y[test]


def write_digits(destination: Path, shard_size: int, size: int) -> None:
    """Write DEST/train and DEST/heldout; all of it appears at once.

    Raises DataError where DEST holds something else or cannot be written.
    """
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        for name, indices in zip(("train", "heldout"), split(), strict=True):
            _write_folder(partial / name, indices, shard_size, size)
        partial.rename(destination)
    except OSError as error:
        raise DataError(f"{destination}: cannot be written ({error.strerror or error}); choose another DEST") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def finished(destination: Path, size: int) -> bool:
    """Whether DEST holds these digits already, so that nothing is to be done; False where it is absent or empty.

    Raises DataError where it holds anything else.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    refusal = f"{destination}: exists and holds something else than digits of {size}x{size} pixels; choose another DEST"
    try:
        manifests = [read_manifest(str(destination / name)) for name in ("train", "heldout")]
    except DataError as error:
        raise DataError(f"{refusal} ({error})") from error
    shards = [shard for manifest in manifests for shard in manifest.shards]
    if any(shard.source != SOURCE or shard.bucket != Bucket(size, size) for shard in shards):
        raise DataError(refusal)
    if lost := [s for s in shards if not (Path(s.folder) / s.name).exists()]:
        raise DataError(f"{refusal} ({lost[0].name} is missing)")
    return True


def upload_digits(url: str, endpoint_url: str | None, shard_size: int, size: int) -> None:
    """Write URL/train and URL/heldout on S3; a manifest follows its shards, so that an interrupted upload has none.

    Raises DataError where an object cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        digits_here = Path(scratch) / "digits"
        write_digits(digits_here, shard_size, size)
        for name in ("train", "heldout"):
            store = open_store(f"{url.rstrip('/')}/{name}", endpoint_url)
            with sole_writer(store):
                for path in sorted((digits_here / name).iterdir(), key=lambda path: path.name == MANIFEST):
                    store.publish(path, path.name)


def _write_folder(folder: Path, indices: Integers, shard_size: int, size: int) -> None:
    folder.mkdir(parents=True)
    bunch = load_digits()
    pattern = str(folder / f"{SOURCE}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=shard_size, verbose=0, mtime=0) as writer:
        for index in tqdm(indices.tolist(), desc=folder.name, unit=" images"):
            label = int(bunch.target[index])
            record = {"caption": CAPTIONS[label], "label": label, "index": index}
            png = _png(bunch.images[index], size)
            writer.write({"__key__": f"{index:06d}", "png": png, "txt": CAPTIONS[label], "json": record})
    bucket = Bucket(size, size)
    tars = sorted(folder.glob("*.tar"))
    shards = [write_index(folder, path.name, index_tar(path), SOURCE, bucket) for path in tars]
    write_manifest(folder, SOURCE, 1, shards)


def _png(values: npt.NDArray[np.float64], size: int) -> bytes:
    image = Image.fromarray(np.rint(values * 255 / 16).astype(np.uint8))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    body = io.BytesIO()
    image.save(body, format="PNG")
    return body.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.demo", description=__doc__)
    parser.add_argument("dest", help="new folder to write, or s3://BUCKET/PREFIX")
    parser.add_argument("--shard-size", type=int, default=128, help="images per shard")
    parser.add_argument("--size", type=int, default=8, help="side of the images [pixels]; more than 8 enlarges them")
    parser.add_argument("--endpoint-url", help="S3 endpoint of stores other than AWS")
    options = parser.parse_args(arguments)
    if options.shard_size < 1 or options.size < 1:
        parser.error("--shard-size and --size are at least 1")
    place = options.dest.rstrip("/") if "://" in options.dest else str(Path(options.dest).expanduser().absolute())
    try:
        if "://" in place:
            upload_digits(place, options.endpoint_url, options.shard_size, options.size)
        elif finished(Path(place), options.size):
            print(f"{place} is finished already: nothing to do")
            return 0
        else:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            write_digits(Path(place), options.shard_size, options.size)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {place}/train/{MANIFEST} and {place}/heldout/{MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
