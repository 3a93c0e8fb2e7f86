import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from dsnet_jax.data.rle import decode_rle


@st.composite
def masks(draw):
    """Masks from one pixel to runs of thousands, empty and full ones among them."""
    height, width = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.random((draw(st.integers(1, height)), draw(st.integers(1, width)))) < draw(st.floats(0, 1))
    rows, columns = (np.arange(side) * count // side for side, count in zip((height, width), blocks.shape, strict=True))
    return blocks[rows][:, columns]


def counts_of(mask):
    """The runs of a mask in whole numbers, down the columns, beginning with that of 0."""
    values = mask.T.ravel()
    ends = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *ends, len(values)]).tolist()
    return [0, *runs] if values[0] else runs


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@settings(max_examples=200, deadline=None)
@given(masks())
def test_a_mask_is_what_coco_s_library_encoded(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    decoded = decode_rle(encoded["counts"].decode(), tuple(encoded["size"]))
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(decoded, coco.decode(encoded).astype(bool))


@settings(max_examples=100, deadline=None)
@given(masks())
def test_runs_may_be_given_as_numbers(mask):
    counts, size_hw = counts_of(mask), mask.shape
    np.testing.assert_array_equal(decode_rle(counts, size_hw), mask)
    encoded = coco.frPyObjects({"counts": counts, "size": list(size_hw)}, *size_hw)
    np.testing.assert_array_equal(decode_rle(encoded["counts"].decode(), size_hw), mask)


def test_runs_as_long_as_the_largest_images_have():
    mask = np.zeros((5000, 3000), np.uint8, order="F")
    mask[-3:, -1] = 1
    encoded = coco.encode(mask)
    np.testing.assert_array_equal(decode_rle(encoded["counts"].decode(), (5000, 3000)), mask.astype(bool))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 2], "its runs do not make 2 x 3 pixels"),
        ([3, 4], "its runs do not make 2 x 3 pixels"),
        ([8, -2], "its runs do not make 2 x 3 pixels"),
        ([10**30], "its runs do not make 2 x 3 pixels"),
        ([3.5, 2.5], "its runs do not make 2 x 3 pixels"),
        ([2**62] * 4 + [6], "its runs do not make 2 x 3 pixels"),  # Their sum is 6, for int64.
        ({"a": 6}, "its runs do not make 2 x 3 pixels"),
        ([[6]], "its runs do not make 2 x 3 pixels"),
        ("", "its runs do not make 2 x 3 pixels"),
        ("o" * 9 + "0", "a run is too long"),
        ("o", "not a string of COCO's"),
        ("3 3", "not a string of COCO's"),
        ("3ä", "not a string of COCO's"),
        ("3\ud800", "not a string of COCO's"),
    ],
)
def test_damage_is_told(counts, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(counts, (2, 3))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_another_string_is_an_error_or_a_mask(text):
    with contextlib.suppress(ValueError):
        assert decode_rle(text, (4, 5)).shape == (4, 5)
