"""Evaluate a trained model, or embeddings of another one, and write numbers, pages and figures."""

import dataclasses
import functools
import json
import logging
import os
from os import PathLike
from typing import Any

import jax
import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from c2f_jax.data.files import check_writable, content_hash, printable
from c2f_jax.data.manifest import is_manifest
from c2f_jax.data.source import PairSource
from c2f_jax.decoding.audio import decode_audio
from c2f_jax.decoding.images import decode_image
from c2f_jax.errors import BadFileError
from c2f_jax.inference import LENGTH_BUCKETS, TrainedModel
from c2f_jax.reports.examples import Example, make_examples, random_queries, worst_queries
from c2f_jax.reports.figures import learning_curves_png, results_png
from c2f_jax.reports.html import Media, image_media, speech_media
from c2f_jax.reports.results_page import PageExamples, write_results_page
from c2f_jax.retrieval.baseline import number_ids, pair_embeddings, read_embeddings
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.evaluation import EvalConfig, evaluate_retrieval
from c2f_jax.retrieval.protocols import Protocol, evaluate_protocol
from c2f_jax.retrieval.result import EvaluationResult
from c2f_jax.retrieval.voices import split_voices
from c2f_jax.training.distributed import in_first_process, share_work

EXAMPLES = 8  # random spoken queries on the page; the other groups have half as many
SHEET_EXAMPLES = 5  # of them in the figure
THUMBNAIL = 96  # side in pixels

log = logging.getLogger(__name__)


def evaluate_encoded(
    model: TrainedModel, encoded: EncodedSplit, calibrate: bool = False
) -> EvaluationResult:
    """Evaluate coarse and, if SIM is trained, fine retrieval of an encoded split.

    Several processes, all of which must call this, divide the matching between them.

    Args:
      model: the model that encoded it.
      encoded: result of ``model.encode_split``.
      calibrate: whether to fit what turns scores into probabilities; if not, the reliability of the
        model's own is measured.

    Returns:
      The result, with the step of the model.
    """
    config = dataclasses.replace(model.experiment.eval, pair_batch_size=model.pair_batch_size)
    result = evaluate_retrieval(
        encoded,
        config,
        model.staged_match if model.has_sim else None,
        tau=model.tau,
        length_buckets=LENGTH_BUCKETS,
        share_work=share_work,
        calibrate=calibrate,
        calibrations=model.calibrations,
    )
    return dataclasses.replace(result, step=model.step)


def evaluate_source(
    model: TrainedModel,
    source: PairSource,
    *,
    protocol: Protocol | None = None,
    progress: bool = True,
) -> tuple[EvaluationResult, epath.Path]:
    """Evaluate a split and write ``eval/<data set>-<split>[-<protocol>].{json,html,png}``.

    The files of another data set of the same label stay: a part of a hash is added to the name. The
    name of a checkpoint that is not the best of its run has its step.

    Several processes, all of which must call this, share the work; the first writes the files.

    Args:
      model: the model; the files are written below its workdir.
      source: the split.
      protocol: protocol to follow.
      progress: whether to show progress bars.

    Returns:
      The result, and the path of the page.

    Raises:
      UserError: too much of the split cannot be read, or the files cannot be written.
    """
    _check_eval_folder(model)
    coarse_only = model.experiment.method.sim_weight and not model.has_sim
    if coarse_only and jax.process_index() == 0:
        log.warning(
            "step %d is in the warm-up, before SIM: only the coarse ranking is reported", model.step
        )
    encoded = model.encode_split(source, progress)

    # A protocol may evaluate a part of the split, or several.
    if protocol is None:
        result = evaluate_encoded(model, encoded)
    else:
        evaluate = functools.partial(evaluate_encoded, model)
        result, encoded = evaluate_protocol(protocol, encoded, evaluate)

    result = _with_origin(result, model, source)
    page = in_first_process(lambda: _write_files(model, source, encoded, result))
    return result, page


def evaluate_by_voice(model: TrainedModel, source: PairSource) -> dict[str, EvaluationResult]:
    """Evaluate voices that training heard and other voices separately, each on all images.

    Writes ``eval/<data set>-<split>-voices.json`` below the workdir, named as by
    `evaluate_source`. Several processes, all of which must call this, share the work; the first
    writes the file.

    Args:
      model: the model.
      source: the split, whose data set names its speakers.

    Returns:
      "heard" and "unheard".

    Raises:
      UserError: the data set does not name its speakers, or the file cannot be written.
    """
    _check_eval_folder(model)
    data = model.experiment.data
    # All speakers of the training split count as heard.
    train = data.load(data.train_split)
    heard = {train.recording(row)["speaker"] for row in range(len(train))}
    groups = split_voices(model.encode_split(source, progress=True), source, heard)
    results = {
        name: _with_origin(evaluate_encoded(model, encoded), model, source)
        for name, encoded in groups.items()
    }

    def write() -> None:
        values = {name: result.to_json() for name, result in results.items()}
        path = _result_path(model, source, "-voices", next(iter(results.values())))
        path.write_text(json.dumps(values, indent=2) + "\n")

    in_first_process(write)
    return results


def evaluate_baseline(
    speech: ArrayLike | str | PathLike[str],
    image: ArrayLike | str | PathLike[str],
    pairs: PairSource | tuple[ArrayLike, ArrayLike],
    *,
    protocol: Protocol | None = None,
    output: str | PathLike[str] | None = None,
) -> EvaluationResult:
    """Evaluate embeddings of any other model as the coarse stage of a run is evaluated.

    Args:
      speech: (R, D) float32 or float64, one row for each recording, or the path of a .npy file.
      image: (G, D), one row for each image, or the path of a .npy file.
      pairs: the split, whose recordings and images the rows are of, in its order; or the ids of
        the recordings (R,) and of the images (G,), equal where they belong together.
      protocol: protocol to follow; the split must be that of ``open_protocol``.
      output: page to write (.html), with the numbers in a .json beside it; None to write nothing.

    Returns:
      The result. Rows are normalized if need be, which ``baseline`` says.

    Raises:
      UserError: the embeddings cannot be used, or do not fit the pairs.
    """
    if output is not None:
        check_writable(output, "--output")
    files = {
        "speech": read_embeddings(speech, "the speech array"),
        "image": read_embeddings(image, "the image array"),
    }
    source = None
    if isinstance(pairs, PairSource):
        source = pairs
        ids = source.image_ids[source.image_index], source.image_ids
        where = f"the {source.split} split of {source.name}"
    else:
        ids, where = number_ids(*pairs), "the pair of id lists"
    encoded = pair_embeddings(files["speech"], files["image"], *ids, where)

    evaluate = functools.partial(evaluate_retrieval, config=EvalConfig(), tau=1.0)
    if protocol is None:
        result = evaluate(encoded)
    else:
        result, encoded = evaluate_protocol(protocol, encoded, evaluate)
    about = {kind: embeddings.to_json() for kind, embeddings in files.items()}
    result = dataclasses.replace(result, baseline=about)
    if source is not None:
        result = dataclasses.replace(
            result, data_set=source.name, split=source.split, data=source.identity()
        )
    if output is not None:
        _write_baseline(epath.Path(output), source, encoded, result)
    return result


def data_set_label(source: PairSource) -> str:
    """Return a data set's name for files and metrics, such as "spoken_scenes-tiny".

    A manifest is named after its folder, and after itself unless it is called "manifest"; a
    prepared manifest, manifest_pairs/<name>/<version>, after its name.
    """
    path = epath.Path(printable(source.name))  # logs take Unicode alone
    if path.parent.parent.name == "manifest_pairs":
        return path.parent.name
    if is_manifest(source.name):
        folder = path.parent.name or "manifest"
        return folder if path.stem == "manifest" else f"{folder}-{path.stem}"
    return source.name.replace("/", "-")


def choose_examples(
    source: PairSource, encoded: EncodedSplit, result: EvaluationResult, count: int = EXAMPLES
) -> PageExamples:
    """Choose examples for the page and decode their images and recordings.

    Args:
      source: the split.
      encoded: its encoded items.
      result: the evaluation, with its lists.
      count: spoken queries to draw at random; half as many of the other groups.
    """

    # Cached, since one item may be in the lists of several queries.
    @functools.cache
    def show_image(row: int) -> Media:
        return image_media(decode_image(source.image(int(encoded.images[row])), THUMBNAIL))

    @functools.cache
    def show_speech(row: int) -> Media:
        item = source.recording(int(encoded.recordings[row]))
        waveform = decode_audio(item["audio"])
        return speech_media(waveform, caption=item["caption"], speaker=item["speaker"])

    def correct_image(row: int) -> Media:
        return show_image(int(np.flatnonzero(encoded.image_ids == encoded.speech_ids[row])[0]))

    def spoken(places: np.ndarray) -> list[Example]:
        return make_examples(s2i, places, show_speech, show_image, correct_image)

    lists = result.lists or {}
    s2i, i2s = lists["s2i"], lists["i2s"]
    return PageExamples(
        speech=spoken(random_queries(s2i, count)),
        failures=spoken(worst_queries(s2i, count // 2)),
        image=make_examples(i2s, random_queries(i2s, count // 2), show_image, show_speech),
    )


def _write_baseline(
    page: epath.Path, source: PairSource | None, encoded: EncodedSplit, result: EvaluationResult
) -> None:
    """Write the numbers and the page of a baseline."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    where, examples = "pairs given by ids", None
    if source is not None:
        where = f"{source.name}, {source.split} split"
        try:
            examples = choose_examples(source, encoded, result)
        except BadFileError as error:  # the embeddings were made without it
            log.warning("the page shows no examples: %s", error)
    if result.protocol is not None:
        where += f", protocol {result.protocol.name}"
    write_results_page(
        page,
        title="Speech-image retrieval, a baseline",
        data_set=where,
        result=result,
        examples=examples,
    )


def _check_eval_folder(model: TrainedModel) -> None:
    """Raise UserError if no results can be written; all processes must call this."""
    folder = epath.Path(model.workdir) / "eval"
    in_first_process(lambda: check_writable(folder, "--workdir", folder=True))


def _with_origin(
    result: EvaluationResult, model: TrainedModel, source: PairSource
) -> EvaluationResult:
    """Say where numbers come from, for the files."""
    return dataclasses.replace(
        result,
        data_set=source.name,
        split=source.split,
        trained_on=model.experiment.data.name,
        step=int(model.step),
        model=model.fingerprint,
        data=source.identity(),
        bad_items=source.bad_items.reasons,
    )


def _result_path(
    model: TrainedModel, source: PairSource, what: str, result: EvaluationResult
) -> epath.Path:
    """Return the path of the numbers of an evaluation; what it replaces is said."""
    folder = epath.Path(model.workdir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{data_set_label(source)}-{source.split}{what}"
    if not model.is_best:
        stem += f"-step{model.step}"
    path = folder / f"{stem}.json"
    stored = _stored(path)
    if stored and stored["data_set"] != result.data_set and stored["data"] != result.data:
        path = folder / f"{stem}-{content_hash(os.fsencode(source.name))[:8]}.json"
        stored = _stored(path)

    values = result.to_json()
    other = [key for key in ("step", "k", "score", "data") if stored.get(key) != values.get(key)]
    if stored and other:
        log.warning("%s is replaced: its result is of other %s", path, ", ".join(other))
    return path


def _stored(path: epath.Path) -> dict[str, Any]:
    """Return a stored result, the first of those by voice; {} if none says its data."""
    try:
        stored = json.loads(path.read_text())
        stored = stored.get("heard") or stored.get("unheard") or stored
        return stored if stored.keys() >= {"data_set", "data"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_files(
    model: TrainedModel, source: PairSource, encoded: EncodedSplit, result: EvaluationResult
) -> epath.Path:
    """Write the JSON, the page and the figure of an evaluation; return the path of the page."""
    title, protocol = f"{printable(source.name)}, {source.split}", ""
    where = f"{title} split"
    if result.protocol is not None:
        protocol = f"-{result.protocol.name}"
        where += f", protocol {result.protocol.name}"

    path = _result_path(model, source, protocol, result)
    path.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    curves = None
    if model.history:
        curves_path = epath.Path(model.workdir) / "learning_curves.png"
        curves = learning_curves_png(curves_path, model.history)

    examples = choose_examples(source, encoded, result)
    page = path.with_suffix(".html")
    write_results_page(
        page,
        title="Speech-image retrieval, coarse to fine",
        data_set=where,
        result=result,
        examples=examples,
        curves_png=curves,
    )

    # The first of the same examples, as an image for README files and slides.
    results_png(
        path.with_suffix(".png"),
        examples.speech[:SHEET_EXAMPLES],
        title=f"{title}: spoken query, coarse and fine top five",
    )
    return page
