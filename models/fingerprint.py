"""Which encoder made precomputed data: a digest of a model folder's encoders that takes a moment, whatever their size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

TEXT = ("text_encoder*", "tokenizer*", "processor")
LATENTS = ("vae",)
_WHOLE = 4 << 20
_PLACES, _PIECE = 16, 64 << 10


def fingerprint(path: str | Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the files of the folders in `path` that match: names, sizes, and the content of small files.

    Of large files (weights) the first 4 MB, which hold the header, and 64 KB at each of 16 even places: other weights
    differ there, and a 16 GB encoder is told apart in a second.
    Raises FileNotFoundError where the folders that match hold no weights.
    """
    root = Path(path)
    files = sorted({file for pattern in patterns for file in root.glob(f"{pattern}/**/*") if file.is_file()})
    if not any(file.suffix == ".safetensors" for file in files):
        raise FileNotFoundError(
            f"{root} has no weights in {' or '.join(patterns)}; model.path must be a diffusers model folder with its "
            "encoders"
        )
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode())
        with file.open("rb") as content:
            total.update(content.read(_WHOLE))
            if size > _WHOLE:
                for place in range(1, _PLACES + 1):
                    content.seek(size - _PIECE - (size - _PIECE) * (_PLACES - place) // _PLACES)
                    total.update(content.read(_PIECE))
    return total.hexdigest()
