"""Your own data: a JSONL or CSV file with the columns image, audio, split.

Optional columns: image_id (items with equal ids match each other; by default the image's path),
caption, speaker, seconds (only used to choose the batch that a recording is padded with). Paths are
relative to the manifest. Other columns are ignored.
"""

import functools
import logging
from collections import Counter
from collections.abc import Iterator

from etils import epath

from c2f_jax.data.files import Stamp, content_hash, file_stamp, file_state
from c2f_jax.data.listing import Listing, folder_of, read_listing
from c2f_jax.data.source import BadItems, ModelInputs, PairSource, Recording
from c2f_jax.errors import UserError

MANIFEST_SUFFIXES = (".jsonl", ".csv")
HASHED = 256 * 2**20  # bytes that are read to know a data set by; of larger ones, a sample

log = logging.getLogger(__name__)


class ManifestSource(PairSource):
    """One split of a manifest or of a published layout."""

    def __init__(
        self,
        path: str,
        split: str,
        rows: list[dict],
        bad_items: BadItems,
        inputs: ModelInputs | None = None,
    ) -> None:
        """Create a source.

        Args:
          path: path of the manifest, or name of the data set.
          split: name of the split.
          rows: rows of a resolved `Listing`, all of this split.
          bad_items: what was left out.
          inputs: what the model is given of each item.
        """
        # Images and identities are numbered in the order in which they are first met.
        gallery: dict[str, int] = {}
        identities: dict[str, int] = {}
        image_index: list[int] = []
        image_ids: list[int] = []
        self._image_names: list[str] = []
        for row in rows:
            identity = identities.setdefault(row["image_id"], len(identities))
            gallery_row = gallery.setdefault(row["image"], len(gallery))
            if gallery_row == len(image_ids):
                image_ids.append(identity)
                self._image_names.append(row["image_id"])
            image_index.append(gallery_row)

        self._rows, self._images = rows, list(gallery)
        # Keys of feature caches are relative, so that a set can be moved with its caches.
        self._folder = folder_of(path)
        super().__init__(
            path,
            split,
            image_index=image_index,
            image_ids=image_ids,
            num_samples=[row["samples"] for row in rows],
            bad_items=bad_items,
            inputs=inputs,
        )

    @property
    def rows(self) -> list[dict]:
        """The checked rows, one for each recording."""
        return self._rows

    def recording(self, index: int) -> Recording:
        """Return path, caption and speaker of recording `index`."""
        row = self._rows[index]
        return Recording(audio=row["audio"], caption=row["caption"], speaker=row["speaker"])

    def image(self, row: int) -> str:
        """Return the path of image `row`."""
        return self._images[row]

    def recording_key(self, index: int) -> str:
        """Return the recording's path, relative to the manifest."""
        return _key(self._rows[index]["audio"], self._folder)

    def image_key(self, row: int) -> str:
        """Return the image's path, relative to the manifest."""
        return _key(self._images[row], self._folder)

    def stamp(self, kind: str, index: int) -> Stamp:
        """Return the stamp of the file of an item; see `PairSource.stamp`."""
        return file_stamp(self._rows[index]["audio"] if kind == "speech" else self._images[index])

    def content(self) -> str:
        """Hash the sizes of all files, and the content of as many as 256 MiB hold, evenly chosen.

        Files in a bucket count by their paths.
        """
        files = [row["audio"] for row in self._rows] + self._images
        sizes = [file_state(file)[:1] or [_key(file, self._folder)] for file in files]
        total = sum(size for (size,) in sizes if isinstance(size, int))
        values = [repr(sizes)]
        step = -(-total // HASHED)
        for file, (size,) in list(zip(files, sizes, strict=True))[:: max(step, 1)]:
            if isinstance(size, int):
                values.append(content_hash(file))
        return content_hash("\n".join(values).encode())

    def image_id(self, row: int) -> str:
        """Return the image_id of image `row` as written in the manifest."""
        return self._image_names[row]


def _key(path: str, folder: str) -> str:
    """Return a path relative to a folder, without what adds nothing: ``./`` and ``//``.

    What ``x/..`` adds depends on links.
    """
    path = path.removeprefix(folder)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "/" * path.startswith("/") + "/".join(parts)


def is_manifest(path: str) -> bool:
    """Return whether a path names a manifest, judged by its suffix."""
    return str(path).lower().endswith(MANIFEST_SUFFIXES)


def load_manifest(
    path: str, split: str, *, max_bad_share: float = 0.01, inputs: ModelInputs | None = None
) -> ManifestSource:
    """Open one split of a manifest.

    Lines that cannot be read and rows whose files do not exist are left out and named in
    `bad_items`; files in a bucket are only looked for when they are read. What else is odd about
    the listing is logged as a warning.

    Args:
      path: path of the manifest, local or in a bucket.
      split: name of the split.
      max_bad_share: share of bad items above which reading ends with an error.
      inputs: what the model is given of each item.

    Returns:
      The pairs of the split.

    Raises:
      UserError: the file cannot be read or a column is missing; the split is unknown or empty; or
        too much is left out (the message names lines and files).
    """
    path = str(path)
    listing = read_listing(path, strict=False)
    counts = Counter(row["split"] for row in listing.rows)
    missing = listing.resolve(split)
    left_out = listing.left_out_of(split)
    if not listing.rows:
        listed = ", ".join(
            f"{name if name.strip() == name else repr(name)} ({count})"
            for name, count in counts.items()
        )
        lines = [
            f"{path}: no rows of the split {split!r}; splits in the file: "
            f"{listed or 'none, it has no rows'}"
        ]
        lines += [f"  {name}: {reason}" for name, reason in list(left_out.items())[:3]]
        raise UserError("\n".join(lines))
    for text in _warnings(listing):
        _warn_once(f"{path}: {text}")

    # All are counted before the first error.
    total = len(listing.rows) + len(left_out)
    bad_items = BadItems(f"{path}, split {split}", total, max_bad_share)
    there = []
    for row in listing.rows:
        gone = [row[column] for column in ("audio", "image") if row[column] in missing]
        if gone:
            left_out[gone[0]] = f"no such file ({row['where']})"
        else:
            there.append(row)
    bad_items.add_all(left_out)
    source = ManifestSource(path, split, there, bad_items, inputs)
    shared = source.shared_identity()
    if shared:
        _warn_once(f"{path}, split {split}: {shared}: each counts as correct for the others")
    return source


def _warnings(listing: Listing) -> Iterator[str]:
    """Say what is odd about a listing, one line for each kind of what is not left out."""
    counts = Counter(note.kind for note in listing.notes)
    for kind, count in counts.items():
        if kind in ("unreadable line", "two image ids", "ignored column"):
            continue
        first = next(note for note in listing.notes if note.kind == kind)
        yield f"{kind}, {count:,}: {first.name}: {first.detail}"


@functools.lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    """Log a warning; the splits of one manifest have the same ones."""
    log.warning(text)


def manifest_in(folder: str) -> str | None:
    """Look for manifest.jsonl or manifest.csv.

    Args:
      folder: a folder, which need not exist.

    Returns:
      The path of the manifest; None if there is none.

    Raises:
      UserError: there are both.
    """
    try:
        found = [
            str(path)
            for suffix in MANIFEST_SUFFIXES
            if (path := epath.Path(folder) / f"manifest{suffix}").exists()
        ]
    except (OSError, ValueError, KeyError):  # no name that a folder can have, or a URL
        return None
    if len(found) > 1:
        raise UserError(f"{folder} holds manifest.jsonl and manifest.csv: name one of them")
    return found[0] if found else None
