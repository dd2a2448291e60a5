"""Encode a split, rank it coarse and fine, and write the numbers, the page and the pictures."""

import functools
import json
import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from c2f_jax.checkpoints import Checkpoints
from c2f_jax.data import loader
from c2f_jax.data.audio import decode_audio
from c2f_jax.data.images import decode_image
from c2f_jax.data.pairs import MANIFEST_SUFFIXES
from c2f_jax.errors import UserError
from c2f_jax.experiment import create_experiment, example_batch, load_saved_config
from c2f_jax.models import Encoded
from c2f_jax.models.c2f import image_input, merge_params, speech_input, split_params
from c2f_jax.parallel import replicate, round_up_rows, split_rows
from c2f_jax.pretrained.features import check_features
from c2f_jax.pretrained.weights import check_weights, load_published
from c2f_jax.retrieval.evaluation import evaluate_retrieval
from c2f_jax.retrieval.figures import learning_curves_png, results_png
from c2f_jax.retrieval.protocols import rank
from c2f_jax.retrieval.report import (
    make_examples,
    picture,
    random_queries,
    recording,
    worst_queries,
    write_results_page,
)
from c2f_jax.retrieval.voices import split_voices

log = logging.getLogger(__name__)
LENGTH_BUCKETS = 4  # numbers of speech tokens that pairs are matched at


@functools.partial(jax.jit, static_argnames="model")
def encode_speech(model, params, waveform, lengths):
    """Recordings, or their cached tokens -> Encoded, deterministic."""
    return model.apply({"params": params}, waveform, lengths, method="encode_speech")


@functools.partial(jax.jit, static_argnames="model")
def encode_image(model, params, image):
    """Images, or their cached tokens -> Encoded, deterministic."""
    return model.apply({"params": params}, image, method="encode_image")


@functools.partial(jax.jit, static_argnames="model")
def match(model, params, speech_tokens, speech_lengths, image_tokens):
    """SIM logits (b, 2) of b pairs of token sequences."""
    image_lengths = jnp.full((image_tokens.shape[0],), image_tokens.shape[1], jnp.int32)
    speech, image = Encoded(None, speech_tokens, speech_lengths), Encoded(None, image_tokens, image_lengths)
    return model.apply({"params": params}, speech, image, method="match")


def matcher(model, params):
    """``match`` as re-ranking calls it, on the devices that ``params`` are replicated on."""

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        return match(model, params, *split_rows(params, (speech_tokens, speech_lengths, image_tokens)))

    return match_fn


@dataclass(frozen=True)
class EncodedSplit:
    """Everything of one split that retrieval needs, on the host, bad items left out.

    Attributes:
      speech, image: Encoded with numpy leaves.
      recordings: (R,) rows of the split's recordings that could be read.
      images: (G,) rows of its images.
      speech_ids, image_ids: (R,), (G,) identities; equal means right.
    """

    speech: Encoded
    image: Encoded
    recordings: np.ndarray
    images: np.ndarray
    speech_ids: np.ndarray
    image_ids: np.ndarray


def encode_split(experiment, params, source, progress=False):
    """Encode all recordings and all images of a PairSource once, each device a share of every batch.

    Args:
      experiment: Experiment.
      params: model parameters, replicated on the devices to use (``parallel.replicate``).
      source: PairSource.
      progress: show a progress bar.
    """
    data, batch_size = experiment.data, round_up_rows(params, experiment.eval.batch_size)
    speech, recordings = _encode_all(
        lambda b: encode_speech(experiment.model, params, *split_rows(params, speech_input(b))),
        loader.speech_batches(source, batch_size=batch_size, seconds_max=data.max_seconds),
        len(source),
        "recordings" if progress else None,
    )
    image, images = _encode_all(
        lambda b: encode_image(experiment.model, params, split_rows(params, image_input(b))),
        loader.image_batches(source, batch_size=batch_size, image_size=data.image_size),
        source.num_images,
        "images" if progress else None,
    )
    return EncodedSplit(
        speech, image, recordings, images, source.image_ids[source.image_index[recordings]], source.image_ids[images]
    )


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


def evaluate_source(experiment, params, source, workdir, *, step, history=None, progress=True, protocol=None):
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
        log.warning("step %d lies in the warm-up, before SIM: only the coarse ranking is reported", step)
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
    curves = learning_curves_png(epath.Path(workdir) / "learning_curves.png", history) if history else None
    speech_examples, failures, image_examples = choose_examples(source, encoded, lists)
    write_results_page(
        page,
        title="Speech-image retrieval, coarse to fine",
        result=result,
        data_set=f"{source.name}, {source.split} split" + (f", protocol {protocol.name}" if protocol else ""),
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
    pictures = functools.cache(lambda row: picture(decode_image(source.image(int(encoded.images[row])), 96)))

    @functools.cache
    def sounds(row):
        item = source.recording(int(encoded.recordings[row]))
        return recording(decode_audio(item["audio"]), caption=item["caption"], speaker=item["speaker"])

    def right_picture(row):
        return pictures(int(np.flatnonzero(encoded.image_ids == encoded.speech_ids[row])[0]))

    s2i, i2s = lists["s2i"], lists["i2s"]
    return (
        make_examples(s2i, random_queries(s2i, count), sounds, pictures, right_picture),
        make_examples(s2i, worst_queries(s2i, count // 2), sounds, pictures, right_picture),
        make_examples(i2s, random_queries(i2s, count // 2), pictures, sounds),
    )


def load_trained(workdir, *, step="best", experiment=None):
    """A trained run: (experiment, parameters on all local devices, step, learning curves).

    Args:
      workdir: directory of ``c2f train``.
      step: "best", "latest" or a number.
      experiment: Experiment to use instead of the one saved with the run (evaluation values overridden).
    """
    experiment = experiment or create_experiment(load_saved_config(workdir))
    checkpoints = Checkpoints(workdir, read_only=True)
    named = {"best": checkpoints.best_step, "latest": checkpoints.latest_step}
    if step not in named and not str(step).isdigit():
        raise UserError(f"--step={step}: best, latest or the number of a saved step is expected")
    number = named[step] if step in named else int(step)
    # On one local device, whatever devices the checkpoint was written from.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    model = experiment.model
    # Also where training reads a cache the network is wanted, for recordings and pictures that are in no cache.
    encoders = {"speech": model.speech_encoder, "image": model.image_encoder}
    batch = example_batch(
        experiment.data, raw=[p for p, e in encoders.items() if getattr(e, "tower", None) is not None]
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    trained, _ = split_params(shapes, model.frozen)
    params, progress = checkpoints.restore_params(number, trained)
    check_weights(workdir, experiment.weights)
    check_features(experiment)
    _, frozen = split_params(load_published(model, experiment.weights, batch), model.frozen)
    return experiment, replicate(merge_params(params, frozen)), number, progress["history"]


def _encode_all(encode, batches, total, label):
    """Run ``encode`` over batches, keep the valid rows: (Encoded of host arrays, their row numbers), in row order."""
    parts, rows = [], []
    with tqdm(total=total, desc=label, disable=label is None, unit="", leave=False) as bar:
        for batch in batches:
            valid = batch["valid"]
            encoded = jax.device_get(encode(batch))
            parts.append(jax.tree.map(lambda x, keep=valid: np.asarray(x)[keep], encoded))
            rows.append(batch["index"][valid])
            bar.update(int(valid.sum()))
    longest = max(part.tokens.shape[1] for part in parts)
    parts = [part._replace(tokens=_padded(part.tokens, longest)) for part in parts]
    rows = np.concatenate(rows)
    order = np.argsort(rows)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *parts), rows[order]


def _padded(tokens, longest):
    """Tokens (n, T, W) as (n, longest, W)."""
    return np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1]), (0, 0)))
