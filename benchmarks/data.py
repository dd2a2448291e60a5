"""Examples per second from files to batches, against a torch DataLoader; the padding of batches.

    pip install torch  # only for this comparison; the CPU build is enough
    python benchmarks/data.py [--manifest=manifest.jsonl] [--image-size=224] [--batch-size=64]

Without a manifest, it writes photographs of 500 x 375 with five FLAC recordings each, as long as
those of Flickr8k Audio, to a temporary folder. Every loader makes the same batches: 16 kHz float32
waveforms, padded or cropped to one length, and square uint8 images. The loaders take turns in one
process; the table shows the median of the rounds.

    DataLoader          soundfile.read, Image.open, resize, center crop, as is usual
    DataLoader, c2f     the same loader with the decoding functions of this package
    c2f, no cache       each image and recording is read and decoded whenever it is needed
    c2f                 decoded items are kept, so an image with five recordings is decoded once

All start with empty caches and run through less than one epoch.

    python benchmarks/data.py --decoder [--against=CHECKOUT]

times the decoder of recordings alone, four seconds of each format; with another checkout both take
turns, each in a process of its own, and the table shows the medians and their ratio.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from c2f_jax.data import batch_plan, loader
from c2f_jax.datasets.registry import load_pairs
from c2f_jax.decoding.audio import decode_audio
from c2f_jax.decoding.images import decode_image

RATE = 16_000


def seconds_like_flickr8k(rng, count=None):
    """Draw lengths in seconds: gamma distributed, with the mean of Flickr8k Audio, 4.1 s."""
    return np.clip(rng.gamma(9.0, 0.46, count), 0.3, 24)


def make_files(folder, images, captions=5):
    """Write JPEGs like photographs, FLAC files like speech, and their manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (500, 375)
        )
        grain = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (375, 500, 1))
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(
            folder / f"{number}.jpg", quality=90
        )
        for k in range(captions):
            seconds = float(seconds_like_flickr8k(rng))
            count = int(seconds * RATE)
            envelope = np.interp(
                np.arange(count), np.linspace(0, count, 60), rng.uniform(0, 0.2, 60)
            )
            name = f"{number}_{k}.flac"
            soundfile.write(folder / name, envelope * rng.standard_normal(count), RATE)
            rows.append(
                {"image": f"{number}.jpg", "audio": name, "split": "train", "seconds": seconds}
            )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def plain_wave(path):
    """Read a recording as is usual."""
    wave, rate = soundfile.read(path, dtype="float32")
    wave = wave if wave.ndim == 1 else wave.mean(1)
    if rate != RATE:
        import soxr

        wave = soxr.resample(wave, rate, RATE)
    return wave


def plain_image(path, size):
    """Read an image as is usual: resize the short side, crop the center."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize(
        [max(round(scale * side), size) for side in image.size], Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Files:
    """A map-style data set for torch."""

    def __init__(self, pairs, size, samples, ours):
        self.pairs, self.size, self.samples, self.ours = pairs, size, samples, ours

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        audio, image = (
            self.pairs.recording(index)["audio"],
            self.pairs.image(int(self.pairs.image_index[index])),
        )
        wave = decode_audio(audio) if self.ours else plain_wave(audio)
        pixels = decode_image(image, self.size) if self.ours else plain_image(image, self.size)
        return wave[: self.samples], pixels

    def collate(self, items):
        """Return the batch that the package's loader makes."""
        import torch

        waves = np.zeros((len(items), self.samples), np.float32)
        for row, (wave, _) in enumerate(items):
            waves[row, : len(wave)] = wave
        return {
            "waveform": torch.from_numpy(waves),
            "speech_lengths": torch.tensor([len(wave) for wave, _ in items], dtype=torch.int32),
            "image": torch.from_numpy(np.stack([pixels for _, pixels in items])),
        }


def torch_batches(pairs, options, workers, ours):
    """Return an iterator over a shuffling torch DataLoader."""
    import torch

    files = Files(pairs, options.image_size, round(options.seconds * RATE), ours)
    return iter(
        torch.utils.data.DataLoader(
            files,
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            collate_fn=files.collate,
        )
    )


def our_batches(pairs, options, workers, cache_mib):
    """Return an iterator over the package's loader."""
    batch_options = loader.BatchOptions(
        batch_size=options.batch_size,
        image_size=options.image_size,
        bucket_seconds=(options.seconds,),
        seed=int(time.time_ns() % 2**31),
        threads=workers,
        cache_mib=cache_mib,
    )
    return (batch for _, batch in loader.train_batches(pairs, batch_options))


def rate_of(batches, count, batch_size):
    """Return examples per second of wall time, and per second of CPU time with child processes."""
    wall, used = time.perf_counter(), sum(os.times()[:4])
    for _ in range(count):
        batch = next(batches)
        assert batch["image"].shape[0] == batch_size
    wall = time.perf_counter() - wall
    del batches, batch  # workers of torch are counted once they have ended
    return count * batch_size / wall, count * batch_size / max(sum(os.times()[:4]) - used, 1e-9)


def padding(lengths, seconds, batch_size):
    """Return a line with the share of padding for one length, and for lengths chosen for 10 %."""
    longest = round(seconds * RATE)
    chosen = batch_plan.fit_buckets(lengths, longest, batch_size=batch_size, max_padding=0.1)
    one, several = (
        batch_plan.padding_share(lengths, batch_size=batch_size, bucket_samples=buckets)
        for buckets in ((longest,), chosen)
    )
    lengths_chosen = ", ".join(f"{count / RATE:g}" for count in chosen)
    return (
        f"padding of {len(lengths):,} recordings, batches of {batch_size}: "
        f"{one:.1%} with one length, {several:.1%} with {lengths_chosen} s"
    )


# Name in the table -> (rate, channels, container, codec).
FORMATS = {
    "WAV": (RATE, 1, "WAV", "PCM_16"),
    "WAV 44.1 kHz stereo": (44_100, 2, "WAV", "PCM_16"),
    "FLAC": (RATE, 1, "FLAC", "PCM_16"),
    "FLAC 48 kHz stereo": (48_000, 2, "FLAC", "PCM_24"),
    "Ogg Vorbis": (RATE, 1, "OGG", "VORBIS"),
    "Ogg Opus": (48_000, 1, "OGG", "OPUS"),
    "MP3": (44_100, 1, "MP3", "MPEG_LAYER_III"),
    "MP3 stereo": (44_100, 2, "MP3", "MPEG_LAYER_III"),
}


def time_decoder(repeats=40, seconds=4.0):
    """Return milliseconds of CPU a recording of each format, the median of several."""
    rng, took = np.random.default_rng(0), {}
    for name, (rate, channels, container, codec) in FORMATS.items():
        count = int(seconds * rate)
        envelope = np.interp(np.arange(count), np.linspace(0, count, 60), rng.uniform(0, 0.2, 60))
        wave = envelope[:, None] * rng.standard_normal((count, 1)) + np.zeros(channels)
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format=container, subtype=codec)
        encoded, times = file.getvalue(), []
        for _ in range(repeats):
            began = time.process_time()
            decode_audio(encoded)
            times.append(time.process_time() - began)
        took[name] = 1000 * statistics.median(times)
    return took


def compare_decoders(other, rounds):
    """Print the milliseconds of each format here and in another checkout, which take turns."""
    trees = {"here": str(Path(__file__).resolve().parents[1]), "there": other}
    command = [sys.executable, __file__, "--decoder", "--json"]
    times = {tree: [] for tree in trees if trees[tree]}
    for number in range(rounds):
        for tree in list(times)[:: 1 if number % 2 else -1]:
            environment = {**os.environ, "PYTHONPATH": trees[tree]}
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            times[tree].append(json.loads(done.stdout))
    for name in FORMATS:
        here = statistics.median(took[name] for took in times["here"])
        line = f"{name:20} {here:7.3f} ms"
        if other:
            there = statistics.median(took[name] for took in times["there"])
            ratio = statistics.median(
                b[name] / a[name] for a, b in zip(times["here"], times["there"], strict=True)
            )
            line += f"  {there:7.3f} ms there  speed {ratio:5.2f} of it"
        print(line)


def main():
    """Print one line for each loader, and the padding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest")
    parser.add_argument("--images", type=int, default=600, help="images to make without a manifest")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the waveforms")
    parser.add_argument(
        "--batches", type=int, default=30, help="batches of each loader in each round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--decoder", action="store_true", help="time the decoder alone")
    parser.add_argument("--against", default="", help="checkout whose decoder is timed in turn")
    parser.add_argument("--json", action="store_true", help="with --decoder: one line, no turns")
    options = parser.parse_args()
    if options.decoder:
        if options.json:
            print(json.dumps(time_decoder()))
        else:
            compare_decoders(options.against, max(options.rounds, 3))
        return
    with tempfile.TemporaryDirectory() as folder:
        manifest = options.manifest or make_files(Path(folder), options.images)
        pairs = load_pairs(str(manifest), "train")
        batches = min(options.batches, len(pairs) // options.batch_size)
        loaders = {
            "DataLoader": lambda: torch_batches(pairs, options, options.workers, False),
            "DataLoader, c2f": lambda: torch_batches(pairs, options, options.workers, True),
            "c2f, no cache": lambda: our_batches(pairs, options, options.workers, 0),
            "c2f": lambda: our_batches(pairs, options, options.workers, 2048),
        }
        rates = {name: [] for name in loaders}
        for _ in range(options.rounds):
            for name, start in loaders.items():
                rates[name].append(rate_of(start(), batches, options.batch_size))
        print(
            f"{len(pairs):,} pairs, {batches} batches of {options.batch_size}, "
            f"{options.workers} workers, images {options.image_size} px, {options.rounds} rounds, "
            f"{os.cpu_count()} cores"
        )
        base = statistics.median(wall for wall, _ in rates["DataLoader"])
        for name, values in rates.items():
            wall, core = (statistics.median(column) for column in zip(*values, strict=True))
            print(
                f"{name:16} {wall:8.1f} examples/s  {core:8.1f} a core second  {wall / base:5.2f} x"
            )
        if options.manifest:
            print(padding(np.asarray(pairs.num_samples), options.seconds, options.batch_size))
        else:  # the files made for timing are too few to choose lengths for
            print(
                padding(
                    (seconds_like_flickr8k(np.random.default_rng(0), 30_000) * RATE).astype(int),
                    8.0,
                    256,
                )
            )


if __name__ == "__main__":
    main()
