"""Arrays of precomputed shards: .npy bodies written and read without pickle, and without trust in their headers."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt

from data.s3 import DataError

Array = npt.NDArray[np.generic]

# bfloat16 has no numpy type: its bits travel as uint16, and the manifest says so.
STORED = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "bool": np.dtype("?")}


def npy_bytes(array: Array) -> bytes:
    """The body of a .npy file."""
    body = io.BytesIO()
    np.save(body, array, allow_pickle=False)
    return body.getvalue()


def read_npy(body: bytes, dtype: str, shape: tuple[int | None, ...], where: str) -> Array:
    """The array of a .npy file; dtype: a key of STORED; shape: None where any length is right.

    Raises DataError naming `where` for another dtype or shape, an object array, or a body of another length.
    """
    source = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(source)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        found, fortran, kind = read(source)
    except Exception as error:  # a header from outside makes numpy's parser raise almost anything
        if isinstance(error, MemoryError):
            raise
        raise DataError(f"{where}: not an array in .npy format ({type(error).__name__}); pack it again") from error
    fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
    if kind != STORED[dtype] or fortran or not fits:
        raise DataError(f"{where}: {kind} {found} where the manifest says {dtype} {shape}; pack it again")
    # The header is not trusted with an allocation: the bytes that are there are viewed.
    if len(body) - source.tell() != math.prod(found) * kind.itemsize:
        raise DataError(f"{where}: {len(body) - source.tell()} bytes for an array of {found} {kind}; pack it again")
    return np.frombuffer(body, dtype=kind, offset=source.tell()).reshape(found)
