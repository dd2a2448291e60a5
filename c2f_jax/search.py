"""Search a gallery: images by voice, recordings by an image."""

import collections
import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath

import jax
import numpy as np
from etils import epath

from c2f_jax.config.experiment import Experiment
from c2f_jax.data.source import MIN_SAMPLES
from c2f_jax.data_check.findings import KINDS
from c2f_jax.datasets.registry import is_data_set, load_pairs
from c2f_jax.decoding.audio import (
    SAMPLE_RATE,
    decode_audio,
    level_notes,
    peak_level,
    read_recording,
    to_pcm16,
)
from c2f_jax.decoding.image_modes import Note
from c2f_jax.decoding.images import make_square, read_image
from c2f_jax.errors import BadFileError, UserError
from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.models.c2f import Encoded
from c2f_jax.reports.examples import Example
from c2f_jax.reports.figures import results_png
from c2f_jax.reports.html import Media, image_media, speech_media
from c2f_jax.reports.results_page import write_search_page
from c2f_jax.retrieval.index import GalleryIndex
from c2f_jax.retrieval.media import count_suffixes, list_media, printable, shortlist
from c2f_jax.retrieval.ranking import coarse_top_k
from c2f_jax.retrieval.reranking import fine_scores, match_candidates, rerank
from c2f_jax.training.distributed import first_process_first, say, share_work
from c2f_jax.training.parallel import round_up_rows

ANSWER_SIDE = 128  # pixels of an image on the page
AUDIBLE = 1 / 32768  # of full scale: one step of 16 bits

File = str | bytes  # path or content


@dataclass(frozen=True)
class Query:
    """What to look for, and where. Give one of audio, say and images.

    Attributes:
      audio: recordings that describe images, as paths.
      say: sentences, which espeak-ng speaks as recordings.
      images: images whose spoken descriptions are wanted, as paths.
      gallery: folder of files, data set or manifest to search; None for the run's data set.
      split: split of a data set or manifest; None for the run's test split.
      index: path of a saved GalleryIndex to search instead.
      k: number of candidates that SIM reranks; None for the run's eval.k.
      top: answers to show for each query.
      output: page of answers (.html); None for ``<workdir>/search.html``.
    """

    audio: Sequence[str] = ()
    say: Sequence[str] = ()
    images: Sequence[str] = ()
    gallery: str | None = None
    split: str | None = None
    index: str | PathLike[str] | None = None
    k: int | None = None
    top: int = 5
    output: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
          UserError: naming the option.
        """
        if sum(bool(names) for names in (self.audio, self.say, self.images)) != 1:
            raise UserError("a query needs one of audio, say and images")

        # Options are named as on the command line, where most mistakes are made.
        for name, value in (("top", self.top), ("k", self.k)):
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: must be at least 1")
        if self.output is not None and epath.Path(self.output).suffix != ".html":
            raise UserError(f"--output={self.output}: must be a file that ends in .html")
        for text in self.say:
            if not any(letter.isalnum() for letter in text):
                raise UserError(f"--say {text!r} has no words: give a sentence in English")
        if self.index and (self.gallery or self.split):
            raise UserError("--index replaces the gallery: leave out --gallery and --split")

    @property
    def kind(self) -> str:
        """What the queries are: "speech" or "image"."""
        return "image" if self.images else "speech"

    @property
    def names(self) -> list[str]:
        """The name of each query: a path or a sentence."""
        return list(self.images or self.audio or self.say)

    def files(self) -> list[File]:
        """Return the queries as files; sentences are spoken."""
        if self.say:
            return [_speak(text) for text in self.say]
        return list(self.images or self.audio)


def build_index(
    model: TrainedModel,
    gallery: str | None = None,
    *,
    kind: str = "image",
    split: str | None = None,
) -> GalleryIndex:
    """Encode a gallery with a trained model.

    Files that cannot be read are named on standard output and left out, and oddities of the others
    are counted there. Several processes, all of which must call this, divide the gallery between
    them.

    Args:
      model: the model.
      gallery: folder of files, data set or manifest; None for the run's data set.
      kind: "image" or "speech".
      split: split of a data set or manifest; None for the run's test split.

    Returns:
      The index, which ``save`` writes to a file.

    Raises:
      UserError: no file can be read, or there is no such gallery.
    """
    count, read = _open_files(model.experiment, gallery, kind, split)
    size = round_up_rows(model.params, min(model.experiment.eval.batch_size, count))
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def encode_share(process: int, processes: int) -> list[_Block]:
        share = blocks[process::processes]
        return [_encode_block(model, kind, map(read, rows), size) for rows in share]

    # Blocks are dealt out like cards; each goes back to its place.
    shares = share_work(encode_share)
    done = [shares[number % len(shares)][number // len(shares)] for number in range(len(blocks))]
    _say_what_is_odd(done)

    encoded = [block.encoded for block in done if block.encoded is not None]
    if not encoded:
        raise UserError(f"{gallery}: none of the {count} files can be read")
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *encoded)
    return GalleryIndex(
        kind=kind,
        model=model.name,
        fingerprint=model.fingerprint,
        names=[name for block in done for name in block.names],
        media=[data for block in done for data in block.media],
        embeddings=joined.embedding,
        tokens=joined.tokens,
        lengths=joined.lengths,
    )


@dataclass(frozen=True)
class _Item:
    """One recording or image.

    Attributes:
      array: what the model is given: (side, side, 3) uint8, or (S,) float32, cut if too long.
      media: a small file that shows or plays it.
      notes: kind and detail of each oddity.
    """

    array: np.ndarray
    media: bytes
    notes: Sequence[Note]


@dataclass(frozen=True)
class _Block:
    """A part of a gallery, encoded."""

    names: list[str]  # of what could be read, as are media and encoded
    media: list[bytes]
    encoded: Encoded | None  # None if nothing could be read
    notes: list[tuple[str, Note]]  # name and oddity
    left_out: list[tuple[str, Note]]  # name and what is wrong


def _encode_block(
    model: TrainedModel, kind: str, files: Iterable[tuple[str, File]], batch_size: int
) -> _Block:
    """Decode and encode some files, given with their names, one after another."""
    block = _Block([], [], None, [], [])
    decoded = []
    for name, file in files:
        label = printable(name)
        try:
            item = _read_item(model.experiment, kind, file, name)
        except BadFileError as error:
            reason = printable(str(error).removeprefix(f"{name}: "))
            block.left_out.append((label, (error.kind, reason)))
            continue
        decoded.append(item.array)
        block.names.append(label)
        block.media.append(item.media)
        block.notes.extend((label, note) for note in item.notes)
    if not decoded:
        return block
    return dataclasses.replace(block, encoded=model.encode_items(kind, decoded, batch_size))


def _say_what_is_odd(blocks: Sequence[_Block]) -> None:
    """Print which files are left out, and how many are read in an odd way."""
    missing: dict[str, list[str]] = collections.defaultdict(list)
    for name, (kind, reason) in (each for block in blocks for each in block.left_out):
        # A type that needs an extra is a matter of many files.
        if kind == "needs an extra":
            missing[reason].append(PurePath(name).suffix.lower())
        else:
            say(f"left out: {name}: {reason}")
    for reason, suffixes in missing.items():
        types = count_suffixes(suffixes)
        say(f"left out: {len(suffixes):,} files of types that cannot be read: {types}; {reason}")

    odd: dict[str, list[str]] = collections.defaultdict(list)
    for name, (kind, detail) in (each for block in blocks for each in block.notes):
        odd[kind].append(f"{name} ({detail})")
    for kind, names in odd.items():
        say(f"note: {kind}, {len(names):,}, {KINDS[kind][1]}: {shortlist(names)}")


def search(model: TrainedModel, query: Query) -> epath.Path:
    """Answer queries: print the answers, write a page and, for spoken queries, a figure beside it.

    Args:
      model: the model.
      query: what to look for, and where.

    Returns:
      The path of the page.

    Raises:
      UserError: a query cannot be read, or the index does not fit the query or the model.
    """
    page = epath.Path(query.output or epath.Path(model.workdir) / "search.html")
    # Queries first: reading them is quick, encoding a gallery is not.
    asked = [
        _read_query(model.experiment, query, name, file)
        for name, file in zip(query.names, query.files(), strict=True)
    ]
    items = _open_gallery(model, query)
    encoded = model.encode_items(query.kind, [item.array for item in asked])
    coarse, fine = _rank(model, query, encoded, items)

    # An item that answers several queries is encoded once for the page.
    show = functools.cache(lambda row: _media(items.kind, items.media[row], items.names[row]))
    unknown = [False] * min(query.top, len(items.names))  # the correct answers are unknown
    examples = []
    for row, name in enumerate(map(printable, query.names)):
        print(f"\n{name}")
        notes = [f"{kind}: {detail}" for kind, detail in asked[row].notes]
        for note in notes:
            print(f"  note: {note}")
        caption = "; ".join([PurePath(name).name if not query.say else name, *notes])
        shown = _media(query.kind, asked[row].media, caption)

        best = coarse[row, : query.top].tolist()
        example = Example(shown, list(map(show, best)), unknown)
        if fine is not None:
            best = fine[row, : query.top].tolist()
            example = dataclasses.replace(example, fine=list(map(show, best)), fine_hits=unknown)
        examples.append(example)
        for place, item in enumerate(best, 1):
            print(f"  {place}. {items.names[item]}")

    _write_answers(page, examples, items, query, model.experiment.data.name)
    return page


def _read_query(experiment: Experiment, query: Query, name: str, file: File) -> _Item:
    """Decode a query; raise UserError if it cannot be used, saying what to do."""
    try:
        item = _read_item(experiment, query.kind, file, name)
        if query.kind == "speech" and peak_level(item.array) < AUDIBLE:
            raise BadFileError(f"{name}: silent: nothing can be heard", "silence")
        return item
    except BadFileError as error:
        problem = error
    if query.say:
        raise UserError(f"--say {name!r}: {problem}: give a longer sentence in English")
    if problem.kind in ("too short", "silence"):
        raise UserError(f"{problem}: check the microphone and record the query again")

    # The wrong option is a usual mistake.
    other, option = ("image", "--image") if query.kind == "speech" else ("speech", "--audio")
    try:
        _read_item(experiment, other, file, name)
    except BadFileError:
        raise problem from None
    what = {"speech": "a recording", "image": "an image"}
    raise UserError(f"{name} is {what[other]}, not {what[query.kind]}: ask with {option}")


def _write_answers(
    page: epath.Path, examples: Sequence[Example], items: GalleryIndex, query: Query, own: str
) -> None:
    """Write the page of answers and, for spoken queries, the figure."""
    what = {"image": "images", "speech": "recordings"}[items.kind]
    searched = (
        f"{len(items.names):,} {what} of {printable(str(query.index or query.gallery or own))}"
    )
    direction = "s2i" if items.kind == "image" else "i2s"
    write_search_page(page, examples, direction=direction, gallery=searched)
    if items.kind == "image":
        results_png(page.with_suffix(".png"), examples, top=query.top)


def _open_gallery(model: TrainedModel, query: Query) -> GalleryIndex:
    """Load the index of a query, or encode its gallery; raise UserError unless the index fits."""
    kind = "speech" if query.kind == "image" else "image"
    if not query.index:
        return build_index(model, query.gallery, kind=kind, split=query.split)

    items = GalleryIndex.load(query.index)
    if items.kind != kind:
        raise UserError(
            f"{query.index} contains {items.kind} items, but these queries look for {kind} items: "
            f"make one with `c2f index --kind={kind}`"
        )
    # The workdir may have moved, or hold another run.
    if items.fingerprint != model.fingerprint:
        raise UserError(
            f"{query.index} was encoded by {items.model} (parameters "
            f"{items.fingerprint or 'unknown'}), the queries by {model.name} (parameters "
            f"{model.fingerprint}): give that run, or make the index again"
        )
    return items


def _rank(
    model: TrainedModel, query: Query, queries: Encoded, items: GalleryIndex
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rank the gallery for each query.

    Returns:
      Rows of the gallery, best first, at least ``query.top`` of them: (Q, L) coarse, and (Q, L)
      fine; None before SIM is trained.
    """
    # Candidates for SIM, and enough answers to show.
    k = min(query.k or model.experiment.eval.k, len(items.names))
    cosine, coarse = coarse_top_k(queries.embedding, items.embeddings, max(k, query.top))
    if not model.has_sim:
        return coarse, None

    direction, speech_lengths = "i2s", items.lengths
    if query.kind == "speech":
        direction, speech_lengths = "s2i", np.asarray(queries.lengths)
    logits = match_candidates(
        model.match,
        np.asarray(queries.tokens),
        items.tokens,
        coarse[:, :k],
        direction=direction,
        speech_lengths=speech_lengths,
        pair_chunk=model.pair_batch_size,
        length_buckets=LENGTH_BUCKETS,
    )
    scores = fine_scores(cosine[:, :k], logits, model.tau)[model.experiment.eval.score]
    return coarse, rerank(coarse, scores)


def _open_files(
    experiment: Experiment, gallery: str | None, kind: str, split: str | None
) -> tuple[int, Callable[[int], tuple[str, File]]]:
    """Return the number of files of a gallery, and a function that reads one and its name."""
    if gallery is not None and not is_data_set(gallery):
        folder = list_media(gallery, kind)
        for line in folder.left_out:
            say(line)
        return len(folder.paths), lambda row: (folder.paths[row], folder.paths[row])

    # A gallery is shown and played, so it is opened without feature caches.
    data = experiment.data
    source = first_process_first(
        lambda: load_pairs(
            gallery or data.name,
            split or data.test_split,
            data.data_dir,
            max_bad_share=data.max_bad_share,
        )
    )

    # A recording is named by its caption, if it has one.
    def read_recording(row: int) -> tuple[str, File]:
        item = source.recording(row)
        return item["caption"] or f"recording {row}", item["audio"]

    if kind == "image":
        return source.num_images, lambda row: (source.image_id(row), source.image(row))
    return len(source), read_recording


def _read_item(experiment: Experiment, kind: str, file: File, name: str) -> _Item:
    """Decode an image or a recording; raise BadFileError if the model cannot use it."""
    data = experiment.data
    if kind == "speech":
        return _read_recording(file, name, data.max_seconds)

    # Published networks are given images that are decoded at full scale.
    square = data.image_resize == "square"
    image = read_image(file, data.image_size, reduce=square, name=name)
    array = make_square(
        image.rgb, data.image_size, resize=data.image_resize, resize_side=data.image_resize_side
    )
    return _Item(array, image_media(make_square(image.rgb, ANSWER_SIDE)).data, image.notes)


def _read_recording(file: File, name: str, max_seconds: float) -> _Item:
    """Decode a recording, cut where the model stops to hear it."""
    import soundfile

    recording = read_recording(file, name=name)
    wave = recording.samples
    if len(wave) < MIN_SAMPLES:
        raise BadFileError(
            f"{name}: too short: {len(wave)} samples at 16 kHz; {MIN_SAMPLES} are needed",
            "too short",
        )
    samples = to_pcm16(wave[: round(max_seconds * SAMPLE_RATE)])
    heard = samples * np.float32(1 / 32768)

    notes = [*recording.notes, *level_notes(heard)]
    if len(wave) > len(heard):
        seconds = len(wave) / SAMPLE_RATE
        notes.append(("over-long", f"{seconds:.1f} s; the first {max_seconds:g} s are heard"))
    small = io.BytesIO()
    soundfile.write(small, samples, SAMPLE_RATE, format="FLAC")
    return _Item(heard, small.getvalue(), notes)


def _speak(text: str) -> bytes:
    """Speak a sentence, as FLAC, in a voice that no training split of spoken_scenes uses."""
    from c2f_jax.datasets.spoken_scenes.speech import check_installed, draw_voice, speak

    check_installed()
    # A bare generator, which must stay: the same sentence keeps its voice.
    voice = draw_voice(np.random.default_rng(list(text.encode())), "test")
    try:
        return speak(text, **voice)[0]
    except RuntimeError as error:
        raise UserError(
            f"--say {text!r} cannot be spoken ({error}): give a sentence in English"
        ) from error


def _media(kind: str, data: bytes, name: str) -> Media:
    """Return what a page shows of an item of an index."""
    label = PurePath(name).name
    if kind == "image":
        mime = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Media(data, mime, label)
    return speech_media(decode_audio(data), caption=label)
