"""What an exported model must compute."""

import numpy as np


def items(rows, side, seed=0):
    """Recordings of different lengths, and images."""
    rng = np.random.default_rng(seed)
    waves = [0.1 * rng.standard_normal(n, np.float32) for n in rng.integers(400, 16_000, rows)]
    return waves, list(rng.integers(0, 256, (rows, side, side, 3), np.uint8))


def expected_outputs(model, rows):
    """Inputs of both encoders, and the outputs of the model of the checkpoint: of the encoders, and
    the matcher's for each recording with its image."""
    waves, images = items(rows, model.experiment.data.image_size)
    lengths = np.array([len(wave) for wave in waves], np.int32)
    waveform = np.stack([np.pad(wave, (0, lengths.max() - len(wave))) for wave in waves])
    inputs = {"waveform": waveform, "lengths": lengths, "image": np.stack(images)}
    speech, image = model.encode_items("speech", waves), model.encode_items("image", images)
    # As many rows as there are devices, or a multiple.
    four = [np.concatenate([x] * 4) for x in (speech.tokens, speech.lengths, image.tokens)]
    outputs = {f"speech_{name}": value for name, value in speech._asdict().items()}
    outputs |= {f"image_{name}": value for name, value in image._asdict().items()}
    return inputs, outputs | {"logits": np.asarray(model.match(*four))[:rows]}


def assert_close(found, expected, bound):
    """To a share of the largest value, or of 1."""
    difference = np.abs(np.asarray(found, np.float64) - expected).max()
    assert difference <= bound * max(1.0, np.abs(expected).max())
