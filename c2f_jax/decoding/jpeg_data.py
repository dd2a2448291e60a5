"""The pixels of a JPEG: whether all of them are there, which its decoder does not say."""

import io
import re
from typing import Any

from PIL import Image, ImageChops

from c2f_jax.decoding.image_modes import Note

MOST_MISSING = 0.01  # of the pixels
_END = b"\xff\xd9"
# What no encoder would have written, to see which pixels the missing bytes decide.
_OTHER_BYTES = bytes(range(1, 255)) + _END
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # markers of the kinds that are read
_FEW = 64  # bytes; encoders leave no more unused, nor write as many zeros
_MARKS = {"L": 77, "RGB": (255, 0, 254), "CMYK": (255, 0, 254, 1)}  # colors, by mode


class JpegWatch:
    """Sees how far the decoder gets with the bytes of a JPEG.

    The decoder makes up what a file lacks before its end mark, and leaves out what it has too much
    of after damage. So the last bytes are withheld until it wants more: by then it must be in the
    last row of blocks, and not have finished before.
    """

    def __init__(self, image: Any, encoded: bytes, height: int) -> None:
        """Prepare.

        Args:
          image: an opened JPEG, scaled but not loaded.
          encoded: its file.
          height: of the image before scaling.
        """
        self._image, self._encoded = image, encoded
        self._start = _pixels_start(encoded)
        # Looking for the first one would take longer; others follow in files of several images.
        self._end = encoded.rfind(_END, self._start)
        self._early = self._late = False  # whether it had finished, or had not come far enough
        self._mark = _MARKS.get(image.mode)
        if self._end < 0 or self._mark is None or image.info.get("progressive"):
            return
        blocks = 8 * max([vertical for _, _, vertical, _ in image.layer], default=1)
        # Smoothing delays a few rows.
        self._row = (height - 1) // blocks * blocks * image.height // height - 4
        self._early = True  # until it wants more
        image.load_prepare()
        image.im.paste(self._mark, (0, 0, 1, image.height))
        image.load_read = self._read

    def _read(self, size: int) -> bytes:
        file = self._image.fp
        place = file.tell()
        for stop in (self._end - _FEW, self._end):
            if place < stop < place + size:
                size = stop - place
        if place == self._end - _FEW:
            self._early = self._is_done(self._image.height - 1)
        elif place == self._end:
            self._late = self._row >= 0 and not self._is_done(self._row)
        return file.read(size)

    def _is_done(self, row: int) -> bool:
        return self._image.im.getpixel((0, row)) != self._mark

    def notes(self) -> list[Note]:
        """Say what was seen, once the image is loaded.

        Raises:
          ValueError: more than a hundredth of the pixels is missing.
        """
        if self._end < 0:
            return []
        vars(self._image).pop("load_read", None)  # a circle would keep the pixels in memory
        zeros = self._encoded.find(bytes(_FEW), self._start, self._end)
        if zeros >= 0 and self._zeros_are_flat():
            zeros = -1
        missing = self._missing(zeros >= 0)
        if missing > MOST_MISSING:
            raise ValueError("image file is truncated: pixels are missing before its end mark")
        if missing:
            return [("last bytes missing", "pixels are missing before the end mark of the JPEG")]
        if self._early and self._encoded.find(_END, self._start) == self._end:
            return [("damaged pixels", "the JPEG holds more bytes than its pixels take")]
        if zeros >= 0:
            return [("damaged pixels", f"zeros in the JPEG from byte {zeros:,} on")]
        return []

    def _missing(self, zeros: bool) -> float:
        """Measure the share of missing pixels, if there is reason to think that any are."""
        if self._image.info.get("progressive"):
            return 0.0 if _block_rows(memoryview(self._encoded)[: self._end]) else 1.0
        # Interrupted downloads are filled with zeros.
        filled = zeros and self._encoded[self._end - 1] == 0
        if not self._late and not filled:
            return 0.0
        body = self._encoded[: self._end]
        return missing_share(body.rstrip(b"\0") if filled else body) or 0.0

    def _zeros_are_flat(self) -> bool:
        """Return whether zeros stand for one color, by the codes in the head."""
        for marker, start, end in _segments(self._encoded):
            # Tables follow one another: kind, numbers of codes of 1 to 16 bits, and their symbols.
            while marker == 0xC4 and start + 17 < end:
                if self._encoded[start + 17]:  # the symbol that only zeros stand for
                    return False
                start += 17 + sum(self._encoded[start + 1 : start + 17])
        return True


def _segments(encoded: bytes) -> list[tuple[int, int, int]]:
    """Return marker, start and end of the content of each segment up to the first scan's."""
    found, place = [], 2
    while encoded[place : place + 1] == b"\xff" and place + 4 <= len(encoded):
        size = int.from_bytes(encoded[place + 2 : place + 4], "big")
        if encoded[place + 1] == 0xFF:  # filling
            place += 1
            continue
        found.append((encoded[place + 1], place + 4, place + 2 + size))
        place += 2 + size
        if found[-1][0] == 0xDA:
            break
    return found


def _pixels_start(encoded: bytes) -> int:
    segments = _segments(encoded)
    return segments[-1][2] if segments else len(encoded)


def with_end(encoded: bytes) -> bytes | None:
    """Give a JPEG its end.

    Args:
      encoded: a file that cannot be read.

    Returns:
      The file with an end mark; None if it is no JPEG or lacks more than a hundredth of its pixels.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    # Interrupted downloads are filled with zeros.
    body = encoded.rstrip(b"\0").removesuffix(_END).removesuffix(b"\xff")
    missing = missing_share(body)
    return None if missing is None or missing > MOST_MISSING else body + _END


def missing_share(body: bytes) -> float | None:
    """Measure how many pixels of a JPEG are missing at its end.

    Args:
      body: the file up to its end mark.

    Returns:
      The share of the pixels that follow those that are there; 1 if a scan is missing; None if the
      file cannot be decoded.
    """
    body = body.removesuffix(b"\xff")
    block_rows = _block_rows(body)
    if not block_rows:
        return 1.0

    # Pixels that the bytes at the end decide are missing, and all that follow in their order.
    try:
        images = [_decoded(body + _END), _decoded(body + _OTHER_BYTES)]
    except Exception:  # Pillow raises nearly anything on damaged files
        return None
    width, height = images[0].size
    box = ImageChops.difference(*images).getbbox()
    if box is None:
        return 0.0
    rows = height - box[1]
    # Blocks are smoothed into the row above.
    return rows * (width - box[0] if rows <= block_rows + 2 else width) / (width * height)


def _decoded(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        image.load()
        return image


def _block_rows(encoded: bytes | memoryview) -> int:
    """Return the height of a row of blocks of a JPEG.

    It is 0 unless the last of its scans has begun, so that no detail is missing.
    """
    components: bytes | memoryview = b""
    rows = 8
    # (component, coefficient) -> bits that a later scan brings
    missing: dict[tuple[int, int], int] = {}
    place = 2
    for _ in range(10_000):  # segments
        marker = _NEXT_MARKER.search(encoded, place)
        if marker is None or marker.end() + 2 > len(encoded):
            break
        kind, start = encoded[marker.end() - 1], marker.end()
        size = int.from_bytes(encoded[start : start + 2], "big")
        content = encoded[start + 2 : start + size]
        if kind in _FRAMES and len(content) >= 6:
            components = content[6::3]
            if len(components) > 1:
                rows = 8 * max(sampling & 15 for sampling in content[7::3])
        elif kind == 0xDA and content and len(content) >= 4 + 2 * content[0]:
            first, last, bits = content[1 + 2 * content[0] :][:3]
            for component in content[1 : 1 + 2 * content[0] : 2]:
                for number in range(first, min(last, 63) + 1):
                    missing[component, number] = bits & 15
        place = start + size
    wanted = [(component, number) for component in components for number in range(64)]
    return rows if wanted and not any(missing.get(key, 1) for key in wanted) else 0


# Within pixels, a byte of 255 is followed by zero or a restart marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")
