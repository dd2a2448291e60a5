"""Answer queries: on the console, as JSON, and as a page."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from c2f_jax.data.files import check_writable, printable
from c2f_jax.decoding.audio import decode_audio
from c2f_jax.errors import UserError
from c2f_jax.galleries.gallery_index import GalleryIndex
from c2f_jax.inference import TrainedModel
from c2f_jax.items import DecodedItem, Question, read_question
from c2f_jax.reports.examples import Example
from c2f_jax.reports.figures import results_png
from c2f_jax.reports.html import Media, speech_media
from c2f_jax.reports.results_page import write_search_page
from c2f_jax.retriever import Answer, Answers, Retriever, check_probabilities


@dataclass(frozen=True)
class Query:
    """What to look for, and where. Give one of audio, say and images.

    Attributes:
      audio: recordings that describe images, as paths.
      say: sentences, which espeak-ng speaks as recordings.
      images: images whose spoken descriptions are wanted, as paths.
      gallery: folder of files, data set or manifest to search; None for the run's data set.
      split: split of a data set or manifest; None for the run's test split.
      index: folder of an index to search instead.
      rerank: number of candidates that SIM reranks, 0 for none; None for the run's eval.k.
      where: SQL condition on the metadata, such as ``date > '2025'``.
      min_probability: answers that match with a smaller probability are left out.
      approximate: whether coarse search may miss some, to be faster in a large gallery.
      top: answers to show for each query.
      output: page of answers (.html); None for ``<workdir>/search.html``, or with ``as_json`` for
        none.
      as_json: whether to print a line of JSON for each query in place of a text.
    """

    audio: Sequence[str] = ()
    say: Sequence[str] = ()
    images: Sequence[str] = ()
    gallery: str | None = None
    split: str | None = None
    index: str | PathLike[str] | None = None
    rerank: int | None = None
    where: str | None = None
    min_probability: float | None = None
    approximate: bool = False
    top: int = 5
    output: str | PathLike[str] | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
          UserError: naming the option.
        """
        if sum(bool(names) for names in (self.audio, self.say, self.images)) != 1:
            raise UserError("a query needs one of audio, say and images")

        # Options are named as on the command line, where most mistakes are made.
        for name, value, least in (("top", self.top, 1), ("rerank", self.rerank, 0)):
            if value is not None and value < least:
                raise UserError(f"--{name}={value}: must be at least {least}")
        if self.min_probability is not None and not 0 <= self.min_probability <= 1:
            raise UserError(f"--min-probability={self.min_probability}: must be from 0 to 1")
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

    def questions(self) -> list[Question]:
        """Return the queries as files; sentences are spoken."""
        if self.say:
            return [_speak(text) for text in self.say]
        return list(self.images or self.audio)


def search(model: TrainedModel, query: Query) -> epath.Path | None:
    """Answer queries: print the answers, write a page and, for spoken queries, a figure beside it.

    Args:
      model: the model.
      query: what to look for, and where.

    Returns:
      The path of the page; None if there is none.

    Raises:
      UserError: a query cannot be read, or the index does not fit the query or the model.
    """
    page = query.output or (None if query.as_json else epath.Path(model.workdir) / "search.html")
    if page is not None:
        check_writable(page, "--output")
    if query.min_probability is not None:
        k = model.experiment.eval.k if query.rerank is None else query.rerank
        check_probabilities(model, "s2i" if query.kind == "speech" else "i2s", k)
    # Queries first: reading them is quick, encoding a gallery is not.
    began = time.perf_counter()
    asked = [
        _read(model, query, name, question)
        for name, question in zip(query.names, query.questions(), strict=True)
    ]
    seconds = time.perf_counter() - began

    retriever = Retriever(model)
    # Lines of JSON are all that a program wants on standard output.
    with contextlib.redirect_stdout(sys.stderr) if query.as_json else contextlib.nullcontext():
        gallery = _open_gallery(retriever, query)
    found = retriever.answer(
        asked,
        top=query.top,
        rerank=query.rerank,
        where=query.where,
        min_probability=query.min_probability,
        approximate=query.approximate,
        read_seconds=seconds,
    )
    for name, answers in zip(query.names, found, strict=True):
        if query.as_json:
            print(json.dumps(to_json(name, answers)))
        else:
            _print_answers(name, answers)
    if not query.as_json:
        times = ", ".join(f"{step} {time:.2f} s" for step, time in found[0].seconds.items())
        print(f"\n{len(gallery):,} {_items(gallery)} searched: {times}")
    if page is None:
        return None
    page = epath.Path(page)
    _write_page(page, query, found, gallery)
    return page


def to_json(name: str, answers: Answers) -> dict[str, Any]:
    """Return the answers to a query as JSON holds them.

    Args:
      name: what the query is called.
      answers: its answers.
    """
    values = [dataclasses.asdict(answer) for answer in answers]
    return {
        "query": name,
        "notes": answers.notes,
        "answers": values,
        "searched": answers.searched,
        "seconds": answers.seconds,
    }


def _read(model: TrainedModel, query: Query, name: str, question: Question) -> DecodedItem:
    """Decode a query."""
    if not query.say:
        return read_question(model.experiment, query.kind, question, name)
    try:
        return read_question(model.experiment, query.kind, question, f"--say {name!r}")
    except UserError as error:
        problem = str(error).partition(": check the microphone")[0]
        raise UserError(f"{problem}: give a longer sentence in English") from error


def _open_gallery(retriever: Retriever, query: Query) -> GalleryIndex:
    """Open the index of a query, or encode its gallery; raise UserError unless it fits."""
    kind = "speech" if query.kind == "image" else "image"
    if not query.index:
        return retriever.index(query.gallery, kind=kind, split=query.split)
    gallery = retriever.open(query.index)
    if gallery.about.kind != kind:
        raise UserError(
            f"{query.index} contains {gallery.about.kind} items, but these queries look for {kind} "
            f"items: make one with `c2f index --kind={kind}`"
        )
    return gallery


def _items(gallery: GalleryIndex) -> str:
    return {"image": "images", "speech": "recordings"}[gallery.about.kind]


def _label(answer: Answer) -> str:
    """Return what an answer is called: a caption if it has one, or its path from here."""
    path = answer.path.removeprefix(os.path.join(os.getcwd(), ""))
    return printable(str(answer.metadata.get("caption") or path))


def _print_answers(name: str, answers: Answers) -> None:
    """Print a query and its ranked answers."""
    print(f"\n{printable(name)}")
    for note in answers.notes:
        print(f"  note: {note}")
    if not answers:
        print("  nothing matches")
    for place, answer in enumerate(answers, 1):
        match = ""
        if answer.probability is not None:
            match = f", match {100 * answer.probability:.0f} %"
        elif answer.match_logit is not None:
            match = f", match logit {answer.match_logit:+.1f}"
        print(f"  {place}. {_label(answer)}  (cosine {answer.cosine:.2f}{match})")


def _write_page(
    page: epath.Path, query: Query, found: Sequence[Answers], gallery: GalleryIndex
) -> None:
    """Write the page of answers and, for spoken queries, the figure."""
    kind = gallery.about.kind
    # An item that answers several queries is encoded once for the page.
    shown: dict[int, Media] = {}

    def show(answer: Answer) -> Media:
        if answer.row not in shown:
            shown[answer.row] = _media(kind, gallery.thumbnail(answer.row), _label(answer))
        return shown[answer.row]

    examples = []
    for name, answers in zip(query.names, found, strict=True):
        label = printable(name if query.say else PurePath(name).name)
        asked = _media(query.kind, answers.query.thumbnail, "; ".join([label, *answers.notes]))
        # The correct answers are unknown.
        example = Example(asked, list(map(show, answers.coarse)), [False] * len(answers.coarse))
        if any(answer.match_logit is not None for answer in [*answers.coarse, *answers]):
            example = dataclasses.replace(
                example, fine=list(map(show, answers)), fine_hits=[False] * len(answers)
            )
        examples.append(example)

    searched = f"{len(gallery):,} {_items(gallery)} of {printable(gallery.about.gallery)}"
    direction = "s2i" if kind == "image" else "i2s"
    write_search_page(page, examples, direction=direction, gallery=searched)
    if kind == "image":
        results_png(page.with_suffix(".png"), examples, top=query.top)


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
    """Return what a page shows of an item."""
    label = PurePath(name).name
    if kind == "image":
        mime = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Media(data, mime, label)
    return speech_media(decode_audio(data), caption=label)
