import io
import pickle

import numpy as np
import pytest

from data.arrays import Array, npy_bytes, read_npy
from data.batch import Batch, collate
from data.s3 import DataError
from data.samples import Sample
from tests.benchmarks.hostile_arrays import header


def test_arrays_come_back_bit_by_bit() -> None:
    for dtype, array in (
        ("float32", np.arange(6, dtype=np.float32).reshape(2, 3)),
        ("float16", np.array([[1, np.inf]], dtype=np.float16)),
        ("bfloat16", np.array([[1, 65535]], dtype=np.uint16)),
        ("bool", np.array([True, False])),
    ):
        found = read_npy(npy_bytes(array), dtype, (None,) * array.ndim, "here")
        assert found.dtype == array.dtype and np.array_equal(found, array)


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


@pytest.mark.parametrize("other", [None, 5])
def test_pooled_embeddings_that_do_not_go_together_are_refused_by_key(other: int | None) -> None:
    def sample(key: str, pooled: int | None) -> Sample:
        arrays: dict[str, Array] = {"text": np.zeros((2, 3), np.float32), "mask": np.ones(2, bool)}
        return Sample(key, "", arrays=arrays if pooled is None else {**arrays, "pooled": np.zeros(pooled, np.float32)})

    def batch(samples: list[Sample]) -> Batch:
        return collate(0, (8, 8), range(2), samples, ["s.tar"] * 2, [0, 0], [], "float32")

    found = batch([sample("a", 4), sample("b", 4)]).precomputed
    assert found is not None and found.text.pooled is not None and found.text.pooled.shape == (2, 4)
    for pair in ((sample("a", 4), sample("b", other)), (sample("a", other), sample("b", 4))):
        with pytest.raises(DataError, match=r"pooled differs between .*in sample a, .*in sample b"):
            batch(list(pair))


def test_pickled_objects_are_never_written() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        npy_bytes(np.array([io.BytesIO()], dtype=object))
