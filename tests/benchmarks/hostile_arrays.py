"""Precomputed sets in which every second sample's array, or what the manifest says of them, is something else."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import npy_bytes
from data.buckets import Bucket
from data.contents import Encoded
from data.index import index_tar, write_index
from data.manifest import MANIFEST, write_manifest
from tests.data.sets import SIDE, write_tar

ENCODED = Encoded("float32", "vae", "a" * 64, "b" * 64, 4, 8, 16, 512, "Generate an image.")


def arrays(rng: np.random.Generator) -> dict[str, bytes]:
    """Members of one good sample."""
    side = SIDE // ENCODED.pixels_per_latent
    latent = rng.standard_normal((ENCODED.latent_channels, side, side), dtype=np.float32)
    text = rng.standard_normal((5, ENCODED.text_width), dtype=np.float32)
    parts = {"latent.npy": npy_bytes(latent), "text.npy": npy_bytes(text), "mask.npy": npy_bytes(np.ones(5, bool))}
    return {**parts, "txt": b"a caption"}


def array_set(folder: Path, samples: int, member: str = "", body: bytes = b"") -> dict[str, bytes]:
    """Files of a set whose every second sample has `body` as its `member`."""
    rng, members = np.random.default_rng(2), {}
    for number in range(samples):
        changed = {member: body} if member and number % 2 == 0 else {}
        members |= {f"0-{number}.{name}": content for name, content in (arrays(rng) | changed).items()}
    folder.mkdir(parents=True)
    path = write_tar(folder / "noise-0.tar", members)
    shard = write_index(folder, path.name, index_tar(path), "noise", Bucket(SIDE, SIDE))
    write_manifest(folder, "noise", 3, [shard], "images", ENCODED)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    """A .npy header with nothing behind it."""
    padded = text.ljust(117) + "\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(padded))
    return b"\x93NUMPY" + version + length + padded.encode()


def bad_arrays(scratch: Path, code: object, samples: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(kind, name, files). code: an object that runs code when it is unpickled."""
    rng = np.random.default_rng(3)
    pickled, archive = io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array([code], dtype=object), allow_pickle=True)
    np.savez(archive, latent=np.zeros(3))
    good = arrays(rng)["latent.npy"]
    promise = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
    bodies = {"empty": b"", "random": rng.bytes(3000), "pickle": pickle.dumps(code), "object array": pickled.getvalue()}
    bodies |= {"npz": archive.getvalue(), "half": good[: len(good) // 2], "more": good + b"x", "magic": good[:6]}
    bodies |= {"huge promise": header(promise % "(4, 1000000, 1000000)"), "negative": header(promise % "(-1, 6, 6)")}
    bodies |= {"right promise alone": header(promise % "(4, 6, 6)"), "no tuple": header(promise % "7")}
    bodies |= {
        "call in header": header(promise % "__import__('os').getcwd()"),
        "version 9": b"\x93NUMPY\x09\x00" + good[8:],
    }
    bodies |= {"deep header": header(promise % ("(" * 5000)), "long header": header(promise % "(4,)", b"\x02\x00")}
    bodies |= {"float64": npy_bytes(np.zeros((4, 6, 6))), "other shape": npy_bytes(np.zeros((4, 7, 6), np.float32))}
    for member in ("latent.npy", "text.npy", "mask.npy"):
        for name, body in bodies.items():
            place = scratch / f"arrays-{member}-{name}".replace(" ", "_")
            yield f"array {member}", name, array_set(place, samples, member, body)


def bad_encoded(scratch: Path, samples: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Manifests whose word on precomputed samples is wrong."""
    base = array_set(scratch / "arrays-base", samples)
    wrong: list[tuple[str, Any]] = [
        (name, value) for name in asdict(ENCODED) for value in (None, -1, 10**30, "x" * 10**6, [])
    ]
    for name, value in wrong:
        document = json.loads(base[MANIFEST])
        document["encoded"][name] = value
        yield "encoded in manifest", f"{name}={value!r:.12}", base | {MANIFEST: json.dumps(document).encode()}
