"""A run as a model of MTEB, the Massive Text Embedding Benchmark, for its audio-image tasks.

The coarse stage is an encoder of mteb, coarse and fine together are a search of mteb.

Reference:
  Muennighoff et al., MTEB, https://arxiv.org/abs/2210.07316
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from c2f_jax.errors import UserError, missing_extra
from c2f_jax.harnesses.encode import encode_files
from c2f_jax.index import say_notes
from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.items import File, wave_file
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval.ranking import coarse_top_k
from c2f_jax.retrieval.reranking import fine_scores, match_candidates, rerank

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType
    from torch import Tensor
    from torch.utils.data import DataLoader

KINDS = {"audio": "speech", "image": "image"}  # modality of mteb -> kind of item


class MtebEncoder:
    """The coarse stage (SIC) of a run, for any task of mteb on recordings and images.

    It has the methods of mteb's ``EncoderProtocol``: ``mteb.evaluate(MtebEncoder(model), tasks)``.
    Recordings and images are decoded, converted and cut as by ``c2f evaluate``; how many were is
    printed.

    Attributes:
      model: the run.
      mteb_model_meta: what mteb files the results under: name, step and stage of the run, and the
        fingerprint of the parameters as revision.
    """

    def __init__(self, model: TrainedModel) -> None:
        """Wrap a run.

        Args:
          model: the run.

        Raises:
          ModuleNotFoundError: mteb is not installed; the message names the extra.
        """
        self.model = model
        self.mteb_model_meta = _model_meta(model, "coarse")

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Encode recordings or images.

        Args:
          inputs: their batches.
          task_metadata: says which of the two they are.
          hf_split: split, for messages.
          hf_subset: not used.
          prompt_type: whether they are queries or the gallery.
          **kwargs: not used; the run's ``eval.batch_size`` is the size of a batch.

        Returns:
          (n, D) float32, L2-normalized.

        Raises:
          UserError: they are something else, or one cannot be used.
        """
        modality = _modality(task_metadata, prompt_type)
        files = _files(inputs.dataset, modality, f"{task_metadata.name}, {hf_split} split")
        encoded, notes = encode_files(self.model, KINDS[modality], files)
        say_notes(notes)
        return np.asarray(encoded.embedding)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosines (n, m) of embeddings (n, D) and (m, D)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosines (n,) of embeddings (n, D) and (n, D), row by row."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


class MtebSearch:
    """The coarse and the fine stage (SIC and SIM) of a run, for retrieval tasks of mteb.

    It has the methods of mteb's ``SearchProtocol``. The best ``eval.k`` items by cosine are
    reranked by ``eval.score``; all others keep their places below. mteb is given places, not
    scores: its nAUC, which reads scores as confidence, means nothing here.

    Attributes:
      model: the run.
      mteb_model_meta: see MtebEncoder.
    """

    def __init__(self, model: TrainedModel) -> None:
        """Wrap a run.

        Args:
          model: the run.

        Raises:
          UserError: SIM is not trained at this step.
          ModuleNotFoundError: mteb is not installed; the message names the extra.
        """
        if not model.has_sim:
            raise UserError(
                f"{model.name}: SIM is not trained at this step: use MtebEncoder, which ranks by "
                "SIC alone"
            )
        self.model = model
        self.mteb_model_meta = _model_meta(model, "fine")
        self._gallery: tuple[list[str], str, Encoded] | None = None  # ids, modality, encoded

    def index(
        self,
        corpus: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Encode the gallery and keep it.

        Args:
          corpus: with "id" and "audio" or "image".
          task_metadata: says which of the two.
          hf_split: split, for messages.
          hf_subset: not used.
          encode_kwargs: not used, like the rest.
          num_proc: not used.
          **kwargs: not used.

        Raises:
          UserError: it holds something else, or an item cannot be used.
        """
        from mteb.types import PromptType

        modality = _modality(task_metadata, PromptType.document)
        files = _files(corpus, modality, f"{task_metadata.name}, {hf_split} split")
        encoded, notes = encode_files(self.model, KINDS[modality], files, tokens=True)
        say_notes(notes)
        self._gallery = list(corpus["id"]), modality, encoded

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, list[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Rank the gallery for each query.

        Args:
          queries: with "id" and "audio" or "image".
          task_metadata: says which of the two.
          hf_split: split, for messages.
          hf_subset: not used.
          top_k: items to return for each query.
          encode_kwargs: not used.
          top_ranked: must be None: the candidates are the run's own.
          num_proc: not used.
          **kwargs: not used.

        Returns:
          Id of a query -> id of an item -> its place from the end: a larger number is better.

        Raises:
          UserError: there is no gallery, the queries are of its modality, or one cannot be used.
        """
        from mteb.types import PromptType

        if self._gallery is None or top_ranked is not None:
            raise UserError(f"{task_metadata.name}: not a task that ranks an indexed gallery")
        where = f"{task_metadata.name}, {hf_split} split"
        modality = _modality(task_metadata, PromptType.query)
        ids, gallery_modality, gallery = self._gallery
        if modality == gallery_modality:
            raise UserError(f"{where}: SIM matches recordings with images, not {modality} alone")

        files = _files(queries, modality, where)
        encoded, notes = encode_files(self.model, KINDS[modality], files, tokens=True)
        say_notes(notes)
        ranked = _rank(self.model, modality, encoded, gallery, top_k)
        places = np.arange(ranked.shape[1], 0, -1, dtype=float).tolist()
        return {
            query: dict(zip((ids[row] for row in rows), places, strict=True))
            for query, rows in zip(queries["id"], ranked.tolist(), strict=True)
        }


def _rank(
    model: TrainedModel, modality: str, queries: Encoded, gallery: Encoded, top_k: int
) -> np.ndarray:
    """Return the rows of the gallery (Q, L), best first, the first k of them reranked by SIM."""
    options = model.experiment.eval
    cosine, coarse = coarse_top_k(queries.embedding, gallery.embedding, max(options.k, top_k))
    speech = queries if modality == "audio" else gallery
    logits = match_candidates(
        model.staged_match,
        np.asarray(queries.tokens),
        np.asarray(gallery.tokens),
        coarse[:, : options.k],
        direction="s2i" if modality == "audio" else "i2s",
        speech_lengths=np.asarray(speech.lengths),
        pair_chunk=model.pair_batch_size,
        length_buckets=LENGTH_BUCKETS,
    )
    scores = fine_scores(cosine[:, : options.k], logits, model.tau)[options.score]
    return rerank(coarse, scores)[:, :top_k]


def _model_meta(model: TrainedModel, stage: str) -> ModelMeta:
    """Describe a stage of a run; results of equal name, revision and options are one to mteb."""
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ModuleNotFoundError as error:
        line = missing_extra("c2f_jax.harnesses.mteb", error)
        if line is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from error

    options = model.experiment.eval
    return ModelMeta(
        loader=None,
        name=f"c2f_jax/{Path(model.workdir).resolve().name}-{model.step}-{stage}",
        revision=model.fingerprint,
        modalities=["audio", "image"],
        similarity_fn_name=ScoringFunction.COSINE,
        framework=["JAX"],
        n_parameters=sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        embed_dim=model.experiment.model.embedding_size,
        experiment_kwargs={"k": options.k, "score": options.score} if stage == "fine" else None,
        use_instructions=False,
        # What a run does not know about itself.
        release_date=None,
        languages=None,
        memory_usage_mb=None,
        max_tokens=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        training_datasets=None,
    )


def _modality(task: TaskMetadata, prompt_type: PromptType | None) -> str:
    """Return "audio" or "image"; raise UserError if a task asks for anything else."""
    modalities = task.get_modalities(prompt_type)
    if len(modalities) != 1 or modalities[0] not in KINDS:
        raise UserError(
            f"{task.name} has {' and '.join(modalities)} in one item: c2f_jax encodes a recording "
            "or an image"
        )
    return modalities[0]


def _files(dataset: Dataset, modality: str, where: str) -> Iterator[tuple[str, File]]:
    """Yield name and content of each item of a data set, as it is stored."""
    import datasets

    # Not decoded, so that files are read as those of the project's own data sets are.
    column = dataset.select_columns([modality])
    feature = column.features[modality]
    if isinstance(feature, datasets.Audio | datasets.Image):
        column = column.cast_column(modality, type(feature)(decode=False))
    for row, item in enumerate(column):
        name = f"{where}, {modality} {row}"
        yield name, _content(item[modality], name)


def _content(item: Any, name: str) -> File:
    """Return the file of an item that is not decoded, or one of an array of samples."""
    if isinstance(item, Mapping) and "array" in item:
        return wave_file(np.asarray(item["array"]), int(item["sampling_rate"]), name)
    if isinstance(item, Mapping):
        return item["path"] if item["bytes"] is None else item["bytes"]
    raise UserError(f"{name}: {type(item).__name__} is no recording or image of a data set")
