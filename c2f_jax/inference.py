"""A trained model at work: its parameters read back, what it encodes, and the pairs that SIM matches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from c2f_jax.config.caches import check_features
from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_saved_config
from c2f_jax.data import loader
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import Encoded, image_input, speech_input
from c2f_jax.models.parameters import merge_params, split_params
from c2f_jax.pretrained.weights import check_weights, load_published
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.training.checkpoints import Checkpoints
from c2f_jax.training.parallel import replicate, round_up_rows, split_rows

LENGTH_BUCKETS = 4  # numbers of speech tokens that pairs are matched at


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
        experiment.data,
        raw=[p for p, e in encoders.items() if getattr(e, "tower", None) is not None],
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    trained, _ = split_params(shapes, model.frozen)
    params, progress = checkpoints.restore_params(number, trained)
    check_weights(workdir, experiment.weights)
    check_features(experiment)
    _, frozen = split_params(load_published(model, experiment.weights, batch), model.frozen)
    return experiment, replicate(merge_params(params, frozen)), number, progress["history"]


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
    speech, image = (
        Encoded(None, speech_tokens, speech_lengths),
        Encoded(None, image_tokens, image_lengths),
    )
    return model.apply({"params": params}, speech, image, method="match")


def matcher(model, params):
    """``match`` as re-ranking calls it, on the devices that ``params`` are replicated on."""

    def match_fn(speech_tokens, speech_lengths, image_tokens):
        return match(
            model, params, *split_rows(params, (speech_tokens, speech_lengths, image_tokens))
        )

    return match_fn


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
        speech,
        image,
        recordings,
        images,
        source.image_ids[source.image_index[recordings]],
        source.image_ids[images],
    )


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
