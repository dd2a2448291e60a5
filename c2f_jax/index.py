"""Encode a gallery with a trained model into an index, and bring an index up to date."""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from c2f_jax.data.files import printable
from c2f_jax.data_check.findings import KINDS
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import BadFileError, UserError
from c2f_jax.galleries.gallery_index import About, GalleryIndex
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.galleries.media import count_suffixes, shortlist
from c2f_jax.galleries.stores import create_index, index_exists, open_index
from c2f_jax.hardware.cores import usable_cores
from c2f_jax.inference import TrainedModel
from c2f_jax.items import DecodedItem, Gallery, open_gallery, read_item
from c2f_jax.training.distributed import in_first_process, say, share_work
from c2f_jax.training.parallel import round_up_rows

CHUNK_BYTES = 1 << 26  # of the tokens of a full chunk; indexing holds a few chunks
MOST_ROWS = 8192  # of a chunk


@dataclass(frozen=True)
class _Plan:
    """What an update does; numbers are those of the gallery.

    Attributes:
      encode: items to read and encode.
      copy: items whose content is known, with the row of the index that has it.
      replaced: names of items that are in the index with other content or times.
      gone: names of items that the gallery no longer has.
    """

    encode: list[int]
    copy: list[tuple[int, int]]
    replaced: set[str]
    gone: list[str]


def build_index(
    model: TrainedModel,
    output: str | os.PathLike[str],
    gallery: str | os.PathLike[str] | None = None,
    *,
    kind: str = "image",
    split: str | None = None,
    store: str | None = None,
    approximate: bool = False,
    progress: bool = False,
) -> GalleryIndex:
    """Encode a gallery, or bring its index up to date.

    Items are decoded, encoded and written in chunks; a call that is stopped goes on where it was
    when it is repeated. In an index that is there already, items whose content has not changed are
    not decoded again. Files that cannot be read are named on standard output and left out, and
    oddities of the others are counted there. Several processes, all of which must call this, divide
    the gallery between them.

    Args:
      model: the model.
      output: folder of the index, local or gs://.
      gallery: folder of files, data set or manifest; None for the run's data set.
      kind: "image" or "speech".
      split: split of a data set or manifest; None for the run's test split.
      store: what stores the rows: "folder", or "lance" for LanceDB; None for what the index has,
        or "folder" if it is made.
      approximate: whether to prepare approximate search of a large gallery, with "lance". An index
        that was prepared once is kept so.
      progress: whether to show a progress bar.

    Returns:
      The index.

    Raises:
      UserError: no file can be read, there is no such gallery, or output holds something else, such
        as an index of another model.
    """
    name = None if gallery is None else os.fspath(gallery)
    listed = open_gallery(model.experiment, name, kind, split)
    for line in listed.left_out:
        say(line)

    opened: list[GalleryIndex] = []  # by the first process, which alone writes
    with contextlib.ExitStack() as held:

        def start() -> _Plan:
            index = _open(output, _about(model, listed, kind), store, approximate)
            held.enter_context(index.locked())
            opened.append(open_index(output))  # as it is under the lock
            return _make_plan(opened[0], listed, progress)

        plan = in_first_process(start)
        in_first_process(lambda: _copy(opened[0], listed, plan))
        _encode(model, opened, listed, plan, kind, progress)
        in_first_process(lambda: _finish(opened[0], listed, plan, approximate))
    return opened[0] if opened else open_index(output)


def _about(model: TrainedModel, listed: Gallery, kind: str) -> About:
    """Say what the index is of."""
    data = model.experiment.data
    prepared = {
        "image_size": data.image_size,
        "image_resize": data.image_resize,
        "image_resize_side": data.image_resize_side,
        "sample_rate": SAMPLE_RATE,
        "max_seconds": data.max_seconds,
    }
    tokens, width = model.token_shape(kind)
    return About(
        kind=kind,
        gallery=listed.label,
        root=listed.root,
        model=model.name,
        fingerprint=model.fingerprint,
        preprocessing=prepared,
        embedding_size=model.experiment.model.embedding_size,
        token_width=width,
        max_tokens=tokens,
        # Of bfloat16, two bytes each.
        chunk_rows=max(1, min(MOST_ROWS, CHUNK_BYTES // (2 * tokens * width))),
    )


def _open(
    output: str | os.PathLike[str], about: About, store: str | None, approximate: bool
) -> GalleryIndex:
    """Open an index to update, or make it; raise UserError if it is of something else."""
    if approximate and (store or "folder") == "folder" and not index_exists(output):
        raise UserError("approximate search needs LanceDB: give --store=lance with --approximate")
    if not index_exists(output):
        return create_index(output, about, store or "folder")
    index = open_index(output)
    if store not in (None, index.store):
        raise UserError(
            f"{output} is stored in {index.store}, not in {store}: leave out --store, or give "
            "another --output"
        )
    if index.about.kind != about.kind:
        raise UserError(
            f"{output} is an index of {index.about.kind} items, not of {about.kind} items: give "
            "another --output"
        )
    check_fingerprint(index, about.fingerprint, about.model)
    return index


def check_fingerprint(index: GalleryIndex, fingerprint: str, name: str) -> None:
    """Raise UserError unless an index was encoded by a model.

    Args:
      index: the index.
      fingerprint: of the model.
      name: of the model, for the message.
    """
    if index.about.fingerprint != fingerprint:
        raise UserError(
            f"{index.path} was encoded by {index.about.model} (parameters "
            f"{index.about.fingerprint}), the queries by {name} (parameters {fingerprint}): give "
            "that run, or make another index"
        )


def _make_plan(index: GalleryIndex, listed: Gallery, progress: bool) -> _Plan:
    """Compare an index with its gallery, reading as few files as can tell."""
    known: dict[str, tuple[int | None, Item | None]] = {}
    rows_of: dict[tuple[str, str], int] = {}
    sizes = set()
    for bad in index.left_out():
        known[bad.name] = None, bad
    for place, good in index.items():
        known[good.name] = place, good
        rows_of[good.content, _suffix(good.name)] = place
        sizes.update(good.stamp[0][:1])

    plan, kept = _Plan(encode=[], copy=[], replaced=set(), gone=[]), 0
    hidden = None if progress else True  # None: but on a terminal
    for number, name in enumerate(tqdm(listed.names, "comparing", leave=False, disable=hidden)):
        row, item = known.pop(name, (None, None))
        stamp = listed.stamp(number)
        if item is not None and stamp.matches(list(item.stamp)):
            # An extra that was missing may be there by now.
            readable = row is not None or (item.left_out and item.left_out[0] != "needs an extra")
            if readable and stamp.state == item.stamp[0]:
                kept += row is not None
                continue
        if item is not None:
            plan.replaced.add(name)
        # A file that was moved, copied or touched is found by its content. To look for it means to
        # read it, so its size must be that of one that is known.
        found = None
        if stamp.state and stamp.state[0] in sizes:
            found = rows_of.get((stamp.content(), _suffix(name)))
        if found is None:
            plan.encode.append(number)
        else:
            plan.copy.append((number, found))
    plan.gone.extend(known)

    if index.about.root != listed.root and len(index) and not kept and not plan.copy:
        raise UserError(
            f"{index.path} is an index of {index.about.gallery}, and nothing of it is in "
            f"{listed.label}: give another --output"
        )
    return plan


def _copy(index: GalleryIndex, listed: Gallery, plan: _Plan) -> None:
    """Add the items whose content the index knows."""
    size = index.about.chunk_rows
    for start in range(0, len(plan.copy), size):
        items, rows = [], []
        for number, row in plan.copy[start : start + size]:
            item = index.item(row)
            about = dict(listed.metadata(number))
            if item.metadata.get("date") == item.metadata.get("modified"):
                about["date"] = about.get("modified")
            items.append(
                dataclasses.replace(
                    item,
                    name=listed.names[number],
                    stamp=listed.stamp(number).record(),
                    metadata={**item.metadata, **about},
                )
            )
            rows.append(row)
        index.add(items, index.encoded(rows), plan.replaced.intersection(i.name for i in items))


def _encode(
    model: TrainedModel,
    opened: Sequence[GalleryIndex],
    listed: Gallery,
    plan: _Plan,
    kind: str,
    progress: bool,
) -> None:
    """Decode, encode and add the items that are not known, a chunk at a time."""
    chunk_rows = in_first_process(lambda: opened[0].about.chunk_rows)
    # One shape is compiled for all batches.
    size = min(model.experiment.eval.batch_size, max(len(plan.encode), 1), chunk_rows)
    size = round_up_rows(model.params, size)
    hidden = True if not progress or jax.process_index() else None  # None: but on a terminal
    threads = ThreadPoolExecutor(usable_cores())
    bar = tqdm(total=len(plan.encode), desc="encoding", unit="", disable=hidden, leave=False)
    with threads, bar:
        for start in range(0, len(plan.encode), chunk_rows):
            numbers = plan.encode[start : start + chunk_rows]
            blocks = [numbers[i : i + size] for i in range(0, len(numbers), size)]

            def encode_share(process: int, processes: int, blocks: list = blocks) -> list[_Block]:
                done = []
                for block in blocks[process::processes]:
                    done.append(_encode_block(model, listed, kind, block, size, threads))
                    bar.update(len(block) * processes)
                return done

            # Blocks are dealt out like cards; each goes back to its place.
            shares = share_work(encode_share)
            done = [shares[n % len(shares)][n // len(shares)] for n in range(len(blocks))]
            in_first_process(functools.partial(_add_blocks, opened, plan, done))


@dataclass(frozen=True)
class _Block:
    """Items that were encoded at once."""

    items: list[Item]
    encoded: EncodedItems | None  # None if nothing could be read


def _encode_block(
    model: TrainedModel,
    listed: Gallery,
    kind: str,
    numbers: Sequence[int],
    size: int,
    threads: ThreadPoolExecutor,
) -> _Block:
    """Decode and encode some items."""
    data = model.experiment.data

    def read(number: int) -> tuple[Item, DecodedItem | None]:
        name = listed.names[number]
        about = dict(listed.metadata(number))
        if "modified" in about:
            about["date"] = about["modified"]
        file = listed.read(number)
        # Before it is decoded: a file that changes meanwhile is found to have changed.
        item = Item(name, listed.stamp(number).record(), about)
        try:
            label = file if isinstance(file, str) else name
            # A data set is heard as it is evaluated.
            decoded = read_item(data, kind, file, label, cut_silence=listed.is_folder)
            if listed.tokens is not None:
                decoded = dataclasses.replace(decoded, array=listed.tokens(number))
        except BadFileError as error:
            reason = printable(str(error).removeprefix(f"{label}: "))
            return dataclasses.replace(item, left_out=[error.kind, reason]), None
        about |= decoded.metadata
        return dataclasses.replace(item, metadata=about, notes=list(decoded.notes)), decoded

    items, arrays, thumbnails = [], [], []
    for item, decoded in threads.map(read, numbers):
        items.append(item)
        if decoded is not None:
            arrays.append(decoded.array)
            thumbnails.append(decoded.thumbnail)
    if not arrays:
        return _Block(items, None)
    encoded = model.encode_items(kind, arrays, size)
    lengths = np.asarray(encoded.lengths, np.int32)
    valid = np.arange(encoded.tokens.shape[1]) < lengths[:, None]
    tokens = np.asarray(encoded.tokens)[valid].astype(ml_dtypes.bfloat16)
    embeddings = np.asarray(encoded.embedding)
    return _Block(items, EncodedItems(thumbnails, embeddings, tokens, lengths))


def _add_blocks(opened: Sequence[GalleryIndex], plan: _Plan, blocks: Sequence[_Block]) -> None:
    """Add encoded blocks as a chunk, in the process that has the index open."""
    index = opened[0]
    items = [item for block in blocks for item in block.items]
    parts = [block.encoded for block in blocks if block.encoded is not None]
    index.add(
        items,
        EncodedItems.join([index.encoded([]), *parts]),
        plan.replaced.intersection(item.name for item in items),
    )


def _finish(index: GalleryIndex, listed: Gallery, plan: _Plan, approximate: bool) -> None:
    """Take away what is gone, and say what the index holds."""
    if plan.gone:
        index.remove(plan.gone)
    index.finish(listed.label, listed.root)
    bad = index.left_out()
    _say_what_is_odd(bad, (item for _, item in index.items()))
    if not len(index):
        raise UserError(f"{listed.label}: none of the {len(bad)} files can be read")
    if approximate:
        index.build_approximate()
    say(
        f"{len(index):,} items indexed: {index.path} ({len(plan.encode):,} read, "
        f"{len(index) + len(bad) - len(plan.encode):,} known, {len(plan.gone):,} gone)"
    )


def _say_what_is_odd(left_out: Sequence[Item], read: Iterable[Item]) -> None:
    """Print which files are left out, and how many are read in an odd way."""
    missing: dict[str, list[str]] = collections.defaultdict(list)
    for item in left_out:
        assert item.left_out is not None
        kind, reason = item.left_out
        # A type that needs an extra is a matter of many files.
        if kind == "needs an extra":
            missing[reason].append(_suffix(item.name))
        else:
            say(f"left out: {printable(item.name)}: {reason}")
    for reason, suffixes in missing.items():
        types = count_suffixes(suffixes)
        say(f"left out: {len(suffixes):,} files of types that cannot be read: {types}; {reason}")

    say_notes((item.name, note) for item in read for note in item.notes)


def say_notes(notes: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Print how many items are read in an odd way, and the first of them.

    Args:
      notes: name of an item, and kind and detail of its oddity.
    """
    odd: dict[str, list[str]] = collections.defaultdict(list)
    for name, (kind, detail) in notes:
        odd[kind].append(f"{printable(name)} ({detail})")
    for kind, names in odd.items():
        say(f"note: {kind}, {len(names):,}, {KINDS[kind][1]}: {shortlist(names)}")


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()
