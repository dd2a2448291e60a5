"""The data check: what is wrong or odd in a data set, item by item, as text, JSON, a page, and a mended manifest."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import os

import numpy as np
from tqdm import tqdm

from c2f_jax.data.audio import decode_audio, read_bytes
from c2f_jax.data.images import open_rgb, resize_box
from c2f_jax.data.manifest import Listing, ManifestSource, is_manifest, manifest_in, read_listing
from c2f_jax.data.source import MIN_SAMPLES, SAMPLE_RATE, BadItems, PairSource
from c2f_jax.data_check.findings import EXIT_CODES, KINDS, VERY_SHORT, Finding, Report
from c2f_jax.datasets.registry import DATA_SETS, PUBLISHED, layout_of, load_pairs, open_builder
from c2f_jax.errors import BadFileError, UserError


def check_data(
    spec: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    max_seconds: float = 30.0,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Reads and decodes every item of a data set and says what is wrong or odd.

    Args:
      spec: a published data set (as downloaded when manual_dir is given, else as prepared), `spoken_scenes`, a
        manifest, a folder that holds manifest.jsonl or manifest.csv, or the directory of a prepared set.
      manual_dir: folder of the downloaded parts of a published set.
      data_dir: where TFDS keeps prepared sets.
      max_seconds: longer recordings are reported.
      threads: that decode; None for one a core.
      progress: show a bar.

    Raises:
      UserError: nothing there that can be checked.
    """
    name, sources, notes = _open(spec, manual_dir, data_dir)
    findings = [Finding(kind, item, detail) for kind, item, detail in notes]
    pictures, recordings = {}, {}
    total = sum(len(source) + source.num_images for source in sources.values())
    with (
        tqdm(total=total, desc="checking", unit=" items", disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
    ):

        def facts_of(function, count):
            facts = []
            for start in range(
                0, count, 4096
            ):  # in slices: half a million waiting futures would be a gigabyte
                for fact in pool.map(function, range(start, min(start + 4096, count))):
                    facts.append(fact)
                    bar.update()
            return facts

        for split, source in sources.items():
            pictures[split] = facts_of(
                lambda row, s=source: _picture_facts(s, row), source.num_images
            )
            recordings[split] = facts_of(
                lambda k, s=source: _recording_facts(s, k, max_seconds), len(source)
            )
    splits, seconds, left_out = {}, {}, {}
    for split, source in sources.items():
        for what, facts in (("picture", pictures[split]), ("recording", recordings[split])):
            for index, fact in enumerate(facts):
                for kind, detail in fact.problems:
                    findings.append(
                        Finding(kind, _NAME_OF[what](source, index), detail, split, (what, index))
                    )
        unusable = [not fact.usable for fact in pictures[split]]
        left_out[split] = {
            k
            for k, fact in enumerate(recordings[split])
            if not fact.usable or unusable[source.image_index[k]]
        }
        usable = [fact for k, fact in enumerate(recordings[split]) if k not in left_out[split]]
        seconds[split] = np.array([fact.seconds for fact in usable])
        splits[split] = _summary(source, seconds[split], usable)
    findings += _duplicates(sources, pictures, "picture")
    findings += _duplicates(sources, recordings, "recording")
    findings += _shared_ids(sources)
    findings += _odd_numbers(sources)
    findings += _differing_counts(name, splits)
    order = list(EXIT_CODES)
    findings.sort(key=lambda f: (order.index(f.severity), list(KINDS).index(f.kind)))
    return Report(name, splits, seconds, findings, sources, left_out)


def _open(spec: str, manual_dir, data_dir):
    """Name, split -> PairSource with nothing left out, and what the listing itself has to say."""
    name = str(spec).partition("/")[0]
    spec = str(spec) if name in DATA_SETS else manifest_in(str(spec)) or str(spec)
    if manual_dir is not None:
        return name, *_listed(layout_of(spec).listing([manual_dir]))
    if is_manifest(spec):
        return spec, *_listed(read_listing(spec, strict=False))
    builder = open_builder(spec, data_dir)
    if name not in DATA_SETS:
        name = builder.name
    splits = list(builder.info.splits)
    sources = {split: load_pairs(spec, split, data_dir, max_bad_share=1.0) for split in splits}
    notes = [
        ("left out", item, reason)
        for source in sources.values()
        for item, reason in source.bad_items.reasons.items()
    ]
    return name if name in PUBLISHED else spec, sources, notes


def _listed(listing: Listing):
    rows: dict[str, list[dict]] = {}
    identity: dict[tuple[str, str], str] = {}
    for row in listing.rows:
        known = identity.setdefault((row["split"], row["image"]), row["image_id"])
        if known != row["image_id"]:
            detail = f"image_id {row['image_id']!r} at {row['where']}, {known!r} before"
            listing.notes.append(("two image ids", row["image"], detail))
            continue
        rows.setdefault(row["split"], []).append(row)
    if not rows:
        raise UserError(
            f"{listing.name}: no rows that can be checked"
            + "".join(f"\n  {n}" for n in listing.notes[:3])
        )
    return {
        split: ManifestSource(listing.name, split, part, BadItems(listing.name, len(part), 1.0))
        for split, part in rows.items()
    }, listing.notes


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    problems: tuple[tuple[str, str], ...] = ()
    usable: bool = True
    seconds: float = 0.0
    content: bytes = b""  # equal for equal files
    look: bytes = b""  # of a picture: 16 x 16 RGB


def _recording_facts(source: PairSource, index: int, max_seconds: float) -> _Facts:
    import soundfile

    try:
        audio = source.recording(index)["audio"]
        encoded = audio if isinstance(audio, bytes) else read_bytes(audio)
        wave = decode_audio(encoded, name=source.recording_name(index))
        if len(wave) < MIN_SAMPLES:
            raise BadFileError(
                f"{len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed", "too short"
            )
    except BadFileError as e:
        return _Facts((_problem(e, source.recording_name(index)),), usable=False)
    about, problems = soundfile.info(io.BytesIO(encoded)), []
    if about.samplerate != SAMPLE_RATE:
        problems.append(("other sample rate", f"{about.samplerate:,} Hz"))
    if about.channels != 1:
        problems.append(("stereo", f"{about.channels} channels"))
    if np.abs(wave).max() < 1e-3:
        problems.append(("silence", f"peak {np.abs(wave).max():.1e} of full scale"))
    seconds = len(wave) / SAMPLE_RATE
    if seconds < VERY_SHORT:
        problems.append(("very short", f"{seconds:.2f} s"))
    if seconds > max_seconds:
        problems.append(("over-long", f"{seconds:.1f} s"))
    return _Facts(tuple(problems), seconds=seconds, content=hashlib.sha1(encoded).digest())


def _picture_facts(source: PairSource, row: int) -> _Facts:
    try:
        image = source.image(row)
        encoded = image if isinstance(image, bytes) else read_bytes(image)
        rgb = open_rgb(encoded, 32, name=source.image_name(row))
    except BadFileError as e:
        return _Facts((_problem(e, source.image_name(row)),), usable=False)
    look = resize_box(rgb, (0, 0, *rgb.size), 16).tobytes()
    problems = (("tiny picture", f"{rgb.width} x {rgb.height}"),) if min(rgb.size) < 16 else ()
    return _Facts(problems, content=hashlib.sha1(encoded).digest(), look=look)


def _problem(error: BadFileError, name: str) -> tuple[str, str]:
    return error.kind, str(error).removeprefix(f"{name}: ")


def _summary(source: PairSource, seconds: np.ndarray, usable: list) -> dict:
    captions = collections.Counter(
        np.bincount(source.image_index, minlength=source.num_images).tolist()
    )
    lengths = seconds if len(seconds) else np.zeros(1)
    return {
        "pictures": source.num_images,
        "recordings": len(source),
        "usable": len(usable),
        "hours": float(seconds.sum() / 3600),
        "seconds": {
            "min": float(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p95": float(np.percentile(lengths, 95)),
            "max": float(lengths.max()),
        },
        "captions_per_picture": {str(number): count for number, count in sorted(captions.items())},
    }


def _duplicates(sources, facts, what: str) -> list[Finding]:
    """Items of equal content or look; in two splits they are a leak."""
    findings, name_of = [], _NAME_OF[what]
    seen: dict[bytes, list] = collections.defaultdict(list)
    for split, source in sources.items():
        for index, fact in enumerate(facts[split]):
            if not fact.usable:
                continue
            keys = _keys(fact)
            like = next((item for key in keys for item in seen[key] if _alike(fact, item[2])), None)
            if like is None:
                for key in keys:
                    # Pictures without any pattern share a key; comparing each with all of them would take for ever.
                    if len(seen[key]) < 100:
                        seen[key].append((split, index, fact))
                continue
            other_split, other, other_fact = like
            same = fact.content == other_fact.content
            kind, detail = (
                f"duplicate {what}",
                f"{'the same file' if same else 'looks the same'} as ",
            )
            if split != other_split:
                kind, detail = "split leak", f"also in {other_split}: "
            elif what == "picture" and source.image_ids[index] == source.image_ids[other]:
                kind = "repeated picture"
            first = name_of(sources[other_split], other)
            findings.append(
                Finding(
                    kind,
                    name_of(source, index),
                    detail + first,
                    split,
                    (what, index),
                    (other_split, first),
                )
            )
    return findings


_NAME_OF = {"picture": PairSource.image_name, "recording": PairSource.recording_name}


def _keys(fact: _Facts) -> list[bytes]:
    """Of the content and, for a picture, of its coarse brightness pattern, which re-encoding does not change."""
    if not fact.look:
        return [fact.content]
    grey = np.frombuffer(fact.look, np.uint8).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3, 4))
    return [fact.content, np.packbits(grey[:, 1:] > grey[:, :-1] + 4).tobytes()]


def _alike(one: _Facts, other: _Facts) -> bool:
    if one.content == other.content:
        return True
    looks = [np.frombuffer(facts.look, np.uint8).astype(int) for facts in (one, other)]
    return bool(len(looks[0]) and np.abs(looks[0] - looks[1]).max() <= 12)


def _shared_ids(sources) -> list[Finding]:
    findings, seen = [], {}
    for split, source in sources.items():
        names = {source.image_id(row) for row in np.unique(source.image_ids, return_index=True)[1]}
        for name in sorted(names):
            other = seen.setdefault(name, split)
            if other != split:
                findings.append(Finding("image_id in two splits", name, f"also in {other}", split))
    return findings


def _odd_numbers(sources) -> list[Finding]:
    """Pictures with another number of recordings than three quarters of all; nothing where there is no such number.

    A split that differs in most of its pictures is made so, and its pictures are not named.
    """
    counts = {
        s: np.bincount(source.image_index, minlength=source.num_images)
        for s, source in sources.items()
    }
    number, pictures = collections.Counter(np.concatenate([*counts.values()]).tolist()).most_common(
        1
    )[0]
    if pictures < 0.75 * sum(map(len, counts.values())):
        return []
    return [
        Finding("number of captions", sources[split].image_name(row), f"{found} where most have {number}", split,
                ("picture", row))
        for split, of_split in counts.items() if np.mean(of_split != number) <= 0.5
        for row, found in enumerate(of_split.tolist()) if found != number
    ]  # fmt: skip


def _differing_counts(name: str, splits) -> list[Finding]:
    published = layout_of(name).published if name in PUBLISHED else {}
    return [
        Finding(
            "count differs",
            f"{split}, {what}",
            f"{splits[split][what]:,}, published {expected:,}",
            split,
        )
        for split, numbers in published.items()
        for what, expected in zip(("pictures", "recordings"), numbers, strict=True)
        if split in splits and expected is not None and splits[split][what] != expected
    ]
