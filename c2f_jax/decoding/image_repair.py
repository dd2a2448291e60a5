"""Images whose metadata are damaged, or that lack only their last bytes."""

import re
import struct
import zlib
from collections.abc import Iterator

from c2f_jax.decoding.image_modes import Note
from c2f_jax.decoding.jpeg_data import with_end

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"iCCP", b"sRGB", b"gAMA")
_MOST_PROFILE = 2**20  # bytes of a color profile in a PNG that Pillow reads
_WEBP_METADATA = (b"EXIF", b"XMP ")
_EXIF_ENTRY = re.compile(rb"(infe.{8})Exif", re.DOTALL)


def repairs(encoded: bytes) -> Iterator[tuple[bytes, Note]]:
    """Yield files to read in place of one that cannot be read.

    Args:
      encoded: content of the file.

    Yields:
      The content of another file with the same pixels, and the kind and detail of what is odd.
    """
    ignored = ("odd metadata", "metadata that cannot be read are ignored")
    bare = _without_metadata(encoded)
    whole = with_end(encoded)
    if whole is not None:
        yield whole, ("last bytes missing", "the JPEG has no end")
    if bare != encoded:
        yield bare, ignored
        whole = with_end(bare)
        if whole is not None:
            yield whole, ignored


def _without_metadata(encoded: bytes) -> bytes:
    """Drop the metadata that an image looks the same without."""
    if encoded[:8] == _PNG:
        return _PNG + b"".join(_png_chunks(encoded))
    if encoded[:2] == b"\xff\xd8":
        return b"\xff\xd8" + b"".join(_jpeg_segments(encoded))
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        content = b"WEBP" + b"".join(_webp_chunks(encoded))
        return b"RIFF" + struct.pack("<I", len(content)) + content
    # AVIF lists what it holds; an entry of an unknown type is passed over.
    return _EXIF_ENTRY.sub(rb"\1skip", encoded) if encoded[4:8] == b"ftyp" else encoded


def _png_chunks(encoded: bytes) -> Iterator[bytes]:
    """Yield the chunks that matter, as they are: size, name, content, checksum."""
    place = 8
    while place + 8 <= len(encoded):
        size, name = struct.unpack_from(">I4s", encoded, place)
        chunk = encoded[place : place + 12 + size]
        place += 12 + size
        critical = name[:1].isupper()
        if not critical and name not in _PNG_KEPT:
            continue
        damaged = zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")
        if not critical and (damaged or (name == b"iCCP" and _is_large_profile(chunk[8:-4]))):
            continue
        yield chunk


def _is_large_profile(content: bytes) -> bool:
    """Return whether the color profile in a chunk of a PNG is damaged or too large for Pillow."""
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(content.partition(b"\0")[2][1:], _MOST_PROFILE)
    except zlib.error:
        return True
    return bool(inflater.unconsumed_tail)


def _jpeg_segments(encoded: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG up to its pixels, without metadata, then the rest."""
    place = 2
    while encoded[place : place + 1] == b"\xff" and place + 4 <= len(encoded):
        marker, size = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker == 0xDA:
            break
        # JFIF and Adobe say how colors are stored; the other segments of programs do not.
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield encoded[place : place + 2 + size]
        place += 2 + size
    yield encoded[place:]


def _webp_chunks(encoded: bytes) -> Iterator[bytes]:
    """Yield the chunks of a WebP that are whole, without metadata."""
    place = 12
    while place + 8 <= len(encoded):
        name, size = struct.unpack_from("<4sI", encoded, place)
        chunk = encoded[place : place + 8 + size + size % 2]
        place += len(chunk)
        if len(chunk) < 8 + size or name in _WEBP_METADATA:
            continue
        # The first chunk says which others there are.
        if name == b"VP8X" and size:
            chunk = chunk[:8] + bytes([chunk[8] & ~0x0C]) + chunk[9:]
        yield chunk + b"\0" * (size % 2 and len(chunk) % 2)
