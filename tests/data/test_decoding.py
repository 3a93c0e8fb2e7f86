import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dsnet_jax.data import decoding
from dsnet_jax.data.decoding import decode_image, decode_mask, is_rotated, read_size_hw
from dsnet_jax.errors import InputError


def smooth_image(height=24, width=36):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 10, columns * 7, 255 - rows * 5 - columns], -1).astype(np.uint8)


def encode(pixels, file_format="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = BytesIO()
    (image.convert(mode) if mode else image).save(file, file_format, **options)
    return file.getvalue()


def palette_image(indices, colours):
    image = Image.fromarray(np.asarray(indices, np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def raw_png(height, width, bits, kind, rows=b"", palette=b"", behind=()):
    """A PNG file with just this header, whose pixels are `rows`, and behind them chunks: names and contents."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    before_pixels = chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"")
    return (
        b"\x89PNG\r\n\x1a\n"
        + before_pixels
        + b"".join(chunk(*one) for one in [(b"IDAT", zlib.compress(rows)), *behind, (b"IEND", b"")])
    )


IMAGE = smooth_image()
FILES = {
    "png": encode(IMAGE),
    "bmp": encode(IMAGE, "BMP"),
    "jpeg": encode(IMAGE, "JPEG", quality=95),
    "progressive jpeg": encode(IMAGE, "JPEG", quality=95, progressive=True),
    "cmyk jpeg": encode(IMAGE, "JPEG", mode="CMYK", quality=95),
    "webp": encode(IMAGE, "WEBP", lossless=True),
    "lossy webp": encode(IMAGE, "WEBP", quality=95),
}


BEHIND_THE_PIXELS = {
    "a text that inflates": (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),
    "an unknown compression": (b"zTXt", b"a\0\1" + zlib.compress(b"")),
    "half a gamma": (b"gAMA", b"\0"),
}


@pytest.mark.parametrize("chunk", BEHIND_THE_PIXELS.values(), ids=BEHIND_THE_PIXELS)
def test_damage_behind_the_pixels_of_a_palette_mask_is_told(chunk):
    good = raw_png(1, 2, 8, 3, rows=b"\0\1\0", palette=bytes(6))
    np.testing.assert_array_equal(decode_mask(good, "a.png"), [[1, 0]])
    with pytest.raises(InputError, match=r"^a\.png: damaged, .*: replace it$"):
        decode_mask(raw_png(1, 2, 8, 3, rows=b"\0\1\0", palette=bytes(6), behind=[chunk]), "a.png")


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_lossless_files_give_their_pixels_in_rgb_order(kind):
    decoded = decode_image(FILES[kind], "a")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, IMAGE)


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "cmyk jpeg", "lossy webp"])
def test_lossy_files_give_nearly_their_pixels_in_rgb_order(kind):
    decoded = decode_image(FILES[kind], "a")
    assert decoded.shape == IMAGE.shape
    assert np.abs(decoded.astype(int) - IMAGE).mean() < 5


def test_cmyk_is_converted_by_the_plain_formula_and_not_by_a_profile():
    cyan, magenta, yellow, black = np.moveaxis(np.array([[[255, 0, 0, 0], [0, 255, 0, 51]]] * 16, np.uint8), -1, 0)
    cmyk = np.repeat(np.stack([cyan, magenta, yellow, black], -1), 8, axis=1)
    decoded = decode_image(encode(Image.frombytes("CMYK", (16, 16), cmyk.tobytes()), "JPEG", quality=100), "a")
    np.testing.assert_allclose(decoded[8, [2, 13]], [[0, 255, 255], [204, 0, 204]], atol=3)


def test_grey_images_get_three_equal_channels():
    grey = IMAGE[..., 0]
    for data in encode(grey), encode(grey, "BMP"):
        np.testing.assert_array_equal(decode_image(data, "a"), np.stack([grey] * 3, -1))
    decoded = decode_image(encode(grey, "JPEG"), "a")
    assert decoded.shape == IMAGE.shape and np.ptp(decoded, axis=-1).max() == 0


def test_palette_images_get_their_colours():
    colours = [(10, 20, 30), (200, 100, 50), (7, 8, 9)]
    image = palette_image([[0, 1, 2], [2, 1, 0]], colours)
    expected = np.array(colours, np.uint8)[[[0, 1, 2], [2, 1, 0]]]
    np.testing.assert_array_equal(decode_image(encode(image), "a"), expected)
    np.testing.assert_array_equal(decode_image(encode(image, transparency=1), "a"), expected)


PALETTE_IMAGE = palette_image(IMAGE[..., 0], [(row, 255 - row, row // 2) for row in range(256)])
QUICK_FILES = {
    "rgb": (decode_image, encode(IMAGE)),
    "rgb, one colour transparent": (decode_image, encode(IMAGE, transparency=tuple(IMAGE[3, 4].tolist()))),
    "rgb, one column": (decode_image, encode(IMAGE[:, :1])),
    "palette": (decode_image, encode(PALETTE_IMAGE)),
    "palette, half transparent": (decode_image, encode(PALETTE_IMAGE, transparency=b"\x80" * 256)),
    "grey mask": (decode_mask, encode(IMAGE[..., 0])),
    "grey mask, one row": (decode_mask, encode(IMAGE[:1, :, 0])),
}


@pytest.mark.parametrize("kind", QUICK_FILES)
def test_usual_png_files_are_decoded_by_libspng_to_what_opencv_makes_of_them(kind, monkeypatch):
    decode, data = QUICK_FILES[kind]
    mode = cv2.IMREAD_COLOR_RGB if decode is decode_image else cv2.IMREAD_GRAYSCALE
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    monkeypatch.setattr(decoding.cv2, "imdecode", None)
    found = decode(data, "a")
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8 and found.flags.c_contiguous


def test_a_png_file_that_libspng_refuses_for_what_is_not_pixels_is_decoded_all_the_same():
    comments = PngInfo()
    for number in range(1001):
        comments.add_text(f"note {number}", "more than libspng takes")
    data = encode(IMAGE, pnginfo=comments)
    with pytest.raises(decoding.SpngError, match="limit"):
        decoding.spng_decode(data)
    np.testing.assert_array_equal(decode_image(data, "a"), IMAGE)


def test_alpha_is_dropped_and_transparent_pixels_keep_their_stored_colour():
    alpha = np.zeros(IMAGE.shape[:2], np.uint8)
    alpha[:, 20:] = 128
    with_alpha = np.dstack([IMAGE, alpha])
    for data in encode(with_alpha), encode(with_alpha, "WEBP", lossless=True, exact=True):
        np.testing.assert_array_equal(decode_image(data, "a"), IMAGE)
    grey_with_alpha = np.dstack([IMAGE[..., 0], alpha])
    np.testing.assert_array_equal(decode_image(encode(grey_with_alpha), "a")[..., 0], IMAGE[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_keep_the_upper_8(channels):
    values = np.repeat(np.array([[[0], [255], [256], [0x12FF], [0xFFFF]]], np.uint16), channels, -1)
    decoded = decode_image(cv2.imencode(".png", values)[1].tobytes(), "a")
    assert decoded.dtype == np.uint8
    assert decoded[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [0x12] * 3, [255] * 3]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_not_applied_and_can_be_asked_for(file_format):
    plain = encode(IMAGE, file_format)
    rotated, upright = (encode(IMAGE, file_format, exif=exif_orientation(value)) for value in (6, 1))
    assert decode_image(rotated, "a").shape == IMAGE.shape
    np.testing.assert_array_equal(decode_image(rotated, "a"), decode_image(plain, "a"))
    assert read_size_hw(rotated, "a") == IMAGE.shape[:2]
    assert [is_rotated(data, "a") for data in (plain, rotated, upright)] == [False, True, False]


def test_damaged_exif_data_asks_for_no_rotation_and_keeps_no_image_from_being_read():
    data = encode(IMAGE, "PNG", exif=b"Exif\0\0 this is no EXIF")
    assert not is_rotated(data, "a")
    np.testing.assert_array_equal(decode_image(data, "a"), IMAGE)


def exif_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_short_anywhere_is_refused_by_name(kind):
    data = FILES[kind]
    for length in {*range(0, len(data), 7), *range(len(data) - 16, len(data))}:
        with pytest.raises(InputError, match="street/7"):
            decode_image(data[:length], "street/7")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_mask_cut_short_anywhere_is_refused_by_name(mode):
    data = encode(IMAGE[..., 0], mode=mode)
    for length in range(len(data)):
        with pytest.raises(InputError, match="street/7"):
            decode_mask(data[:length], "street/7")


def test_one_flipped_bit_in_a_png_is_noticed():
    image, mask = FILES["png"], encode(IMAGE[..., 0])
    for data, decode in (image, decode_image), (mask, decode_mask):
        for position in range(8, len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises(InputError, match="street/7"):
                decode(bytes(damaged), "street/7")


def test_a_mask_whose_pixels_end_early_is_refused():
    two_rows_of_four = bytes([0, 1, 1, 1, 1] * 2)  # Every checksum is right.
    palette = raw_png(4, 4, 8, 3, two_rows_of_four, palette=bytes(range(6)))
    for data in raw_png(4, 4, 8, 0, two_rows_of_four), palette:
        with pytest.raises(InputError, match="street/7: damaged"):
            decode_mask(data, "street/7")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "an empty file"), (b"II*\0 and so on", "not a JPEG"), (b"GIF89a", "not a JPEG"), (b"text", "not a JPEG")],
)
def test_other_files_are_refused_by_name(data, message):
    for read in decode_image, decode_mask, read_size_hw:
        with pytest.raises(InputError, match=f"street/7: {message}"):
            read(data, "street/7")


@pytest.mark.parametrize("kind", FILES)
def test_the_size_is_read_from_the_header(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(FILES[kind])
    assert read_size_hw(FILES[kind], "a") == (24, 36)
    assert read_size_hw(path, "a") == (24, 36)


def test_a_path_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
    with pytest.raises(InputError, match="street/7: cannot be read: No such file"):
        read_size_hw(tmp_path / "nothing", "street/7")


def test_a_huge_image_is_refused_from_its_header_before_any_pixel_is_decoded(monkeypatch):
    def no_decoding(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(decoding.cv2, "imdecode", no_decoding)
    monkeypatch.setattr(decoding, "spng_decode", no_decoding)
    monkeypatch.setattr(Image.Image, "load", no_decoding)
    for decode, kind in (decode_image, 2), (decode_mask, 0):
        with pytest.raises(InputError, match=r"street/7: 20000 x 30000 pixels .* limit of 100000000"):
            decode(raw_png(20_000, 30_000, 8, kind), "street/7")
    jpeg = bytearray(FILES["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 20_000)
    with pytest.raises(InputError, match="street/7: 30000 x 20000 pixels"):
        decode_image(bytes(jpeg), "street/7")


def test_the_pixel_limit_can_be_chosen():
    assert decode_image(FILES["png"], "a", max_pixels=24 * 36).shape == IMAGE.shape
    with pytest.raises(InputError, match="limit of 863"):
        decode_image(FILES["png"], "a", max_pixels=24 * 36 - 1)
    with pytest.raises(InputError, match="limit of 863"):
        decode_mask(encode(IMAGE[..., 0]), "a", max_pixels=24 * 36 - 1)


@pytest.mark.parametrize("size_hw", [(1, 65_537), (65_537, 1)])
def test_an_image_that_is_too_thin_is_refused_from_its_header(size_hw):
    with pytest.raises(InputError, match=r"street/7: \d+ x \d+ pixels .*, a side has at most 65536"):
        decode_image(raw_png(*size_hw, 8, 0), "street/7")
    with pytest.raises(InputError, match="street/7: damaged"):  # The size is accepted; there are no pixels.
        decode_image(raw_png(*(side - side // 65_537 for side in size_hw), 8, 0), "street/7")


def test_an_image_beyond_opencv_s_own_limit_is_refused_by_name():
    with pytest.raises(InputError, match="street/7: damaged"):
        decode_image(raw_png(40_000, 40_000, 8, 2), "street/7", max_pixels=10**12)


def test_grey_masks_give_their_values():
    values = np.array([[0, 1, 20], [150, 254, 255]], np.uint8)
    for data in encode(values), encode(values, transparency=20):
        decoded = decode_mask(data, "a")
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_give_their_indices_whatever_the_colours(bits):
    indices = (np.arange(6).reshape(2, 3) % (1 << bits)).astype(np.uint8)
    colours = [(200 - 10 * i, 3 * i, 77) for i in range(min(1 << bits, 20))]
    for options in {}, {"transparency": 0}:
        data = encode(palette_image(indices, colours), bits=bits, **options)
        assert data[24] == bits
        np.testing.assert_array_equal(decode_mask(data, "a"), indices)


OTHER_MASKS = {
    "8-bit RGB": encode(IMAGE),
    "8-bit RGB with alpha": encode(IMAGE, mode="RGBA"),
    "8-bit grey with alpha": encode(IMAGE, mode="LA"),
    "1-bit grey": encode(IMAGE, mode="1"),
    "2-bit grey": raw_png(1, 4, 2, 0, bytes([0, 0b00011011])),
    "4-bit grey": raw_png(1, 2, 4, 0, bytes([0, 0x12])),
    "16-bit grey": cv2.imencode(".png", IMAGE[..., 0].astype(np.uint16))[1].tobytes(),
    "16-bit RGB": cv2.imencode(".png", IMAGE.astype(np.uint16))[1].tobytes(),
}


@pytest.mark.parametrize("mode", OTHER_MASKS)
def test_masks_of_other_modes_are_refused_with_mode_name_and_remedy(mode):
    with pytest.raises(InputError) as error:
        decode_mask(OTHER_MASKS[mode], "masks/7.png", None if mode == "8-bit RGB" else {(0, 0, 0): 0})
    assert str(error.value).startswith(f"masks/7.png: a mask in mode {mode}: store class numbers as 8-bit grey or pal")


def test_a_mask_of_a_lossy_format_is_refused():
    with pytest.raises(InputError, match=r"masks/7\.jpg: masks must be PNG files"):
        decode_mask(encode(IMAGE[..., 0], "JPEG"), "masks/7.jpg")


COLOURS = {(128, 64, 128): 0, (0, 0, 0): 255, (255, 255, 255): 2, (0, 0, 1): 1}


def test_rgb_masks_are_read_by_their_declared_colours():
    wanted = np.array([[0, 255, 2], [1, 1, 0]], np.uint8)
    colour_of = {label: colour for colour, label in COLOURS.items()}
    pixels = np.array([[colour_of[label] for label in row] for row in wanted.tolist()], np.uint8)
    decoded = decode_mask(encode(pixels), "a", COLOURS)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, wanted)


IN_ORDER = [(128, 64, 128), (0, 0, 1), (255, 255, 255)]  # The colours of labels 0, 1 and 2.


@pytest.mark.parametrize(
    ("indices", "palette"),
    [
        ([0, 1, 2], IN_ORDER),
        ([0, 1, 2], [IN_ORDER[2], IN_ORDER[0], (7, 7, 7)]),  # One is not declared, so the palette says nothing.
        ([0, 2], [IN_ORDER[0], IN_ORDER[0], IN_ORDER[2]]),  # What no pixel has does not matter.
        ([0, 3], [*IN_ORDER, (0, 0, 0)]),  # 3 is no class, and may be ignored by its value.
        ([0, 255], [IN_ORDER[0]] + 255 * [(0, 0, 0)]),
    ],
)
def test_declared_colours_leave_grey_masks_and_palettes_that_do_not_contradict_as_they_are(indices, palette):
    values = np.array([indices], np.uint8)
    for data in encode(values), encode(palette_image(values, palette)):
        np.testing.assert_array_equal(decode_mask(data, "a", COLOURS), values)


@pytest.mark.parametrize(
    ("indices", "palette", "message"),
    [
        ([0, 1], [IN_ORDER[2], IN_ORDER[0]], "index 0 has the colour #ffffff in the palette, which is label 2"),
        ([0, 1], [IN_ORDER[0], (0, 0, 0)], "index 1 has the colour #000000 in the palette, which is to be ignored"),
        ([0, 3], [*IN_ORDER, IN_ORDER[1]], "index 3 has the colour #000001 in the palette, which is label 1"),
        ([0, 255], [IN_ORDER[0]] + 255 * [IN_ORDER[1]], "index 255 has the colour #000001 in the palette, which is l"),
    ],
)
def test_a_palette_of_declared_colours_that_contradicts_the_indices_is_refused(indices, palette, message):
    data = encode(palette_image([indices], palette))
    with pytest.raises(InputError) as error:
        decode_mask(data, "masks/7.png", COLOURS)
    assert str(error.value).startswith(f"masks/7.png: {message}")
    assert str(error.value).endswith("store the mask as RGB, or indices in the order of the class list")
    np.testing.assert_array_equal(decode_mask(data, "masks/7.png"), [indices])


def test_an_undeclared_colour_is_refused_with_its_value_and_count():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, :3] = (1, 2, 255)
    pixels[1, 0] = (255, 255, 254)
    with pytest.raises(
        InputError, match=r"masks/7\.png: 2 colours are not in the class list, above all #0102ff \(3 pix"
    ):
        decode_mask(encode(pixels), "masks/7.png", COLOURS)
