"""What the server does with a query, apart from HTTP."""

import dataclasses
import io
import math
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.items import DecodedItem
from c2f_jax.retrieval.reranking import match_candidates
from c2f_jax.retriever import Answer, Answers, Retriever
from c2f_jax.serving.limits import MOST_ANSWERS, Limits, Refusal

KEPT_QUERIES = 256
ASKED_KIND = {"image": "speech", "speech": "image"}  # kind of an index -> kind of its queries


@dataclass(frozen=True)
class Query:
    """A query that was asked.

    Attributes:
      find: kind of the index that is searched.
      item: the query as the model hears or sees it.
    """

    find: str
    item: DecodedItem


class Service:
    """A model and one or two indexes; all but ``read``, ``media`` and ``thumbnail`` run the model.

    Attributes:
      retrievers: kind of an index -> what searches it.
      limits: of the server.
    """

    def __init__(self, retrievers: Mapping[str, Retriever], limits: Limits) -> None:
        self.retrievers, self.limits = retrievers, limits
        self._queries: OrderedDict[str, Query] = OrderedDict()
        self._lock = threading.Lock()
        for retriever in retrievers.values():
            retriever.pairs_at_once = max(1, self.most_candidates)

    @property
    def model(self) -> TrainedModel:
        """The model of all indexes."""
        return next(iter(self.retrievers.values())).model

    @property
    def most_candidates(self) -> int:
        """The most candidates that SIM may rerank: the run's eval.k; 0 without SIM."""
        return self.model.experiment.eval.k if self.model.has_sim else 0

    def warm_up(self) -> None:
        """Compile every program that queries need, and read the index."""
        most = round(self.model.experiment.data.max_seconds * SAMPLE_RATE)
        noise = np.random.default_rng(0).normal(0, 0.1, most).clip(-1, 1).astype(np.float32)
        side = self.model.experiment.data.image_size
        for kind, retriever in self.retrievers.items():
            question = noise if kind == "image" else np.zeros((side, side, 3), np.uint8)
            item = retriever.read(question)
            answers = retriever.answer([item], top=1)[0]
            if answers and self._can_show_attention:
                retriever.attention(answers[0].row, item)
        if not self.most_candidates:
            return

        # A recording is matched at one of a few lengths, and candidates come in one number.
        tokens, width = self.model.token_shape("speech")
        pairs = -(-self.most_candidates // len(_devices())) * len(_devices())
        speech = np.zeros((pairs, tokens, width), np.float32)
        image = np.zeros((pairs, *self.model.token_shape("image")), np.float32)
        for kind, direction in (("image", "s2i"), ("speech", "i2s")):
            if kind not in self.retrievers:
                continue
            queries, gallery = (speech, image) if kind == "image" else (image, speech)
            for bucket in range(1, LENGTH_BUCKETS + 1):
                frames = math.ceil(bucket / LENGTH_BUCKETS * tokens)
                match_candidates(
                    self.model.staged_match,
                    queries[:1],
                    gallery,
                    np.arange(pairs)[None],
                    direction=direction,
                    speech_lengths=[frames] * (1 if kind == "image" else pairs),
                    pair_chunk=pairs,
                    length_buckets=LENGTH_BUCKETS,
                )

    def read(self, body: bytes, find: str, name: str) -> str:
        """Decode and keep a query.

        Args:
          body: content of a file.
          find: kind of the index to search.
          name: what messages call it.

        Returns:
          Its id.

        Raises:
          UserError: it cannot be used.
          Refusal: 422, the recording is too long.
        """
        retriever = self._retriever(find)
        if not body:
            raise UserError(f"{name} is empty: send a recording or an image")
        if find == "image":
            self._check_length(_header_seconds(body), name)
        try:
            item = retriever.read(body, name)
        except UserError as error:
            # Options of the command line mean nothing to those who use the page.
            raise UserError(str(error).partition(": ask with --")[0]) from error
        if find == "image":
            self._check_length(item.metadata["seconds"], name)
        query = secrets.token_urlsafe(12)
        with self._lock:
            self._queries[query] = Query(find, item)
            while len(self._queries) > KEPT_QUERIES:
                self._queries.popitem(last=False)
        return query

    def answer(
        self,
        query: str,
        top: int = 5,
        rerank: int | None = None,
        where: str | None = None,
        min_probability: float | None = None,
    ) -> dict[str, Any]:
        """Answer a query that was read.

        Args:
          query: its id.
          top: answers to return.
          rerank: candidates of SIM; None for the run's eval.k.
          where: SQL condition on the metadata.
          min_probability: answers that match with a smaller probability are left out.

        Raises:
          UserError: an argument cannot be used.
          Refusal: 404, the query is no longer kept.
        """
        kept = self._query(query)
        for name, value, least, most in (
            ("top", top, 1, MOST_ANSWERS),
            ("rerank", self.most_candidates if rerank is None else rerank, 0, self.most_candidates),
        ):
            if not least <= value <= most:
                raise UserError(f"{name}={value}: must be from {least} to {most}")
        retriever = self.retrievers[kept.find]
        answers = retriever.answer(
            [kept.item], top=top, rerank=rerank, where=where, min_probability=min_probability
        )[0]
        return self._to_json(query, kept.find, answers)

    def attention(self, query: str, row: int) -> dict[str, Any]:
        """Return where SIM looked: the weights of each moment of speech and patch of the image.

        Args:
          query: id of the query.
          row: row of an item in the index that was searched.

        Returns:
          "weights", T rows for equal parts of the recording with a weight for each of the rows x
          columns patches of "grid", which add up to 1; "start" and "seconds" of what was heard of
          the query, or of the sound of the item.

        Raises:
          UserError: the model's tokens are not a grid of the whole image.
          Refusal: 404, no such query or row.
        """
        kept = self._query(query)
        retriever = self.retrievers[kept.find]
        item = self._item(kept.find, row)
        if not self._can_show_attention:
            raise UserError(f"{self.model.name}: its image tokens are not patches in a grid")
        weights = retriever.attention(row, kept.item)

        # Without [CLS], which is no moment and no place.
        patches = weights[1:, 1:].astype(np.float64)
        patches /= np.maximum(patches.sum(1, keepdims=True), 1e-12)
        side = math.isqrt(patches.shape[1])
        start, seconds = kept.item.start, len(kept.item.array) / SAMPLE_RATE
        if kept.find == "speech":  # the sound of an item is what was heard of it
            longest = self.model.experiment.data.max_seconds
            start, seconds = 0.0, min(float(item.metadata["seconds"]), longest)
        return {
            "grid": [side, side],
            "start": start,
            "seconds": seconds,
            "weights": [[round(value, 6) for value in line] for line in patches.tolist()],
        }

    def thumbnail(self, find: str, row: int) -> tuple[bytes, str]:
        """Return the small file that shows or plays an item, and its media type."""
        self._item(find, row)
        with self._lock:
            data = self._retriever(find).gallery.thumbnail(row)  # type: ignore[union-attr]
        if find == "speech":
            return data, "audio/flac"
        return data, "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"

    def media(self, find: str, row: int) -> Path:
        """Return the file of an item.

        Raises:
          Refusal: 404, it is not a file below the gallery's root any more.
        """
        gallery: Any = self._retriever(find).gallery
        name, root = self._item(find, row).name, gallery.about.root
        gone = Refusal(404, "the file is not there: only its thumbnail is in the index")
        if root is None or "://" in root:
            raise gone
        folder, path = os.path.realpath(root), os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
            raise gone
        return Path(path)

    def about(self) -> dict[str, Any]:
        """Return what the page needs to know."""
        experiment = self.model.experiment
        return {
            "model": self.model.name,
            "find": {
                kind: {"items": len(retriever.gallery or ()), "gallery": _label(retriever)}
                for kind, retriever in self.retrievers.items()
            },
            "max_seconds": experiment.data.max_seconds,
            "rerank": self.most_candidates,
            "attention": self._can_show_attention,
        }

    @property
    def _can_show_attention(self) -> bool:
        experiment = self.model.experiment
        patches = self.model.token_shape("image")[0] - 1
        return (
            bool(self.most_candidates)
            and experiment.model.multimodal_encoder.depth > 0
            and experiment.data.image_resize == "square"
            and math.isqrt(patches) ** 2 == patches
        )

    def _check_length(self, seconds: float, name: str) -> None:
        if seconds > self.limits.seconds:
            raise Refusal(
                422,
                f"{name}: too long: {seconds:.1f} s; at most {self.limits.seconds:g} s can be sent",
            )

    def _retriever(self, find: str) -> Retriever:
        if find not in self.retrievers:
            served = " and ".join(self.retrievers)
            raise UserError(f"find={find}: this server has an index of {served} items only")
        return self.retrievers[find]

    def _query(self, query: str) -> Query:
        with self._lock:
            if query not in self._queries:
                raise Refusal(404, "the query is no longer kept: send it again")
            self._queries.move_to_end(query)
            return self._queries[query]

    def _item(self, find: str, row: int) -> Any:
        gallery: Any = self._retriever(find).gallery
        if not 0 <= row < len(gallery.alive) or not gallery.alive[row]:
            raise Refusal(404, f"there is no item in row {row}")
        return gallery.item(row)

    def _to_json(self, query: str, find: str, answers: Answers) -> dict[str, Any]:
        def values(answer: Answer) -> dict[str, Any]:
            found = dataclasses.asdict(answer)
            # The name below the gallery: folders of the server are nobody's business.
            name = self._item(find, answer.row).name
            found["name"] = os.path.basename(name) if os.path.isabs(name) else name
            del found["path"]
            return found

        return {
            "query": query,
            "find": find,
            "notes": answers.notes,
            "seconds_heard": answers.query.metadata.get("seconds"),
            "answers": [values(answer) for answer in answers],
            "coarse": [values(answer) for answer in answers.coarse],
            "searched": answers.searched,
            "seconds": answers.seconds,
        }


def _label(retriever: Retriever) -> str:
    gallery: Any = retriever.gallery
    label = str(gallery.about.gallery)
    # Of a folder only the name: where it is on the server is nobody's business.
    return label if gallery.about.root is None else os.path.basename(label.rstrip("/"))


def _devices() -> list:
    import jax

    return jax.local_devices()


def _header_seconds(body: bytes) -> float:
    """Return how long a recording says it is, before it is decoded; 0 if that is unknown."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(body))
    except (soundfile.LibsndfileError, OSError, ValueError):
        return 0.0
    return info.duration
