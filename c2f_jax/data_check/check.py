"""The data check: what is wrong or odd in a data set, item by item."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from c2f_jax.data.feature_cache import open_features
from c2f_jax.data.listing import Listing, Note, read_listing
from c2f_jax.data.manifest import ManifestSource, is_manifest, manifest_in
from c2f_jax.data.source import BadItems, PairSource
from c2f_jax.data_check.facts import Facts, image_facts, recording_facts
from c2f_jax.data_check.findings import EXIT_CODES, KINDS, Finding, Report
from c2f_jax.datasets.config import DataConfig
from c2f_jax.datasets.registry import (
    DATA_SETS,
    PUBLISHED,
    data_set_name,
    layout_of,
    load_pairs,
    open_builder,
)
from c2f_jax.errors import UserError

SLICE = 4096  # items at a time: half a million waiting futures would be a gigabyte
# Images without any pattern share a key; comparing each with all of them would take forever.
MOST_COMPARED = 100
USUAL_SHARE = 0.75  # of the images that must have a number of captions for others to be odd

Sources = dict[str, PairSource]  # by split
FactsOfSplits = dict[str, list[Facts]]
NAME_OF = {"image": PairSource.image_name, "recording": PairSource.recording_name}


@dataclasses.dataclass(frozen=True)
class _DataSet:
    """A data set with all items that are listed, and the notes of its listing.

    Attributes:
      name: its name.
      sources: its splits.
      notes: what is odd about the listing.
      not_listed: name -> reason of what the listing or the preparation left out.
    """

    name: str
    sources: Sources
    notes: list[Note]
    not_listed: dict[str, str]


@dataclasses.dataclass(frozen=True)
class RunLimits:
    """What a run does with its data, to judge them by.

    Attributes:
      data: how it reads data.
      batch_size: rows of its batches.
    """

    data: DataConfig
    batch_size: int

    def seconds(self, split: str) -> float:
        """Return the length above which recordings of a split are cropped or cut."""
        if split == self.data.train_split:
            return max(self.data.bucket_seconds)
        return self.data.max_seconds


def check_data(
    spec: str,
    *,
    manual_dir: str | None = None,
    data_dir: str | None = None,
    max_seconds: float = 30.0,
    run: RunLimits | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Read and decode every item of a data set, and say what is wrong or odd.

    Args:
      spec: a published data set (as downloaded when manual_dir is given, else as prepared),
        `spoken_scenes`, a manifest, a folder that holds manifest.jsonl or manifest.csv, or the
        directory of a prepared set.
      manual_dir: folder of the downloaded parts of a published set.
      data_dir: where TFDS keeps prepared sets.
      max_seconds: longer recordings are reported.
      run: what a run would do with the data, in place of max_seconds.
      threads: threads that decode; None for one a core.
      progress: whether to show a bar.

    Returns:
      What was found.

    Raises:
      UserError: there is nothing that can be checked.
    """
    data_set = _open(str(spec), manual_dir, data_dir)
    sources = data_set.sources
    # Everything is decoded once; what follows only compares facts.
    total = sum(len(source) + source.num_images for source in sources.values())
    with (
        tqdm(total=total, desc="checking", unit=" items", disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
    ):
        images, recordings = _decode_all(sources, run or max_seconds, pool, bar)

    # Problems of single items decide what can be used.
    findings = [Finding(kind, name, detail) for kind, name, detail in data_set.notes]
    splits, seconds, left_out = {}, {}, {}
    for split, source in sources.items():
        findings += _problems(split, source, "image", images[split])
        findings += _problems(split, source, "recording", recordings[split])
        left_out[split] = _left_out(source, images[split], recordings[split])
        usable = []
        for index, fact in enumerate(recordings[split]):
            if index not in left_out[split]:
                usable.append(fact.seconds)
        seconds[split] = np.array(usable)
        splits[split] = _summary(source, seconds[split])

    # Oddities that show only when items or splits are compared.
    findings += _duplicates(sources, images, "image")
    findings += _duplicates(sources, recordings, "recording")
    findings += _shared_ids(sources)
    findings += _one_id(sources)
    findings += _odd_numbers(sources)
    findings += _differing_counts(data_set.name, splits)
    if run is not None:
        findings += _unlike_run(sources, {"image": images, "recording": recordings}, run)

    findings.sort(key=_place)
    return Report(data_set.name, splits, seconds, findings, sources, left_out, data_set.not_listed)


def _place(finding: Finding) -> tuple[int, int]:
    """Order findings by severity, then by kind."""
    return list(EXIT_CODES).index(finding.severity), list(KINDS).index(finding.kind)


def _open(spec: str, manual_dir: str | None, data_dir: str | None) -> _DataSet:
    """Open a data set with nothing left out."""
    name = data_set_name(spec)
    if name not in DATA_SETS:
        spec = manifest_in(spec) or spec

    if manual_dir is not None:
        return _listed(name, layout_of(spec).listing([manual_dir]))
    if is_manifest(spec):
        return _listed(spec, read_listing(spec, strict=False))

    builder = open_builder(spec, data_dir)
    # Nothing is left out, however bad, so that all of it can be reported.
    sources, not_listed = {}, {}
    for split in builder.info.splits:
        sources[split] = load_pairs(spec, split, data_dir, max_bad_share=1.0)
        not_listed |= sources[split].bad_items.reasons
    notes = [Note("left out", item, reason) for item, reason in not_listed.items()]
    if name not in DATA_SETS:
        name = builder.name
    return _DataSet(name if name in PUBLISHED else spec, sources, notes, not_listed)


def _listed(name: str, listing: Listing) -> _DataSet:
    """Make sources from a listing; files that are missing are found when they are read."""
    listing.resolve()
    rows: dict[str, list[dict]] = {}
    for row in listing.rows:
        rows.setdefault(row["split"], []).append(row)
    if not rows:
        notes = "".join(f"\n  {note.name}: {note.detail}" for note in listing.notes[:3])
        raise UserError(f"{listing.name}: no rows that can be checked{notes}")

    sources: Sources = {}
    for split, part in rows.items():
        left_out = listing.left_out_of(split)
        bad_items = BadItems(listing.name, len(part) + len(left_out), 1.0)
        bad_items.add_all(left_out)
        sources[split] = ManifestSource(listing.name, split, part, bad_items)
    not_listed = {where: reason for where, (_, reason) in listing.left_out.items()}
    return _DataSet(name, sources, listing.notes, not_listed)


def _decode_all(
    sources: Sources,
    limits: RunLimits | float,
    pool: concurrent.futures.ThreadPoolExecutor,
    bar: tqdm,
) -> tuple[FactsOfSplits, FactsOfSplits]:
    """Read the facts of all images and of all recordings; ``limits`` are a run's, or seconds."""
    images, recordings = {}, {}
    for split, source in sources.items():
        max_seconds, image_size = limits, 0
        if isinstance(limits, RunLimits):
            max_seconds, image_size = limits.seconds(split), limits.data.image_size
        read_image = functools.partial(image_facts, source, image_size=image_size)
        read_recording = functools.partial(recording_facts, source, max_seconds=max_seconds)
        images[split] = _facts_of_all(read_image, source.num_images, pool, bar)
        recordings[split] = _facts_of_all(read_recording, len(source), pool, bar)
        if isinstance(limits, RunLimits):
            images[split] = _with_features(source, "image", images[split], limits.data)
            recordings[split] = _with_features(source, "speech", recordings[split], limits.data)
    return images, recordings


def _with_features(
    source: PairSource, kind: str, facts: list[Facts], data: DataConfig
) -> list[Facts]:
    """Add what a run's feature cache lacks; training makes a cache that is not there."""
    path = data.features_path(kind)
    if path is None or not os.path.exists(path):
        return facts
    features, found = open_features(path), []
    key_of = source.recording_key if kind == "speech" else source.image_key
    for index, fact in enumerate(facts):
        try:
            if fact.usable:
                features.check(key_of(index), source.stamp(kind, index))
        except UserError as e:
            problems = (*fact.problems, ("no features", str(e)))
            fact = dataclasses.replace(fact, problems=problems, usable=False)
        found.append(fact)
    return found


def _facts_of_all(
    read: Callable[[int], Facts],
    count: int,
    pool: concurrent.futures.ThreadPoolExecutor,
    bar: tqdm,
) -> list[Facts]:
    """Read the facts of all items of one kind of a split."""
    facts = []
    for start in range(0, count, SLICE):
        for fact in pool.map(read, range(start, min(start + SLICE, count))):
            facts.append(fact)
            bar.update()
    return facts


def _problems(split: str, source: PairSource, what: str, facts: list[Facts]) -> list[Finding]:
    """List the problems of single items."""
    findings = []
    for index, fact in enumerate(facts):
        for kind, detail in fact.problems:
            name = NAME_OF[what](source, index)
            findings.append(Finding(kind, name, detail, split, (what, index)))
    return findings


def _left_out(source: PairSource, images: list[Facts], recordings: list[Facts]) -> set[int]:
    """Return the recordings that cannot be used, or whose image cannot."""
    left_out = set()
    for index, fact in enumerate(recordings):
        if not fact.usable or not images[source.image_index[index]].usable:
            left_out.add(index)
    return left_out


def _captions_per_image(source: PairSource) -> np.ndarray:
    """Count the recordings of each image, int (G,)."""
    return np.bincount(source.image_index, minlength=source.num_images)


def _summary(source: PairSource, seconds: np.ndarray) -> dict[str, Any]:
    """Sum up a split, given the lengths of its usable recordings; see `Report.splits`."""
    captions = collections.Counter(_captions_per_image(source).tolist())
    # A split without usable recordings has lengths of 0.
    lengths = seconds if len(seconds) else np.zeros(1)
    return {
        "images": source.num_images,
        "recordings": len(source),
        "usable": len(seconds),
        "hours": float(seconds.sum() / 3600),
        "seconds": {
            "min": float(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p95": float(np.percentile(lengths, 95)),
            "max": float(lengths.max()),
        },
        "captions_per_image": {str(number): count for number, count in sorted(captions.items())},
    }


@dataclasses.dataclass(frozen=True)
class _Seen:
    """An item that later ones are compared with."""

    split: str
    index: int
    fact: Facts


def _duplicates(sources: Sources, facts: FactsOfSplits, what: str) -> list[Finding]:
    """Find items of equal content or look; in two splits they are a leak."""
    findings = []
    seen: dict[bytes, list[_Seen]] = collections.defaultdict(list)
    for split in sources:
        for index, fact in enumerate(facts[split]):
            if not fact.usable:
                continue
            keys = fact.keys()
            # Comparing looks is slow, so only items that share a key are compared.
            candidates = (item for key in keys for item in seen[key])
            like = next((item for item in candidates if fact.is_like(item.fact)), None)
            if like is not None:
                findings.append(_duplicate(sources, what, _Seen(split, index, fact), like))
                continue
            for key in keys:
                if len(seen[key]) < MOST_COMPARED:
                    seen[key].append(_Seen(split, index, fact))
    return findings


def _duplicate(sources: Sources, what: str, item: _Seen, like: _Seen) -> Finding:
    """Say how an item is like an earlier one."""
    source, other = sources[item.split], sources[like.split]
    first = NAME_OF[what](other, like.index)

    kind = f"duplicate {what}"
    same = "the same file" if item.fact.content == like.fact.content else "looks the same"
    detail = f"{same} as {first}"
    if item.split != like.split:
        kind, detail = "split leak", f"also in {like.split}: {first}"
    elif what == "image" and source.image_ids[item.index] == source.image_ids[like.index]:
        kind = "repeated image"

    name = NAME_OF[what](source, item.index)
    return Finding(kind, name, detail, item.split, (what, item.index), (like.split, first))


def _shared_ids(sources: Sources) -> list[Finding]:
    """Find image_ids that occur in two splits."""
    findings: list[Finding] = []
    seen: dict[str, str] = {}  # image_id -> the first split that it is in
    for split, source in sources.items():
        first_rows = np.unique(source.image_ids, return_index=True)[1]
        for name in sorted({source.image_id(row) for row in first_rows}):
            other = seen.setdefault(name, split)
            if other != split:
                findings.append(Finding("image_id in two splits", name, f"also in {other}", split))
    return findings


def _one_id(sources: Sources) -> list[Finding]:
    """Find splits of which more than half of the images share one image_id."""
    shared = {split: source.shared_identity() for split, source in sources.items()}
    return [
        Finding("shared image_id", split, detail, split)
        for split, detail in shared.items()
        if detail
    ]


def _unlike_run(
    sources: Sources, facts: Mapping[str, FactsOfSplits], run: RunLimits
) -> list[Finding]:
    """Compare the splits with those that a run reads, and what is left out with what it allows."""
    data, found = run.data, []
    wanted = (data.train_split, data.validation_split, data.test_split)
    for split in dict.fromkeys(wanted):
        if split not in sources:
            found.append(Finding("missing split", split, f"there are {', '.join(sources)}"))

    for split, source in sources.items():
        if split not in wanted:
            found.append(Finding("unused split", split, f"{len(source):,} recordings", split))
            continue
        # Counted by name, as the loader counts.
        bad = set(source.bad_items.reasons)
        for what, name_of in NAME_OF.items():
            for index, fact in enumerate(facts[what][split]):
                if not fact.usable:
                    bad.add(name_of(source, index))
        total = source.bad_items.total
        allowed = BadItems("", total, data.max_bad_share).allowed
        if len(bad) > allowed:
            detail = f"{len(bad):,} of {total:,}; {allowed:,} are allowed"
            found.append(Finding("too many left out", split, detail, split))
        if split == data.train_split and len(source) < run.batch_size:
            detail = f"{len(source):,}; a batch has {run.batch_size:,}"
            found.append(Finding("too few recordings", split, detail, split))
    return found


def _odd_numbers(sources: Sources) -> list[Finding]:
    """Find images that do not have the number of recordings that three quarters of all have.

    Without such a number none is odd. A split in which most images differ is so by design, and its
    images are not named.
    """
    counts = {split: _captions_per_image(source) for split, source in sources.items()}
    joined = np.concatenate([*counts.values()])
    ((usual, images),) = collections.Counter(joined.tolist()).most_common(1)

    if images < USUAL_SHARE * len(joined):
        return []

    findings = []
    for split, of_split in counts.items():
        odd = np.flatnonzero(of_split != usual)
        if len(odd) > 0.5 * len(of_split):
            continue
        for row in odd.tolist():
            name = sources[split].image_name(row)
            detail = f"{of_split[row]} where most have {usual}"
            findings.append(Finding("number of captions", name, detail, split, ("image", row)))
    return findings


def _differing_counts(name: str, splits: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compare the sizes of a published data set with those that were published."""
    if name not in PUBLISHED:
        return []
    findings = []
    for split, numbers in layout_of(name).published.items():
        for what, expected in zip(("images", "recordings"), numbers, strict=True):
            if split not in splits or expected is None or splits[split][what] == expected:
                continue
            detail = f"{splits[split][what]:,}, published {expected:,}"
            findings.append(Finding("count differs", f"{split}, {what}", detail, split))
    return findings
