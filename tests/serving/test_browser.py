"""The page in a real browser, with a file as its microphone; and a server under load."""

import contextlib
import shutil
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import soundfile

from c2f_jax.datasets.spoken_scenes.speech import draw_voice, speak
from c2f_jax.decoding.audio import decode_audio
from c2f_jax.serving.app import create_app

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking "
    "--use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
).split()
# Keeps what the page posts.
KEEP = """window.posted = []; const before = window.fetch;
window.fetch = (url, options) => {
  if (options?.body) options.body.arrayBuffer().then(
    (bytes) => window.posted.push(Array.from(new Uint8Array(bytes))));
  return before(url, options);
};"""


@contextlib.contextmanager
def running(service):
    """The address of a server on loopback."""
    import uvicorn

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service, service.limits), log_level="warning")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def browser(width, *flags):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, *flags):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
    finally:
        driver.quit()


def wait(driver, script, seconds=30):
    end = time.monotonic() + seconds
    while not (found := driver.execute_script(f"return {script}")):
        problem = driver.execute_script("return document.getElementById('warning').textContent")
        assert time.monotonic() < end and not problem, (script, problem)
        time.sleep(0.05)
    return found


def likeness(one, other):
    """The largest correlation of two recordings over all delays."""
    size = len(one) + len(other)
    spectrum = np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size))
    return np.abs(np.fft.irfft(spectrum)).max() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
@pytest.mark.parametrize("width", [1200, 390])
def test_record_search_and_look(service, tmp_path, width):
    voice = draw_voice(np.random.default_rng(0), "test")
    content = speak("a small red circle", **voice)[0]
    spoken = decode_audio(content)[:16_000]  # the tiny model hears one second
    file = tmp_path / "spoken.wav"
    soundfile.write(file, decode_audio(content, sample_rate=48_000)[:48_000], 48_000, "PCM_16")
    microphone = f"--use-file-for-fake-audio-capture={file}%noloop"
    with running(service) as address, browser(width, microphone) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": KEEP})
        driver.get(f"http://{address.replace('127.0.0.1', 'localhost')}/")
        wait(driver, "!!(page.about && document.getElementById('record').onclick)")
        driver.execute_script(
            "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'r', bubbles: true}))"
        )
        wait(driver, "document.querySelectorAll('#fine .answer').length")  # stops by itself
        posted = decode_audio(bytes(wait(driver, "window.posted[0]")))
        assert abs(len(posted) - len(spoken)) < 0.4 * 16_000
        assert likeness(posted, spoken) > 0.5 and likeness(posted[::2], spoken) < 0.4
        wide = "document.documentElement.scrollWidth"
        assert driver.execute_script(f"return {wide}") <= width

        # The arrows move through the answers, Enter opens one; pointing at a moment lights patches.
        driver.execute_script("moveFocus(1); document.activeElement.click()")
        wait(driver, "!document.getElementById('joined').hidden")
        lit = """[...document.querySelectorAll('#patches i')].filter((i) => i.style.background)"""
        driver.execute_script(
            """const m = document.getElementById('moments'), b = m.getBoundingClientRect();
            m.dispatchEvent(new PointerEvent('pointermove',
              {clientX: b.left + b.width / 2, clientY: b.top + 5}));"""
        )
        assert driver.execute_script(f"return {lit}.length") > 1
        assert driver.execute_script(f"return {wide}") <= width
        # The other direction.
        driver.execute_script("document.getElementById('backwards').click()")
        wait(driver, "page.current.find === 'speech' && !!page.current.fine")
        assert driver.execute_script("return document.querySelectorAll('#history li').length") == 2


# Holds the fine answers back until window.release is called.
HOLD = """const straight = window.fetch;
const held = new Promise((resolve) => (window.release = resolve));
window.fetch = async (url, options) => {
  if (String(url).includes('/answers')) await held;
  return straight(url, options);
};"""
PRESS = """document.dispatchEvent(
  new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}));"""
DROP = """const [bytes, name, type] = arguments, items = new DataTransfer();
items.items.add(new File([new Uint8Array(bytes)], name, {type}));
document.dispatchEvent(new DragEvent('dragover', {dataTransfer: items, cancelable: true}));
document.dispatchEvent(new DragEvent('drop', {dataTransfer: items, cancelable: true}));"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
def test_drop_keys_and_coarse_answers_first(service, wav, picture, tmp_path):
    file = tmp_path / "tone.wav"
    soundfile.write(file, 0.3 * np.sin(np.arange(96_000) / 20), 48_000, "PCM_16")
    microphone = f"--use-file-for-fake-audio-capture={file}"
    with running(service) as address, browser(1200, microphone) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": HOLD})
        driver.get(f"http://{address.replace('127.0.0.1', 'localhost')}/")
        wait(driver, "!!(page.about && document.getElementById('record').onclick)")
        count = "document.querySelectorAll('#{} .answer').length"
        driver.execute_script(DROP, list(wav(0.7)), "said.wav", "audio/wav")
        wait(driver, count.format("coarse"))
        assert not driver.execute_script(f"return {count.format('fine')}")
        driver.execute_script("window.release()")
        wait(driver, count.format("fine"))
        driver.execute_script(DROP, list(picture(1)), "seen.png", "image/png")
        wait(driver, "page.current.find === 'speech' && !!page.current.fine")
        assert driver.execute_script("return document.getElementById('asked').naturalWidth") == 40

        # The space bar begins to record and Esc ends it.
        recording = "document.getElementById('record').classList.contains('on')"
        driver.execute_script(PRESS, " ")
        wait(driver, recording)
        time.sleep(0.3)
        driver.execute_script(PRESS, "Escape")
        wait(driver, f"!{recording} && page.queries.length === 3 && !!page.current.fine")

        driver.execute_script(DROP, list(b"a letter"), "letter.txt", "text/plain")
        end = time.monotonic() + 20
        problem = "return document.getElementById('warning').textContent"
        while not driver.execute_script(problem) and time.monotonic() < end:
            time.sleep(0.05)
        assert "text/plain cannot be searched with" in driver.execute_script(problem)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
def test_without_a_secure_address(service):
    with running(service) as address, browser(800) as driver:
        # As over plain http from another machine.
        hide = "Object.defineProperty(navigator, 'mediaDevices', {get: () => undefined})"
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
        driver.get(f"http://{address}/")
        end = time.monotonic() + 10
        text = ""
        while "localhost" not in text and time.monotonic() < end:
            text = driver.execute_script("return document.getElementById('warning').textContent")
        assert f"http://localhost:{address.split(':')[1]}" in text and "HTTPS" in text


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def slow_upload(address):
    """Send a byte now and then, as a hostile client does; return the status."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"POST /api/search HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n")
        with contextlib.suppress(OSError):  # the server hangs up
            for _ in range(40):
                sock.sendall(b"x")
                time.sleep(0.1)
                sock.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    return int(sock.recv(100).split()[1])
        return int(sock.recv(100).split()[1])


@pytest.mark.slow
def test_fifty_clients_for_a_minute(service, wav):
    kinds = {
        "good": (wav(0.7), 200),
        "oversized": (bytes(300_000), 413),
        "truncated": (wav()[:30], 422),
        "silent": (wav(level=0.0), 422),
        "not audio": (b"neither sound nor image" * 50, 422),
        "slow": (None, 408),
    }
    wrong, counts = [], dict.fromkeys(kinds, 0)
    with running(service) as address:

        def client(number, seconds):
            rng = np.random.default_rng(number)
            end = time.monotonic() + seconds
            with httpx.Client(timeout=60) as http:
                while time.monotonic() < end:
                    kind = rng.choice(list(kinds), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
                    body, expected = kinds[kind]
                    try:
                        if body is None:
                            status = slow_upload(address)
                        else:
                            status = http.post(f"http://{address}/api/search", content=body)
                            status = status.status_code
                    except Exception as error:
                        status = repr(error)
                    counts[kind] += 1
                    if status != expected:
                        wrong.append((kind, status))

        def crowd(seconds):
            threads = [threading.Thread(target=client, args=(n, seconds)) for n in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        crowd(10)  # pools and caches fill
        before = resident()
        crowd(60)
        after = resident()
        assert httpx.get(f"http://{address}/healthz").status_code == 200
    assert not wrong, (len(wrong), wrong[:10], counts)
    assert all(counts.values()), counts
    assert after < 1.1 * before, (before, after)
    print(counts, f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
