"""Use a trained model: load it, encode a split or a few items, match pairs with SIM."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from c2f_jax.config.caches import check_features
from c2f_jax.config.experiment import Experiment, create_experiment, example_batch
from c2f_jax.config.files import load_saved_config
from c2f_jax.data import loader
from c2f_jax.data.feature_cache import open_features
from c2f_jax.data.source import PairSource
from c2f_jax.decoding.audio import SAMPLE_RATE
from c2f_jax.errors import UserError
from c2f_jax.matcher import cross_attention, match, staged_match
from c2f_jax.models.c2f import Encoded, image_input, speech_input
from c2f_jax.models.parameters import merge_params, split_params
from c2f_jax.pretrained.weights import check_weights, load_published
from c2f_jax.retrieval.calibration import Calibration, read_calibrations
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.reranking import StagedMatch
from c2f_jax.training.checkpoints import Checkpoints
from c2f_jax.training.distributed import share_work
from c2f_jax.training.parallel import replicate, round_up_rows, split_rows

LENGTH_BUCKETS = 4  # lengths in speech tokens at which pairs are matched

Params = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class TrainedModel:
    """The parameters of a run at one step, and what can be done with them.

    Attributes:
      experiment: the checked configuration, with the model.
      params: its parameters, replicated on the devices to use (``parallel.replicate``).
      step: step of the parameters.
      workdir: directory of the run.
      history: learning curves, metric name -> [[step, value], ...].
      calibrations: "s2i" and "i2s" -> what turns scores into probabilities; empty if this step was
        not evaluated on the validation split, or SIM was not trained.
      is_best: whether the step is the best of the run.
    """

    experiment: Experiment
    params: Params
    step: int
    workdir: str | PathLike[str]
    history: Mapping[str, Sequence]
    calibrations: Mapping[str, Calibration] = dataclasses.field(default_factory=dict)
    is_best: bool = True

    @classmethod
    def load(
        cls,
        workdir: str | PathLike[str],
        step: str | int = "best",
        experiment: Experiment | None = None,
    ) -> TrainedModel:
        """Load a run of ``c2f train`` onto all local devices.

        Args:
          workdir: directory of the run.
          step: "best", "latest" or the number of a checkpoint.
          experiment: experiment to use in place of the one saved with the run, such as one with
            other evaluation options.

        Raises:
          UserError: there is no such run or checkpoint, or it does not fit the experiment.
        """
        experiment = experiment or create_experiment(load_saved_config(workdir))
        checkpoints = Checkpoints(workdir, read_only=True)
        number = _step_number(checkpoints, step)

        # Training from a feature cache needs no network; new recordings and images do.
        model = experiment.model
        raw = list(filter(experiment.can_encode, ("speech", "image")))
        batch = example_batch(experiment.data, raw=raw)

        # Onto one local device, whatever devices the checkpoint was written from.
        shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        trained, _ = split_params(shapes, model.frozen)
        params, progress = checkpoints.restore_params(number, trained)
        assert number is not None  # else there was nothing to restore

        # Frozen parameters are not in the checkpoint: they are read from the published weights.
        check_weights(workdir, experiment.weights)
        check_features(experiment)
        _, frozen = split_params(load_published(model, experiment.weights, batch), model.frozen)
        params = replicate(merge_params(params, frozen))
        calibrations = read_calibrations(progress.get("calibrations", {}), number)
        is_best = step == "best" or number == checkpoints.best_step
        return cls(experiment, params, number, workdir, progress["history"], calibrations, is_best)

    @property
    def name(self) -> str:
        """The run and step, such as "runs/scenes@1000"."""
        return f"{self.workdir}@{self.step}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters and of how images and recordings are prepared for them.

        Items that two models encode can be compared if their fingerprints are equal. Folders, steps
        and devices are not in it.
        """
        data = self.experiment.data
        prepared = [data.image_size, data.image_resize, data.image_resize_side, data.max_seconds]
        hashed = hashlib.sha256(repr(prepared).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            array = np.ascontiguousarray(leaf)
            hashed.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            hashed.update(array.view(np.uint8).data if array.size else b"")
        return hashed.hexdigest()[:16]

    @property
    def has_sim(self) -> bool:
        """Whether SIM is trained at this step; if not, only the coarse ranking is useful."""
        return self.experiment.method.has_sim(self.step)

    @property
    def tau(self) -> float:
        """The learned temperature."""
        tau: Any = self.experiment.model.apply({"params": self.params}, method="tau")
        return float(tau)

    @property
    def pair_batch_size(self) -> int:
        """Pairs to match at once: ``eval.pair_batch_size``, rounded up to fill the devices."""
        return round_up_rows(self.params, self.experiment.eval.pair_batch_size)

    def encode_split(self, source: PairSource, progress: bool = False) -> EncodedSplit:
        """Encode each recording and each image of a split once, in batches over all devices.

        Several processes, all of which must call this, divide the batches between them.

        Args:
          source: the split.
          progress: whether to show a progress bar.

        Returns:
          The encoded items, unreadable ones left out and recorded in ``source.bad_items``.
        """
        experiment, params = self.experiment, self.params
        # Each device takes a share of every batch.
        batch_size = round_up_rows(params, experiment.eval.batch_size)
        speech, recordings = _encode_all(
            lambda batch: encode_speech(
                experiment.model, params, *split_rows(params, speech_input(batch))
            ),
            lambda *part: loader.speech_batches(
                source, batch_size=batch_size, seconds_max=experiment.data.max_seconds, part=part
            ),
            source,
            total=len(source),
            label="recordings" if progress else None,
        )

        # The same for images, which all have one shape.
        image, images = _encode_all(
            lambda batch: encode_image(
                experiment.model, params, split_rows(params, image_input(batch))
            ),
            lambda *part: loader.image_batches(
                source, batch_size=batch_size, image_size=experiment.data.image_size, part=part
            ),
            source,
            total=source.num_images,
            label="images" if progress else None,
        )

        # A recording has the identity of its image.
        speech_ids = source.image_ids[source.image_index[recordings]]
        return EncodedSplit(speech, image, speech_ids, source.image_ids[images], recordings, images)

    def encode_items(
        self, kind: str, items: Sequence[np.ndarray], batch_size: int | None = None
    ) -> Encoded:
        """Encode a few recordings or images.

        Args:
          kind: "speech" or "image".
          items: n waveforms (S,) float32 at 16 kHz, at most ``data.max_seconds`` long, or n images
            (side, side, 3) uint8; or n arrays of tokens, each (T, C) float16, where the model
            encodes nothing else.
          batch_size: rows encoded at once; None for as many as there are items, at most
            ``eval.batch_size``.

        Returns:
          Encoded, n rows, with numpy leaves.
        """
        size = batch_size or min(self.experiment.eval.batch_size, len(items))
        size = round_up_rows(self.params, size)
        encode = self._encode_speech if kind == "speech" else self._encode_images

        parts = []
        for start in range(0, len(items), size):
            chunk = list(items[start : start + size])
            # Copies of the last item fill the batch, so that each batch has the same shape.
            count = len(chunk)
            encoded = encode(chunk + [chunk[-1]] * (size - count))
            parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], encoded))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def token_shape(self, kind: str) -> tuple[int, int]:
        """Return the most tokens that an item has, and the entries of a token.

        Args:
          kind: "speech" or "image".
        """
        model, one = self.experiment.model, self._longest(kind)
        item = jax.ShapeDtypeStruct((1, *one.shape), one.dtype)
        if kind == "speech":
            lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
            shapes = jax.eval_shape(
                functools.partial(encode_speech, model), self.params, item, lengths
            )
        else:
            shapes = jax.eval_shape(functools.partial(encode_image, model), self.params, item)
        return shapes.tokens.shape[1:]

    def match(
        self, speech_tokens: np.ndarray, speech_lengths: np.ndarray, image_tokens: np.ndarray
    ) -> jax.Array:
        """Compute the SIM logits of pairs.

        Args:
          speech_tokens: (b, T, W), b a multiple of the number of devices.
          speech_lengths: (b,) valid tokens.
          image_tokens: (b, P, W).

        Returns:
          (b, 2) float32, [no match, match].
        """
        rows = split_rows(self.params, (speech_tokens, speech_lengths, image_tokens))
        return match(self.experiment.model, self.params, *rows)

    @functools.cached_property
    def staged_match(self) -> StagedMatch:
        """What ``match`` computes, for ``reranking.match_candidates``: faster for many pairs."""
        shapes = self.token_shape("speech"), self.token_shape("image")
        return staged_match(self.experiment.model, self.params, *shapes)

    def attention(
        self, speech_tokens: np.ndarray, speech_lengths: np.ndarray, image_tokens: np.ndarray
    ) -> jax.Array:
        """Compute where SIM looks: the weights of cross-attention of pairs.

        Args:
          speech_tokens: (b, T, W), b a multiple of the number of devices.
          speech_lengths: (b,) valid tokens.
          image_tokens: (b, P, W).

        Returns:
          (b, T, P) float32, the mean over heads and blocks; each row adds up to 1.

        Raises:
          UserError: the multimodal encoder has no block.
        """
        if not self.experiment.model.multimodal_encoder.depth:
            raise UserError(f"{self.name} has no cross-attention: multimodal.depth is 0")
        rows = split_rows(self.params, (speech_tokens, speech_lengths, image_tokens))
        return cross_attention(self.experiment.model, self.params, *rows)

    def _longest(self, kind: str) -> jax.ShapeDtypeStruct:
        """Return shape and type of the longest item that the model is given."""
        data = self.experiment.data
        if not self.experiment.can_encode(kind):
            features = open_features(str(data.features_path(kind)))
            count = features.most_tokens
            if kind == "speech":
                count = features.tokens_of_samples(round(data.max_seconds * SAMPLE_RATE))
            return jax.ShapeDtypeStruct((count, *features.shape), np.float16)
        if kind == "speech":
            return jax.ShapeDtypeStruct((round(data.max_seconds * SAMPLE_RATE),), np.float32)
        return jax.ShapeDtypeStruct((data.image_size, data.image_size, 3), np.uint8)

    def _encode_speech(self, items: Sequence[np.ndarray]) -> Encoded:
        # All are padded to one length, so that one shape is compiled.
        longest = self._longest("speech")
        padded = np.zeros((len(items), *longest.shape), longest.dtype)
        for row, item in zip(padded, items, strict=True):
            row[: len(item)] = item
        lengths = np.array(list(map(len, items)), np.int32)
        rows = split_rows(self.params, (padded, lengths))
        return encode_speech(self.experiment.model, self.params, *rows)

    def _encode_images(self, images: Sequence[np.ndarray]) -> Encoded:
        rows = split_rows(self.params, np.stack(images))
        return encode_image(self.experiment.model, self.params, rows)

    def __repr__(self) -> str:
        return f"TrainedModel({self.name}, trained on {self.experiment.data.name})"


@functools.partial(jax.jit, static_argnames="model")
def encode_speech(
    model: nn.Module, params: Params, waveform: jax.Array, lengths: jax.Array
) -> Encoded:
    """Encode recordings, without dropout.

    Args:
      model: C2FModel.
      params: its parameters.
      waveform: (n, S) float32 at 16 kHz, or cached tokens (n, T, C).
      lengths: (n,) valid samples or tokens.
    """
    encoded: Any = model.apply({"params": params}, waveform, lengths, method="encode_speech")
    return encoded


@functools.partial(jax.jit, static_argnames="model")
def encode_image(model: nn.Module, params: Params, image: jax.Array) -> Encoded:
    """Encode images, without dropout.

    Args:
      model: C2FModel.
      params: its parameters.
      image: (n, side, side, 3) uint8, or cached tokens (n, P, C).
    """
    encoded: Any = model.apply({"params": params}, image, method="encode_image")
    return encoded


def _step_number(checkpoints: Checkpoints, step: str | int) -> int | None:
    """Return the number of the checkpoint that ``step`` names; None if the run has none."""
    if step == "best":
        return checkpoints.best_step
    if step == "latest":
        return checkpoints.latest_step
    if not str(step).isdigit():
        raise UserError(f"--step={step}: must be best, latest or the number of a saved step")
    return int(step)


def _encode_all(
    encode: Callable[[dict], Encoded],
    batches: Callable[[int, int], Iterable[dict]],
    source: PairSource,
    *,
    total: int,
    label: str | None,
) -> tuple[Encoded, np.ndarray]:
    """Encode all batches and put the valid rows in order.

    Args:
      encode: encodes a batch.
      batches: (p, n) -> the share of process p of n: batches with "index", row of each item in the
        split, and "valid".
      source: the split; unreadable items are recorded in ``source.bad_items``.
      total: number of items, for the progress bar.
      label: label of the progress bar; None for no bar.

    Returns:
      Encoded of n host arrays, and their rows (n,).
    """

    def encode_share(process: int, processes: int) -> tuple[list[tuple], dict[str, str]]:
        parts = []
        hidden = label is None or process > 0
        expected = -(-total // processes)
        with tqdm(total=expected, desc=label, disable=hidden, unit="", leave=False) as bar:
            for batch in batches(process, processes):
                # The last batch is padded, and unreadable items are zeros.
                valid = batch["valid"]
                encoded = jax.device_get(encode(batch))
                encoded = jax.tree.map(lambda x, keep=valid: np.asarray(x)[keep], encoded)
                parts.append((batch["index"][valid], encoded))
                bar.update(int(valid.sum()))
        return parts, source.bad_items.reasons

    shares = share_work(encode_share)
    if len(shares) > 1:
        source.bad_items.merge([reasons for _, reasons in shares])
    return _in_order([part for parts, _ in shares for part in parts])


def _in_order(parts: Sequence[tuple[np.ndarray, Encoded]]) -> tuple[Encoded, np.ndarray]:
    """Join encoded batches, which come sorted by length, in the order of the split.

    Args:
      parts: rows in the split, and what was encoded of them.

    Returns:
      Encoded of n host arrays, and their rows (n,).
    """
    rows = np.concatenate([rows for rows, _ in parts])
    order = np.argsort(rows)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))

    # Batches of short recordings have fewer tokens; zeros fill them up. Each goes to its place, for
    # tokens may take gigabytes.
    encoded = [part for _, part in parts]
    longest = max(part.tokens.shape[1] for part in encoded)
    tokens = encoded[0].tokens
    joined: Any = np.zeros((len(rows), longest, *tokens.shape[2:]), tokens.dtype)
    start = 0
    for part in encoded:
        stop = start + len(part.tokens)
        joined[places[start:stop], : part.tokens.shape[1]] = part.tokens
        start = stop

    embedding: Any = np.concatenate([part.embedding for part in encoded])[order]
    lengths: Any = np.concatenate([part.lengths for part in encoded])[order]
    return Encoded(embedding, joined, lengths), rows[order]
