import io
import pickle
import struct

import numpy as np
import pytest

from data.arrays import npy_bytes, read_npy
from data.s3 import DataError


def test_arrays_come_back_bit_by_bit() -> None:
    for dtype, array in (
        ("float32", np.arange(6, dtype=np.float32).reshape(2, 3)),
        ("float16", np.array([[1, np.inf]], dtype=np.float16)),
        ("bfloat16", np.array([[1, 65535]], dtype=np.uint16)),
        ("bool", np.array([True, False])),
    ):
        found = read_npy(npy_bytes(array), dtype, (None,) * array.ndim, "here")
        assert found.dtype == array.dtype and np.array_equal(found, array)


def header(text: str) -> bytes:
    """A .npy header with nothing behind it."""
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an array"),
        (b"PK\x03\x04", "not an array"),
        (pickle.dumps([1]), "not an array"),
        (npy_bytes(np.zeros((2, 4), np.float32)), r"where the manifest says float32 \(2, 3\)"),
        (npy_bytes(np.zeros((2, 3), np.float64)), "float64"),
        (npy_bytes(np.asfortranarray(np.zeros((2, 3), np.float32))), "pack it again"),
        (npy_bytes(np.zeros((2, 3), np.float32))[:-4], "20 bytes for an array"),
        (npy_bytes(np.zeros((2, 3), np.float32)) + b"x", "25 bytes for an array"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"), "0 bytes for an array"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }"), "object"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os'), }"), "not an array"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000), "not an array"),
    ],
)
def test_bodies_that_are_not_the_promised_array_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_npy(content, "float32", (2, 3), "s.tar, sample k.latent.npy")


def test_a_header_that_promises_much_allocates_nothing() -> None:
    huge = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }")
    with pytest.raises(DataError, match="0 bytes for an array"):
        read_npy(huge, "float32", (None, 3), "here")


def test_pickled_objects_are_never_written() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        npy_bytes(np.array([io.BytesIO()], dtype=object))
