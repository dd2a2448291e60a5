"""What an audio file holds: its streams, and what its headers promise.

libsndfile trusts headers. Here they are compared with the file, whose last byte decides: a header
that was written before the recording ended is corrected, streams that follow one another are
separated, and what is missing is measured.
"""

import dataclasses
import re
import struct
from typing import NamedTuple

import numpy as np

from c2f_jax.decoding.flac_frames import flac_samples, is_whole
from c2f_jax.decoding.mpeg_frames import begins_as_mpeg, mpeg_streams, tag_bytes
from c2f_jax.errors import BadFileError

Note = tuple[str, str]  # a kind of `data_check.findings.KINDS`, and the detail
INAUDIBLE_SHARE = 0.01
INAUDIBLE_SECONDS = 0.02
# Recorders that cannot go back to write the length write this or more.
STREAMED_SIZE = 2**31 - 2**16
_STEP = 2**18  # bytes searched at a time
_INAUDIBLE_BYTES = 640  # 20 ms of 16 bits at 16 kHz
_MPEG_IN_WAV = (0x50, 0x55)  # format tags
# Chunks that follow samples; of others only whole ones are known to be chunks.
_CHUNKS = b"LIST INFO bext cue  smpl inst fact JUNK junk PAD  FLLR id3  ID3  iXML _PMX PEAK".split(
    b" "
)


@dataclasses.dataclass(frozen=True)
class Stream:
    """One stream of a file.

    Attributes:
      data: the file of this stream alone.
      frames: samples a channel, if known; None for as many as libsndfile says.
      missing: share of what a header promises that the file lacks.
    """

    data: bytes
    frames: int | None = None
    missing: float = 0.0


def audio_streams(encoded: bytes, name: str) -> tuple[list[Stream], list[Note]]:
    """Split a file into its streams.

    Args:
      encoded: the file.
      name: what errors call it.

    Returns:
      The streams in order, one for most files, and what is odd about them.

    Raises:
      BadFileError: more samples follow than its header says.
    """
    start = 0
    while encoded[start : start + 3] == b"ID3" and (size := tag_bytes(encoded, start)):
        start += size
    notes: list[Note] = []
    magic = encoded[start : start + 4]
    if magic in (*_LAYOUTS, b".snd", b"dns.", b"OggS", b"fLaC"):
        encoded = encoded[start:]
    if magic in _LAYOUTS:
        streams = _chunked(encoded, name, notes)
    elif magic in (b".snd", b"dns."):
        streams = _au(encoded, name, notes)
    elif magic == b"OggS":
        streams = _ogg(encoded, notes)
    elif magic == b"fLaC":
        streams = _flac(encoded, name, notes)
    elif start or begins_as_mpeg(encoded, tag_bytes(encoded, 0)):
        streams = _mpeg(encoded, name, notes)
    else:
        streams = [Stream(part) for part in _joined_files(encoded)]
    if len(streams) > 1:
        notes.append(("several streams", f"{len(streams)} follow one another; all were read"))
    return streams, notes


# How files begin that players stop at the end of, though others follow.
_BEGINNINGS = re.compile(rb"FLV\x01.\0\0\0\x09|TTA[12][\1-\3]\0|#!AMR(?:-WB)?\n", re.DOTALL)


def _joined_files(encoded: bytes) -> list[bytes]:
    """Separate FLV, TTA, AMR or MP4 files that follow one another."""
    starts = [0]
    if _BEGINNINGS.match(encoded):
        starts = [match.start() for match in _BEGINNINGS.finditer(encoded)]
    elif encoded[4:8] == b"ftyp":
        place = 0
        while (place := _after_box(encoded, place)) < len(encoded):
            if encoded[place + 4 : place + 8] == b"ftyp":
                starts.append(place)
    ends = [*starts[1:], len(encoded)]
    return [encoded[start:end] for start, end in zip(starts, ends, strict=True)]


def _after_box(encoded: bytes, place: int) -> int:
    """Return where a box of MP4 ends."""
    size = int.from_bytes(encoded[place : place + 4], "big")
    if size == 1:
        size = int.from_bytes(encoded[place + 8 : place + 16], "big")
    return place + size if size >= 8 else len(encoded)  # to the end, or damaged


class _Layout(NamedTuple):
    """How the chunks of a container are laid out.

    Attributes:
      first: where the first one begins.
      size: format of the size.
      size_at: where in a chunk it is.
      head: bytes before the content.
      counted: bytes of them that the size counts.
      align: chunks begin at multiples of this.
      samples: names of the chunk that holds the samples.
    """

    first: int
    size: str
    size_at: int
    head: int
    counted: int
    align: int
    samples: tuple[bytes, ...]


_LITTLE = _Layout(12, "<I", 4, 8, 0, 2, (b"data",))
_LAYOUTS = {
    b"RIFF": _LITTLE,
    b"RF64": _LITTLE,
    b"BW64": _LITTLE,
    b"RIFX": _LITTLE._replace(size=">I"),
    b"FORM": _LITTLE._replace(size=">I", samples=(b"SSND", b"BODY")),
    b"caff": _Layout(8, ">q", 4, 12, 0, 1, (b"data",)),
    b"riff": _Layout(40, "<q", 16, 24, 24, 8, (b"data",)),
}


def _chunked(encoded: bytes, name: str, notes: list[Note]) -> list[Stream]:
    """Read WAV, RF64, Wave64, AIFF, 8SVX or CAF."""
    layout = _LAYOUTS[encoded[:4]]
    tag, long_size = 0, None
    place = layout.first
    while place + layout.head <= len(encoded):
        size = struct.unpack_from(layout.size, encoded, place + layout.size_at)[0]
        size = size - layout.counted
        body, kind = place + layout.head, encoded[place : place + 4]
        if kind in layout.samples:
            break
        if kind == b"fmt " and body + 2 <= len(encoded):
            tag = struct.unpack_from(layout.size[0] + "H", encoded, body)[0]
        elif kind == b"ds64" and body + 16 <= len(encoded):
            long_size = struct.unpack_from("<q", encoded, body + 8)[0]
        place = _aligned(body + max(size, 0), layout.align)
    else:
        # No samples; the decoder says so. Those of AVI are deeper in lists.
        promised = 8 + struct.unpack_from(layout.size[0] + "I", encoded.ljust(8, b"\0"), 4)[0]
        streamed = encoded[8:12] != b"AVI " or promised >= STREAMED_SIZE
        missing = 0.0 if streamed else max(1 - len(encoded) / promised, 0.0)
        return [Stream(encoded, missing=missing)]

    if long_size is not None and size == 2**32 - 1:
        size = long_size
    rest = len(encoded) - body
    most = STREAMED_SIZE if layout.size[1] == "I" and long_size is None else 2**40
    unknown = size < 0 or size > rest and size >= most
    if size == 0 and rest and not _are_chunks(encoded, body, layout):
        unknown = True

    missing, more = 0.0, []
    if unknown or size > rest:
        missing = 0.0 if unknown else (size - rest) / size
        encoded = _with_size(encoded, layout, place, rest)
    elif size < rest:
        end = _end_of_samples(encoded, body + size, layout, name, notes)
        if encoded[end : end + 4] == encoded[:4]:
            encoded, more = encoded[:end], _chunked(encoded[end:], name, notes)
        elif left := _more_samples(encoded, end, layout):  # libsndfile would read them alone
            notes.append(("sound left out", f"a second chunk of samples, of {left:,} bytes"))
            encoded = encoded[:end]
        elif encoded[:4] == b"riff":  # libsndfile would read to the end of the file
            encoded = _with_size(encoded[: body + size], layout, place, size)
    if tag in _MPEG_IN_WAV and encoded[8:12] == b"WAVE":
        found = _mpeg(encoded[body : body + min(max(size, 0) or rest, rest)], name, notes)
        found[-1] = dataclasses.replace(found[-1], missing=max(found[-1].missing, missing))
        return found + more
    return [Stream(encoded, missing=missing), *more]


def _aligned(place: int, align: int) -> int:
    return -(-place // align) * align


def _with_size(encoded: bytes, layout: _Layout, place: int, size: int) -> bytes:
    """Correct the size of the chunk of samples."""
    at = place + layout.size_at
    width = struct.calcsize(layout.size)
    head = encoded[:at] + struct.pack(layout.size, size + layout.counted)
    if encoded[:4] in (b"RF64", b"BW64"):
        head = b"RIFF" + head[4:]
    return head + encoded[at + width :]


def _are_chunks(encoded: bytes, place: int, layout: _Layout) -> bool:
    """Return whether chunks follow up to the end of the file."""
    while place + layout.head <= len(encoded):
        kind = encoded[place : place + 4]
        size = struct.unpack_from(layout.size, encoded, place + layout.size_at)[0] - layout.counted
        known = kind in _CHUNKS
        if size < 0 or not known and not all(32 <= byte < 127 for byte in kind):
            return _are_tags(encoded, place)
        place = place + layout.head + size
        if place > len(encoded):
            return known
        place = _aligned(place, layout.align)
    return True


def _more_samples(encoded: bytes, place: int, layout: _Layout) -> int:
    """Return the bytes of a second chunk of samples, if chunks follow at a place, or 0."""
    if not _are_chunks(encoded, place, layout):
        return 0
    while place + layout.head <= len(encoded) and not tag_bytes(encoded, place):
        size = struct.unpack_from(layout.size, encoded, place + layout.size_at)[0] - layout.counted
        if size < 0 or encoded[place : place + 4] in layout.samples:
            return max(size, 0)
        place = _aligned(place + layout.head + size, layout.align)
    return 0


def _are_tags(encoded: bytes, place: int) -> bool:
    """Return whether tags or zeros follow up to the end of the file."""
    while size := tag_bytes(encoded, place):
        place += size
    return place >= len(encoded)


def _end_of_samples(
    encoded: bytes, end: int, layout: _Layout | None, name: str, notes: list[Note]
) -> int:
    """Return where the samples of a file end, given where they should; refuse if more follow."""
    places = [end]
    if layout:
        # Some writers leave out the byte that makes the size even.
        places.insert(0, _aligned(end, layout.align))
        for place in places:
            if encoded[place : place + 4] == encoded[:4]:
                return place
            if _are_chunks(encoded, place, layout):
                return place
    if any(_are_tags(encoded, place) for place in places):
        if not layout:  # some players take what follows for samples
            notes.append(("bytes left out", f"{len(encoded) - end:,} bytes after the samples"))
        return end

    more = len(encoded) - end
    if more > max(INAUDIBLE_SHARE * len(encoded), _INAUDIBLE_BYTES):
        raise BadFileError(
            f"{name}: its header says that the samples end at byte {end:,}, but {more:,} bytes "
            "follow that are nothing known; if the header was written before the recording ended, "
            "`ffmpeg -ignore_length 1 -i FILE OUTPUT.wav` corrects it",
            "header too short",
        )
    notes.append(("bytes left out", f"{more:,} bytes after the samples"))
    return end


def _au(encoded: bytes, name: str, notes: list[Note]) -> list[Stream]:
    order = ">" if encoded[:4] == b".snd" else "<"
    if len(encoded) < 24:
        return [Stream(encoded)]
    body, size = struct.unpack_from(order + "II", encoded, 4)
    rest = len(encoded) - body
    if rest <= 0:
        return [Stream(encoded)]
    if size == 0 or size >= STREAMED_SIZE and size > rest:
        return [Stream(encoded[:8] + struct.pack(order + "I", rest) + encoded[12:])]
    if size > rest:
        return [Stream(encoded, missing=(size - rest) / size)]
    end = body + size
    if encoded[end : end + 4] == encoded[:4]:
        return [Stream(encoded[:end]), *_au(encoded[end:], name, notes)]
    if size < rest:
        _end_of_samples(encoded, end, None, name, notes)
    return [Stream(encoded)]


class _Page(NamedTuple):
    """A page of Ogg."""

    start: int
    end: int
    flags: int
    granule: int
    serial: int


_FIRST_PAGE, _LAST_PAGE = 2, 4
_SOUND_IN_OGG = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")


def _ogg(encoded: bytes, notes: list[Note]) -> list[Stream]:
    """Separate the links of a chain, and take the first stream of sound of each."""
    links: list[list[_Page]] = []
    begun = False  # whether the link has pages after its first ones
    lost = place = 0
    cut = False
    while 0 <= place < len(encoded):
        if encoded[place : place + 4] != b"OggS" or place + 27 > len(encoded):
            cut = encoded[place : place + 4] in (b"OggS", b"Ogg", b"Og", b"O")
            following = encoded.find(b"OggS", place + 1)
            lost += (len(encoded) if following < 0 else following) - place
            place = following
            continue
        flags = encoded[place + 5]
        granule, serial = struct.unpack_from("<qI", encoded, place + 6)
        table = encoded[place + 27 : place + 27 + encoded[place + 26]]
        page = _Page(place, place + 27 + encoded[place + 26] + sum(table), flags, granule, serial)
        if not links or flags & _FIRST_PAGE and begun:
            links.append([])
        begun = not flags & _FIRST_PAGE
        links[-1].append(page)
        place = page.end
    if lost and not cut and not tag_bytes(encoded, len(encoded) - lost):
        notes.append(("bytes left out", f"{lost:,} bytes that are no pages of Ogg"))

    streams = []
    for pages in links:
        serial = _sound_in(encoded, pages)
        if serial is not None:
            streams.append(_ogg_stream(encoded, pages, serial, notes))
    if cut and streams:  # within the head of a page, which would say how long it is
        streams[-1] = dataclasses.replace(streams[-1], missing=1.0)
    return streams or [Stream(encoded)]


def _sound_in(encoded: bytes, pages: list[_Page]) -> int | None:
    """Return the serial number of the first stream of sound of a link."""
    for page in pages:
        start = page.start + 27 + encoded[page.start + 26] if page.start + 27 <= page.end else 0
        if page.flags & _FIRST_PAGE and encoded[start : start + 8].startswith(_SOUND_IN_OGG):
            return page.serial
    return pages[0].serial if len({page.serial for page in pages}) == 1 else None


def _ogg_stream(encoded: bytes, pages: list[_Page], serial: int, notes: list[Note]) -> Stream:
    mine = [page for page in pages if page.serial == serial]
    last = mine[-1]
    if len(mine) == len(pages):
        data = encoded[pages[0].start : pages[-1].end]
    else:
        data = b"".join(encoded[page.start : page.end] for page in mine)

    if last.end <= len(encoded):
        if not last.flags & _LAST_PAGE:
            notes.append(("no end mark", "the last page of its Ogg stream is not marked as such"))
        return Stream(data)
    # The page that is cut off says how many samples precede its end.
    before = max((page.granule for page in mine[:-1]), default=0)
    known = last.granule > before > 0
    return Stream(data, missing=(last.granule - before) / last.granule if known else 1.0)


def _flac(encoded: bytes, name: str, notes: list[Note]) -> list[Stream]:
    """Separate FLAC files that follow one another; correct the number of samples."""
    starts = [place for place in _places_of(b"fLaC", encoded) if _is_flac(encoded, place)]
    if not starts or starts[0] != 0:
        return [Stream(encoded)]
    streams = []
    for start, end in zip(starts, [*starts[1:], len(encoded)], strict=True):
        data = encoded[start:end]
        if len(data) < 42:
            streams.append(Stream(data, missing=1.0))
            continue
        total = (data[21] & 15) << 32 | struct.unpack_from(">I", data, 22)[0]
        found, last = flac_samples(data, name)
        # FLAC that was split as it is keeps the number of samples of all its parts.
        split = 0 < found < (1 - INAUDIBLE_SHARE) * total and is_whole(data[last:])
        if found > total or split:
            if total:
                kind = "more promised" if split else "wrong length"
                notes.append((kind, f"{total:,} samples in its header, {found:,} in its frames"))
            number = struct.pack(">BI", data[21] & 0xF0 | found >> 32, found & 0xFFFFFFFF)
            data, total = data[:21] + number + data[26:], found
        streams.append(Stream(data, frames=total or None))
    return streams


def _places_of(name: bytes, encoded: bytes) -> list[int]:
    """Find a name of four bytes, of which most files have one, several times as fast as `re`."""
    values = np.frombuffer(encoded, np.uint8)
    for start in range(1, len(encoded) - 3, _STEP):
        part = values[start : start + _STEP + 2]
        alike = part[:-2] == name[0]
        alike &= part[1:-1] == name[1]
        alike &= part[2:] == name[2]
        if alike.any():
            return [match.start() for match in re.finditer(re.escape(name), encoded)]
    return [0] if encoded.startswith(name) else []


def _is_flac(encoded: bytes, place: int) -> bool:
    """Return whether the first block of a FLAC file follows its name."""
    return encoded[place + 4 : place + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22")


def _mpeg(encoded: bytes, name: str, notes: list[Note]) -> list[Stream]:
    """Separate MPEG streams, with the number of frames that the file has."""
    found, between, outside = mpeg_streams(encoded)
    if not found:
        return [Stream(encoded[tag_bytes(encoded, 0) :])]
    if between > INAUDIBLE_SHARE * len(encoded):
        raise BadFileError(
            f"{name}: damaged, {between:,} bytes between its frames are none", "unreadable"
        )
    if between:
        notes.append(("incomplete", f"{between:,} bytes between its frames are damaged"))
    if outside:
        notes.append(("bytes left out", f"{outside:,} bytes that are no whole frames"))
    if any(stream.wrong for stream in found):
        notes.append(("wrong length", "its header gives fewer frames than follow; all were read"))
    return [Stream(stream.data, stream.frames, stream.missing) for stream in found]
