"""Malformed and malicious data sets: random damage with a fixed seed, and what an attacker would write."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.manifest import MANIFEST
from tests.benchmarks.hostile_arrays import bad_arrays, bad_encoded
from tests.data.sets import SIDE, noise_shards, png, write_set, write_tar

TAR, INDEX = "noise-0.tar", "noise-0.idx"
SAMPLES = 12
Files = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """files: of the data set's folder. index: the tar alone is indexed, else the whole set is read."""

    kind: str
    name: str
    files: Files
    index: bool = False


class RunsCode:
    """Pickled, it writes a file where it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("/tmp/hostile-pickle-was-loaded", "w")


def cases(scratch: Path, damaged: int) -> Iterator[Case]:
    """All cases; `damaged` of each kind of random damage."""
    folder = write_set(scratch / "base", noise_shards(1, SAMPLES))
    base = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng = np.random.default_rng(0)
    for kind, target, repaired in (
        ("tar", TAR, False),
        ("tar, sizes repaired", TAR, True),
        ("index", INDEX, False),
        ("index, digest repaired", INDEX, True),
        ("manifest", MANIFEST, False),
    ):
        for number in range(damaged):
            for damage in (flip, cut):
                files = base | {target: damage(base[target], rng)}
                yield Case(f"{damage.__name__}: {kind}", str(number), repair(files) if repaired else files)
    for number in range(damaged):
        for damage in (flip_header, cut):
            yield Case(f"{damage.__name__}: tar to index", str(number), {TAR: damage(base[TAR], rng)}, index=True)
    yield from named_members(scratch)
    yield from bad_members(scratch)
    yield from wrong_manifests(base)
    for kind, name, files in (*bad_arrays(scratch, RunsCode(), SAMPLES), *bad_encoded(scratch, SAMPLES)):
        yield Case(kind, name, files)


def flip(body: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bits turned over."""
    damaged = bytearray(body)
    for at in rng.integers(0, len(body) * 8, rng.integers(1, 9)):
        damaged[at // 8] ^= 1 << (at % 8)
    return bytes(damaged)


def flip_header(body: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bits turned over in the first tar header, its checksum mended half of the times."""
    header = flip(body[:512], rng)
    if rng.integers(2):
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])
        header = header[:148] + f"{total:06o}\0 ".encode() + header[156:]
    return header + body[512:]


def cut(body: bytes, rng: np.random.Generator) -> bytes:
    return body[: rng.integers(0, len(body))]


def repair(files: Files) -> Files:
    """The manifest says the sizes and digests that the files have: the damage is met later."""
    document = json.loads(files[MANIFEST])
    index = files[INDEX]
    document["shards"][0] |= {"bytes": len(files[TAR]), "etag": None, "index_bytes": len(index)}
    document["shards"][0] |= {"index_sha256": hashlib.sha256(index).hexdigest()}
    return files | {MANIFEST: json.dumps(document).encode()}


def named_members(scratch: Path) -> Iterator[Case]:
    """Member names and types that lead elsewhere."""
    names: tuple[str, ...] = (
        "../x.png",
        "../../../../tmp/x.png",
        "/etc/passwd.png",
        "/x.png",
        "a/../../x.png",
        "..\\x.png",
        "C:\\x.png",
    )
    names += (
        "a\nb.png",
        "\x1b[31m.png",
        "a" * 3000 + ".png",
        "%2e%2e/x.png",
        "x.png/../../y.png",
        "\u202egnp.png",
        ".png",
    )
    for name in names:
        path = write_tar(scratch / "named.tar", {name: b"x"})
        yield Case("member name", repr(name[:40]), {TAR: path.read_bytes()}, index=True)
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "PKL", "text.pkl", "latent.PT"):
        path = write_tar(scratch / "pickle.tar", {f"0.{extension}": pickle.dumps(RunsCode())})
        yield Case("pickle by name", extension, {TAR: path.read_bytes()}, index=True)
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.GNUTYPE_SPARSE,
    ):
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode="w") as tar:
            info = tarfile.TarInfo("0.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        yield Case("member type", repr(kind), {TAR: body.getvalue()}, index=True)


def bad_members(scratch: Path) -> Iterator[Case]:
    """Sets in which every second sample's member is replaced by something else."""
    rng = np.random.default_rng(1)
    code, good = pickle.dumps(RunsCode()), png(rng)
    images = {"empty": b"", "pickle": code, "random": rng.bytes(5000), "text": b"hello", "half": good[: len(good) // 2]}
    images |= {"gzip": gzip.compress(bytes(10**7)), "zeros": bytes(10**6), "null header": b"\x89PNG\r\n\x1a\n"}
    images |= {"postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n(x) run showpage\n"}
    images |= {
        f"another format: {f}": encoded(f) for f in ("GIF", "TIFF", "BMP", "ICO", "PPM", "PDF", "JPEG2000", "TGA")
    }
    images |= {"bomb 50000x50000": header_png(50000, 50000), "bomb 2^31": header_png(2**31 - 1, 2**31 - 1)}
    images |= {"bomb 1x10^6": header_png(1, 10**6), "zero size": header_png(0, 0), "bomb webp": webp_header(16384)}
    images |= {"bomb of right header": chunks(("IHDR", ihdr(SIDE, SIDE)), ("IDAT", zlib.compress(bytes(10**8))))}
    images |= {
        f"bomb in {c}": with_chunk(good, c, b"k\0\0" + zlib.compress(bytes(10**8))) for c in ("zTXt", "iCCP", "iTXt")
    }
    images |= {"16 MiB and more": good + bytes(17 << 20), "jpeg header": jpeg_header(65535, 65535)}
    for name, body in images.items():
        yield member_case(scratch, "image", name, "png", body)
    deep = b'{"caption": ' + b"[" * 200_000
    texts = {"5 MB": b"a" * 5_000_000, "not UTF-8": b"\xff\xfe\x00", "pickle": code, "NUL": bytes(1000)}
    for name, body in texts.items():
        yield member_case(scratch, "caption", name, "txt", body)
    records = {
        "deep": deep,
        "list": b'{"caption": ["a"]}',
        "number": b'{"caption": 1e999}',
        "none": b"{}",
        "pickle": code,
    }
    records |= {"huge": b'{"caption": "' + b"a" * 5_000_000 + b'"}', "integer": b'{"caption": ' + b"9" * 10_000 + b"}"}
    for name, body in records.items():
        yield member_case(scratch, "caption record", name, "json", body)


def member_case(scratch: Path, kind: str, name: str, extension: str, body: bytes) -> Case:
    (shard,) = noise_shards(1, SAMPLES)
    for number in range(0, SAMPLES, 2):
        if extension == "json":
            del shard[f"0-{number}.txt"]
        shard[f"0-{number}.{extension}"] = body
    folder = write_set(scratch / f"set-{kind}-{name}".replace("/", "_"), [shard])
    return Case(kind, name, {path.name: path.read_bytes() for path in folder.iterdir()})


def wrong_manifests(base: Files) -> Iterator[Case]:
    """Wrong counts, sizes, names and types in the manifest."""
    numbers = (0, -1, 1, 11, 13, 10**18, 2**63, 10**400, 1.5, "12", None, True, [12])
    changes: list[tuple[str, Any]] = [(key, n) for key in ("samples", "bytes", "index_bytes") for n in numbers]
    changes += [("bucket", b) for b in ([0, 0], [-1, 48], [48], [10**9, 10**9], "48x48", [48.0, 48], [48, 48, 3], None)]
    names = (
        "../x.tar",
        "/etc/passwd",
        "/tmp/x.tar",
        "x/../../y.tar",
        "..\\x.tar",
        "x\0.tar",
        "",
        "x.zip",
        ".tar",
        5,
        None,
    )
    changes += [("name", name) for name in names]
    changes += [("etag", 5), ("etag", ""), ("etag", 'x"\r\nHost: y'), ("index_sha256", None), ("index_sha256", "../x")]
    for key, value in changes:
        document = json.loads(base[MANIFEST])
        document["shards"][0][key] = value
        yield Case("manifest entry", f"{key}={str(value)[:24]!r}", base | {MANIFEST: json.dumps(document).encode()})
    heads: list[tuple[str, Any]] = [("channels", c) for c in (0, 2, -1, 10**9, "3", None)]
    lists: tuple[Any, ...] = ([], {}, None, [1], [[]], "x")
    heads += [("shards", value) for value in lists]
    heads += [("version", 99), ("format", "x"), ("source", 5), ("source", "../x")]
    for key, value in heads:
        body = json.dumps(json.loads(base[MANIFEST]) | {key: value}).encode()
        yield Case("manifest head", f"{key}={value!r}", base | {MANIFEST: body})
    for name, body in (
        ("deep", b"[" * 200_000),
        ("pickle", pickle.dumps(RunsCode())),
        ("number", b"1"),
        ("empty", b""),
    ):
        yield Case("manifest body", name, base | {MANIFEST: body})


def encoded(image_format: str) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(body, format=image_format)
    return body.getvalue()


def ihdr(width: int, height: int) -> bytes:
    return struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def chunks(*parts: tuple[str, bytes]) -> bytes:
    """A PNG of these chunks."""
    body = b"\x89PNG\r\n\x1a\n"
    for name, data in (*parts, ("IEND", b"")):
        checked = name.encode() + data
        body += struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
    return body


def header_png(width: int, height: int) -> bytes:
    return chunks(("IHDR", ihdr(width, height)), ("IDAT", zlib.compress(bytes(10**6))))


def with_chunk(body: bytes, name: str, data: bytes) -> bytes:
    """`body`, a PNG, with one more chunk behind its header."""
    extra = chunks((name, data))[8:-12]
    return body[:33] + extra + body[33:]


def webp_header(side: int) -> bytes:
    canvas = (side - 1).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9"
