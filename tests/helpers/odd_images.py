"""Images as cameras, scanners, phones and programs write them, made by hand where Pillow cannot."""

import struct
import zlib

import numpy as np
from helpers.memory_source import png
from PIL import Image, ImageCms

PIXELS = np.asarray(
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
)
PHOTO = Image.fromarray(PIXELS)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tiff(pixels, tags=(), order="<"):
    """An uncompressed TIFF; tags are (number, type, count, four bytes or a number), and replace
    those that it has anyway."""
    pixels = np.asarray(pixels)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, bands = pixels.shape
    bits = pixels.dtype.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits_place, pixels_place = 8, 16
    entries = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, bands, bits if bands == 1 else bits_place),
        259: (3, 1, 1),
        262: (3, 1, 2 if bands > 2 else 1),
        273: (4, 1, pixels_place),
        277: (3, 1, bands),
        278: (4, 1, height),
        279: (4, 1, len(data)),
    }
    if bands in (2, 4):
        entries[338] = (3, 1, 2)
    entries |= {number: rest for number, *rest in tags}
    directory = struct.pack(order + "H", len(entries))
    for number, (kind, count, value) in sorted(entries.items()):
        directory += struct.pack(order + "HHI", number, kind, count)
        if isinstance(value, bytes):
            directory += value.ljust(4, b"\0")
        elif kind == 3 and count == 1:
            directory += struct.pack(order + "HH", value, 0)
        else:
            directory += struct.pack(order + "I", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 16 + len(data))
    depths = struct.pack(order + "4H", *[bits] * 4)
    return head + depths + data + directory + bytes(4)


def chunk(name, content):
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_16(pixels, *chunks):
    """A PNG of 16 bits: gray, gray with alpha, RGB or RGBA."""
    pixels = np.asarray(pixels)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, bands = pixels.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    middle = b"".join(chunk(*each) for each in chunks)
    return SIGNATURE + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_chunk(encoded, name, content):
    """A PNG with another chunk after its header."""
    return encoded[:33] + chunk(name, content) + encoded[33:]


def cmyk_jpeg(ycck=False):
    """A JPEG of four colors as Adobe's programs write it, and what it shows."""
    cmyk = PHOTO.convert("CMYK")
    shown = np.asarray(cmyk.convert("RGB"))
    if not ycck:
        return png(cmyk, "JPEG", quality=95, subsampling=0), shown
    # The inks as luma and two differences; black as it is. Pillow inverts what it writes.
    bands = np.asarray(cmyk)
    colors = Image.fromarray(bands[..., :3]).convert("YCbCr")
    mixed = np.dstack([255 - np.asarray(colors), bands[..., 3]])
    encoded = png(Image.fromarray(mixed, "CMYK"), "JPEG", quality=95, subsampling=0)
    adobe = encoded.index(b"Adobe")
    return encoded[: adobe + 11] + b"\x02" + encoded[adobe + 12 :], shown


def profile(red, green, blue, gamma=2.2, space=b"RGB "):
    """A color profile of three primaries, each (X, Y, Z), or of gray alone."""

    def tag(kind, content):
        content = kind + bytes(4) + content
        return content + bytes(-len(content) % 4)

    def fixed(*numbers):
        return struct.pack(f">{len(numbers)}i", *(round(65536 * number) for number in numbers))

    curve = tag(b"curv", struct.pack(">IH", 1, round(256 * gamma)))
    text = "odd colors".encode("utf-16-be")
    name = struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    tags = {
        b"desc": tag(b"mluc", name),
        b"wtpt": tag(b"XYZ ", fixed(0.9642, 1, 0.8249)),
        b"cprt": tag(b"mluc", name),
    }
    if space == b"RGB ":
        for letter, primary in ((b"r", red), (b"g", green), (b"b", blue)):
            tags[letter + b"XYZ"] = tag(b"XYZ ", fixed(*primary))
            tags[letter + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(content), len(value))
        content += value
    header = struct.pack(">I4sI4s4s4s", start + len(content), b"lcms", 0x04300000, b"mntr", space,
                         b"XYZ ")  # fmt: skip
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + content


SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ROTATED = profile(SRGB[1], SRGB[2], SRGB[0])  # red shows as green, green as blue, blue as red


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation=6, kind=3, content=None, order=">"):
    """An EXIF block whose orientation has any type: its number, and its four bytes."""
    content = struct.pack(order + "HH", orientation, 0) if content is None else content
    count = {1: 1, 2: 2, 7: 1}.get(kind, 1)
    entry = struct.pack(order + "HHI", 274, kind, count) + content
    mark = b"MM\0*" if order == ">" else b"II*\0"
    offset = struct.pack(order + "I", 8)
    return b"Exif\0\0" + mark + offset + struct.pack(order + "H", 1) + entry + bytes(4)


def partial_gif(background=2):
    """A GIF of 64 x 64 pixels whose first image is 32 x 32 red ones in the middle."""
    palette = bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    head = b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x91, background, 0) + palette
    # Codes of three bits; clearing the table after every two pixels keeps them so short.
    codes = [code for _ in range(512) for code in (4, 1, 1)] + [5]
    bits = sum(code << 3 * place for place, code in enumerate(codes))
    content = bits.to_bytes(3 * len(codes) // 8 + 1, "little")
    blocks = [content[start : start + 255] for start in range(0, len(content), 255)]
    image = b"," + struct.pack("<HHHHB", 16, 16, 32, 32, 0) + b"\x02"
    return head + image + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0;"


def bmp_32(pixels, alpha):
    """A BMP of 32 bits with a mask for alpha, which many programs leave at 0."""
    height, width = pixels.shape[:2]
    colors = np.dstack([pixels[::-1, :, ::-1], np.full((height, width), alpha, np.uint8)])
    data = colors.astype(np.uint8).tobytes()
    head = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return (
        b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data
    )
