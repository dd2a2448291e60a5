"""Search a gallery by voice or by image, from a program."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from etils import epath

from c2f_jax.data.files import content_hash
from c2f_jax.errors import UserError
from c2f_jax.galleries.gallery_index import GalleryIndex
from c2f_jax.galleries.item import Item
from c2f_jax.galleries.stores import index_exists, open_index
from c2f_jax.index import build_index, check_fingerprint
from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.items import DecodedItem, Question, read_question
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval.reranking import fine_order, fine_scores, match_candidates
from c2f_jax.training.distributed import say
from c2f_jax.training.parallel import round_up_rows

MOST_TOKEN_BYTES = 1 << 28  # of candidates that are matched at once
INDEXES = "indexes"  # folder of a workdir


@dataclass(frozen=True)
class Answer:
    """An item that answers a query.

    Attributes:
      path: its file; its id if it comes from a data set.
      row: its row in the index.
      cosine: of its embedding and that of the query.
      match_logit: log-odds of a match by SIM; None if SIM did not look at it.
      probability: that it matches, calibrated on the validation split (``retrieval.calibration``);
        None if SIM did not look at it, or the step of the run was not calibrated.
      coarse_place: its place by cosine, from 1.
      metadata: what the index knows of it.
    """

    path: str
    row: int
    cosine: float
    match_logit: float | None
    probability: float | None
    coarse_place: int
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Answers(Sequence[Answer]):
    """The answers to one query, best first.

    Attributes:
      answers: after both stages.
      coarse: by cosine alone.
      query: the query as the model heard or saw it.
      searched: number of items that were searched.
      seconds: time of "read", "encode", "coarse" and "fine", of all queries of the call together.
    """

    answers: list[Answer]
    coarse: list[Answer]
    query: DecodedItem = field(repr=False)
    searched: int
    seconds: Mapping[str, float] = field(repr=False)

    def __getitem__(self, place: Any) -> Any:
        return self.answers[place]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def notes(self) -> list[str]:
        """What is odd about the query: "over-long: 31.2 s; the first 16 s are heard", ..."""
        return [f"{kind}: {detail}" for kind, detail in self.query.notes]


@dataclass(frozen=True)
class _Fine:
    """What SIM says of the candidates (Q, k) of each query."""

    logits: np.ndarray  # (Q, k)
    probability: np.ndarray | None  # (Q, k)
    order: np.ndarray  # (Q, k) places, best first


class Retriever:
    """A trained model and a gallery.

    >>> retriever = Retriever.load("runs/scenes")  # doctest: +SKIP
    >>> retriever.index("photos")  # doctest: +SKIP
    >>> retriever.search("question.wav")[0].path  # doctest: +SKIP
    'photos/red_door.jpg'

    Attributes:
      model: the model.
      gallery: the index that is searched; None before ``index`` or ``open``.
      pairs_at_once: pairs in each call of SIM, so that every query runs the same programs; None
        for as few as hold the candidates.
    """

    pairs_at_once: int | None = None

    def __init__(self, model: TrainedModel, gallery: GalleryIndex | None = None) -> None:
        self.model, self.gallery = model, gallery
        if gallery is not None:
            check_fingerprint(gallery, model.fingerprint, model.name)

    @classmethod
    def load(cls, workdir: str | PathLike[str], step: str | int = "best") -> Retriever:
        """Load a run of ``c2f train``.

        Args:
          workdir: directory of the run.
          step: "best", "latest" or the number of a checkpoint.

        Raises:
          UserError: there is no such run or checkpoint.
        """
        return cls(TrainedModel.load(workdir, step))

    def index(
        self,
        gallery: str | PathLike[str] | None = None,
        output: str | PathLike[str] | None = None,
        *,
        kind: str = "image",
        split: str | None = None,
        store: str | None = None,
        approximate: bool = False,
        progress: bool = True,
    ) -> GalleryIndex:
        """Encode a gallery, or bring its index up to date, and search it from here on.

        Args:
          gallery: folder of files, data set or manifest; None for the run's data set.
          output: folder of the index; None for one of the run's workdir, made anew when the
            parameters are others.
          kind: "image" or "speech".
          split: split of a data set or manifest; None for the run's test split.
          store: what stores the rows of an index that is made; see ``build_index``.
          approximate: whether to prepare approximate search; see ``build_index``.
          progress: whether to show progress bars.

        Returns:
          The index.

        Raises:
          UserError: as ``build_index``.
        """
        name = None if gallery is None else os.fspath(gallery)
        place = output or self._place(name, kind, split)
        if not output and index_exists(place):
            # It belongs to the run, and can be made again.
            if open_index(place).about.fingerprint != self.model.fingerprint:
                epath.Path(place).rmtree()
        self.gallery = build_index(
            self.model,
            place,
            name,
            kind=kind,
            split=split,
            store=store,
            approximate=approximate,
            progress=progress,
        )
        return self.gallery

    def open(self, index: str | PathLike[str]) -> GalleryIndex:
        """Search an index that was made before.

        Args:
          index: its folder.

        Raises:
          UserError: there is no such index, or another model encoded it.
        """
        found = open_index(index)
        check_fingerprint(found, self.model.fingerprint, self.model.name)
        self.gallery = found
        return found

    def search(
        self,
        question: Question,
        *,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
        approximate: bool = False,
    ) -> Answers:
        """Find the items that match a recording (in a gallery of images) or an image.

        Args:
          question: path or content of a file; or (S,) float samples at 16 kHz; or (H, W, 3) uint8.
          top: answers to return.
          rerank: candidates that SIM orders anew; 0 for none, None for the run's eval.k.
          where: SQL condition on the metadata, such as ``date > '2025'``.
          min_probability: answers below it are left out; there may be none.
          approximate: whether coarse search may miss some, to be faster in a large gallery; the
            index must be prepared for it.

        Returns:
          The answers, best first.

        Raises:
          UserError: the query cannot be used, or the condition not understood.
        """
        return self.search_all(
            [question],
            top=top,
            rerank=rerank,
            where=where,
            min_probability=min_probability,
            approximate=approximate,
        )[0]

    def search_all(
        self,
        questions: Sequence[Question],
        *,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
        approximate: bool = False,
    ) -> list[Answers]:
        """Answer several queries at once; see ``search``."""
        began = time.perf_counter()
        items = [self.read(question) for question in questions]
        return self.answer(
            items,
            top=top,
            rerank=rerank,
            where=where,
            min_probability=min_probability,
            approximate=approximate,
            read_seconds=time.perf_counter() - began,
        )

    def read(self, question: Question, name: str | None = None) -> DecodedItem:
        """Decode a query as the model hears or sees it.

        Args:
          question: see ``search``.
          name: what messages call it.

        Raises:
          UserError: it cannot be used; the message says why and what to do.
        """
        kind = "speech" if self._gallery.about.kind == "image" else "image"
        return read_question(self.model.experiment, kind, question, name)

    def answer(
        self,
        items: Sequence[DecodedItem],
        *,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
        approximate: bool = False,
        read_seconds: float = 0.0,
    ) -> list[Answers]:
        """Answer queries that are decoded; see ``search``.

        Args:
          items: results of ``read``.
          top: answers to return for each.
          rerank: candidates that SIM orders anew.
          where: SQL condition on the metadata.
          min_probability: answers below it are left out.
          approximate: whether coarse search may miss some.
          read_seconds: what decoding took.
        """
        gallery = self._gallery
        kind = "speech" if gallery.about.kind == "image" else "image"
        k = self._candidates(top, rerank, min_probability)
        times = [time.perf_counter()]
        queries = self.model.encode_items(kind, [item.array for item in items])
        times.append(time.perf_counter())
        embeddings = np.asarray(queries.embedding)
        cosine, rows = gallery.search(embeddings, max(k, top), where, approximate)
        times.append(time.perf_counter())
        searched = gallery.count(where)
        fine = self._fine(queries, cosine[:, :k], rows[:, :k], searched)
        times.append(time.perf_counter())

        steps = dict(zip(("encode", "coarse", "fine"), np.diff(times).tolist(), strict=True))
        different = np.unique(rows)
        known = dict(zip(different.tolist(), gallery.items_of(different), strict=True))
        found = []
        for number, item in enumerate(items):
            coarse = [
                self._answer(known, rows[number, place], cosine[number, place], fine, number, place)
                for place in range(rows.shape[1])
            ]
            best = [coarse[place] for place in fine.order[number]] + coarse[fine.order.shape[1] :]
            if min_probability is not None:
                best = [answer for answer in best if (answer.probability or 0) >= min_probability]
            seconds = {"read": read_seconds, **steps}
            found.append(Answers(best[:top], coarse[:top], item, searched, seconds))
        return found

    def _candidates(self, top: int, rerank: int | None, min_probability: float | None) -> int:
        """Check the options of a search; return the number of candidates for SIM."""
        if top < 1:
            raise UserError(f"top must be at least 1, the number of answers; got {top}")
        k = self.model.experiment.eval.k if rerank is None else rerank
        if k < 0:
            raise UserError(f"rerank must be 0 or more, the number of candidates; got {rerank}")
        if min_probability is not None:
            if not 0 <= min_probability <= 1:
                raise UserError(f"min_probability must be from 0 to 1; got {min_probability}")
            check_probabilities(self.model, self._direction, k)
        return k if self.model.has_sim else 0

    def _fine(self, queries: Encoded, cosine: np.ndarray, rows: np.ndarray, searched: int) -> _Fine:
        """Match the candidates (Q, k) of each query, of a number of items searched."""
        if not rows.size:
            return _Fine(np.zeros(rows.shape), None, np.zeros(rows.shape, int))
        logits = self._match(queries, rows)
        scores = fine_scores(cosine, logits, self.model.tau)
        probability = None
        calibration = self.model.calibrations.get(self._direction)
        if calibration is not None:
            probability = calibration.probability(scores[calibration.score], searched)
        order = fine_order(scores[self.model.experiment.eval.score])
        return _Fine(logits, probability, order)

    def attention(self, row: int, query: DecodedItem) -> np.ndarray:
        """Compute which parts of an image SIM looked at in each moment of a recording.

        Args:
          row: of an answer, or of another item of the index.
          query: what was asked, a result of ``read``.

        Returns:
          (T, P) float32, the mean over heads and blocks of the cross-attention of each valid speech
          token, [CLS] first, to each image token, [CLS] first; each row adds up to 1.

        Raises:
          UserError: the model has no cross-attention, or SIM is not trained.
        """
        if not self.model.has_sim:
            raise UserError(f"{self.model.name}: SIM is not trained at this step")
        about = self._gallery.about
        asked = "speech" if about.kind == "image" else "image"
        encoded = self.model.encode_items(asked, [query.array])
        tokens, lengths = self._gallery.tokens([row])
        tokens = tokens.astype(np.float32)
        pair = np.asarray(encoded.tokens), np.asarray(encoded.lengths), tokens
        if about.kind == "speech":
            pair = tokens, lengths, np.asarray(encoded.tokens)

        # Copies give each device a row.
        rows = round_up_rows(self.model.params, 1)
        repeated = [np.repeat(part, rows, axis=0) for part in pair]
        return np.asarray(self.model.attention(*repeated))[0, : int(pair[1][0])]

    @property
    def _direction(self) -> str:
        return "s2i" if self._gallery.about.kind == "image" else "i2s"

    @property
    def _gallery(self) -> GalleryIndex:
        if self.gallery is None:
            raise UserError("nothing to search: call index(folder) or open(index) first")
        return self.gallery

    def _answer(
        self,
        known: Mapping[int, Item],
        row: int,
        cosine: float,
        fine: _Fine,
        number: int,
        place: int,
    ) -> Answer:
        item = known[int(row)]
        looked = place < fine.logits.shape[1]
        probability = None
        if looked and fine.probability is not None:
            probability = float(fine.probability[number, place])
        return Answer(
            path=self._gallery.file_of(item),
            row=int(row),
            cosine=float(cosine),
            match_logit=float(fine.logits[number, place]) if looked else None,
            probability=probability,
            coarse_place=place + 1,
            metadata=item.metadata,
        )

    def _match(self, queries: Encoded, candidates: np.ndarray) -> np.ndarray:
        """Return the match logits (Q, k) of queries and candidates (Q, k), rows of the index."""
        gallery = self._gallery
        about = gallery.about
        count, k = candidates.shape
        direction = self._direction
        # All candidates of a query are matched at once, many queries in batches of one shape.
        pairs = self.model.pair_batch_size
        if self.pairs_at_once is not None:
            pairs = round_up_rows(self.model.params, self.pairs_at_once)
        elif count * k < pairs:
            pairs = round_up_rows(self.model.params, count * k)

        item_bytes = 4 * about.max_tokens * about.token_width
        together = max(1, MOST_TOKEN_BYTES // (item_bytes * k))
        found = []
        for start in range(0, count, together):
            stop = start + together
            rows, places = np.unique(candidates[start:stop], return_inverse=True)
            tokens, lengths = gallery.tokens(rows)
            if direction == "s2i":
                lengths = np.asarray(queries.lengths)[start:stop]
            found.append(
                match_candidates(
                    self.model.staged_match,
                    np.asarray(queries.tokens)[start:stop],
                    tokens.astype(np.float32),
                    places.reshape(-1, k),
                    direction=direction,
                    speech_lengths=lengths,
                    pair_chunk=pairs,
                    length_buckets=LENGTH_BUCKETS,
                )
            )
        return np.concatenate(found)

    def _place(self, gallery: str | None, kind: str, split: str | None) -> str:
        """Return the folder for the index of a gallery, in the workdir or a temporary one."""
        workdir = str(self.model.workdir)
        if "://" not in workdir and not os.access(workdir, os.W_OK):
            workdir = tempfile.mkdtemp(prefix="c2f-")
            say(f"{self.model.workdir} cannot be written: the index is in {workdir} and not kept")
        what = gallery
        if gallery is not None and os.path.exists(gallery):
            what = os.path.realpath(gallery)
        told = content_hash(repr((what, kind, split)).encode())[:16]
        return os.path.join(workdir, INDEXES, told)


def check_probabilities(model: TrainedModel, direction: str, k: int) -> None:
    """Raise UserError unless the answers of a search have probabilities.

    Args:
      model: the model.
      direction: "s2i" for spoken queries, "i2s" for images.
      k: candidates that SIM is to rerank.
    """
    why = ""
    if not model.has_sim or not k:
        why = "SIM is left out" if model.has_sim else "SIM is not trained at this step"
    elif direction not in model.calibrations:
        why = "this step was not evaluated on the validation split in training"
    if why:
        raise UserError(f"{model.name} gives no probabilities: {why}; leave out min_probability")
