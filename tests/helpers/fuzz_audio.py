"""Damaged and odd recordings by the thousand, against what FFmpeg makes of them.

    PYTHONPATH=tests python tests/helpers/fuzz_audio.py COUNT SEED [FOLDER]

prints one JSON object: how many files had each outcome, by kind of damage, the complaints, the
slowest file and peak memory; FOLDER gets the files to look at. A file may be refused. What is
accepted must have 99 % of the samples that FFmpeg (PyAV) gives, or say what is missing.
"""

import collections
import io
import itertools
import json
import struct
import sys
import time
from pathlib import Path

import av
import numpy as np
from helpers.audio_forms import RATE, forms_by_hand, speech

from c2f_jax.decoding.audio import read_recording
from c2f_jax.errors import BadFileError

SHARE = 0.99
# Seconds of delay and padding that decoders trim or do not, of each stream.
FRAMES, MPEG_FRAMES = 0.08, 0.15
# A file that is accepted and shorter must have one of these notes.
SAID = {"incomplete", "bytes left out", "wrong length", "no end mark", "more promised"}


def cut(rng, data, _):
    return data[: int(len(data) * rng.uniform(0.01, 1.0))]


def cut_little(rng, data, _):
    return data[: len(data) - int(rng.integers(1, 400))]


def flip(rng, data, _):
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(len(changed), size=2 ** rng.integers(0, 7))
    changed[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return changed.tobytes()


def flip_head(rng, data, _):
    changed = bytearray(data)
    for place in rng.integers(0, min(200, len(data)), size=rng.integers(1, 4)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def number_in_head(rng, data, _):
    """Put another number where the head may have a size."""
    changed = bytearray(data)
    place = int(rng.integers(0, min(120, len(data) - 8)))
    values = (0, 1, 2**31 - 1, 2**32 - 1, len(data), len(data) // 2, int(rng.integers(2**32)))
    struct.pack_into(("<I", ">I")[rng.integers(2)], changed, place, values[rng.integers(7)])
    return bytes(changed)


def remove(rng, data, _):
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, max(len(data) // 3, 2))) :]


def insert(rng, data, _):
    start = int(rng.integers(len(data)))
    return data[:start] + rng.bytes(int(rng.integers(1, 5000))) + data[start:]


def before(rng, data, _):
    return (bytes, rng.bytes)[rng.integers(2)](int(rng.integers(1, 3000))) + data


def after(rng, data, _):
    return data + (bytes, rng.bytes)[rng.integers(2)](int(rng.integers(1, 9000)))


def join(rng, data, other):
    return data + other


def join_part(rng, data, other):
    return data[: int(rng.integers(1, len(data)))] + other[int(rng.integers(len(other))) :]


def zeros(rng, data, _):
    start = int(rng.integers(len(data)))
    count = min(int(rng.integers(1, max(len(data) // 4, 2))), len(data) - start)
    return data[:start] + bytes(count) + data[start + count :]


DAMAGES = (
    *(cut, cut_little, flip, flip_head, number_in_head, remove, insert),
    *(before, after, join, join_part, zeros),
)


def ffmpeg_seconds(data):
    """Return how many seconds FFmpeg decodes, past any damage as its program does, or None."""
    seconds = 0.0
    try:
        with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            stream.codec_context.thread_type = "NONE"
            packets = container.demux(stream)
            while True:
                try:
                    for frame in next(packets).decode():
                        seconds += frame.samples / frame.sample_rate
                except StopIteration:
                    break
                except av.InvalidDataError:
                    continue
    except (av.FFmpegError, AttributeError, IndexError, ValueError):
        pass
    return seconds or None


def files(rng):
    """Yield (damage, form, data) without end."""
    forms = [form for form in forms_by_hand(speech()) if len(form.data) < 400_000]
    while True:
        form, other = (forms[number] for number in rng.integers(len(forms), size=2))
        if form.container != other.container and rng.random() < 0.7:
            other = form
        damage = DAMAGES[rng.integers(len(DAMAGES))]
        yield damage.__name__, form, damage(rng, form.data, other.data)


def outcome(data, form, known, joined=False):
    """Return what came of a file, a complaint or None, and seconds it took."""
    began = time.perf_counter()
    try:
        found = read_recording(data, name="the file")
    except BadFileError as error:
        unnamed = not str(error).startswith("the file: ")
        complaint = f"the error does not name the file: {error}" if unnamed else None
        return "refused", complaint, time.perf_counter() - began
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}", time.perf_counter() - began
    took = time.perf_counter() - began

    wave = found.samples
    if wave.ndim != 1 or not len(wave) or not np.abs(wave).max() <= 1:
        return "wrong", f"samples of {wave.shape}, {wave.dtype}", took
    # ffmpeg takes some formats that it does not know for others.
    key = (form.container, form.codec, form.quirk)
    if key not in known:
        whole = ffmpeg_seconds(form.data)
        known[key] = whole is not None and (
            isinstance(form.seconds, str) or abs(whole - form.seconds) < 0.3
        )
    if not known[key]:
        return "accepted, unknown to ffmpeg", None, took
    expected = ffmpeg_seconds(data)
    if expected is None:
        return "accepted, refused by ffmpeg", None, took
    seconds = len(wave) / RATE
    kinds = {kind for kind, _ in found.notes}
    streams = int(dict(found.notes).get("several streams", "1").split()[0])
    slack = streams * (MPEG_FRAMES if form.container == "MP3" or form.codec == "MP3" else FRAMES)
    if seconds >= SHARE * expected - slack:
        longer = seconds > expected / SHARE + slack
        return "accepted, longer" if longer else "accepted, as ffmpeg", None, took
    if joined and streams > 1:  # FFmpeg may take a second file for samples of the first
        return "accepted, joined and said", None, took
    if SAID & kinds:
        return "accepted, shorter and said", None, took
    return "shorter", f"{seconds:.3f} s, ffmpeg {expected:.3f} s, notes {found.notes}", took


def peak_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main(count, seed, keep=None):
    rng = np.random.default_rng(seed)
    outcomes = collections.defaultdict(collections.Counter)
    complaints, slowest, known = [], (0.0, ""), {}
    for number, (damage, form, data) in enumerate(itertools.islice(files(rng), count)):
        what, complaint, took = outcome(data, form, known, damage == "join")
        outcomes[damage][what] += 1
        about = f"{number} {damage} of {form.container} {form.codec} {form.quirk}".strip()
        slowest = max(slowest, (took, about))
        if complaint:
            complaints.append(f"{about}: {complaint}")
        if keep and (complaint or what == "accepted, longer"):
            (Path(keep) / f"{seed}_{number}").write_bytes(data)
            print(f"{seed}_{number}", what, about, file=sys.stderr)
    total = sum(outcomes.values(), collections.Counter())
    return {
        "files": count,
        "seed": seed,
        "outcomes": total,
        "by_damage": outcomes,
        "complaints": complaints,
        "slowest": slowest,
        "peak_mib": peak_mib(),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]), indent=1))
