"""TFDS builders of pairs that lie on disk as files: the published data sets, and anyone's manifest.

A record is one picture with all its recordings, as the files hold them; shards are ArrayRecord files. What cannot be
decoded is left out and named. Each shard is finished on its own, so that an interrupted preparation goes on from the
last finished shard, and several are made at a time.
"""

import concurrent.futures
import hashlib
import json
import os
import tempfile
import threading
from collections import Counter

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from c2f_jax.data.audio import decode_audio, read_bytes
from c2f_jax.data.images import decode_image
from c2f_jax.data.manifest import Listing, read_listing
from c2f_jax.data.prepared import pair_features
from c2f_jax.data.source import MIN_SAMPLES, BadItems
from c2f_jax.datasets.layout import Layout
from c2f_jax.errors import UserError

SHARD_PICTURES = 512


class FilePairs(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Prepares the pairs of a listing.

    Constructor arguments beside TFDS's: threads, shards made at a time; max_bad_share, of the items of a split, above
    which preparation ends with an error (finished shards stay); download, whether parts that are missing are fetched
    where their owners give a direct link; progress, a bar.
    """

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT: Layout | None = None

    def __init__(
        self,
        *,
        threads: int | None = None,
        max_bad_share: float = 0.01,
        download: bool = True,
        progress: bool = True,
        **kwargs,
    ):
        self._threads = threads or os.cpu_count() or 1
        self._max_bad_share, self._download, self._progress = max_bad_share, download, progress
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.LAYOUT
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{layout.name}: pictures with spoken captions. {layout.licence}."
            if layout
            else "Pairs.",
            homepage=layout.homepage if layout else None,
            features=pair_features(),
            disable_shuffling=True,
            # For each split: recordings of each picture, samples of each recording, identities, what was left out.
            metadata=tfds.core.MetadataDict(),
        )

    def _listing(self, dl_manager) -> Listing:
        try:
            folders = [dl_manager.manual_dir]
        except AssertionError:  # how TFDS says that there is none, or an empty one
            folders = []
        missing = self.LAYOUT.missing(folders)
        if self._download and missing and all(part.direct for part in missing):
            wanted = {
                part.what: part.source
                for part in self.LAYOUT.parts
                if part in missing or part.optional
            }
            folders += dl_manager.download_and_extract(wanted).values()
        return self.LAYOUT.listing(folders)

    def _shard_iterators_per_split(self, dl_manager):
        """split -> shards, each a list of pictures, each the list of its rows."""
        splits: dict[str, dict[str, list[dict]]] = {}
        for row in self._listing(dl_manager).rows:
            splits.setdefault(row["split"], {}).setdefault(row["image"], []).append(row)
        shards = {}
        for split, pictures in splits.items():
            groups = list(pictures.values())
            shards[split] = [
                groups[k : k + SHARD_PICTURES] for k in range(0, len(groups), SHARD_PICTURES)
            ]
        return shards

    def _download_and_prepare(self, dl_manager, download_config=None):
        del download_config  # nothing of it applies
        splits = self._shard_iterators_per_split(dl_manager)
        version = epath.Path(self._data_dir_root) / ".parts" / self.info.full_name.replace("/", "-")
        version.mkdir(parents=True, exist_ok=True)
        jobs = [
            (split, number, shard)
            for split, shards in splits.items()
            for number, shard in enumerate(shards)
        ]
        bar = tqdm(total=sum(len(shard) for *_, shard in jobs), desc=self.name, unit=" pictures",
                   disable=not self._progress)  # fmt: skip
        stop = threading.Event()
        with bar, concurrent.futures.ThreadPoolExecutor(self._threads) as threads:
            waiting = [threads.submit(self._shard, version, *job, bar, stop) for job in jobs]
            try:
                done = [future.result() for future in waiting]
            except BaseException:
                stop.set()  # the shards at work end after the picture in hand
                threads.shutdown(cancel_futures=True)
                raise
        self._finish([(job[0], *result) for job, result in zip(jobs, done, strict=True)])
        version.rmtree()
        if not any(version.parent.iterdir()):
            version.parent.rmdir()

    def _shard(self, folder, split, number, pictures, bar, stop):
        """Writes one shard unless it is there: (its path, what is known of it)."""
        told = json.dumps(
            [[row[k] for k in sorted(row) if k != "where"] for rows in pictures for row in rows]
        )
        fingerprint = hashlib.sha256(told.encode()).hexdigest()
        path, about_path = folder / f"{split}-{number:05d}", folder / f"{split}-{number:05d}.json"
        if path.exists() and about_path.exists():
            about = json.loads(about_path.read_text())
            if about["fingerprint"] == fingerprint and about.get("stamps") == _stamps(about["bad"]):
                bar.update(len(pictures))
                return path, about
        about = {
            "fingerprint": fingerprint,
            "captions": [],
            "samples": [],
            "image_ids": [],
            "bad": {},
        }
        about["items"] = len(pictures) + sum(map(len, pictures))
        remote = "://" in str(folder)
        with tempfile.TemporaryDirectory(dir=None if remote else folder) as local:
            part = os.path.join(local, "shard")
            writer = ArrayRecordWriter(part, "group_size:1")
            for rows in pictures:
                if stop.is_set():
                    raise InterruptedError
                example, samples = _read_picture(rows, about["bad"])
                if samples:
                    writer.write(self.info.features.serialize_example(example))
                    about["captions"].append(len(samples))
                    about["samples"] += samples
                    about["image_ids"].append(rows[0]["image_id"])
                bar.update()
            writer.close()
            about["bytes"] = os.path.getsize(part)
            if remote:
                epath.Path(part).copy(path, overwrite=True)
            else:
                os.replace(part, path)
        about["stamps"] = _stamps(about["bad"])
        about_path.write_text(json.dumps(about))  # last: it says that the shard is whole
        return path, about

    def _finish(self, done) -> None:
        """Moves the shards to where TFDS looks for them and writes what is known of each split."""
        infos, checked = [], {}
        for split in dict.fromkeys(
            split for split, _, _ in done
        ):  # all are checked before any is moved
            shards = [(path, about) for name, path, about in done if name == split]
            bad = {name: reason for _, about in shards for name, reason in about["bad"].items()}
            items = sum(about["items"] for _, about in shards)
            BadItems(f"{self.name}, split {split}", items, self._max_bad_share).add_all(bad)
            full = [(path, about) for path, about in shards if about["captions"]]
            if not full:
                raise UserError(f"{self.name}: nothing of the split {split!r} can be used")
            checked[split] = full, bad, items
        for split, (full, bad, items) in checked.items():
            template = self._get_filename_template(split_name=split)
            for number, (path, _) in enumerate(full):
                path.replace(template.sharded_filepath(shard_index=number, num_shards=len(full)))
            lengths = [len(about["captions"]) for _, about in full]
            size = sum(about["bytes"] for _, about in full)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
            identities: dict[str, int] = {}
            self.info.metadata[split] = {
                "captions": [count for _, about in full for count in about["captions"]],
                "samples": [count for _, about in full for count in about["samples"]],
                "identities": [
                    identities.setdefault(name, len(identities))
                    for _, about in full
                    for name in about["image_ids"]
                ],
                "bad_items": bad,
                "items": items,
            }
        self.info.set_splits(tfds.core.SplitDict(infos))


def _stamps(names) -> dict[str, list | None]:
    """Size and time of change of bad files, None for a missing one: a shard is made again once one was mended."""
    stamps = {}
    for name in names:
        try:
            about = epath.Path(name).stat()
            stamps[name] = [about.length, about.mtime]
        except OSError:
            stamps[name] = None
    return stamps


def _read_picture(rows: list[dict], bad: dict[str, str]) -> tuple[dict, list[int]]:
    """The record of one picture and the samples of its recordings at 16 kHz; what is bad joins `bad`."""
    image = rows[0]["image"]
    recordings, samples = [], []
    try:
        picture = read_bytes(image)
        decode_image(picture, 32, name=image)
    except UserError as e:
        bad[image] = str(e).removeprefix(f"{image}: ")
        return {}, []
    for row in rows:
        name = row["audio"]
        try:
            audio = read_bytes(name)
            length = len(decode_audio(audio, name=name))
            if length < MIN_SAMPLES:
                raise UserError(
                    f"{name}: only {length} samples at 16 kHz; {MIN_SAMPLES} are needed"
                )
        except UserError as e:
            bad[name] = str(e).removeprefix(f"{name}: ")
            continue
        recordings.append({"audio": audio, "caption": row["caption"], "speaker": row["speaker"]})
        samples.append(length)
    return {"image": picture, "image_id": rows[0]["image_id"], "recordings": recordings}, samples


class ManifestPairs(FilePairs, skip_registration=True):
    """The pairs of a manifest; the name of the configuration is that of the prepared set."""

    def __init__(self, *, manifest: str, name: str, **kwargs):
        self._manifest = manifest
        super().__init__(config=tfds.core.BuilderConfig(name=name), **kwargs)

    def _listing(self, dl_manager) -> Listing:
        del dl_manager
        return read_listing(self._manifest)


def count_splits(listing: Listing) -> dict[str, tuple[int, int]]:
    """split -> (pictures, recordings) of a listing."""
    recordings = Counter(row["split"] for row in listing.rows)
    pictures = Counter(split for split, _ in {(row["split"], row["image"]) for row in listing.rows})
    return {split: (pictures[split], count) for split, count in recordings.items()}
