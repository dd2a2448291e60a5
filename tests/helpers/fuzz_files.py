"""Damaged and odd files by the thousand, each with what must come of it; also run as a script, in a
process of its own.

    python tests/fuzz_files.py COUNT SEED FOLDER [bombs]

prints one JSON object: the number of files of each kind, those accepted, complaints, the slowest
file, peak memory.
"""

import collections
import io
import itertools
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from c2f_jax.data.manifest import read_listing
from c2f_jax.decoding.audio import decode_audio, read_recording
from c2f_jax.decoding.images import decode_image
from c2f_jax.errors import UserError

AUDIO = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
)
IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SIZE = 16
# What may come of a file: an error that names it; the content of another file; anything sane.
REFUSED, SAME, SANE = "refused", "same", "sane"


def sound(rng, kind="WAV", subtype="PCM_16", rate=16_000, count=4800, channels=1):
    tone = 0.3 * np.sin(np.arange(count)[:, None] * rng.uniform(0.02, 0.4, channels)) + rng.normal(
        0, 0.05, (count, channels)
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(tone, -0.9, 0.9), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def shot(rng, kind="PNG", size=(40, 30), mode="RGB", **options):
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    pixels.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width, height, rows=b"", bits=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zeros_flac(count):
    """FLAC of silence, a thousandth of what it decodes to."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(count // 10_000_000):
            file.write(np.zeros(10_000_000, np.int16))
    return buffer.getvalue()


def cases(rng, folder):
    """Endless (kind, medium, data or path, what must come of it, the file of the same content or
    None)."""
    while True:
        container, subtype = AUDIO[rng.integers(len(AUDIO))]
        format_ = IMAGES[rng.integers(len(IMAGES))]
        audio, image = sound(rng, container, subtype), shot(rng, format_)
        for medium, whole in (("audio", audio), ("image", image)):
            cut = int(len(whole) * rng.uniform(0.005, 0.995))
            yield (
                f"truncated {container if medium == 'audio' else format_}",
                medium,
                whole[:cut],
                REFUSED,
                whole,
            )
            flipped = np.frombuffer(whole, np.uint8).copy()
            places = rng.integers(len(flipped), size=2 ** rng.integers(0, 7))
            flipped[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
            yield "bits flipped", medium, flipped.tobytes(), SANE, None
            start = np.frombuffer(whole, np.uint8).copy()
            start[: rng.integers(4, 80)] ^= np.uint8(rng.integers(1, 256))
            yield "header spoiled", medium, start.tobytes(), SANE, None
            noise = rng.bytes(int(rng.integers(1, 3000)))
            yield "start and noise", medium, whole[: rng.integers(4, 60)] + noise, SANE, None
            yield "noise", medium, noise, SANE, None
            yield "empty", medium, b"", REFUSED, None
        yield "audio as picture", "image", audio, REFUSED, None
        yield "picture as audio", "audio", image, REFUSED, None
        number = rng.integers(1e9)
        for name in (
            f"{number}.jpg",
            f"жаба 蛙 {number} ضفدع.wav",
            f"new\nline{number}'\";$(x).wav",
            "l" * 200 + f"{number}",
        ):
            path = folder / name
            path.write_bytes(audio)
            yield "odd name or wrong ending", "audio", str(path), SAME, audio
        for name in ("l" * 300 + ".wav", "nul\0.wav", ".", "/dev/zero", "half \udc80.wav"):
            yield (
                "impossible name",
                ("audio", "image")[rng.integers(2)],
                name if name[0] == "/" else f"{folder}/{name}",
                REFUSED,
                None,
            )
        wav = sound(rng)
        yield "streamed length", "audio", wav[:40] + b"\xff\xff\xff\xff" + wav[44:], SAME, wav
        yield (
            "length too large",
            "audio",
            wav[:40] + struct.pack("<I", int(rng.integers(1e5, 2e9))) + wav[44:],
            REFUSED,
            None,
        )
        yield (
            "channels from the header",
            "audio",
            wav[:22] + struct.pack("<H", int(rng.integers(100, 65535))) + wav[24:],
            SANE,
            None,
        )
        rate = int(rng.choice([0, 1, 3999, 2**31, 2**32 - 1]))
        yield (
            "rate from the header",
            "audio",
            wav[:24] + struct.pack("<I", rate) + wav[28:],
            REFUSED,
            None,
        )
        flac = sound(rng, "FLAC")
        yield (
            "samples from the header",
            "audio",
            flac[:21] + b"\x0f\xff\xff\xff\xff" + flac[26:],
            REFUSED,
            None,
        )
        spoiled = np.frombuffer(sound(rng, "WAV", "FLOAT"), np.float32, offset=80).copy()
        spoiled[rng.integers(len(spoiled), size=3)] = rng.choice([np.nan, np.inf, -np.inf])
        buffer = io.BytesIO()
        soundfile.write(buffer, spoiled, 16_000, format="WAV", subtype="FLOAT")
        yield "not numbers", "audio", buffer.getvalue(), REFUSED, None
        yield "1 Hz", "audio", sound(rng, rate=1), REFUSED, None
        yield "384 kHz", "audio", sound(rng, rate=384_000, count=48_000), 2000, None
        yield "8 channels", "audio", sound(rng, channels=8), 4800, None
        yield "1 x 1", "image", shot(rng, format_, (1, 1)), SANE, None
        yield "a strip", "image", shot(rng, "PNG", (20_000, 1)), "accepted", None
        yield "CMYK", "image", shot(rng, "JPEG", mode="CMYK"), "accepted", None
        deep = rng.integers(0, 65536, (20, 20)).astype(np.uint16)
        buffer = io.BytesIO()
        Image.fromarray(deep).save(buffer, "PNG")
        yield "16 bit", "image", buffer.getvalue(), "accepted", None
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 12))
        yield "EXIF", "image", shot(rng, "JPEG", exif=exif), "accepted", None
        width, height = (int(n) for n in rng.integers(20_000, 2**31 - 1, 2))
        yield "size from the header", "image", png(width, height, b"\0" * 99), REFUSED, None
        yield "20,000 px square", "image", png(20_000, 20_000, b"\0" * 99, 1, 0), REFUSED, None
        yield "fewer rows than promised", "image", png(40, 40, b"\0" * 121 * 20), SANE, None
        lines = "".join(
            f'{{"image": "{k}.png", "audio": "{k}.wav", "split": "train", "seconds": {k + 1}}}\n'
            for k in range(9)
        )
        damaged = np.frombuffer(lines.encode(), np.uint8).copy()
        damaged[rng.integers(len(damaged), size=4)] = rng.integers(0, 128, 4)
        path = folder / f"{number}.{('jsonl', 'csv')[rng.integers(2)]}"
        path.write_bytes(
            damaged.tobytes()
            + [b"", b"[" * 50_000, b"9" * 9999, b'{"image": "\\ud800"'][rng.integers(4)]
        )
        yield "manifest", "manifest", str(path), SANE, None


def bombs():
    """Small files that become large; few, for they take seconds."""
    yield "sound bomb", "audio", zeros_flac(150_000_000), REFUSED, None
    yield (
        "picture bomb, largest allowed",
        "image",
        png(10_000, 10_000, b"\0" * 10_001 * 10_000, 8, 0),
        "accepted",
        None,
    )
    yield (
        "16 bit, largest allowed",
        "image",
        png(10_000, 10_000, b"\0" * 20_001 * 10_000, 16, 0),
        "accepted",
        None,
    )
    yield (
        "text bomb",
        "image",
        png(8, 8, b"\0" * 200)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 300_000_000)),
        SANE,
        None,
    )


def decode(medium, data):
    if medium == "manifest":
        return read_listing(data, strict=False)
    return (
        decode_audio(data, name=None if isinstance(data, str) else "the file")
        if medium == "audio"
        else decode_image(data, SIZE, name=None if isinstance(data, str) else "the file")
    )


def complaint(medium, data, expected, whole):
    """What is wrong with what came of a file, or None; and whether it was accepted."""
    try:
        result = decode(medium, data)
    except UserError as e:
        named = (data if isinstance(data, str) else "the file").splitlines()[0]
        if named not in str(e):
            return f"the error does not name the file: {e}", False
        return (None if expected in (REFUSED, SANE) else f"refused: {e}"), False
    if medium == "manifest":
        return None, True
    if medium == "image" and (result.shape != (SIZE, SIZE, 3) or result.dtype != np.uint8):
        return f"a picture of {result.shape}", True
    if medium == "audio" and (result.ndim != 1 or not len(result) or not np.isfinite(result).all()):
        return f"samples of {result.shape}", True
    if expected in (SAME, REFUSED):
        # A cut that takes nothing but padding at the end leaves the same content.
        same = whole is not None and np.array_equal(result, decode(medium, whole))
        # Nor does one that takes what cannot be heard, or that nothing in the file tells: noted.
        if medium == "audio" and not same and expected == REFUSED:
            same = bool(read_recording(data, name="the file").notes)
        return (None if same else "accepted, but not what the whole file holds"), True
    if isinstance(expected, int) and abs(len(result) - expected) > 1:
        return f"{len(result)} samples, {expected} expected", True
    return None, True


def peak_mib():
    """Peak memory of this program; getrusage's also counts the process that it was started from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main(count, seed, folder, with_bombs):
    rng = np.random.default_rng(seed)
    kinds, accepted, complaints, slowest = (
        collections.Counter(),
        collections.Counter(),
        [],
        (0.0, ""),
    )
    files = itertools.islice(
        itertools.chain(bombs() if with_bombs else (), cases(rng, folder)), count
    )
    for number, (kind, medium, data, expected, whole) in enumerate(files):
        kinds[kind] += 1
        began = time.perf_counter()
        try:
            wrong, taken = complaint(medium, data, expected, whole)
        except Exception as e:
            wrong, taken = f"{type(e).__name__}: {e}", False
        accepted[kind] += taken
        slowest = max(slowest, (time.perf_counter() - began, kind))
        if wrong:
            complaints.append(f"{number} {kind} ({medium}): {wrong[:300]}")
    return {
        "files": sum(kinds.values()),
        "kinds": kinds,
        "accepted": accepted,
        "complaints": complaints[:30],
        "complained": len(complaints),
        "slowest": slowest,
        "peak_mib": peak_mib(),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), "bombs" in sys.argv[4:])
        )
    )
