"""Images to arrays: odd but legal files give the right pixels and say what is odd, bad ones are
errors that name them."""

import io
import struct
import zlib
from pathlib import PurePath

import numpy as np
import pytest
import soundfile
from helpers.memory_source import png
from helpers.odd_images import (
    PHOTO,
    PIXELS,
    ROTATED,
    bmp_32,
    chunk,
    cmyk_jpeg,
    exif,
    partial_gif,
    png_16,
    profile,
    srgb_profile,
    tiff,
    with_chunk,
)
from PIL import Image, PngImagePlugin

from c2f_jax.data.items import load_image
from c2f_jax.data.manifest import load_manifest
from c2f_jax.data_check.check import check_data
from c2f_jax.decoding.images import decode_image, read_image
from c2f_jax.errors import BadFileError, UserError


def read(data, side=1000):
    """The pixels of a file, and the kinds of its notes."""
    image = read_image(data, side)
    return np.asarray(image.rgb).astype(int), [kind for kind, _ in image.notes]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png: cannot be read.*No such file"):
        decode_image(str(tmp_path / "gone.png"), 8)


RAMP = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_comes_back_exactly():
    decoded = decode_image(png(RAMP), 16)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RAMP)


@pytest.mark.parametrize("height, width", [(20, 60), (60, 20)])
def test_the_center_square_of_the_resized_image_is_kept(height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    resized = np.asarray(resized).astype(int)
    center = resized[:, 10:20] if width > height else resized[10:20]
    assert abs(decode_image(png(pixels), 10) - center).max() <= 1


def test_reduction_averages_rather_than_skips():
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    decoded = decode_image(png(np.repeat(checks[..., None], 3, 2).astype(np.uint8)), 16)
    assert abs(decoded.astype(int) - 128).max() < 12


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    np.testing.assert_array_equal(decode_image(png(RAMP, exif=exif), 16), np.rot90(RAMP, -1))


def test_gray_palette_one_bit_and_cmyk():
    gray = RAMP[..., 0]
    np.testing.assert_array_equal(decode_image(png(gray), 16), np.repeat(gray[..., None], 3, 2))
    palette = Image.fromarray(RAMP).quantize(16)
    np.testing.assert_array_equal(
        decode_image(png(palette), 16), np.asarray(palette.convert("RGB"))
    )
    bits = Image.fromarray(gray > 127)
    assert set(np.unique(decode_image(png(bits), 16))) == {0, 255}
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    np.testing.assert_allclose(
        decode_image(png(red, "JPEG", quality=95), 8)[4, 4], (255, 0, 0), atol=6
    )


def test_sixteen_bit_gray_keeps_its_tones():
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    decoded = decode_image(png(deep), 16)
    np.testing.assert_allclose(decoded[..., 0], deep / 65535 * 255, atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        clear = Image.fromarray((np.arange(64).reshape(8, 8) % 8 > 3).astype(np.uint8)).convert("P")
        clear.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
        options["transparency"] = 1
    elif mode == "LA":
        clear = clear.convert("LA")
    decoded = decode_image(png(clear, **options), 8)
    assert (decoded[:, :4] == 0).all() and (decoded[:, 4:] == 255).all()


def test_large_jpegs_decode_to_nearly_the_same_at_reduced_scale():
    y, x = np.mgrid[0:1200, 0:1600] / 1200
    photo = (
        np.stack([255 * x / 1.4, 255 * y, 127 + 100 * np.sin(9 * x)], -1)
        .clip(0, 255)
        .astype(np.uint8)
    )
    whole = Image.fromarray(photo).resize(
        (64, 64), Image.Resampling.BICUBIC, box=(200, 0, 1400, 1200)
    )
    decoded = decode_image(png(photo, "JPEG", quality=95), 64)
    assert abs(decoded.astype(int) - np.asarray(whole).astype(int)).mean() < 1.5


def test_a_thin_strip_does_not_explode():
    assert decode_image(png(np.zeros((1, 20_000, 3), np.uint8)), 224).shape == (224, 224, 3)


def test_broken_images_name_the_item(tmp_path, monkeypatch):
    whole = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="photo 3: (not a readable image|the file is empty)"):
            decode_image(data, 8, name="photo 3")
    path = tmp_path / "bad.png"
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="bad.png: not a readable image"):
        decode_image(str(path), 8)
    monkeypatch.setattr("c2f_jax.decoding.images.MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="photo 3: 64 x 64 pixels"):
        decode_image(whole, 8, name="photo 3")


def gif(**options):
    frames = [PHOTO, PHOTO.rotate(180)]
    return png(frames[0], "GIF", save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "MPO"])
def test_what_phones_write(kind):
    pytest.importorskip("pillow_heif").register_heif_opener()
    pixels, notes = read(png(PHOTO, kind, quality=95))
    assert abs(pixels - PIXELS).mean() < 7 and not notes
    # A burst or a picture with its depth: the first of several.
    two = png(PHOTO, kind, quality=95, save_all=True, append_images=[PHOTO.rotate(180)])
    pixels, notes = read(two)
    assert abs(pixels - PIXELS).mean() < 7
    assert notes == ["several images"] or kind == "HEIF"


def test_heic_without_its_extra_names_it(monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    encoded = png(PHOTO, "HEIF")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(BadFileError, match=r"photo 3: .*pip install 'c2f_jax\[heif\]'") as caught:
        decode_image(encoded, 8, name="photo 3")
    assert caught.value.kind == "needs an extra"


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".heic", ".avif", ".png", ".TIF", ""])
def test_the_content_decides_and_not_the_name(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(png(PHOTO, "JPEG", quality=95))
    pixels, notes = read(str(path))
    assert abs(pixels - PIXELS).mean() < 3
    assert notes == ([] if suffix in (".jfif", ".jpe", "") else ["wrong suffix"])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("write", ["PNG", "TIFF <", "TIFF >"])
@pytest.mark.parametrize("bands", ["gray", "gray and alpha", "RGB", "RGBA"])
def test_deep_images_of_any_depth_are_as_bright_as_they_should(bits, write, bands):
    if write != "PNG" and bands == "gray and alpha":
        pytest.skip("Pillow does not read it")
    white = 2**bits - 1
    deep = (PIXELS.astype(int) * white // PIXELS.max()).astype(np.uint16)
    expected = deep / white * 255
    if "gray" in bands:
        deep, expected = deep[..., :1].copy(), np.repeat(expected[..., :1], 3, 2)
        deep[0, 0], expected[0, 0] = white, 255  # the brightest pixel may be in another band
    if "alpha" in bands or bands == "RGBA":
        alpha = np.full((*deep.shape[:2], 1), white, np.uint16)
        alpha[:10], expected[:10] = 0, 255
        deep = np.concatenate([deep, alpha], -1)
    encoded = png_16(deep) if write == "PNG" else tiff(deep, order=write[-1])
    pixels, notes = read(encoded)
    np.testing.assert_allclose(pixels, expected, atol=1.01)
    assert ("deep image" in notes) == (bits < 16)


def test_dark_planes_of_sixteen_bits_are_refused_and_bright_ones_read():
    deep = PIXELS.astype(np.uint16) * 257
    planes = np.concatenate([deep[..., band] for band in range(3)])  # one below the other
    size, count = 48 * 64 * 2, 3
    offsets = [16 + size * band for band in range(count)]

    def planar(pixels):
        whole = tiff(pixels)
        place = len(whole)
        table = struct.pack("<3I3I3H", *offsets, *[size] * 3, *[16] * 3)
        entries = {257: (4, 1, 48), 258: (3, 3, place + 24), 262: (3, 1, 2), 277: (3, 1, 3)}
        entries |= {273: (4, 3, place), 278: (4, 1, 48), 279: (4, 3, place + 12), 284: (3, 1, 2)}
        # The directory lies before the table, whose place does not depend on its own content.
        tags = [(number, *rest) for number, rest in entries.items()]
        grown = len(tiff(pixels, tags)) - place
        for number in (258, 273, 279):
            entries[number] = (*entries[number][:2], entries[number][2] + grown)
        return tiff(pixels, [(n, *rest) for n, rest in entries.items()]) + table

    pixels, _ = read(planar(planes))
    assert abs(pixels - PIXELS).max() <= 1
    with pytest.raises(BadFileError, match="store them together"):
        read(planar(planes // 16))


def test_a_tiff_says_what_white_is_and_whether_zero_is():
    gray = PIXELS[..., 0].astype(np.uint16)
    dark = gray * 2  # not as bright as its 12 bits allow
    pixels, _ = read(tiff(dark, [(281, 3, 1, 4095)]))
    np.testing.assert_allclose(pixels[..., 0], dark / 4095 * 255, atol=0.51)
    pixels, _ = read(tiff(65535 - 257 * gray, [(262, 3, 1, 0)]))
    np.testing.assert_array_equal(pixels[..., 0], gray)
    floats, notes = read(tiff((gray / 50).astype(np.float32), [(339, 3, 1, 3)]))
    np.testing.assert_allclose(floats[..., 0], gray / gray.max() * 255, atol=0.51)
    assert notes == ["deep image"]


@pytest.mark.parametrize("color", [(0, 0, 0), (7, 4000, 60_000)])
def test_a_transparent_color_of_sixteen_bits_is_only_that_color(color):
    deep = np.full((20, 20, 3), 30_000, np.uint16)
    deep[5], deep[6] = color, np.array(color) + 1  # equal in their upper 8 bits
    pixels, notes = read(png_16(deep, (b"tRNS", struct.pack(">3H", *color))))
    assert (pixels[5] == 255).all() and abs(pixels[6] - np.array(color) / 257).max() < 1
    assert "transparency" in notes
    gray = png_16(deep[..., :1], (b"tRNS", struct.pack(">H", color[0])))
    assert (read(gray)[0][5] == 255).all() and (read(gray)[0][6] < 10).all()


@pytest.mark.parametrize("ycck", [False, True])
def test_print_colors(ycck):
    encoded, shown = cmyk_jpeg(ycck)
    pixels, notes = read(encoded)
    assert abs(pixels - shown.astype(int)).mean() < 2 and notes == ["print colors"]


@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"bits": 1}])
def test_palettes_of_any_depth_with_transparency(options):
    colors = 2 ** options.get("bits", 4)
    image = PHOTO.quantize(colors)
    shown = np.array(image.convert("RGB"))
    clear = np.asarray(image) == 1
    shown[clear] = 255
    pixels, notes = read(png(image, transparency=1, **options))
    np.testing.assert_array_equal(pixels, shown)
    assert clear.any() and notes == ["transparency"]
    # Half-transparent entries mix with white.
    half = bytes([128]) * colors
    np.testing.assert_allclose(
        read(png(image, transparency=half, **options))[0],
        255 - (255 - np.asarray(image.convert("RGB")).astype(int)) * 128 / 255,
        atol=1,
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_a_color_profile_changes_the_look(kind):
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 98}
    options = {"subsampling": "4:4:4"} if kind in ("JPEG", "AVIF") else {}
    lossless = {} if kind in ("PNG", "TIFF") else lossless
    pixels, notes = read(png(PHOTO, kind, icc_profile=ROTATED, **lossless, **options))
    assert abs(pixels - PIXELS[..., [2, 0, 1]].astype(int)).mean() < 6
    assert notes == ["color profile"]
    pixels, notes = read(png(PHOTO, kind, icc_profile=srgb_profile(), **lossless, **options))
    assert abs(pixels - PIXELS).mean() < 4 and notes == []


def test_color_profiles_of_gray_of_other_colors_and_damaged_ones():
    linear = profile(0, 0, 0, 1.0, b"GRAY")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels, notes = read(png(ramp, icc_profile=linear))
    encoded = np.where(ramp / 255 <= 0.0031308, ramp / 255 * 12.92,
                       1.055 * (ramp / 255) ** (1 / 2.4) - 0.055)  # fmt: skip
    np.testing.assert_allclose(pixels[1:, :, 0], 255 * encoded[1:], atol=2)
    assert notes == ["color profile"]
    for wrong in (linear, b"not a profile" * 20, ROTATED[:200]):
        pixels, notes = read(png(PHOTO, icc_profile=wrong))
        np.testing.assert_array_equal(pixels, PIXELS)
        assert notes == ["odd metadata"]


TYPES = [
    *[(3, n, None) for n in range(1, 9)],
    (4, 6, struct.pack(">I", 6)),
    (1, 6, b"\6\0\0\0"),
    (7, 6, b"\6\0\0\0"),
    (2, 6, b"6\0\0\0"),
    (11, 6, struct.pack(">f", 6.0)),
]
TURNS = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("kind, orientation, content", TYPES)
def test_orientations_of_any_type_in_any_format(kind, orientation, content):
    block = exif(orientation, kind, content)
    expected = TURNS[orientation](PIXELS)
    np.testing.assert_array_equal(read(png(PHOTO, "PNG", exif=block))[0], expected)
    np.testing.assert_array_equal(read(png(PHOTO, "WEBP", lossless=True, exif=block))[0], expected)
    jpeg = png(PHOTO, "JPEG", quality=98, subsampling=0, exif=block)
    assert abs(read(jpeg)[0] - expected.astype(int)).max() < 12
    count, value = (2 if kind == 2 else 1), content or orientation
    tags = tiff(PIXELS, [(274, kind, count, value)], order=">")
    np.testing.assert_array_equal(read(tags)[0], expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "HEIF", "TIFF"])
def test_broken_exif_does_not_cost_the_image(kind):
    pytest.importorskip("pillow_heif").register_heif_opener()
    rng = np.random.default_rng(0)
    if kind == "TIFF":
        # Directories of EXIF that are nowhere, or no directories.
        for place in (0, 3, 9000, 2**31, 2**32 - 1):
            encoded = tiff(PIXELS, [(34665, 4, 1, place), (34853, 4, 1, place)])
            np.testing.assert_array_equal(read(encoded)[0], PIXELS)
        return
    block = Image.Exif()
    block[271], block[282], block[305] = "maker", 72.0, "a program"
    encoded = png(PHOTO, kind, exif=block)
    pixels, _ = read(encoded)
    start = encoded.index(b"MM\0*")
    for _ in range(60):
        damaged = np.frombuffer(encoded, np.uint8).copy()
        places = start + rng.integers(0, 44, rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        shape = read(damaged.tobytes())[0].shape
        assert sorted(shape) == sorted(pixels.shape)


def note(size, compressed=True):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * size, zip=compressed)
    return png(PHOTO, pnginfo=info)


@pytest.mark.parametrize(
    "encoded",
    {
        "compressed text": note(1_100_000),
        "plain text": note(3_000_000, False),
        "much text": png(PHOTO)[:33] + 40 * chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**21))
        + png(PHOTO)[33:],
        "international text": with_chunk(
            png(PHOTO), b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)
        ),
        "damaged text": with_chunk(png(PHOTO), b"zTXt", b"a\0\0 no zlib"),
        "wrong checksum": png(PHOTO)[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + png(PHOTO)[33:],
        "large profile": png(PHOTO, icc_profile=b"a" * 3_000_000),
        "text bomb": with_chunk(png(PHOTO), b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**8)),
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_a_png_with_much_metadata(encoded):
    pixels, _ = read(encoded[1])
    np.testing.assert_array_equal(pixels, PIXELS)


def test_metadata_that_are_dropped_are_named_and_those_that_matter_stay():
    turned = png(PHOTO, exif=exif(6))
    pixels, notes = read(with_chunk(turned, b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**21)))
    np.testing.assert_array_equal(pixels, np.rot90(PIXELS, -1))
    assert notes == ["odd metadata"]


@pytest.mark.parametrize(
    "encoded",
    [
        gif(),
        png(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
        png(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)], lossless=True),
        png(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.rotate(180)]),
    ],
    ids=["GIF", "APNG", "WebP", "TIFF"],
)
def test_the_first_of_several_images_is_used_and_said(encoded):
    pixels, notes = read(encoded)
    assert abs(pixels - PIXELS).mean() < 9 and notes == ["several images"]


def test_the_raw_file_of_a_camera_is_not_its_thumbnail():
    with pytest.raises(BadFileError, match="photo 3: the raw file of a camera; convert it"):
        decode_image(tiff(PIXELS, [(254, 4, 1, 1)]), 8, name="photo 3")


LARGE = PHOTO.resize((640, 480), Image.Resampling.BICUBIC)
JPEGS = {
    "usual": {},
    "full color": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "gray": {"gray": True},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_may_lack_its_last_bytes_and_no_more(kind):
    options = dict(JPEGS[kind])
    image = LARGE.convert("L") if options.pop("gray", False) else LARGE
    encoded = png(image, "JPEG", quality=90, **options)
    whole, _ = read(encoded)
    for cut in (2, 3, 4, 6):
        pixels, notes = read(encoded[:-cut])
        assert (abs(pixels - whole).max(axis=-1) > 2).mean() < 0.012
        assert cut == 2 or notes == ["last bytes missing"]
    # What its metadata say counts as before.
    profiled = png(image, "JPEG", quality=90, exif=exif(6), icc_profile=ROTATED, **options)
    if image.mode == "RGB":
        pixels, notes = read(profiled[:-3])
        assert abs(pixels - read(profiled)[0]).mean() < 1 and pixels.shape == (640, 480, 3)
        assert notes == ["last bytes missing", "color profile"]
    # Interrupted downloads are filled with zeros.
    for filling in (b"", bytes(5000)):
        for share in (0.2, 0.5, 0.9):
            with pytest.raises(BadFileError, match="not a readable image") as caught:
                read(encoded[: int(share * len(encoded))] + filling)
            assert caught.value.kind == "truncated"


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("side", [1000, 100], ids=["whole", "reduced"])
def test_a_jpeg_is_cut_off_whatever_its_end_says(kind, side):
    options = dict(JPEGS[kind])
    image = LARGE.convert("L") if options.pop("gray", False) else LARGE
    encoded = png(image, "JPEG", quality=90, **options)
    for whole in (encoded, encoded + b"from a camera" * 100, encoded[:-2] + bytes(3) + b"\xff\xd9"):
        assert read(whole, side)[1] == []
    # The last scan of a progressive one has but the finest detail.
    for share in (0.3, 0.5, 0.6 if kind == "progressive" else 0.8):
        cut = encoded[: int(share * len(encoded))]
        for content in (cut + b"\xff\xd9", cut + bytes(5000) + b"\xff\xd9"):
            with pytest.raises(BadFileError, match="photo 3: .*truncated") as caught:
                read_image(content, side, name="photo 3")
            assert caught.value.kind == "truncated"


@pytest.mark.parametrize("kind", sorted(set(JPEGS) - {"progressive"}))
def test_zeros_in_a_jpeg_are_said(kind):
    options = dict(JPEGS[kind])
    image = LARGE.convert("L") if options.pop("gray", False) else LARGE
    encoded = png(image, "JPEG", quality=90, **options)
    for size in (100, 1500):
        for start in (1200, len(encoded) // 2):
            try:
                notes = read(encoded[:start] + bytes(size) + encoded[start + size :])[1]
            except BadFileError as error:
                assert error.kind == "truncated"
            else:
                assert notes == ["damaged pixels"]
    # More bytes than pixels, as when the height in the head is damaged.
    place = encoded.index(b"\xff\xc0") + 5
    low = encoded[:place] + struct.pack(">H", 240) + encoded[place + 2 :]
    assert read(low)[1] == ["damaged pixels"]


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_drawings_in_jpegs_are_whole_and_not_damaged(quality):
    drawing = Image.new("RGB", (700, 500), "white")
    drawing.paste("red", (20, 30, 90, 90))
    for options in ({}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}):
        for image in (drawing, drawing.convert("L"), drawing.crop((0, 0, 9, 500))):
            encoded = png(image, "JPEG", quality=quality, **options)
            assert set(read(encoded)[1]) <= {"one color"}
            assert ("one color" in read(encoded)[1]) == (image.width == 9)


def test_an_image_of_one_color_is_said():
    for color in ("black", "white", (12, 200, 3)):
        for kind in ("PNG", "JPEG", "WEBP"):
            assert read(png(Image.new("RGB", (90, 70), color), kind))[1] == ["one color"]
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert read(png(clear))[1] == ["transparency", "one color"]
    dot = Image.new("RGB", (90, 70), "black")
    dot.putpixel((50, 33), (0, 9, 0))
    assert read(png(dot))[1] == []


def test_a_bmp_whose_alpha_was_left_out_is_opaque():
    pixels, notes = read(bmp_32(PIXELS, 0))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == []
    pixels, notes = read(bmp_32(PIXELS, 128))
    assert abs(pixels - (255 - (255 - PIXELS.astype(int)) * 128 / 255)).max() <= 1
    assert notes == ["transparency"]


def test_colors_that_are_not_those_of_srgb_are_said():
    adobe = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    usual = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    for name, content, odd in (
        (b"cICP", bytes([9, 16, 0, 1]), True),
        (b"cICP", bytes([12, 13, 0, 1]), True),
        (b"cICP", bytes([1, 13, 0, 1]), False),
        (b"cHRM", adobe, True),
        (b"cHRM", usual, False),
    ):
        pixels, notes = read(with_chunk(png(PHOTO), name, content))
        np.testing.assert_array_equal(pixels, PIXELS)
        assert notes == ["odd metadata"] * odd, (name, content)
    named = with_chunk(png(PHOTO), b"cHRM", adobe)
    assert read(with_chunk(named, b"sRGB", b"\0"))[1] == []
    encoded = png(PHOTO, "AVIF", quality=90)
    place = encoded.index(b"colrnclx") + 8
    assert read(encoded)[1] == []
    wide = encoded[:place] + struct.pack(">HH", 9, 16) + encoded[place + 4 :]
    assert read(wide)[1] == ["odd metadata"]


@pytest.mark.parametrize("background", [0, 2])
def test_what_the_first_image_of_a_gif_leaves_out_is_white(background):
    pixels, notes = read(partial_gif(background))
    expected = np.full((64, 64, 3), 255)
    expected[16:48, 16:48] = 255, 0, 0
    np.testing.assert_array_equal(pixels, expected)
    assert notes == ["transparency"]


@pytest.mark.parametrize("kind", ["float16", "float64", "float colors", "five bands"])
def test_a_tiff_of_a_rare_kind_is_not_called_another_format(kind):
    gray, floats = PIXELS[..., 0] / 255, (339, 3, 1, 3)
    encoded = {
        "float16": lambda: tiff(gray.astype(np.float16), [floats]),
        "float64": lambda: tiff(gray, [floats]),
        "float colors": lambda: tiff((PIXELS / 255).astype(np.float32), [floats]),
        "five bands": lambda: tiff(np.dstack([PIXELS, PIXELS[..., :2]])),
    }[kind]()
    with pytest.raises(BadFileError, match="a.tif: .*a TIFF .* not read.*convert it to PNG"):
        decode_image(encoded, 8, name="a.tif")


def test_the_main_image_of_a_heic_is_used():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    several = pillow_heif.from_pillow(PHOTO.rotate(180))
    several.add_from_pillow(PHOTO)
    several.save(file, quality=95, primary_index=1)
    image = read_image(file.getvalue(), 1000)
    assert abs(np.asarray(image.rgb).astype(int) - PIXELS).mean() < 7
    assert image.notes == (("several images", "the main one is used"),)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_other_formats_that_are_cut_off_are_refused(kind):
    encoded = png(PHOTO, kind)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(BadFileError, match="not a readable image"):
            read(encoded[: int(share * len(encoded))])


def test_the_end_of_a_png_and_of_a_webp_may_be_missing_if_no_pixel_is():
    pixels, notes = read(png(PHOTO)[:-12])
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == ["last bytes missing"]
    encoded = png(PHOTO, "WEBP", lossless=True, exif=exif(1))
    pixels, notes = read(encoded[:-4])
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == ["odd metadata"]


def test_bombs_are_refused_by_their_headers():
    for side in (10_001, 20_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99)))
        with pytest.raises(BadFileError, match="photo 3: ") as caught:
            decode_image(bomb, 8, name="photo 3")
        assert caught.value.kind == "too large" or side == 2**31 - 1


ZEROS = png(LARGE, "JPEG", quality=90)
ZEROS = ZEROS[:6000] + bytes(100) + ZEROS[6100:]


def test_the_data_check_names_what_is_odd_and_training_reads_the_same(tmp_path):
    wave = 0.1 * np.sin(np.arange(8000))
    files = {
        "usual.png": (png(PHOTO), None),
        "frames.gif": (gif(), "several images"),
        "deep.png": (png_16(PIXELS.astype(np.uint16) * 16), "deep image"),
        "clear.png": (png(PHOTO.convert("RGBA")), "transparency"),
        "print.jpg": (cmyk_jpeg()[0], "print colors"),
        "profile.png": (png(PHOTO, icc_profile=ROTATED), "color profile"),
        "turned.png": (png(PHOTO, exif=exif(99)), "odd metadata"),
        "end.jpg": (png(LARGE, "JPEG")[:-6], "last bytes missing"),
        "other.png": (png(PHOTO, "JPEG"), "wrong suffix"),
        "black.png": (png(Image.new("RGB", (64, 48))), "one color"),
        "zeros.jpg": (ZEROS, "damaged pixels"),
        "raw.tif": (tiff(PIXELS, [(254, 4, 1, 1)]), "unreadable"),
        "half.jpg": (png(LARGE, "JPEG")[:5000], "truncated"),
    }
    rows = ""
    for number, (name, (content, _)) in enumerate(files.items()):
        (tmp_path / name).write_bytes(content)
        soundfile.write(tmp_path / f"{number}.wav", (1 + number / 99) * wave, 16_000)
        rows += f'{{"image": "{name}", "audio": "{number}.wav", "split": "train"}}\n'
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(rows)

    report = check_data(str(manifest), progress=False)
    found = {}
    for finding in report.findings:
        if finding.item and finding.item[0] == "image" and "duplicate" not in finding.kind:
            found.setdefault(PurePath(finding.name).name, []).append(finding.kind)
    assert found == {name: [kind] for name, (_, kind) in files.items() if kind}
    assert [line for line in report.text().splitlines() if "left out" in line]

    source = load_manifest(str(manifest), "train", max_bad_share=1.0)
    images = [load_image(source, row, 16) for row in range(source.num_images)]
    unusable = {PurePath(name).name for name in source.bad_items.reasons}
    assert unusable == {"raw.tif", "half.jpg"} and sum(i is None for i in images) == 2


def damaged(rng, encoded):
    """What becomes of a file on bad media, and whether it is cut off."""
    cut = int(len(encoded) * rng.uniform(0.01, 0.999))
    how = rng.choice(["cut", "zeros", "flipped", "header"])
    if how == "cut":
        return encoded[:cut], True
    if how == "zeros":
        return encoded[:cut] + bytes(len(encoded) - cut), True
    values = np.frombuffer(encoded, np.uint8).copy()
    count = 2 ** rng.integers(0, 6)
    places = rng.integers(0, len(values) if how == "flipped" else min(200, len(values)), count)
    values[places] ^= (1 << rng.integers(0, 8, count)).astype(np.uint8)
    return values.tobytes(), False


@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_by_name_or_said_to_lack_their_end(count):
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = PHOTO.resize((160, 120), Image.Resampling.BICUBIC)
    deep = np.asarray(image).astype(np.uint16) * 16
    wholes = [png(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "MPO")]
    wholes += [png(image, "JPEG", progressive=True), png(image, "WEBP", lossless=True)]
    wholes += [png(image, "JPEG", icc_profile=ROTATED, exif=exif(6)), cmyk_jpeg(True)[0]]
    wholes += [png_16(deep), png(image, "TIFF", compression="tiff_lzw"), tiff(deep)]
    pixels = [read(whole)[0] for whole in wholes]

    rng = np.random.default_rng(count)
    accepted = 0
    for number in range(count):
        which = number % len(wholes)
        content, lost = damaged(rng, wholes[which])
        try:
            decoded = read_image(content, 1000, name="photo 3")
        except BadFileError as error:
            assert str(error).startswith("photo 3: ")
            continue
        accepted += 1
        # Uncompressed pixels may be zero.
        if not lost or which == len(wholes) - 1:
            continue
        kinds = {kind for kind, _ in decoded.notes}
        wrong = abs(np.asarray(decoded.rgb).astype(int) - pixels[which]).max(axis=-1) > 2
        assert wrong.mean() < 0.02 or "zeros at the end" in kinds, which
    assert accepted > 0.1 * count
