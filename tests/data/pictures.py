"""Small images with captions, in the layouts that people have them in."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
# Small buckets and shards, so that a test data set has several of both.
SMALL = ("--resolution", "32", "--bucket-step", "8", "--min-bucket", "4")
SIZES = ((40, 40), (60, 34), (34, 60), (80, 80))


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth image that differs from seed to seed."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    bands = [np.sin(2 * np.pi * (x * (seed % 3 + 1) + y * (seed % 5) + seed / 7 + k / 3)) for k in range(3)]
    return Image.fromarray(np.rint(127.5 + 127.5 * np.stack(bands, axis=-1)).astype(np.uint8))


def body(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, format=kind, **options)
    return target.getvalue()


def write_folder(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    """folder/group<n>/<n>.png (every third .jpg) with a .txt beside each."""
    for n in range(count):
        kind = "jpg" if n % 3 == 0 else "png"
        path = folder / f"group{n % 2}" / f"{n:04d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body(picture(*sizes[n % len(sizes)], n), "JPEG" if kind == "jpg" else "PNG"))
        path.with_suffix(".txt").write_text(f"picture {n}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _heed_ctrl_c() -> None:
    """A shell ignores Ctrl-C for what it runs in the background, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """A process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
