"""The recorder of notebooks, in a real browser with a file as its microphone."""

import base64
import contextlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import soundfile

from c2f_jax.datasets.spoken_scenes.speech import draw_voice, speak
from c2f_jax.decoding.audio import decode_audio
from c2f_jax.errors import UserError
from c2f_jax.reports import microphone
from c2f_jax.reports.microphone import Recording, record

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
# Runs the program that the server has for it, presses the first button as soon as there is one,
# and sends back what the program returns.
PAGE = """<!doctype html><title>notebook</title><script>
window.google = {colab: {output: {setIframeHeight() {}}}};
const pressed = setInterval(() => {
  const button = document.querySelector("button");
  if (button) { clearInterval(pressed); button.click(); }
}, 50);
(async () => {
  const program = await (await fetch("/program")).text();
  const answer = await eval(program);
  await fetch("/answer", {method: "POST", body: JSON.stringify(answer)});
})();
</script>"""
# The module of the widget, with the model that Jupyter would give it.
WIDGET = """(async () => {
  const module = await import(URL.createObjectURL(new Blob([%s], {type: "text/javascript"})));
  const values = {seconds: %g};
  return await new Promise((resolve) => module.default.render({el: document.body, model: {
    get: (name) => values[name],
    set: (changes) => Object.assign(values, changes),
    save_changes: () => resolve(values),
  }}));
})()"""


def in_browser(program, profile, *flags):
    """What a program returns in a page of a browser of its own."""
    answers, answered = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((program if self.path == "/program" else PAGE).encode())

        def do_POST(self):
            answers.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            answered.set()

        def log_message(self, *_):
            pass

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(http.server.ThreadingHTTPServer(("localhost", 0), Handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        address = f"http://localhost:{server.server_port}/"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(browser.wait)
        stack.callback(browser.terminate)
        assert answered.wait(60), "the page did not answer"
    return json.loads(answers[0])


def microphone_flags(file):
    return [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={file}%noloop",
    ]


@pytest.fixture
def in_colab(monkeypatch, tmp_path):
    """Make ``google.colab`` a browser with these flags."""

    def start(*flags):
        output = types.ModuleType("google.colab.output")
        output.eval_js = lambda program: in_browser(program, tmp_path / "profile", *flags)
        colab = types.ModuleType("google.colab")
        colab.output = output
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        monkeypatch.setitem(sys.modules, "google.colab.output", output)

    return start


@pytest.fixture
def sentence(tmp_path):
    """A spoken sentence as a file for the fake microphone, and its samples at 16 kHz."""
    content, _ = speak("a small red circle above a large blue square", **voice())[:2]
    wave = decode_audio(content, sample_rate=48_000)
    soundfile.write(tmp_path / "spoken.wav", wave, 48_000, subtype="PCM_16")
    return tmp_path / "spoken.wav", decode_audio(content)


def voice():
    return draw_voice(np.random.default_rng(0), "test")


def likeness(one, other):
    """The largest correlation of two recordings over all delays."""
    size = len(one) + len(other)
    spectrum = np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size))
    return np.abs(np.fft.irfft(spectrum)).max() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
class TestInTheBrowser:
    def test_colab(self, in_colab, sentence):
        file, spoken = sentence
        in_colab(*microphone_flags(file))
        recording = record(seconds=5)
        assert recording.problem == ""
        with soundfile.SoundFile(io.BytesIO(recording.wav)) as recorded:
            assert (recorded.samplerate, recorded.channels) == (16_000, 1)
            assert recorded.subtype == "PCM_16" and 4.5 < recorded.frames / 16_000 < 6.5
        # Of the five seconds, the sentence is kept.
        saved = decode_audio(recording.save(file.with_name("recorded.wav")))
        assert abs(len(saved) - len(spoken)) < 0.4 * 16_000 and likeness(saved, spoken) > 0.5
        # The browser compresses it and evens out its loudness.
        assert likeness(decode_audio(recording.wav), spoken) > 0.5
        assert likeness(decode_audio(recording.wav)[::2], spoken) < 0.3

    def test_jupyter(self, sentence, tmp_path):
        file, spoken = sentence
        script = json.dumps(microphone._widget_class()._esm)
        program = WIDGET % (script, 5)
        answer = in_browser(program, tmp_path / "profile", *microphone_flags(file))
        recording = Recording(types.SimpleNamespace(**answer))
        assert likeness(decode_audio(recording.wav), spoken) > 0.5

    def test_its_speed_and_pitch_are_right(self, in_colab, tmp_path):
        seconds = np.arange(48_000 * 4) / 48_000
        tone = 0.3 * np.sin(2 * np.pi * 440 * seconds)
        soundfile.write(tmp_path / "tone.wav", tone, 48_000, subtype="PCM_16")
        in_colab(*microphone_flags(tmp_path / "tone.wav"))
        wave = decode_audio(record(seconds=2).wav)
        loudest = np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave)
        assert abs(loudest - 440) < 2

    def test_without_a_microphone(self, in_colab, tmp_path):
        in_colab()
        recording = record(seconds=1)
        assert recording.wav == b"" and "microphone" in recording.problem
        with pytest.raises(UserError, match="nothing was recorded"):
            recording.save(tmp_path / "question.wav")


def test_a_recording_changes_with_its_recorder(tmp_path):
    source = types.SimpleNamespace(wav="", problem="")
    recording = Recording(source)
    assert recording.wav == b"" and repr(recording) == "Recording(the recorder was not used)"
    source.wav = as_wav(np.zeros(8000))
    assert repr(recording) == "Recording(0.5 s)" and recording.problem == ""
    with pytest.raises(UserError, match="is silent"):
        recording.save(tmp_path / "a.wav")


def test_silence_around_the_speech_is_not_saved(tmp_path):
    noise = 1e-3 * np.random.default_rng(0).standard_normal(4 * 16_000)
    noise[16_000:32_000] += 0.2 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)
    recording = Recording(types.SimpleNamespace(wav=as_wav(noise), problem=""))
    assert 16_000 < len(decode_audio(recording.save(tmp_path / "a.wav"))) < 21_000


def as_wav(samples):
    content = io.BytesIO()
    soundfile.write(content, samples, 16_000, format="WAV", subtype="PCM_16")
    return base64.b64encode(content.getvalue()).decode()


def test_outside_of_a_notebook():
    with pytest.raises(UserError, match="needs a notebook"):
        record()


def test_jupyter_without_the_extra(monkeypatch):
    ipython = types.SimpleNamespace(get_ipython=lambda: object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    microphone._widget_class.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'c2f_jax\[notebook\]'"):
        record()
