"""The frames of MPEG audio: how many there are, where one stream ends and the next begins.

An MP3 file has no header of its own. Its length is that of its frames, which encoders may or may
not write into a first frame without sound (Xing, Info or VBRI), and which libsndfile otherwise
estimates from the size of the file.
"""

import dataclasses
import functools
import re
import struct

_RATES = (44_100, 48_000, 32_000)
# kbit/s by (version 1 or not, layer), for the indices 1 to 14.
_KILOBITS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# How the numbers of header frames begin; more than the four letters makes the search fast.
_HEADER_FRAMES = (b"Xing\0\0\0", b"Info\0\0\0", b"VBRI\0\1")
_SYNC = re.compile(rb"\xff[\xe2-\xff]", re.DOTALL)
_LONGEST = 8192  # bytes; no frame is larger, of free format neither
_SURE = 3  # frames in a row that random bytes do not make


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a frame header says.

    Attributes:
      key: version, layer, rate, and whether it is of free format; one stream has one.
      size: bytes of the frame; 0 in free format, where no header says it.
      padding: bytes more in free format.
      samples: samples a channel.
    """

    key: tuple[int, int, int, bool]
    size: int
    padding: int
    samples: int


@dataclasses.dataclass
class MpegStream:
    """Frames of one kind that belong together.

    Attributes:
      data: the frames, with a header frame that gives their number.
      frames: samples a channel; None where the header frame decides, with delay and padding.
      missing: share of the frames promised by a header frame that the file lacks.
      wrong: the header frame gave fewer frames than follow.
    """

    data: bytes
    frames: int | None
    missing: float
    wrong: bool


@functools.cache
def _kind(second: int, third: int) -> _Kind | None:
    """Read the second and third byte of a frame header; None if they are not of one."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    index, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or index == 15 or rate == 3:
        return None
    first = version == 3
    hertz = _RATES[rate] >> (0 if first else 1 if version == 2 else 2)
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    slot = 4 if layer == 1 else 1
    padding = (third >> 1 & 1) * slot
    size = 0
    if index:
        bits = _KILOBITS[first, layer][index - 1] * 1000
        size = samples // 8 * bits // hertz // slot * slot + padding
    return _Kind((version, layer, hertz, not index), size, padding, samples)


class _Frames:
    """Frames that follow one another, before they are closed as a stream."""

    def __init__(self, kind: _Kind, channels: int) -> None:
        self.kind, self.channels = kind, channels
        self.pieces: list[list[int]] = []  # [start, end] of adjoining frames
        self.count = 0
        self.sizes: dict[bytes, int] = {}  # of frames, by their headers
        self.header: bytes = b""  # a frame that holds numbers and no sound

    def add(self, start: int, end: int, count: int = 1) -> None:
        if self.pieces and self.pieces[-1][1] == start:
            self.pieces[-1][1] = end
        else:
            self.pieces.append([start, end])
        self.count += count

    def run(self, encoded: bytes, start: int, numbers: set[int]) -> int:
        """Add the frames that follow with headers that were seen before; return where they end."""
        place, count, sizes = start, 0, self.sizes
        while (size := sizes.get(encoded[place : place + 4])) and place not in numbers:
            if place + size > len(encoded):
                break
            place += size
            count += 1
        if count:
            self.add(start, place, count)
        return place

    def close(self, encoded: bytes) -> MpegStream:
        """Give the stream a header frame with the number of its frames, if it lacks one."""
        data = b"".join(encoded[start:end] for start, end in self.pieces)
        promised = _promised(self.header)
        if promised and self.count <= promised:
            missing = (promised - self.count) / promised
            # The decoder takes a frame for one of numbers only if zeros precede them, and trims the
            # encoder's delay then.
            place = 36 if self.header[36:40] == b"VBRI" else _number_place(self.header)
            header = self.header[:4] + bytes(place - 4) + self.header[place:]
            return MpegStream(header + data, None, missing, False)
        frames: int | None = self.count * self.kind.samples
        if data and self.kind.key[1] == 3 and self.kind.size:
            data, frames = _number_frame(data[:4], self.count) + data, None
        return MpegStream(data, frames, 0.0, bool(promised))


def is_mpeg(encoded: bytes, place: int = 0) -> bool:
    """Return whether frames of MPEG audio follow one another at a place."""
    for _ in range(_SURE):
        kind = _at(encoded, place)
        if kind is None:
            return False
        place += kind.size or _free_size(encoded, place, kind)
        if place >= len(encoded):
            return True
    return True


def begins_as_mpeg(encoded: bytes, place: int) -> bool:
    """Return whether a file is MPEG audio, of which the first frame may be damaged.

    libsndfile takes it for that by the first header, and stops early where the next does not
    follow.

    Args:
      encoded: the file.
      place: behind the tags at its beginning.
    """
    if is_mpeg(encoded, place):
        return True
    return _at(encoded, place) is not None and is_mpeg(encoded, _next_sync(encoded, place + 1))


def mpeg_streams(encoded: bytes) -> tuple[list[MpegStream], int, int]:
    """Split a file of MPEG audio where a stream begins.

    A stream begins at a header frame, after a tag that belongs before a stream, and where the rate,
    the layer or the number of channels changes.

    Args:
      encoded: the file.

    Returns:
      The streams; the bytes that are neither frames nor tags between frames; and those before the
      first frame and after the last one.
    """
    numbers = _header_places(encoded)
    streams: list[MpegStream] = []
    frames: _Frames | None = None
    free = between = outside = place = 0
    while place + 4 <= len(encoded):
        kind = _at(encoded, place)
        channels = 1 if encoded[place + 3] >> 6 == 3 else 2
        same = frames and kind and (kind.key, channels) == (frames.kind.key, frames.channels)
        # Bytes that look like a header now and then are in the sound too.
        if kind is None or not (same or is_mpeg(encoded, place)):
            following = place + tag_bytes(encoded, place)
            if following == place:
                following = _next_sync(encoded, place + 1)
                if (frames or streams) and following < len(encoded):
                    between += following - place
                else:
                    outside += following - place
            elif encoded[place : place + 3] == b"ID3" and frames:
                streams.append(frames.close(encoded))
                frames = None
            place = following
            continue

        if frames and (not same or place in numbers):
            streams.append(frames.close(encoded))
            frames = None
        if frames is None:
            frames = _Frames(kind, channels)
            free = 0 if kind.size else _free_size(encoded, place, kind) - kind.padding
        size = kind.size or free + kind.padding
        if place + size > len(encoded):
            outside += len(encoded) - place
            break
        if place in numbers:
            frames.header = encoded[place : place + size]
        else:
            frames.add(place, place + size)
            frames.sizes[encoded[place : place + 4]] = size
        place = frames.run(encoded, place + size, numbers)

    if frames:
        streams.append(frames.close(encoded))
    return [stream for stream in streams if stream.data], between, outside


def _at(encoded: bytes, place: int) -> _Kind | None:
    if place + 4 > len(encoded) or encoded[place] != 0xFF:
        return None
    return _kind(encoded[place + 1], encoded[place + 2])


def _free_size(encoded: bytes, place: int, kind: _Kind) -> int:
    """Find the size of a frame in free format: the next header of the kind follows it."""
    head = re.escape(encoded[place : place + 2])
    for match in re.finditer(head, encoded[place + 4 : place + _LONGEST]):
        following = place + 4 + match.start()
        other = _at(encoded, following)
        if other and other.key == kind.key:
            return following - place
    return _LONGEST


def _header_places(encoded: bytes) -> set[int]:
    """Return the places where frames begin, if they are frames, that hold numbers and no sound."""
    places = set()
    for name in _HEADER_FRAMES:
        found = encoded.find(name)
        while found >= 0:
            # They follow the header of 4 bytes and the side information of 9, 17 or 32 bytes.
            for before in (36,) if name[:4] == b"VBRI" else (13, 21, 36):
                place = found - before
                kind = _at(encoded, place) if place >= 0 else None
                if kind and before == _number_place(encoded[place : place + 4], name[:4]):
                    places.add(place)
            found = encoded.find(name, found + 1)
    return places


def _number_place(header: bytes, name: bytes = b"Info") -> int:
    """Return where in a frame the numbers begin."""
    if name == b"VBRI":
        return 36
    first, mono = header[1] >> 3 & 3 == 3, header[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return 4 + side


def _promised(frame: bytes) -> int:
    """Return the number of frames that a header frame gives, or 0."""
    if not frame:
        return 0
    place = _number_place(frame)
    if frame[place : place + 4] in (b"Xing", b"Info") and len(frame) >= place + 12:
        flags, number = struct.unpack_from(">II", frame, place + 4)
        return number if flags & 1 else 0
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return struct.unpack_from(">I", frame, 50)[0]
    return 0


def _number_frame(header: bytes, count: int) -> bytes:
    """Make a frame without sound that gives the number of frames."""
    place = _number_place(header)
    # The smallest bit rate whose frame has room; the bit says that there is no checksum.
    for index in range(1, 15):
        third = index << 4 | header[2] & 0x0C
        made = _kind(header[1] | 1, third)
        if made and made.size >= place + 16:
            frame = bytes([0xFF, header[1] | 1, third, header[3]]).ljust(place, b"\0")
            return (frame + b"Info" + struct.pack(">II", 1, count)).ljust(made.size, b"\0")
    raise AssertionError(header)


def tag_bytes(encoded: bytes, place: int) -> int:
    """Return the size of the tag or of the zeros at a place.

    Args:
      encoded: a file.
      place: where in it.

    Returns:
      Bytes of the ID3, APE or Lyrics tag; 0 if there is none, or if it reaches past the end.
    """
    size = _tag_size(encoded, place)
    return size if place + size <= len(encoded) else 0


def _tag_size(encoded: bytes, place: int) -> int:
    head = encoded[place : place + 32]
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte
        return 10 + size + (10 if head[5] & 16 else 0)
    if head[:3] == b"TAG":
        return 227 if head[3:4] == b"+" else 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size = struct.unpack_from("<I", head, 12)[0]
        # The size leaves out a header, and a footer has its items before it.
        return size + 32 if head[23] & 0x20 else 32
    if head[:11] == b"LYRICSBEGIN":
        end = encoded.find(b"LYRICS200", place)
        return end + 9 - place if end > 0 else 0
    if head[:1] == b"\0":
        zeros = re.compile(rb"\0+").match(encoded, place)
        return zeros.end() - place if zeros else 0
    return 0


def _next_sync(encoded: bytes, place: int) -> int:
    """Return the next place where frames follow one another, or the end of the file."""
    for match in _SYNC.finditer(encoded, place):
        if is_mpeg(encoded, match.start()):
            return match.start()
        if tag_bytes(encoded, match.start()):
            return match.start()
    return len(encoded)
