import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_jax.data import sbd
from dsnet_jax.data.sbd import decode_sbd
from dsnet_jax.errors import InputError


def labels_of(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 21, size_hw, np.uint8)


def mat_with(compressed=True, **content):
    file = io.BytesIO()
    scipy.io.savemat(file, content, do_compression=compressed)
    return file.getvalue()


def mat_of(labels, compressed=True):
    """With the fields of SBD's files (README of benchmark_RELEASE): boundaries of each class are sparse, in cells."""
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = scipy.sparse.csc_matrix(np.eye(3, 4) * (index % 2))
    content = {"Boundaries": boundaries, "Segmentation": labels, "CategoriesPresent": np.unique(labels)[:, None]}
    return mat_with(compressed, other=np.arange(3), GTcls=content)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.booleans(), st.integers(0, 99))
def test_the_segmentation_is_what_scipy_reads(height, width, compressed, seed):
    labels = labels_of((height, width), seed)
    data = mat_of(labels, compressed)
    decoded = decode_sbd(data, "a.mat")
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, labels)
    np.testing.assert_array_equal(decoded, scipy.io.loadmat(io.BytesIO(data))["GTcls"][0]["Segmentation"][0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, or no .mat file of SBD's"),
        (b"x" * 300, "damaged, or no .mat"),
        (mat_of(labels_of((8, 9)))[:-5], "cut short"),
        (mat_of(labels_of((8, 9)), compressed=False)[:-5], "cut short"),
        (mat_of(np.zeros((8, 9), np.uint16)), "not an array of uint8 with two dimensions"),
        (mat_of(np.zeros((8, 9, 3), np.uint8)), "not an array of uint8 with two dimensions"),
        (mat_with(GTinst={"Segmentation": labels_of((8, 9))}), "it has no struct GTcls"),
        (mat_with(GTcls=labels_of((8, 9))), "it has no struct GTcls"),
        (mat_with(GTcls={"segmentation": labels_of((8, 9))}), "its struct has no field Segmentation"),
        (mat_of(np.full((8, 9), 21, np.uint8)), "label 21, and SBD's are 0 to 20"),
        (mat_of(np.full((8, 9), 255, np.uint8)), "label 255, and SBD's are 0 to 20"),
    ],
)
def test_another_file_is_an_error_that_names_it(data, message):
    with pytest.raises(InputError, match=f"a.mat: .*{message}"):
        decode_sbd(data, "a.mat")


def test_a_file_is_not_inflated_without_limit(monkeypatch):
    monkeypatch.setattr(sbd, "MAX_BYTES", 10_000)
    element = zlib.compress(bytes(10_001))
    with pytest.raises(InputError, match="more than 10000 bytes"):
        decode_sbd(mat_of(labels_of((3, 4)))[:128] + struct.pack("<II", 15, len(element)) + element, "a.mat")


@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_file_is_an_error_and_nothing_else(compressed):
    """SciPy ends the process at some of these."""
    good, rng, told = mat_of(labels_of((8, 9)), compressed), np.random.default_rng(0), 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(128, len(data))] = rng.integers(256)
        try:
            assert decode_sbd(bytes(data), "a.mat").dtype == np.uint8
        except InputError:
            told += 1
    assert told > 300
