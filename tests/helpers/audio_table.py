"""The table of recordings in every form: seconds that must be decoded, and seconds that are.

    PYTHONPATH=tests python tests/helpers/audio_table.py

makes all forms by soundfile and by hand, and with ffmpeg, sox, lame, flac, opusenc and oggenc where
they are installed, decodes each, and prints the table. Its status is 1 if a line is wrong.
"""

import sys

import numpy as np
from helpers.audio_forms import RATE, all_forms, speech

from c2f_jax.decoding.audio import Recording, read_recording
from c2f_jax.errors import BadFileError


def likeness(wave, original):
    """Return the correlation with the original at the best delay of up to 0.12 s."""
    size = len(original)
    padded = np.zeros(size + 4000)
    wave, original = wave - wave.mean(), original - original.mean()
    padded[: min(len(wave), size + 4000)] = wave[: size + 4000]
    length = 2 ** int(np.ceil(np.log2(2 * size + 4000)))
    product = np.fft.rfft(padded, length) * np.conj(np.fft.rfft(original, length))
    lags = np.fft.irfft(product, length)
    best = np.max(np.concatenate([lags[:2000], lags[-2000:]]))
    return best / (np.linalg.norm(wave[:size]) * np.linalg.norm(original) + 1e-12)


def judge(form):
    """Decode a form; return what came of it in words, and what is wrong with that or None."""
    try:
        found = read_recording(form.data, name="the file")
    except BadFileError as error:
        if error.kind == form.seconds:
            return f"error: {error.kind}", None
        return f"error: {error}", "refused"
    if isinstance(form.seconds, str):
        return f"{len(found.samples) / RATE:.3f}", f"accepted; {form.seconds} expected"
    return _judge_samples(form, found)


def _judge_samples(form, found: Recording):
    seconds = len(found.samples) / RATE
    kinds = [kind for kind, _ in found.notes]
    said = f"{seconds:.3f}"
    if abs(seconds - form.seconds) > form.slack + 1e-4:
        return said, f"{form.seconds} s expected"
    if form.note and form.note not in kinds:
        return said, f"no note of {form.note}, but {kinds}"
    if not form.note and set(kinds) - {"clipped"}:
        return said, f"notes {found.notes}"
    original = speech()
    for part in range(form.repeats):
        start = round(part * seconds / form.repeats * RATE)
        alike = likeness(found.samples[start : start + len(original)], original)
        if alike < (0.75 if found.rate < RATE or form.repeats > 1 else 0.85):
            return said, f"likeness {alike:.2f} of part {part}"
    return said, None


def table(rows):
    """Format (form, what came of it) as a table.

    Containers share a line where they have the same quirk and the same came of it; plain files
    share one by container.
    """
    lines = {}
    for form, said in rows:
        place = (form.quirk or form.container, form.seconds, form.note)
        lines.setdefault(place, []).append((form, said))
    yield "| header, or how it was made | container and codec | expected, s | decoded, s | said |"
    yield "|---|---|---|---|---|"
    for (quirk, expected, note), found in lines.items():
        slack = max(form.slack for form, _ in found)
        files: dict[str, list[str]] = {}
        for form, _ in found:
            files.setdefault(form.container, []).append(form.codec)
        if not found[0][0].quirk:
            quirk, note = "plain", "" if len(found) == 1 else f"{len(found)} files"
        names = "; ".join(f"{name} {', '.join(codecs)}" for name, codecs in files.items())
        if isinstance(expected, str):
            expected = f"error: {expected}"
        else:
            expected = f"{expected:.3f}" + (f" ± {slack:.2f}" if slack >= 0.01 else "")
        decoded = sorted({said for _, said in found})
        decoded = decoded[0] if len(decoded) == 1 else f"{decoded[0]} to {decoded[-1]}"
        yield f"| {quirk} | {names} | {expected} | {decoded} | {note} |"


def main():
    rows, wrong = [], 0
    for form in all_forms():
        said, complaint = judge(form)
        rows.append((form, said))
        if complaint:
            wrong += 1
            print(f"{form.container}, {form.codec}, {form.quirk}: {said}, {complaint}")
    print(*table(rows), sep="\n")
    print(f"\n{len(rows)} files, {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
