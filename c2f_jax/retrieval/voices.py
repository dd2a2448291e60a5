"""Split recordings by voice, to tell what a model learned about words from what about voices."""

from collections.abc import Set

import numpy as np

from c2f_jax.data.source import PairSource
from c2f_jax.errors import UserError
from c2f_jax.retrieval.encoded import EncodedSplit


def check_voices(source: PairSource) -> None:
    """Check that a data set names its speakers, judging by its first recording.

    Raises:
      UserError: it does not.
    """
    if not source.recording(0)["speaker"]:
        raise UserError(_nameless(source))


def split_voices(
    encoded: EncodedSplit, source: PairSource, heard: Set[str]
) -> dict[str, EncodedSplit]:
    """Split the recordings into voices that training heard and voices that it did not.

    Args:
      encoded: R encoded recordings and G encoded images.
      source: the split they were encoded from.
      heard: speakers of the training split.

    Returns:
      "heard" and "unheard", each with all G images; a group without recordings is left out.

    Raises:
      UserError: the data set does not name its speakers.
    """
    speakers = [source.recording(int(row))["speaker"] for row in encoded.recordings]
    if not all(speakers) or not all(heard):
        raise UserError(_nameless(source))

    known = np.array([speaker in heard for speaker in speakers])
    groups = {"heard": np.flatnonzero(known), "unheard": np.flatnonzero(~known)}
    return {name: encoded.select_recordings(rows) for name, rows in groups.items() if len(rows)}


def _nameless(source: PairSource) -> str:
    return (
        f"{source.name} does not name the speaker of each recording, which --by-voice needs: "
        "leave out --by-voice"
    )
