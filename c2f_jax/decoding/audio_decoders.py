"""Decoders of audio: libsndfile, and FFmpeg (extra `av`) for what libsndfile does not read."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from c2f_jax.decoding.audio_streams import Note
from c2f_jax.errors import BadFileError

if TYPE_CHECKING:
    import soundfile

_BLOCK = 2**20  # samples of all channels read at a time
_SMALL_BLOCK = 256  # where a file is damaged, so that all before the damage is read
# soundfile raises all of these on damaged files.
_ERRORS = (RuntimeError, TypeError, ValueError, OverflowError, MemoryError)
# Formats whose length libsndfile takes from the file; what their headers say is in its log.
_LOGGED = ("NIST", "VOC", "MAT4", "MAT5", "AVR", "MPC2K", "SDS")
_ENDLESS = 2**60  # libsndfile's number of samples where none is known
# Containers that FFmpeg may open: none that refer to other files.
_CONTAINERS = (
    "mov,matroska,asf,avi,flv,mpegts,mpeg,rm,ogg,aac,loas,ac3,eac3,dts,truehd,amr,amrnb,amrwb,mp3,"
    "flac,wav,w64,aiff,au,caf,wv,ape,tta,tak,mpc,mpc8,dsf,iff,oma,xwma,shn,nistsphere,voc"
)
# Those that hold their length, rather than an estimate from the size of the file.
_TIMED = tuple("mov, matroska asf flv rm wv ape tta flac wav caf aiff".split())
_ROUNDING = 0.1  # seconds of a length that are delay, or padding of the last frame
_LAST_PICTURE = 1.0  # seconds that the last packet of a film may be shown


class SndfileDecoder:
    """Samples of a file, by libsndfile.

    Attributes:
      rate: Hz.
      channels: their number.
      promised: samples a channel that are in the file, as far as is known; None if they are not.
      surplus: samples a channel that the file has beyond them.
      integers: whether the samples were integers, which are within full scale.
      error: what stopped reading, if anything did.
      notes: what is odd about it.
    """

    notes: tuple[Note, ...] = ()

    def __init__(self, data: bytes, frames: int | None) -> None:
        self._data = data
        self._file: soundfile.SoundFile | None = _sound_file()(_Bytes(data))
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.promised = _promised(self._file, data) if frames is None else frames
        self.integers = self._file.subtype.startswith("PCM_")
        self.surplus = 0
        if self._file.format in _LOGGED and self.promised is not None:
            self.surplus = max(self._file.frames - self.promised, 0)
            if self.surplus and self._file.format == "VOC":
                # libsndfile would take the heads of the blocks that follow for samples.
                raise ValueError("a VOC of several blocks")
        self.error: Exception | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Read from the beginning: float32 (n, channels) at a time, up to the end or the error."""
        done = 0
        for size in (max(_BLOCK // self.channels, 1), _SMALL_BLOCK):
            try:
                for block in self._read(size, done):
                    done += len(block)
                    yield block
                return
            except _ERRORS as error:
                # A read that fails gives nothing of what it had, so it is repeated in small steps.
                self.error = error

    def _read(self, size: int, skipped: int) -> Iterator[np.ndarray]:
        file = self._file or _sound_file()(_Bytes(self._data))
        self._file = None
        left = _ENDLESS if self.promised is None else self.promised
        with file:
            while left > 0:
                count = min(_BLOCK // self.channels or 1, skipped) if skipped else size
                block = file.read(min(count, left), dtype="float32", always_2d=True)
                if not len(block):
                    return
                left -= len(block)
                if skipped:
                    skipped -= len(block)
                else:
                    yield block


@functools.cache
def _sound_file() -> type[soundfile.SoundFile]:
    import soundfile

    class ForwardOnly(soundfile.SoundFile):
        """A file that is read once, from its beginning.

        Of a file that can seek, soundfile seeks after each read, which is slow and which fails at
        the end of streams of unknown length.
        """

        def seekable(self) -> bool:
            return False

    return ForwardOnly


class _Bytes(io.BytesIO):
    """Bytes that ignore a seek to before their beginning, as damaged headers ask for.

    soundfile would print a traceback.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _promised(file: soundfile.SoundFile, data: bytes) -> int | None:
    """Return how many samples a channel a file has, or should have."""
    if file.format == "NIST":
        count = re.search(rb"sample_count -i (\d+)", data[:1024])
        return int(count[1]) if count else file.frames
    if file.format in _LOGGED:
        log = file.extra_info
        if "truncated" in log:
            return _ENDLESS
        if file.format == "VOC":
            sizes = re.findall(r"(Sound Data|Extended II)\s*:\s*(\d+)", log)
            width = file.channels * (2 if file.subtype == "PCM_16" else 1)
            size = sum(int(size) - (12 if kind == "Extended II" else 2) for kind, size in sizes)
            # Writers differ in what of the block's head they count.
            alike = not sizes or abs(size - width * file.frames) <= 16
            return file.frames if alike else size // width
        stated = re.findall(r"(?:Frames|Cols)\s*:\s*(\d+)", log)
        if file.format == "SDS":  # here the log has what the file holds
            return file.frames if int(stated[-1]) >= file.frames else _ENDLESS
        return int(stated[-1]) if stated else file.frames
    return file.frames if file.frames < _ENDLESS else None


class FfmpegDecoder:
    """Samples of a file, by FFmpeg.

    The attributes are those of `SndfileDecoder`.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        self.notes: tuple[Note, ...] = ()
        self.promised: int | None = None
        self._last = self._end = 0.0  # seconds, where the last of all packets should end and does
        self.integers = False
        self.surplus = 0
        self.error: Exception | None = None
        container, stream = self._open()
        with container:
            self.rate, self.channels = stream.rate, stream.channels
            for frame in self._frames(container, stream):
                # The decoder knows better than the header: HE-AAC doubles its rate.
                self.rate, self.channels = frame.sample_rate, len(frame.layout.channels)
                break
            if not self.rate or not self.channels:
                raise BadFileError(f"{name}: not readable audio (no channels)", "unreadable")
            if container.format.name.startswith(_TIMED):
                self._measure(container, stream)
            tracks = len(container.streams.audio)
        if tracks > 1:
            self.notes = (("several tracks", f"track {stream.index} of {tracks} is the main one"),)
        self.error = None

    def blocks(self) -> Iterator[np.ndarray]:
        """Read from the beginning: float32 (n, channels) at a time."""
        import av

        container, stream = self._open()
        to_float = av.AudioResampler(format="fltp")
        done = 0
        with container:
            for frame in self._frames(container, stream):
                if (frame.sample_rate, len(frame.layout.channels)) != (self.rate, self.channels):
                    raise BadFileError(
                        f"{self._name}: changes its rate or its number of channels; convert it: "
                        "ffmpeg -i FILE OUTPUT.wav",
                        "unreadable",
                    )
                try:
                    parts = to_float.resample(frame)
                except (av.FFmpegError, ValueError) as error:
                    raise BadFileError(
                        f"{self._name}: damaged, its samples cannot be converted ({error})",
                        "unreadable",
                    ) from error
                for part in parts:
                    done += part.samples
                    yield part.to_ndarray().T
        if self._last:
            lost = max(self._last - _LAST_PICTURE - self._end, 0.0)
            self.promised = done + round(lost * self.rate)

    def _open(self) -> tuple[Any, Any]:
        import av

        options = {"format_whitelist": _CONTAINERS}
        container = av.open(io.BytesIO(self._data), options=options, metadata_errors="ignore")
        stream: Any = container.streams.best("audio")  # what players play
        if stream is None or stream.codec_context is None:
            container.close()
            what = "there is no sound in it" if stream is None else "its codec is not known"
            raise BadFileError(f"{self._name}: not readable audio ({what})", "unreadable")
        stream.codec_context.thread_type = "NONE"  # the callers are threads
        return container, stream

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Decode; leave out packets that are damaged, as players do."""
        import av

        count = damaged = 0
        packets = container.demux()
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                raise BadFileError(
                    f"{self._name}: damaged after {count} packets ({error})", "unreadable"
                ) from error
            if packet is None:
                return
            if packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                self._end = max(self._end, float(end))
            if packet.stream_index != stream.index:
                continue
            count += 1
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                damaged, self.error = damaged + 1, error
                if damaged > 3 and damaged > 0.01 * count:
                    raise BadFileError(
                        f"{self._name}: damaged, {damaged} of {count} packets cannot be decoded",
                        "unreadable",
                    ) from error

    def _measure(self, container: Any, stream: Any) -> None:
        """Take from a container how long it is: samples, or the end of the longest stream."""
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration and len(container.streams) == 1:
            # Matroska gives the end, which is not the length of what does not begin at 0.
            seconds = (container.duration - max(container.start_time or 0, 0)) / 1e6
        else:
            self._last = (container.duration or 0) / 1e6
            return
        self.promised = round(max(seconds - _ROUNDING, 0) * self.rate)


Decoder = SndfileDecoder | FfmpegDecoder


def open_audio(data: bytes, frames: int | None, name: str) -> Decoder:
    """Open a file with the first decoder that reads it.

    Args:
      data: the file, of one stream.
      frames: samples a channel that it has, if known.
      name: what errors call it.

    Returns:
      A decoder.

    Raises:
      BadFileError: none reads it.
    """
    try:
        return SndfileDecoder(data, frames)
    except _ERRORS as error:
        reason = getattr(error, "error_string", None) or str(error)
    try:
        import av
    except ImportError:
        raise BadFileError(
            f"{name}: not readable audio ({reason}); use WAV, FLAC, Ogg or MP3, or install the "
            "extra `av`, which reads M4A, WebM, AMR, WMA and more: pip install 'c2f_jax[av]'",
            "unreadable",
        ) from None
    try:
        return FfmpegDecoder(data, name)
    except (av.FFmpegError, *_ERRORS) as error:
        if isinstance(error, BadFileError):
            raise
        raise BadFileError(
            f"{name}: not readable audio (libsndfile: {reason}; FFmpeg: "
            f"{getattr(error, 'strerror', None) or error})",
            "unreadable",
        ) from error
