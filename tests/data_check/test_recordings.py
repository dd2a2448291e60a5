"""The check says how a recording was read wherever that was not as its header says, and refuses
what training leaves out, for the same reason."""

import json
from pathlib import Path

import numpy as np
from helpers.audio_forms import RATE, forms_by_hand, speech, stored
from PIL import Image

from c2f_jax.data.loader import load_speech_input
from c2f_jax.data_check.check import RunLimits, check_data
from c2f_jax.data_check.findings import KINDS
from c2f_jax.datasets.config import DataConfig
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.decoding.audio import decode_audio


def check(folder, forms):
    """Check a manifest of recordings, each with a picture of its own."""
    rows = []
    for number, data in enumerate(forms):
        (folder / f"{number}.sound").write_bytes(data)
        picture = Image.new("RGB", (32, 32), (number * 60 % 256, number * 97 % 256, 40))
        picture.paste("white", (4, 4, 20, 9 + number % 20))
        picture.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "audio": f"{number}.sound", "split": "test"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), check_data(str(path), progress=False)


def test_every_note_of_the_decoder_is_in_the_report(tmp_path):
    forms = [form for form in forms_by_hand(speech()) if form.note or isinstance(form.seconds, str)]
    path, report = check(tmp_path, [form.data for form in forms])
    told = {}
    for finding in report.findings:
        told.setdefault(finding.name.rsplit("/", 1)[-1], set()).add(finding.kind)

    kinds = {form.note or form.seconds for form in forms}
    assert len(kinds) >= 11 and kinds <= set(KINDS)
    source = load_pairs(path, "test", max_bad_share=1.0)
    for number, form in enumerate(forms):
        assert (form.note or form.seconds) in told[f"{number}.sound"], form.quirk
        # What the check refuses, training leaves out; of the rest it gets what the check saw.
        wave = load_speech_input(source, number)
        assert (wave is None) == isinstance(form.seconds, str), form.quirk
        if wave is not None:
            expected = decode_audio(form.data) * 32768
            np.testing.assert_allclose(wave, np.minimum(expected, 32767), atol=0.5001)


def test_a_recording_that_was_only_converted_passes(tmp_path):
    wave = speech()
    odd = [stored(np.stack([wave, -wave], 1)), stored(wave * 32768, subtype="FLOAT")]
    _, report = check(tmp_path, [*odd, stored(wave)])
    assert report.severity == "note"
    assert report.counts()["out of phase"] == report.counts()["scaled"] == 1
    assert "the loudest one is used" in report.text()


def test_silence_that_is_all_that_is_heard_is_said(tmp_path):
    wave = speech()
    late = np.concatenate([np.zeros(2 * RATE, np.float32), wave])
    path, report = check(tmp_path, [stored(late), stored(0 * late), stored(wave)])
    assert report.counts()["silence"] == 1 and "silent start" not in report.counts()
    data = DataConfig(name=path, bucket_seconds=(1.0,), max_seconds=1.5)
    report = check_data(path, run=RunLimits(data, 1), progress=False)
    told = {(finding.kind, Path(finding.name).name) for finding in report.findings}
    assert ("silent start", "0.sound") in told and ("silence", "1.sound") in told
    assert "nothing louder than -180 dB in the first 1.5 s" in report.text()
