"""Retrieval with voices heard in training and with others, apart: what is learnt of words, and what of voices."""

import dataclasses

import numpy as np

from c2f_jax.errors import UserError


def check_voices(source):
    """Raise UserError for a data set that does not name its speakers, as far as its first recording tells."""
    if not source.recording(0)["speaker"]:
        raise UserError(_nameless(source))


def split_voices(encoded, source, heard):
    """The recordings of an encoded split by voices heard in training and others.

    Args:
      encoded: EncodedSplit (``c2f_jax.trained``).
      source: its PairSource.
      heard: set of the speakers of the training split.

    Returns:
      {"heard": EncodedSplit, "unheard": EncodedSplit}, each with all images; groups without recordings are left out.

    Raises:
      UserError: the data set does not name its speakers.
    """
    speakers = [source.recording(int(row))["speaker"] for row in encoded.recordings]
    if not all(speakers) or not all(heard):
        raise UserError(_nameless(source))
    known = np.array([speaker in heard for speaker in speakers])
    groups = {"heard": np.flatnonzero(known), "unheard": np.flatnonzero(~known)}
    return {name: _rows(encoded, rows) for name, rows in groups.items() if len(rows)}


def _nameless(source):
    return f"{source.name} does not name the speaker of each recording, which --by-voice needs: leave it out"


def _rows(encoded, rows):
    """The EncodedSplit with some of its recordings."""
    speech = type(encoded.speech)(*(leaf[rows] for leaf in encoded.speech))
    return dataclasses.replace(
        encoded,
        speech=speech,
        recordings=encoded.recordings[rows],
        speech_ids=encoded.speech_ids[rows],
    )
