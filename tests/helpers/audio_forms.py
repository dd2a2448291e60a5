"""One recording in every form that people store recordings in, and what must come of each."""

import dataclasses
import functools
import io
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from c2f_jax.decoding.flac_frames import is_whole

RATE, SECONDS = 16_000, 3.0


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to store a recording.

    Attributes:
      container: what a user calls the file.
      codec: how samples are coded.
      quirk: what is odd about it.
      data: the file.
      seconds: what must be decoded, or the kind of the error.
      note: kind of the note that must be made.
      slack: seconds that an encoder may add or a cut may take.
      repeats: how often the recording is in it.
    """

    container: str
    codec: str
    quirk: str
    data: bytes
    seconds: float | str = SECONDS
    note: str = ""
    slack: float = 0.0
    repeats: int = 1


def speech(seconds=SECONDS, rate=RATE, seed=0):
    """Make noise and tones in syllables, of a shape that is nowhere the same."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    envelope = np.interp(time, np.linspace(0, seconds, 24), rng.uniform(0.0, 1.0, 24))
    tones = sum(np.sin(2 * np.pi * hertz * time + hertz) for hertz in (180, 420, 950, 1700))
    return (0.06 * envelope * (tones + 0.3 * rng.standard_normal(len(time)))).astype(np.float32)


def stored(wave, rate=RATE, container="WAV", subtype=None, endian=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=container, subtype=subtype, endian=endian)
    return buffer.getvalue()


def patched(data, place, layout, value):
    changed = bytearray(data)
    struct.pack_into(layout, changed, place, value)
    return bytes(changed)


def riff(kind, wave):
    """Return a WAV and the place of its data chunk's size."""
    data = stored(wave, container=kind)
    return data, data.index(b"data") + 4


def plain_forms(wave):
    """Yield each container and codec that soundfile writes."""
    for container in sorted(soundfile.available_formats()):
        if container in ("RAW", "SD2", "WVE", "XI"):  # no header, two files, fixed rates
            continue
        for codec in sorted(soundfile.available_subtypes(container)):
            # At 16 kHz these have no rate, or one that is nearly so.
            half = codec == "GSM610" or container == "VOC"
            try:
                data = stored(wave[:: 1 + half], RATE // (1 + half), container, codec)
            except (soundfile.SoundFileError, ValueError):
                continue
            slack = 0.1 if codec not in LOSSLESS else 0.0
            yield Form(container, codec, "", data, slack=slack or 0.001 * half)


LOSSLESS = ("PCM_16", "PCM_24", "PCM_32", "PCM_S8", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW")


def wav_forms(wave):
    data, size = riff("WAV", wave)
    length = struct.unpack_from("<I", data, size)[0]
    body = size + 4
    form = functools.partial(Form, "WAV", "PCM_16")
    for value in (0, 2**32 - 1, 2**31 - 1, 0x7FFFF000, 2**31):
        yield form(f"data size {value:#x}, streamed", patched(data, size, "<I", value))
    both = patched(patched(data, size, "<I", 2**32 - 1), 4, "<I", 2**32 - 1)
    yield form("both sizes 0xFFFFFFFF", both)
    both = patched(patched(data, size, "<I", 0), 4, "<I", 0)
    yield form("both sizes 0", both)
    yield form("RIFF size 0", patched(data, 4, "<I", 0))
    for more in (2, 44, 800):
        yield form(
            f"data size {more} too large",
            patched(data, size, "<I", length + more),
            note="incomplete",
        )
    yield form("data size twice", patched(data, size, "<I", 2 * length), "truncated")
    yield form("header written after 1 s", patched(data, size, "<I", 32_000), "header too short")
    yield form("header written at the start", patched(data, size, "<I", 2), "header too short")
    yield form(
        "data size 10 too small",
        patched(data, size, "<I", length - 10),
        note="bytes left out",
        slack=0.001,
    )
    yield form("cut in half", data[: len(data) // 2], "truncated")
    yield form("last 0.5 % missing", data[: -length // 200], note="incomplete", slack=0.02)
    notes = (
        b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf59.27.100\0"
    )
    yield form("LIST after the samples", data + notes)
    yield form("LIST before the samples", data[: size - 4] + notes + data[size - 4 :])
    yield form(
        "unknown size, LIST before",
        patched(data[: size - 4], 4, "<I", 2**32 - 1)
        + notes
        + b"data\xff\xff\xff\xff"
        + data[body:],
    )
    yield form("bytes after the last chunk", data + notes + b"\0" * 600)
    yield form("ID3 tag after the samples", data + b"ID3\4\0\0\0\0\7\x76" + bytes(1014))
    yield form("ID3v1 after the samples", data + b"TAG" + b"x" * 125)
    yield form("two files joined", data + data, 2 * SECONDS, "several streams", repeats=2)
    second = b"data" + struct.pack("<I", 3200) + bytes(3200)
    yield form("a second data chunk", data + second, note="sound left out")
    yield form("fact and PEAK chunks", stored(wave, subtype="FLOAT"))
    yield form("big endian (RIFX)", stored(wave, endian="BIG"))
    eight = stored(wave[:-1], subtype="PCM_U8")  # an odd number of bytes
    eight = eight[: eight.index(b"data") + 8 + len(wave) - 1]
    yield Form("WAV", "PCM_U8", "odd size, no padding", eight + notes, slack=0.001)
    for kind in ("RF64", "WAVEX"):
        long, place = riff(kind, wave)
        where = long.index(b"ds64") + 16 if kind == "RF64" else place
        layout = "<q" if kind == "RF64" else "<I"
        form = functools.partial(Form, kind, "PCM_16")
        yield form("size 0, streamed", patched(long, where, layout, 0))
        yield form(
            "largest size, streamed",
            patched(long, where, layout, -1 if kind == "RF64" else 2**32 - 1),
        )
        yield form(
            "data size 44 too large", patched(long, where, layout, length + 44), note="incomplete"
        )
        yield form("cut in half", long[: len(long) // 2], "truncated")
        yield form(
            "header written after 1 s", patched(long, where, layout, 32_000), "header too short"
        )


def other_header_forms(wave):
    length = 2 * len(wave)
    for kind, name, ahead, layout, extra in (
        ("W64", b"data\xf3\xac", 16, "<q", 24),
        ("CAF", b"data", 4, ">q", 4),
        ("AIFF", b"SSND", 4, ">I", 8),
        ("AU", b".snd", 8, ">I", 0),
        ("SVX", b"BODY", 4, ">I", 0),
    ):
        data = stored(wave, container=kind, subtype="PCM_16")
        place = data.index(name) + ahead
        form = functools.partial(Form, kind, "PCM_16")
        biggest = -1 if layout[1] == "q" else 2**32 - 1
        yield form("largest size, streamed", patched(data, place, layout, biggest))
        if kind != "SVX":
            yield form("size 0, streamed", patched(data, place, layout, 0))
        yield form(
            "size 40 too large",
            patched(data, place, layout, length + extra + 40),
            note="incomplete",
        )
        yield form("cut in half", data[: len(data) // 2], "truncated")
        yield form(
            "header written after 1 s",
            patched(data, place, layout, 32_000 + extra),
            "header too short",
        )
    for kind in ("NIST", "VOC", "AVR", "MPC2K", "MAT4", "MAT5", "SDS"):
        data = stored(wave, container=kind)
        yield Form(
            kind,
            soundfile.default_subtype(kind),
            "cut in half",
            data[: len(data) // 2],
            "truncated",
        )


def flac_frame_starts(data):
    """Find the frames of a FLAC by their checksums."""
    first = place = data.index(b"\xff\xf8", 42)
    starts = [first]
    while (place := data.find(b"\xff\xf8", place + 1)) > 0:
        if is_whole(data[starts[-1] : place]):
            starts.append(place)
    return starts


def flac_forms(wave):
    data = stored(wave, container="FLAC")
    form = functools.partial(Form, "FLAC", "PCM_16")

    def with_total(total):
        return data[:21] + bytes([data[21] & 0xF0]) + struct.pack(">I", total) + data[26:]

    yield form("unknown length", with_total(0))
    yield form("length too small", with_total(20_000), note="wrong length")
    yield form("length 20 too large", with_total(len(wave) + 20), note="incomplete")
    yield form("length twice", with_total(2 * len(wave)), note="more promised")
    yield form("cut in half", data[: len(data) // 2], "truncated")
    # As `ffmpeg -f segment -c copy` does: frames of a later part, under the head of the whole.
    starts = flac_frame_starts(data)
    part = data[: starts[0]] + data[starts[3] :]
    yield form(
        "without its first frames", part, SECONDS - 3 * 4096 / RATE, "more promised", repeats=0
    )
    yield form("ID3v2 before", b"ID3\4\0\0\0\0\1\0" + bytes(128) + data)
    yield form("ID3v1 after", data + b"TAG" + b"x" * 125)
    yield form("zeros after", data + bytes(3000))
    yield form("two files joined", data * 2, 2 * SECONDS, "several streams", repeats=2)
    yield form(
        "unknown lengths, joined", with_total(0) * 3, 3 * SECONDS, "several streams", repeats=3
    )


def ogg_forms(wave):
    for codec in ("VORBIS", "OPUS"):
        data = stored(wave, container="OGG", subtype=codec)
        other = stored(wave, 48_000 if codec == "OPUS" else 44_100, "OGG", codec)
        form = functools.partial(Form, "OGG", codec, slack=0.01)
        yield form("two links", data * 2, 2 * SECONDS, "several streams", repeats=2)
        yield form("five links", data * 5, 5 * SECONDS, "several streams", repeats=5)
        yield form(
            "links of other rates",
            data + other,
            SECONDS + len(wave) / soundfile.info(io.BytesIO(other)).samplerate,
            "several streams",
            repeats=0,
        )
        yield form("cut in half", data[: len(data) // 2], "truncated")
        yield form("ID3v2 before", b"ID3\4\0\0\0\0\1\0" + bytes(128) + data)
        yield form("bytes after", data + b"junk" * 20, note="bytes left out")


def mp3_forms(wave):
    data = stored(wave, container="MP3")
    form = functools.partial(Form, "MP3", "LAYER_III", slack=0.11)
    first = len(data) - len(without_header(data))
    bare = data[first:]
    yield form("no Xing header", bare)
    yield form("ID3v2, cover of 300 kB", b"ID3\4\0\0\0\x12\x27\x60" + bytes(300_000) + data)
    yield form("two ID3v2 tags", (b"ID3\4\0\0\0\0\1\0" + bytes(128)) * 2 + data)
    yield form(
        "ID3v2 with a footer", b"ID3\4\0\x10\0\0\1\0" + bytes(128) + b"3DI\4\0\x10\0\0\1\0" + data
    )
    yield form("ID3v1 after", data + b"TAG" + b"x" * 125)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 64, 3, 0) + bytes(8)
    yield form("APE tag after", data + ape[:20] + b"\0\0\0\xa0" + bytes(8) + bytes(1968) + ape)
    yield form("zeros before", bytes(5000) + data)
    yield form("two files joined", data * 2, 2 * SECONDS, "several streams", repeats=2)
    yield form("joined, no Xing header", bare * 2, 2 * SECONDS, repeats=2, slack=0.25)
    yield form(
        "joined, one Xing header", data + bare, 2 * SECONDS, "wrong length", repeats=2, slack=0.25
    )
    yield form(
        "joined with tags",
        (b"ID3\4\0\0\0\0\1\0" + bytes(128) + data + b"TAG" + b"x" * 125) * 3,
        3 * SECONDS,
        "several streams",
        repeats=3,
    )
    other = stored(speech(rate=44_100), 44_100, "MP3")
    yield form(
        "joined, other rates", data + other, 2 * SECONDS, "several streams", repeats=2, slack=0.2
    )
    yield form("Xing header, cut in half", data[: len(data) // 2], "truncated")
    wrapped = b"WAVEfmt " + struct.pack(
        "<IHHIIHHHHIHHH", 30, 0x55, 1, RATE, 3000, 1, 0, 12, 1, 2, 108, 1, 1393
    )
    wrapped += b"data" + struct.pack("<I", len(bare)) + bare
    wrapped = b"RIFF" + struct.pack("<I", len(wrapped)) + wrapped
    yield Form("WAV", "MP3", "no Xing header", wrapped, slack=0.11)
    yield Form("WAV", "MP3", "cut in half", wrapped[: len(wrapped) // 2], "truncated")


def without_header(data):
    """Take the Xing frame off an MP3 file."""
    sync = data[:2]
    place = data.index(sync, 4)
    while data[place + 2] & 0x0C != data[2] & 0x0C:
        place = data.index(sync, place + 1)
    return data[place:]


def channel_forms(wave):
    rng = np.random.default_rng(1)
    noise = [rng.normal(0, 1.5e-3, len(wave)).astype(np.float32) for _ in range(6)]
    zero = np.zeros_like(wave)
    yield Form("WAV", "PCM_16", "2 channels, equal", stored(np.stack([wave] * 2, 1)))
    yield Form(
        "WAV",
        "PCM_16",
        "2, opposite phase",
        stored(np.stack([wave + noise[0], noise[1] - wave], 1)),
        note="out of phase",
    )
    yield Form(
        "WAV",
        "PCM_16",
        "2, opposite and half as loud",
        stored(np.stack([wave, -0.5 * wave], 1)),
        note="out of phase",
    )
    offset = np.stack([wave + 0.2, 0.2 - wave], 1)
    yield Form("WAV", "PCM_16", "2, opposite, with an offset", stored(offset), note="out of phase")
    yield Form(
        "OGG",
        "VORBIS",
        "2, opposite phase",
        stored(np.stack([wave, -wave], 1), container="OGG"),
        note="out of phase",
        slack=0.01,
    )
    yield Form(
        "WAV", "PCM_16", "2, one silent", stored(np.stack([wave, zero], 1)), note="silent channel"
    )
    yield Form(
        "WAV",
        "PCM_16",
        "4, two of them opposite",
        stored(np.stack([wave, -wave, *noise[:2]], 1)),
        note="out of phase",
    )
    half = np.where(np.arange(len(wave)) < len(wave) // 2, wave, -wave)
    yield Form(
        "WAV",
        "PCM_16",
        "2, opposite in the second half",
        stored(np.stack([wave, half], 1)),
        note="out of phase",
    )
    yield Form(
        "WAVEX", "PCM_16", "5.1, all equal", stored(np.stack([wave] * 6, 1), container="WAVEX")
    )
    yield Form(
        "FLAC",
        "PCM_16",
        "5.1, speech in the center",
        stored(np.stack([zero, zero, wave, zero, zero, zero], 1), container="FLAC"),
        note="silent channel",
    )


def gain_forms(wave):
    for codec, scale in (
        ("FLOAT", 2.0**15),
        ("DOUBLE", 2.0**15),
        ("FLOAT", 2.0**23),
        ("DOUBLE", 2.0**31),
        ("FLOAT", 4.0),
    ):
        yield Form(
            "WAV",
            codec,
            f"samples up to {scale:,.0f}",
            stored(wave / abs(wave).max() * scale, subtype=codec),
            note="scaled",
        )
    spoiled = wave.copy()
    spoiled[1000] = 1e20
    yield Form(
        "WAV", "FLOAT", "one sample of 1e20", stored(spoiled, subtype="FLOAT"), note="clipped"
    )
    yield Form(
        "MAT5",
        "DOUBLE",
        "samples up to 32,768",
        stored(wave / abs(wave).max() * 2.0**15, container="MAT5"),
        note="scaled",
    )


def rate_forms():
    for rate in (
        8_000,
        11_025,
        12_000,
        22_050,
        24_000,
        32_000,
        44_100,
        48_000,
        88_200,
        96_000,
        176_400,
        192_000,
        384_000,
    ):
        yield Form("WAV", "PCM_16", f"{rate:,} Hz", stored(speech(rate=rate), rate), slack=0.0001)
    for rate in (44_100, 48_000, 96_000):
        yield Form(
            "FLAC",
            "PCM_24",
            f"{rate:,} Hz",
            stored(speech(rate=rate), rate, "FLAC", "PCM_24"),
            slack=0.0001,
        )


# Container | codec | quirk | seconds that may be added | command; IN and OUT are files.
COMMANDS = """
MP3 | LAYER_III | VBR, no Xing header | 0.11 | ffmpeg -i IN -ar 44100 LAME -q:a 5 OUT.mp3
MP3 | LAYER_III | 24 kHz, no Xing header | 0.11 | ffmpeg -i IN -ar 24000 LAME -b:a 64k OUT.mp3
MP3 | LAYER_III | ffmpeg, Xing header | 0.11 | ffmpeg -i IN -c:a libmp3lame OUT.mp3
MP3 | LAYER_III | ffmpeg, 8 kHz (MPEG 2.5) | 0.2 | ffmpeg -i IN -ar 8000 LAME OUT.mp3
MP3 | LAYER_III | lame, free format | 0.11 | lame --quiet --freeformat -b 320 IN OUT.mp3
MP3 | LAYER_III | free format, no Xing | 0.11 | lame --quiet -t --freeformat -b 200 IN OUT.mp3
MP3 | LAYER_III | lame, VBR | 0.11 | lame --quiet -V4 IN OUT.mp3
MP3 | LAYER_III | lame, ABR, no Xing header | 0.11 | lame --quiet -t --abr 56 IN OUT.mp3
MP3 | LAYER_III | lame, checksums | 0.11 | lame --quiet -p -b 64 IN OUT.mp3
MP2 | LAYER_II | ffmpeg | 0.11 | ffmpeg -i IN -c:a mp2 -b:a 64k OUT.mp2
WAV | MP3 | ffmpeg | 0.11 | ffmpeg -i IN -ar 44100 -c:a libmp3lame -f wav OUT.wav
WAV | PCM_S16LE | ffmpeg to a pipe | 0 | ffmpeg -i IN -f wav pipe:1
WAV | PCM_S16LE | sox to a pipe | 0 | sox IN -t wav -
WAV | ADPCM_MS | ffmpeg | 0.1 | ffmpeg -i IN -c:a adpcm_ms OUT.wav
WAV | ADPCM_IMA | ffmpeg | 0.13 | ffmpeg -i IN -c:a adpcm_ima_wav OUT.wav
WAV | PCM_F32LE | ffmpeg | 0 | ffmpeg -i IN -c:a pcm_f32le OUT.wav
WAV | GSM | sox | 0.05 | sox IN -r 8000 -e gsm-full-rate OUT.wav
RF64 | PCM_S16LE | ffmpeg | 0 | ffmpeg -i IN -rf64 always OUT.wav
W64 | PCM_S16LE | ffmpeg | 0 | ffmpeg -i IN OUT.w64
W64 | PCM_S16LE | ffmpeg to a pipe | 0 | ffmpeg -i IN -f w64 pipe:1
AIFF | PCM_S16BE | ffmpeg | 0 | ffmpeg -i IN OUT.aiff
AIFF | PCM_S24BE | ffmpeg | 0 | ffmpeg -i IN -c:a pcm_s24be OUT.aiff
AIFF | PCM_S16BE | ffmpeg to a pipe | 0 | ffmpeg -i IN -f aiff pipe:1
AU | PCM_S16BE | ffmpeg to a pipe | 0 | ffmpeg -i IN -f au pipe:1
AU | PCM_S16BE | sox to a pipe | 0 | sox IN -t au -
CAF | PCM_S16LE | ffmpeg | 0 | ffmpeg -i IN OUT.caf
CAF | ALAC | ffmpeg | 0.01 | ffmpeg -i IN -c:a alac OUT.caf
NIST | PCM_16 | sox | 0 | sox IN OUT.sph
VOC | PCM_16 | sox | 0 | sox IN OUT.voc
VOC | PCM_16 | ffmpeg | 0 | ffmpeg -i IN OUT.voc
FLAC | PCM_16 | flac | 0 | flac --silent IN -o OUT.flac
FLAC | PCM_16 | ffmpeg to a pipe | 0 | ffmpeg -i IN -f flac pipe:1
FLAC | PCM_16 | flac to a pipe | 0 | flac --silent -c IN
OGG | FLAC | flac --ogg | 0 | flac --silent --ogg IN -o OUT.oga
OGG | FLAC | ffmpeg | 0 | ffmpeg -i IN -c:a flac OUT.oga
OGG | OPUS | opusenc | 0.01 | opusenc --quiet IN OUT.opus
OGG | OPUS | ffmpeg, VoIP | 0.05 | ffmpeg -i IN -c:a libopus -application voip OUT.opus
OGG | VORBIS | oggenc | 0.01 | oggenc -Q IN -o OUT.ogg
OGG | VORBIS | ffmpeg to a pipe | 0.05 | ffmpeg -i IN -c:a libvorbis -f ogg pipe:1
OGG | SPEEX | ffmpeg | 0.1 | ffmpeg -i IN -c:a libspeex OUT.spx
M4A | AAC | ffmpeg | 0.08 | ffmpeg -i IN -c:a aac OUT.m4a
M4A | AAC | ffmpeg, moov first | 0.08 | ffmpeg -i IN -c:a aac -movflags +faststart OUT.m4a
M4A | AAC | fragments | 0.15 | ffmpeg -i IN -movflags frag_keyframe+empty_moov OUT.m4a
M4A | ALAC | ffmpeg | 0.01 | ffmpeg -i IN -c:a alac OUT.m4a
MP4 | AAC | ffmpeg, with pictures | 0.08 | ffmpeg PICTURES -i IN -c:a aac OUT.mp4
AAC | AAC | ffmpeg, ADTS | 0.2 | ffmpeg -i IN -c:a aac OUT.aac
3GP | AAC | ffmpeg | 0.08 | ffmpeg -i IN -c:a aac OUT.3gp
WebM | OPUS | ffmpeg | 0.05 | ffmpeg -i IN -c:a libopus OUT.webm
WebM | OPUS | ffmpeg, begins at 0.5 s | 0.05 | ffmpeg -i IN -c:a libopus LATER OUT.webm
Matroska | FLAC | ffmpeg, second of two tracks | 0 | ffmpeg SINE -i IN TRACKS -c:a flac OUT.mka
WebM | OPUS | ffmpeg to a pipe | 0.05 | ffmpeg -i IN -c:a libopus -f webm pipe:1
WebM | VORBIS | ffmpeg | 0.05 | ffmpeg -i IN -c:a libvorbis OUT.webm
Matroska | FLAC | ffmpeg | 0.01 | ffmpeg -i IN -c:a flac OUT.mka
Matroska | PCM_S16LE | ffmpeg, with pictures | 0.01 | ffmpeg PICTURES -i IN -c:a pcm_s16le OUT.mkv
3GP | AMR_NB | ffmpeg | 0.1 | ffmpeg -i IN -ar 8000 -c:a libopencore_amrnb OUT.3gp
AMR | AMR_NB | ffmpeg | 0.1 | ffmpeg -i IN -ar 8000 -c:a libopencore_amrnb OUT.amr
WMA | WMAV2 | ffmpeg | 0.2 | ffmpeg -i IN -c:a wmav2 OUT.wma
AC-3 | AC3 | ffmpeg | 0.1 | ffmpeg -i IN -ar 48000 -c:a ac3 OUT.ac3
MPEG-TS | AAC | ffmpeg | 0.2 | ffmpeg -i IN -c:a aac OUT.ts
AVI | MP3 | ffmpeg, with pictures | 0.2 | ffmpeg PICTURES -i IN -ar 44100 -c:a libmp3lame OUT.avi
FLV | AAC | ffmpeg | 0.2 | ffmpeg -i IN -c:a aac OUT.flv
WavPack | WAVPACK | ffmpeg | 0.01 | ffmpeg -i IN -c:a wavpack OUT.wv
TTA | TTA | ffmpeg | 0.01 | ffmpeg -i IN -c:a tta OUT.tta
"""
# What a command may abbreviate.
SHORT = {
    "LATER": "-output_ts_offset 0.5",
    "SINE": "-f lavfi -i sine=300:d=3",
    "TRACKS": "-map 0:a -map 1:a -disposition:a:0 0 -disposition:a:1 default",
    "PICTURES": "-f lavfi -i testsrc=d=3:s=64x48",
    "LAME": "-c:a libmp3lame -write_xing 0",
}


def tool_forms(wave, folder):
    """Yield what the programs that are installed write, and halves of some of it."""
    folder = Path(folder)
    soundfile.write(folder / "in.wav", wave, RATE)
    for number, line in enumerate(COMMANDS.strip().splitlines()):
        container, codec, quirk, slack, command = line.split(" | ")
        for word, meaning in SHORT.items():
            command = command.replace(word, meaning)
        words = command.split()
        if not shutil.which(words[0]):
            continue
        if words[0] == "ffmpeg":
            words[1:1] = ["-v", "error", "-y"]
        for place, word in enumerate(words):
            if word == "IN":
                words[place] = str(folder / "in.wav")
            elif word.startswith("OUT."):
                words[place] = str(folder / f"{number}{word[3:]}")

        done = subprocess.run(words, capture_output=True)
        if done.returncode:  # an encoder that this build lacks
            print(f"not made here: {command}", file=sys.stderr)
            continue
        made = list(folder.glob(f"{number}.*"))
        data = made[0].read_bytes() if made else done.stdout
        note = "several tracks" if quirk.endswith("tracks") else ""
        form = functools.partial(Form, container, codec, slack=float(slack))
        yield form(quirk, data, note=note)
        if quirk.endswith("moov first") or container in ("WavPack", "AVI", "FLV"):
            yield form(f"{quirk}, cut in half", data[: len(data) // 2], "truncated")
        if container in ("M4A", "FLV", "TTA") and not quirk.endswith("first"):
            both = {"seconds": 2 * SECONDS, "note": "several streams", "repeats": 2}
            yield form(f"{quirk}, two joined", data * 2, **both | {"slack": 2 * float(slack)})


def forms_by_hand(wave=None):
    """Return the forms that need no program."""
    wave = speech() if wave is None else wave
    makers = (
        plain_forms,
        wav_forms,
        other_header_forms,
        flac_forms,
        ogg_forms,
        mp3_forms,
        channel_forms,
        gain_forms,
    )
    return [form for make in makers for form in make(wave)] + list(rate_forms())


def all_forms():
    """Return all forms that can be made here."""
    with tempfile.TemporaryDirectory() as folder:
        return forms_by_hand() + list(tool_forms(speech(), folder))
