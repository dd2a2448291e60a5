"""Recordings as people have them: whatever the container, the codec and the header, what is decoded
is what a player plays, or an error that says what is wrong."""

import io
import shutil
import struct
import sys

import numpy as np
import pytest
import soundfile
from helpers import audio_forms
from helpers.audio_forms import RATE, patched, speech, stored
from helpers.audio_table import judge

from c2f_jax.decoding import audio_decoders
from c2f_jax.decoding.audio import decode_audio, read_recording
from c2f_jax.errors import BadFileError

WAVE = speech()


def kinds(data):
    return [kind for kind, _ in read_recording(data).notes]


@pytest.mark.parametrize(
    "make",
    [
        audio_forms.plain_forms,
        audio_forms.wav_forms,
        audio_forms.other_header_forms,
        audio_forms.flac_forms,
        audio_forms.ogg_forms,
        audio_forms.mp3_forms,
        audio_forms.channel_forms,
        audio_forms.gain_forms,
        lambda wave: audio_forms.rate_forms(),
    ],
)
def test_forms_made_by_hand(make):
    wrong, count = [], 0
    for form in make(WAVE):
        count += 1
        said, complaint = judge(form)
        if complaint:
            wrong.append(f"{form.container} {form.codec} {form.quirk}: {said}, {complaint}")
    assert count >= 7 and not wrong


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_forms_made_by_programs(tmp_path):
    pytest.importorskip("av", reason="the extra av is not installed")
    forms = list(audio_forms.tool_forms(WAVE, tmp_path))
    wrong = [(form.container, form.codec, form.quirk, *judge(form)) for form in forms]
    assert len(forms) > 20 and not [line for line in wrong if line[-1]]


def test_lossless_forms_give_the_same_samples():
    samples = np.round(WAVE * 32767).astype(np.int16)
    expected = samples * np.float32(1 / 32768)
    wav = stored(samples)
    size = wav.index(b"data") + 4
    flac = stored(samples, container="FLAC")
    unknown = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    for data in (
        flac,
        unknown,
        patched(wav, size, "<I", 0),
        patched(wav, size, "<I", 2**32 - 1),
        *(stored(samples, container=kind) for kind in ("AIFF", "AU", "CAF", "W64", "RF64", "NIST")),
    ):
        np.testing.assert_array_equal(decode_audio(data), expected)


def test_joined_files_give_both_one_after_the_other():
    first, second = WAVE, speech(2.0, seed=1)
    for kind in ("WAV", "FLAC", "AU", "AIFF"):
        data = stored(first, container=kind) + stored(second, container=kind)
        both = np.concatenate([first, second])
        np.testing.assert_allclose(decode_audio(data), both, atol=1e-4)
        assert kinds(data) == ["several streams"]


def test_the_mean_of_channels_is_taken_unless_it_cancels_them():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (len(WAVE), 2)).astype(np.float32)
    for right in (WAVE, 0.3 * WAVE, -0.1 * WAVE):
        stereo = np.stack([WAVE, right], 1)
        data = stored(stereo, subtype="FLOAT")
        np.testing.assert_allclose(decode_audio(data), stereo.mean(1), atol=1e-6)
        assert kinds(data) == []
    # The speech is opposite and louder than the noise, which is not.
    for right, taken in ((-WAVE, 0), (-0.8 * WAVE, 0), (-1.5 * WAVE, 1)):
        stereo = np.stack([WAVE, right], 1) + noise
        data = stored(stereo, subtype="FLOAT")
        np.testing.assert_allclose(decode_audio(data), stereo[:, taken], atol=1e-6)
        assert kinds(data) == ["out of phase"]


def test_speech_in_opposite_phase_is_kept_under_a_hum_and_in_a_part():
    hum = 0.3 * np.sin(2 * np.pi * 50 * np.arange(len(WAVE)) / RATE).astype(np.float32)
    late = np.where(np.arange(len(WAVE)) < 2 * RATE, WAVE, -WAVE)
    for stereo in (np.stack([hum + WAVE / 2, hum - WAVE / 2], 1), np.stack([WAVE, late], 1)):
        data = stored(stereo, subtype="FLOAT")
        np.testing.assert_array_equal(decode_audio(data), stereo[:, 0])
        assert kinds(data) == ["out of phase"]
    # Two microphones 10 cm apart, two speakers, and noise are not out of phase.
    rng = np.random.default_rng(0)
    zero = np.zeros_like(WAVE)
    for left, right in (
        (WAVE, np.roll(WAVE, 5)),
        (np.concatenate([WAVE, zero]), np.concatenate([zero, WAVE])),
        rng.normal(0, 0.1, (2, 700)),
    ):
        stereo = np.stack([left, right], 1)
        data = stored(stereo, subtype="FLOAT")
        np.testing.assert_allclose(decode_audio(data), stereo.mean(1), atol=1e-6)
        assert kinds(data) == []


def test_one_channel_is_taken_of_a_file_of_several_blocks(monkeypatch):
    monkeypatch.setattr(audio_decoders, "_BLOCK", 4096)
    stereo = np.stack([0.5 * WAVE, -WAVE], 1)
    np.testing.assert_allclose(decode_audio(stored(stereo)), -WAVE, atol=1e-4)


def test_a_silent_channel_does_not_halve_the_others():
    data = stored(np.stack([np.zeros_like(WAVE), WAVE], 1), subtype="FLOAT")
    np.testing.assert_allclose(decode_audio(data), WAVE, atol=1e-6)
    assert kinds(data) == ["silent channel"]


@pytest.mark.parametrize("scale", [2.0**15, 2.0**23, 2.0**31])
def test_integers_stored_as_floats_keep_their_level(scale):
    data = stored(WAVE.astype(float) * scale, subtype="DOUBLE")
    np.testing.assert_allclose(decode_audio(data), WAVE, atol=1e-6)
    assert kinds(data) == ["scaled"]


def test_what_is_above_full_scale_is_scaled_or_clipped_and_said():
    shape = WAVE / abs(WAVE).max()
    loud = stored(6 * shape, subtype="FLOAT")
    np.testing.assert_allclose(decode_audio(loud), shape, atol=1e-6)
    click = shape.copy()
    click[500] = -1e6
    clicked = stored(click, subtype="FLOAT")
    found = decode_audio(clicked)
    assert found[500] == -1 and kinds(clicked) == ["clipped"]
    np.testing.assert_allclose(np.delete(found, 500), np.delete(shape, 500), atol=1e-6)
    for bad in (np.inf, -np.inf, np.nan):
        click[500] = bad
        with pytest.raises(BadFileError, match="not numbers"):
            decode_audio(stored(click, subtype="FLOAT"))
    with pytest.raises(BadFileError, match="no sound"):
        decode_audio(stored(WAVE.astype(float) * 1e30, subtype="DOUBLE"))


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64", "RF64", "CAF", "FLAC"])
def test_a_cut_is_an_error_once_it_can_be_heard(kind):
    data = stored(WAVE, container=kind)
    for share in (0.3, 0.9, 0.98):
        with pytest.raises(BadFileError, match="cut off"):
            decode_audio(data[: int(share * len(data))], name="a file")
    if kind != "FLAC":  # a frame of FLAC is a quarter of a second
        assert kinds(data[: -len(data) // 500]) == ["incomplete"]


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "W64", "RF64", "CAF"])
def test_zeros_after_the_samples_are_passed_over(kind):
    data = stored(WAVE, container=kind, subtype="PCM_16")
    assert len(decode_audio(data + bytes(4000))) == len(WAVE)


def test_a_header_that_ends_too_early_is_named():
    data = stored(WAVE)
    with pytest.raises(BadFileError, match="a.wav: its header says .* bytes follow") as caught:
        decode_audio(patched(data, data.index(b"data") + 4, "<I", 32_000), name="a.wav")
    assert caught.value.kind == "header too short"


def test_mp3_without_a_header_is_read_to_its_end():
    # The number of frames is not in the file, and their sizes differ.
    loud = np.concatenate([np.zeros(RATE, np.float32), WAVE, np.zeros(3 * RATE, np.float32)])
    bare = audio_forms.without_header(stored(loud, container="MP3"))
    assert 7.0 <= len(decode_audio(bare)) / RATE < 7.15
    assert 14.0 <= len(decode_audio(bare + bare)) / RATE < 14.3


def test_mp3_with_damaged_frames_is_named():
    bare = audio_forms.without_header(stored(WAVE, container="MP3"))
    third = len(bare) // 3
    assert kinds(bare[:third] + b"\1" * 30 + bare[third:]) == ["incomplete"]
    with pytest.raises(BadFileError, match="damaged"):
        decode_audio(bare[:third] + b"\1" * 3000 + bare[third:])


def test_mp3_cut_anywhere_is_read_or_named():
    data = stored(WAVE[:3200], container="MP3")
    for whole in (data, audio_forms.without_header(data)):
        for size in range(1, len(whole)):
            try:
                assert len(decode_audio(whole[:size])) <= 3200 + 2000
            except BadFileError:
                pass


def test_an_mp3_whose_first_frame_is_damaged_is_read_to_its_end():
    """libsndfile stops early: the next frame is not where the first says."""
    whole = stored(WAVE, container="MP3")
    expected = len(decode_audio(whole))
    other_rate = bytes([*whole[:2], whole[2] ^ 0xC0, whole[3]]) + whole[4:]
    for data in (other_rate, whole[:60] + bytes(range(200)) * 8 + whole[60:]):
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            assert len(file.read()) < 0.9 * expected
        found = read_recording(data)
        assert abs(len(found.samples) - expected) <= 3000
        assert "bytes left out" in [kind for kind, _ in found.notes]


def test_frames_that_turn_to_free_format_end():
    bare = audio_forms.without_header(stored(WAVE, container="MP3"))
    size = bare.index(bare[:2], 4)
    odd = bytes([bare[0], bare[1], bare[2] & 0x0F, bare[3]]) + bare[4:size]
    for data in (bare + odd, bare + odd * 5, bare[: 9 * size] + odd * 3 + bare):
        try:
            assert len(decode_audio(data)) > 0
        except BadFileError:
            pass


def test_random_bytes_and_texts_are_no_audio():
    rng = np.random.default_rng(0)
    for data in (rng.bytes(50_000), b"<!DOCTYPE html><html>" + b"x" * 5000, b"ID3" + bytes(2000)):
        with pytest.raises(BadFileError, match="not readable audio"):
            decode_audio(data)


def test_the_extra_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadFileError, match=r"b.m4a: .*pip install 'c2f_jax\[av\]'"):
        decode_audio(b"\0\0\0\x1cftypM4A " + bytes(500), name="b.m4a")


def with_av(file, container, codec, rate=RATE, tracks=(WAVE,), **options):
    """Encode by the FFmpeg of PyAV; of several tracks the last one is the main one."""
    av = pytest.importorskip("av", reason="the extra av is not installed")
    with av.open(str(file), "w", format=container, options=options) as output:
        streams = [output.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        for stream in streams if len(tracks) > 1 else ():
            stream.disposition = int(stream is streams[-1])  # 1 is the default track
        for stream, wave in zip(streams, tracks, strict=True):
            if codec == "wmav2":
                stream.bit_rate = 64_000
            frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
            frame.sample_rate = RATE
            fitted = av.AudioResampler(stream.format.name, "mono", rate).resample(frame)
            for part in [*fitted, None]:
                output.mux(stream.encode(part))
    return file.read_bytes()


@pytest.mark.parametrize(
    "container, codec, rate",
    [
        ("mp4", "aac", RATE),
        ("webm", "libopus", 48_000),
        ("matroska", "pcm_s16le", RATE),
        ("adts", "aac", 44_100),
        ("asf", "wmav2", 44_100),
        ("amr", "libopencore_amrnb", 8_000),
        ("3gp", "libopencore_amrnb", 8_000),
        ("mpegts", "aac", 48_000),
    ],
)
def test_what_libsndfile_does_not_read_is_read_by_ffmpeg(container, codec, rate, tmp_path):
    data = with_av(tmp_path / "a", container, codec, rate)
    form = audio_forms.Form(container, codec, "", data, slack=0.15)
    assert judge(form)[1] is None


def test_a_cut_mp4_and_a_codec_that_is_not_known_are_named(tmp_path):
    data = with_av(tmp_path / "a.mp4", "mp4", "aac", movflags="faststart")
    with pytest.raises(BadFileError, match="cut off"):
        decode_audio(data[: len(data) // 2])
    other = with_av(tmp_path / "a.mka", "matroska", "aac").replace(b"A_AAC", b"A_ABC")
    with pytest.raises(BadFileError, match="not readable audio"):
        decode_audio(other)


@pytest.mark.parametrize("container, codec", [("avi", "pcm_s16le"), ("flv", "pcm_s16le")])
def test_cut_films_are_named(container, codec, tmp_path):
    data = with_av(tmp_path / "a", container, codec, 44_100)
    assert audio_forms.SECONDS == pytest.approx(len(decode_audio(data)) / RATE, abs=0.1)
    with pytest.raises(BadFileError, match="cut off") as caught:
        decode_audio(data[: len(data) // 2])
    assert caught.value.kind == "truncated"


def test_a_cut_film_with_pictures_is_named(tmp_path):
    av = pytest.importorskip("av", reason="the extra av is not installed")
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        pictures = output.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 32
        sound = output.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            output.mux(pictures.encode(frame))
            part = (WAVE[None, number * 1600 : (number + 1) * 1600] * 32767).astype(np.int16)
            part = av.AudioFrame.from_ndarray(part, "s16", "mono")
            part.sample_rate = RATE
            output.mux(sound.encode(part))
        for stream in (pictures, sound):
            output.mux(stream.encode(None))
    data = (tmp_path / "a.mkv").read_bytes()
    np.testing.assert_allclose(decode_audio(data), WAVE, atol=1e-4)
    with pytest.raises(BadFileError, match="cut off"):
        decode_audio(data[: len(data) // 2])


@pytest.mark.parametrize(
    "container, codec, rate",
    [
        ("mp4", "aac", 44_100),
        ("flv", "aac", 44_100),
        ("tta", "tta", RATE),
        ("amr", "libopencore_amrnb", 8_000),
    ],
)
def test_joined_files_of_which_players_play_the_first_are_read_whole(
    container, codec, rate, tmp_path
):
    data = with_av(tmp_path / "a", container, codec, rate)
    form = audio_forms.Form(
        container, codec, "", data * 2, 6.0, "several streams", slack=0.3, repeats=2
    )
    assert judge(form)[1] is None


def test_the_main_track_of_several_is_heard_and_said(tmp_path):
    other = speech(seed=4)
    for container, codec in (("matroska", "pcm_s16le"), ("mov", "pcm_s16le")):
        data = with_av(tmp_path / "a", container, codec, tracks=(other, WAVE))
        np.testing.assert_allclose(decode_audio(data), WAVE, atol=1e-4)
        assert kinds(data) == ["several tracks"]


def test_matroska_may_begin_late(tmp_path):
    data = with_av(tmp_path / "a", "matroska", "pcm_s16le", output_ts_offset="0.5")
    np.testing.assert_allclose(decode_audio(data), WAVE, atol=1e-4)
    with pytest.raises(BadFileError, match="cut off"):
        decode_audio(data[: len(data) // 2])


def test_voc_of_several_blocks_has_no_heads_in_its_sound():
    pytest.importorskip("av", reason="the extra av is not installed")
    samples = (WAVE * 32767).astype("<i2").tobytes()
    blocks = b"".join(
        bytes([2]) + struct.pack("<I", 4096)[:3] + samples[place : place + 4096]
        for place in range(4096, len(samples) - 4096, 4096)
    )
    head = b"Creative Voice File\x1a\x1a\0\x14\x01\x1f\x11"
    first = struct.pack("<IBBHI", RATE, 16, 1, 4, 0) + samples[:4096]
    data = head + b"\x09" + struct.pack("<I", len(first))[:3] + first + blocks + b"\0"
    count = 2048 * (1 + len(blocks) // 4100)
    np.testing.assert_allclose(decode_audio(data), WAVE[:count], atol=1e-4)


def test_parts_of_flac_are_whole_and_cut_ones_are_not():
    data = stored(WAVE, container="FLAC")
    starts = audio_forms.flac_frame_starts(data)
    for first, last in ((0, 4), (3, 8), (5, len(starts) - 1)):
        part = data[: starts[0]] + data[starts[first] : starts[last]]
        expected = WAVE[first * 4096 : last * 4096]
        np.testing.assert_allclose(decode_audio(part), expected, atol=1e-4)
        assert kinds(part) == ["more promised"]
        with pytest.raises(BadFileError, match="cut off"):
            decode_audio(part[:-1000])


def test_playlists_do_not_open_other_files(tmp_path):
    pytest.importorskip("av", reason="the extra av is not installed")
    (tmp_path / "a.wav").write_bytes(stored(WAVE))
    for text in (
        f"#EXTM3U\n#EXTINF:3,\n{tmp_path}/a.wav\n",
        f"ffconcat version 1.0\nfile {tmp_path}/a.wav\n",
    ):
        with pytest.raises(BadFileError, match="not readable audio"):
            decode_audio(text.encode())
