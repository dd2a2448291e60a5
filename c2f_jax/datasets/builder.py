"""TFDS builders of pairs that are files on disk: the published data sets, and manifests.

A record is one image with all its recordings, as the files hold them; shards are ArrayRecord files.
What cannot be decoded is left out and named. Each shard is finished separately, so an interrupted
preparation resumes after the last finished shard, and several shards are made at a time.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import tempfile
import threading
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from c2f_jax.data.files import content_hash, file_state
from c2f_jax.data.listing import Listing, read_listing
from c2f_jax.data.prepared import MADE_FROM, pair_features
from c2f_jax.data.source import MIN_SAMPLES, BadItems
from c2f_jax.datasets.layout import Layout
from c2f_jax.decoding.audio import decode_audio, read_bytes
from c2f_jax.decoding.images import decode_image
from c2f_jax.errors import UserError

# What is lost when a preparation is interrupted, for each thread.
SHARD_IMAGES = 512


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard to be made.

    Attributes:
      split: its split.
      number: its number in the split.
      images: for each image the rows of the listing that share it.
    """

    split: str
    number: int
    images: list[list[dict]]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def fingerprint(self) -> str:
        """Hash all that the shard is made from: what is listed, and the states of the files.

        Line numbers and folders are not in it.
        """
        values: list[Any] = [self.split]
        for rows in self.images:
            values.append(file_state(rows[0]["image"]) or rows[0]["image"])
            for row in rows:
                values.append(file_state(row["audio"]) or row["audio"])
                values.append([row[key] for key in ("image_id", "caption", "speaker", "samples")])
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Made:
    """A finished shard: its split, its file and its metadata."""

    split: str
    path: epath.Path
    about: dict[str, Any]


class FilePairs(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Prepare the pairs of a listing.

    A subclass sets LAYOUT. Its name in snake case is the name of the prepared set.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See `c2f data prepare --dry-run`."
    LAYOUT: Layout | None = None

    def __init__(
        self,
        *,
        threads: int | None = None,
        max_bad_share: float = 0.01,
        download: bool = True,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        """Create a builder.

        Args:
          threads: shards made at a time; None for one a core.
          max_bad_share: share of bad items of a split above which preparation ends with an error.
            Finished shards stay.
          download: whether to fetch missing parts where their owners give a direct link.
          progress: whether to show a bar.
          **kwargs: arguments of TFDS's builder.
        """
        self._threads = threads or os.cpu_count() or 1
        self._max_bad_share, self._download, self._progress = max_bad_share, download, progress
        self._left_out: dict[str, dict[str, str]] = {}  # split -> lines of the listing
        # The one of TFDS's formats with random access.
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.LAYOUT
        description, homepage = "Pairs.", None
        if layout is not None:
            description = f"{layout.name}: images with spoken captions. {layout.license}."
            homepage = layout.homepage
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            homepage=homepage,
            features=pair_features(),
            disable_shuffling=True,
            # Of each split: recordings of each image, samples of each recording, identities, and
            # what was left out.
            metadata=tfds.core.MetadataDict(),
        )

    @property
    def origin(self) -> str:
        """What the set is made from, for messages and to compare."""
        return self.LAYOUT.name

    def is_current(self, manual_dir: str | None = None) -> bool:
        """Return whether the prepared set holds what its listing lists, files unchanged.

        Args:
          manual_dir: folder of the downloaded parts of a published set. Without it, or if parts are
            missing, there is nothing to compare with.

        Raises:
          UserError: it was made from another listing, or does not say from which.
        """
        folders = [manual_dir] if manual_dir else []
        if self.LAYOUT is not None and self.LAYOUT.missing(folders):
            return True
        listing = self._read(folders)
        listing.resolve()
        made_from = self.info.metadata.get(MADE_FROM) or {}
        if made_from.get("fingerprint") == _fingerprint(listing):
            return True
        if made_from.get("listing") == self.origin:
            return False
        raise UserError(
            f"{self.data_dir} was made from {made_from.get('listing', 'an unknown listing')}, not "
            f"from {self.origin}: give another --name or --data-dir, or remove it"
        )

    def _read(self, folders: list[str]) -> Listing:
        """Read the listing; ``folders`` hold the parts of a published set."""
        return self.LAYOUT.listing(folders)

    def _folders(self, dl_manager: tfds.download.DownloadManager) -> list[str]:
        """Return the folders of a published set's parts, which are fetched if that is possible."""
        if self.LAYOUT is None:
            return []
        try:
            folders = [dl_manager.manual_dir]
        except AssertionError:  # what TFDS raises without a manual directory, or with an empty one
            folders = []

        missing = self.LAYOUT.missing(folders)
        if self._download and missing and all(part.direct for part in missing):
            # Optional parts come along: they are small.
            wanted = {}
            for part in self.LAYOUT.parts:
                if part in missing or part.optional:
                    wanted[part.what] = part.source
            folders += dl_manager.download_and_extract(wanted).values()
        return folders

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[_Shard]]:
        """Divide each split into shards."""
        listing = self._read(self._folders(dl_manager))
        listing.resolve()
        shards = _divide(listing)
        # Lines of a split of which no row is left count in each of the others.
        lost = {
            where: reason
            for where, (split, reason) in listing.left_out.items()
            if split and split not in shards
        }
        self._left_out = {split: listing.left_out_of(split) | lost for split in shards}
        self.info.metadata[MADE_FROM] = {
            "listing": self.origin,
            "fingerprint": _fingerprint(listing),
            "manifest": content_hash(self.origin) if self.LAYOUT is None else "",
        }
        return shards

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        del download_config  # none of its options apply
        splits = self._shard_iterators_per_split(dl_manager)
        shards = [shard for of_split in splits.values() for shard in of_split]
        # Outside of the directory that TFDS empties when it starts again.
        folder = epath.Path(self._data_dir_root) / ".parts" / self.info.full_name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)

        total = sum(len(shard.images) for shard in shards)
        bar = tqdm(total=total, desc=self.name, unit=" images", disable=not self._progress)
        stop = threading.Event()
        with bar, concurrent.futures.ThreadPoolExecutor(self._threads) as threads:
            futures = [threads.submit(self._make, folder, s, bar, stop) for s in shards]
            try:
                made = [future.result() for future in futures]
            except BaseException:
                stop.set()  # unfinished shards end after the current image
                threads.shutdown(cancel_futures=True)
                raise

        self._finish(made)
        folder.rmtree()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def _make(self, folder: epath.Path, shard: _Shard, bar: tqdm, stop: threading.Event) -> _Made:
        """Write a shard, unless it is there."""
        fingerprint = shard.fingerprint()
        path, about_path = folder / shard.name, folder / f"{shard.name}.json"

        # A finished shard is kept unless the listing or one of its files has changed.
        if path.exists() and about_path.exists():
            about = json.loads(about_path.read_text())
            if about["fingerprint"] == fingerprint:
                bar.update(len(shard.images))
                return _Made(shard.split, path, about)

        about = {
            "fingerprint": fingerprint,
            "captions": [],
            "samples": [],
            "image_ids": [],
            "bad": {},
            "items": len(shard.images) + sum(map(len, shard.images)),
            "content": [],
        }

        # ArrayRecord writes to local files only; a shard for a bucket is copied there.
        remote = "://" in str(folder)
        with tempfile.TemporaryDirectory(dir=None if remote else folder) as local:
            part = os.path.join(local, "shard")
            writer = ArrayRecordWriter(part, "group_size:1")
            for rows in shard.images:
                if stop.is_set():
                    raise InterruptedError
                example, samples = _read_record(rows, about["bad"])
                if samples:
                    record = self.info.features.serialize_example(example)
                    writer.write(record)
                    about["content"].append(content_hash(record))
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
        about_path.write_text(json.dumps(about))  # last: marks the shard as complete
        return _Made(shard.split, path, about)

    def _finish(self, made: list[_Made]) -> None:
        """Move the shards to where TFDS looks for them, and write the metadata of each split."""
        splits = list(dict.fromkeys(shard.split for shard in made))
        # All splits are checked before any shard is moved.
        metadata, full = {}, {}
        for split in splits:
            shards = [shard for shard in made if shard.split == split]
            metadata[split] = self._metadata(split, [shard.about for shard in shards])
            full[split] = [shard for shard in shards if shard.about["captions"]]

        infos = []
        for split in splits:
            template = self._get_filename_template(split_name=split)
            count = len(full[split])
            for number, shard in enumerate(full[split]):
                shard.path.replace(template.sharded_filepath(shard_index=number, num_shards=count))
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(shard.about["captions"]) for shard in full[split]],
                    num_bytes=sum(shard.about["bytes"] for shard in full[split]),
                    filename_template=template,
                )
            )
            self.info.metadata[split] = metadata[split]
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _metadata(self, split: str, shards: list[dict]) -> dict[str, Any]:
        """Join the metadata of the shards of a split, as `PreparedSource` reads them."""
        captions, samples, identities, content = [], [], [], []
        # Identities are numbered over the whole split, in the order of its images.
        number_of: dict[str, int] = {}
        bad = dict(self._left_out[split])
        items = len(bad) + sum(about["items"] for about in shards)
        for about in shards:
            captions += about["captions"]
            samples += about["samples"]
            content += about["content"]
            bad |= about["bad"]
            for name in about["image_ids"]:
                identities.append(number_of.setdefault(name, len(number_of)))

        BadItems(f"{self.name}, split {split}", items, self._max_bad_share).add_all(bad)
        if not captions:
            raise UserError(f"{self.name}: nothing in the split {split!r} can be used")
        return {
            "captions": captions,
            "samples": samples,
            "identities": identities,
            "bad_items": bad,
            "items": items,
            "content": content_hash("".join(content).encode()),
        }


def _divide(listing: Listing) -> dict[str, list[_Shard]]:
    """Divide each split of a listing into shards."""
    # split -> image -> its rows, in the order of the listing.
    splits: dict[str, dict[str, list[dict]]] = {}
    for row in listing.rows:
        splits.setdefault(row["split"], {}).setdefault(row["image"], []).append(row)

    shards: dict[str, list[_Shard]] = {}
    for split, images in splits.items():
        groups = list(images.values())
        shards[split] = []
        for number, start in enumerate(range(0, len(groups), SHARD_IMAGES)):
            shards[split].append(_Shard(split, number, groups[start : start + SHARD_IMAGES]))
    return shards


def _fingerprint(listing: Listing) -> str:
    """Hash what a set is made from: its rows, the states of their files, and what is left out."""
    values = []
    for split, shards in _divide(listing).items():
        values.append([split, len(listing.left_out_of(split))])
        values += [shard.fingerprint() for shard in shards]
    return content_hash(json.dumps(values).encode())


def _read_record(rows: list[dict], bad: dict[str, str]) -> tuple[dict, list[int]]:
    """Read an image and its recordings.

    Args:
      rows: the rows of the listing that share the image.
      bad: name -> reason of what cannot be used; bad files are added.

    Returns:
      The record, and the samples of its recordings at 16 kHz; nothing if the image is bad.
    """
    # Encoded files are stored as they are; decoding only shows whether they can be used.
    image = rows[0]["image"]
    try:
        encoded = read_bytes(image)
        decode_image(encoded, 32, name=image)
    except UserError as e:
        bad[image] = str(e).removeprefix(f"{image}: ")
        return {}, []

    recordings, samples = [], []
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
    return {"image": encoded, "image_id": rows[0]["image_id"], "recordings": recordings}, samples


class ManifestPairs(FilePairs, skip_registration=True):
    """The pairs of a manifest; the name of the configuration is that of the prepared set."""

    def __init__(self, *, manifest: str, name: str, **kwargs: Any) -> None:
        """Create a builder.

        Args:
          manifest: path of the manifest.
          name: name of the prepared set.
          **kwargs: arguments of `FilePairs`.
        """
        self._manifest = manifest
        super().__init__(config=tfds.core.BuilderConfig(name=name), **kwargs)

    @property
    def origin(self) -> str:
        """The path of the manifest, absolute on a disk."""
        path = self._manifest
        return path if "://" in path else os.path.abspath(path)

    def _read(self, folders: list[str]) -> Listing:
        del folders
        return read_listing(self._manifest, strict=False)
