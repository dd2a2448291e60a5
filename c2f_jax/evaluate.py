"""Rank an encoded split coarse and fine, and write the numbers, the page and the pictures."""

import functools
import json
import logging

import numpy as np
from etils import epath

from c2f_jax.data.audio import decode_audio
from c2f_jax.data.images import decode_image
from c2f_jax.data.manifest import MANIFEST_SUFFIXES
from c2f_jax.inference import LENGTH_BUCKETS, encode_split, matcher
from c2f_jax.reports.examples import make_examples, random_queries, worst_queries
from c2f_jax.reports.figures import learning_curves_png, results_png
from c2f_jax.reports.html import picture, recording
from c2f_jax.reports.results_page import write_results_page
from c2f_jax.retrieval.evaluation import evaluate_retrieval
from c2f_jax.retrieval.protocols import rank
from c2f_jax.retrieval.voices import split_voices
from c2f_jax.training.parallel import round_up_rows

log = logging.getLogger(__name__)


def retrieve(experiment, params, encoded, *, step):
    """Coarse and, where SIM is trained at ``step``, fine retrieval of an encoded split.

    Returns:
      The result for JSON and the ranked lists, see ``evaluate_retrieval``.
    """
    speech, image, options = encoded.speech, encoded.image, experiment.eval
    return evaluate_retrieval(
        speech.embedding,
        image.embedding,
        encoded.speech_ids,
        encoded.image_ids,
        speech.tokens,
        speech.lengths,
        image.tokens,
        matcher(experiment.model, params) if experiment.method.has_sim(step) else None,
        k=options.k,
        tau=float(experiment.model.apply({"params": params}, method="tau")),
        score=options.score,
        pair_chunk=round_up_rows(params, options.pair_batch_size),
        length_buckets=LENGTH_BUCKETS,
        resamples=options.resamples,
    )


def evaluate_source(
    experiment, params, source, workdir, *, step, history=None, progress=True, protocol=None
):
    """Evaluate a split and write ``eval/<data set>-<split>[-<protocol>].{json,html,png}`` below the workdir.

    Args:
      experiment, params, source: what is evaluated on what.
      workdir: directory of the run.
      step: of the parameters.
      history: learning curves to show.
      progress: show progress bars.
      protocol: a `c2f_jax.retrieval.protocols.Protocol` to follow.

    Returns:
      The result, as it stands in the JSON file, and the path of the page.
    """
    if experiment.method.sim_weight and not experiment.method.has_sim(step):
        log.warning(
            "step %d lies in the warm-up, before SIM: only the coarse ranking is reported", step
        )
    encoded = encode_split(experiment, params, source, progress)
    rank_all = functools.partial(retrieve, experiment, params, step=step)
    if protocol is None:
        result, lists = rank_all(encoded)
    else:
        result, lists, encoded = rank(protocol, encoded, rank_all)
    result |= {
        "data_set": source.name,
        "split": source.split,
        "trained_on": experiment.data.name,
        "step": int(step),
        "bad_items": source.bad_items.reasons,
    }
    folder, stem = epath.Path(workdir) / "eval", f"{data_set_label(source)}-{source.split}"
    if protocol is not None:
        stem += f"-{protocol.name}"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{stem}.html"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    curves = (
        learning_curves_png(epath.Path(workdir) / "learning_curves.png", history)
        if history
        else None
    )
    speech_examples, failures, image_examples = choose_examples(source, encoded, lists)
    write_results_page(
        page,
        title="Speech-image retrieval, coarse to fine",
        result=result,
        data_set=f"{source.name}, {source.split} split"
        + (f", protocol {protocol.name}" if protocol else ""),
        step=int(step),
        speech_examples=speech_examples,
        failures=failures,
        image_examples=image_examples,
        curves_png=curves,
    )
    results_png(
        folder / f"{stem}.png",
        speech_examples[:5],
        title=f"{source.name}, {source.split}: spoken query, coarse and fine top five",
    )
    return result, page


def evaluate_by_voice(experiment, params, source, workdir, *, step):
    """Evaluate a split with the voices of the training split and with others apart.

    Returns:
      {"heard": result, "unheard": result}, as it stands in ``eval/<data set>-<split>-voices.json`` below the workdir;
      the gallery of speech -> image holds all pictures in both.
    """
    train = experiment.data.load(experiment.data.train_split)
    heard = {train.recording(row)["speaker"] for row in range(len(train))}
    groups = split_voices(encode_split(experiment, params, source, progress=True), source, heard)
    results = {
        name: retrieve(experiment, params, encoded, step=step)[0] | {"step": int(step)}
        for name, encoded in groups.items()
    }
    path = epath.Path(workdir) / "eval" / f"{data_set_label(source)}-{source.split}-voices.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def data_set_label(source):
    """A data set's name as it stands in file and metric names: "spoken_scenes-tiny", or a manifest's folder.

    For the directory of a prepared manifest, manifest_pairs/<name>/<version>, it is that name.
    """
    path = epath.Path(source.name)
    if path.suffix in MANIFEST_SUFFIXES or path.parent.parent.name == "manifest_pairs":
        return path.parent.name
    return source.name.replace("/", "-")


def choose_examples(source, encoded, lists, count=8):
    """Examples for the page, as report.Example: random speech queries, the worst of them, random image queries."""
    pictures = functools.cache(
        lambda row: picture(decode_image(source.image(int(encoded.images[row])), 96))
    )

    @functools.cache
    def sounds(row):
        item = source.recording(int(encoded.recordings[row]))
        return recording(
            decode_audio(item["audio"]), caption=item["caption"], speaker=item["speaker"]
        )

    def right_picture(row):
        return pictures(int(np.flatnonzero(encoded.image_ids == encoded.speech_ids[row])[0]))

    s2i, i2s = lists["s2i"], lists["i2s"]
    return (
        make_examples(s2i, random_queries(s2i, count), sounds, pictures, right_picture),
        make_examples(s2i, worst_queries(s2i, count // 2), sounds, pictures, right_picture),
        make_examples(i2s, random_queries(i2s, count // 2), pictures, sounds),
    )
