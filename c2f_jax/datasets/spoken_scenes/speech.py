"""Captions spoken by espeak-ng, in this process or in several: text and voice in, FLAC bytes out.

The library and its voices come from PyPI's `espeakng_loader` (GPL-3), which is imported only when
something is spoken. This file also runs as a script, the speaking worker. It imports nothing of
this package, so that workers start in a tenth of a second and carry neither jax nor TensorFlow.
"""

import _ctypes
import atexit
import collections
import concurrent.futures
import ctypes
import functools
import importlib.util
import io
import itertools
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 16_000  # as in decoding/audio.py, which a worker does not import
# Longer sentences are spoken faster; what is still longer is cut.
WANTED_SECONDS, MOST_SECONDS = 4.5, 5.0
# Each accent with each variant is a voice.
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc")
# Voice variants of espeak-ng 1.52. Left out: whispers, robots, echoes and croaks, and two (Reed,
# caleb) whose sound depends on uninitialized memory. Variants that share most of their parameters
# (iven, iven2) are in one split.
VARIANTS = {
    "train": (
        "Alex Andrea Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Marco Mario Michael "
        "Mike Nguyen adam anika antonio aunty benjamin ed edward edward2 f2 f4 grandma "
        "grandpa gustave ian iven iven2 iven3 iven4 john klatt4 klatt5 linda m1 m3 m5 m7 m8 "
        "marcelo max michel miguel mike2 norbert pablo paul pedro rob robert sandro steph "
        "steph2 steph3 victor"
    ).split(),
    "validation": "Alicia boris david f1 m2 quincy".split(),
    "test": "Andy Lee Storm belinda f3 f5 m4 m6 shelby travis".split(),
}

_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_SYNCHRONOUS, _DONT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
_DATA_VARIABLE = "C2F_JAX_ESPEAK_DATA"  # from a process to its workers
_CHUNK = 32  # utterances sent to a worker at a time
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

Spoken = tuple[bytes, int]  # FLAC, and its number of samples


def draw_voice(rng: np.random.Generator, split: str) -> dict[str, Any]:
    """Draw a speaker and a manner of speaking.

    Args:
      rng: random generator.
      split: split of the data set, which decides the speakers.

    Returns:
      The keyword arguments of `speak`, without the text.
    """
    variant = VARIANTS[split][rng.integers(len(VARIANTS[split]))]
    accent = ACCENTS[rng.integers(len(ACCENTS))]
    # A speaker keeps a habitual rate and pitch; each utterance strays a little from them. The
    # generator is bare and must stay so: the data sets on users' disks were spoken with it.
    habit = np.random.default_rng(list(f"{accent}+{variant}".encode()))
    rate, pitch, pitch_range = habit.uniform(185, 235), habit.uniform(30, 65), habit.uniform(35, 65)
    return {
        "voice": f"{accent}+{variant}",
        "rate": int(np.clip(rate + rng.normal(0, 12), 170, 260)),
        "pitch": int(np.clip(pitch + rng.normal(0, 7), 15, 85)),
        "pitch_range": int(np.clip(pitch_range + rng.normal(0, 8), 20, 85)),
        "level": round(float(rng.uniform(-27, -20)), 2),
    }


def speak(
    text: str, *, voice: str, rate: int, pitch: int, pitch_range: int, level: float
) -> Spoken:
    """Speak a text: 16 kHz mono, silence trimmed, at most 5 s, the same bytes for the same call.

    Sentences over 4.5 s are spoken again, faster.

    Args:
      text: what to say.
      voice: `<accent>+<variant>`.
      rate: words a minute, 80 to 450.
      pitch: 0 to 100.
      pitch_range: 0 to 100.
      level: RMS in dB below full scale.

    Returns:
      FLAC bytes and the number of samples.
    """
    import soundfile
    import soxr

    # The rate that comes out is not quite the one that was asked for, so one more try may be
    # needed.
    for _ in range(3):
        pcm, source_rate = _synthesize(text, voice, rate, pitch, pitch_range)
        wave = _trim(pcm.astype(np.float32) / 32768, source_rate)
        seconds = len(wave) / source_rate
        if seconds <= WANTED_SECONDS:
            break
        rate = min(int(rate * 1.03 * seconds / WANTED_SECONDS) + 1, 450)

    # The level is set over the whole recording, without clipping the peaks.
    wave = soxr.resample(wave, source_rate, SAMPLE_RATE)[: int(MOST_SECONDS * SAMPLE_RATE)]
    gain = 10 ** (level / 20) / max(float(np.sqrt(np.mean(wave**2))), 1e-4)
    wave = wave * min(gain, 0.95 / max(float(np.abs(wave).max()), 1e-4))

    # Twelve significant bits: FLAC packs the four zero bits away, which halves the set, 50 dB below
    # the speech.
    pcm = np.round(wave * 2047).astype(np.int16) * 16
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(wave)


def _synthesize(
    text: str, voice: str, rate: int, pitch: int, pitch_range: int
) -> tuple[np.ndarray, int]:
    """Return the bare int16 samples and their rate, from a freshly loaded library.

    espeak-ng carries oscillator phases, filters and noise over from what it spoke before, and no
    call clears them. Loading the library anew for each utterance (3 ms) does, so an utterance is
    the same bits in any order.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, _voice_data().encode(), _DONT_EXIT)
        if sample_rate <= 0:
            raise RuntimeError("espeak-ng did not start")
        chunks: list[bytes] = []

        @_CALLBACK
        def collect(samples: Any, count: int, _events: Any) -> int:
            if samples and count > 0:
                chunks.append(ctypes.string_at(samples, 2 * count))
            return 0

        library.espeak_SetSynthCallback(collect)
        # With a fixed seed the noise of the voices is the same in every call.
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")

        parameters = {_RATE: rate, _VOLUME: 100, _PITCH: pitch, _PITCH_RANGE: pitch_range}
        for parameter, value in parameters.items():
            library.espeak_SetParameter(parameter, int(value), 0)

        data = text.encode() + b"\0"
        library.espeak_Synth(data, len(data), 0, _CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Terminate()
    finally:
        (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(library._handle)
    return np.frombuffer(b"".join(chunks), np.int16), sample_rate


@functools.cache
def _voice_data() -> str:
    """Copy what the English voices need of espeak-ng's data; return the folder.

    Each accent is where it is looked for first. From the full data each freshly loaded library
    would list all 250 voices before it speaks, a third of the time. Workers use their parent's
    copy, which is deleted when the parent exits.
    """
    if _DATA_VARIABLE in os.environ:
        return os.environ[_DATA_VARIABLE]
    import espeakng_loader

    original = Path(espeakng_loader.get_data_path())
    folder = tempfile.mkdtemp(prefix="espeak-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    copy = Path(folder) / "espeak-ng-data"
    shutil.copytree(original / "voices" / "!v", copy / "voices" / "!v")
    (copy / "lang").mkdir()
    for name in ("phontab", "phonindex", "phondata", "intonations", "en_dict"):
        shutil.copy(original / name, copy)
    for file in (original / "lang" / "gmw").glob("en*"):
        shutil.copy(file, copy / "lang" / file.name.lower())
    return folder


def _trim(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Cut off the silence before and after the speech, except 40 ms."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max(initial=1e-6))
    if not len(loud):
        raise RuntimeError("espeak-ng returned silence")

    margin = int(0.04 * sample_rate)
    return wave[max(loud[0] - margin, 0) : loud[-1] + margin]


def check_installed() -> None:
    """Check that speech can be synthesized.

    Raises:
      UserError: `espeakng_loader` is not installed.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        # A worker must not import the package; see the top of this file.
        from c2f_jax.errors import UserError

        raise UserError(
            "speaking the captions of spoken_scenes needs espeak-ng, which is not installed: "
            "pip install 'c2f_jax[speech]' (it brings the package espeakng_loader, GPL-3)"
        )


def speak_all(utterances: Iterable[dict], *, processes: int | None = None) -> Iterator[Spoken]:
    """Speak many utterances in worker processes.

    Args:
      utterances: keyword arguments of `speak`.
      processes: number of workers; None for one a core.

    Yields:
      FLAC bytes and number of samples of each utterance, in order.
    """
    from c2f_jax.hardware.cores import usable_cores  # a worker imports nothing of the package

    processes = processes or usable_cores()
    workers = [_start_worker() for _ in range(processes)]

    # A thread waits for each worker, which is in the queue while it has nothing to do.
    free: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    threads = concurrent.futures.ThreadPoolExecutor(processes)
    try:
        waiting: collections.deque = collections.deque()
        for chunk in _chunks(utterances):
            waiting.append(threads.submit(_ask, free, chunk))
            # Enough to keep the workers busy, little enough to hold in memory.
            if len(waiting) > 3 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        threads.shutdown(cancel_futures=True)


def _start_worker() -> subprocess.Popen:
    # A plain child process rather than multiprocessing: that would import the caller's main module,
    # jax and all, in each worker, and fails in scripts without the __main__ guard.
    environment = {
        **os.environ,
        _DATA_VARIABLE: _voice_data(),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _ask(free: queue.SimpleQueue[subprocess.Popen], chunk: list[dict]) -> list[Spoken]:
    """Have a chunk spoken by the next worker that is free."""
    worker = free.get()
    try:
        pickle.dump(chunk, worker.stdin)
        worker.stdin.flush()
        answer = pickle.load(worker.stdout)
    except (EOFError, BrokenPipeError) as e:
        raise RuntimeError(f"a speaking process ended with exit status {worker.wait()}") from e
    finally:
        free.put(worker)
    if isinstance(answer, str):
        raise RuntimeError(f"speaking failed: {answer}")
    return answer


def _chunks(utterances: Iterable[dict]) -> Iterator[list[dict]]:
    utterances = iter(utterances)
    while chunk := list(itertools.islice(utterances, _CHUNK)):
        yield chunk


def _serve() -> None:
    """Answer lists of utterances with lists of what was spoken, or an error, until input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    # The pipe is kept apart from file descriptor 1, so that nothing that C code prints can spoil
    # it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = [speak(**utterance) for utterance in chunk]
        except Exception as e:  # sent to the parent, which stops
            answer = f"{type(e).__name__}: {e}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
