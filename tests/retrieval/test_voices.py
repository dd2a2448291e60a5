"""Voices heard in training and other voices: which recordings are in which group."""

import numpy as np
import pytest
from helpers.memory_source import Memory

from c2f_jax.errors import UserError
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval.encoded import EncodedSplit
from c2f_jax.retrieval.voices import check_voices, split_voices


class Voices(Memory):
    """Recordings of three speakers in turn."""

    speakers = ("ann", "bob", "cy")

    def recording(self, index):
        return super().recording(index) | {"speaker": self.speakers[index % 3]}


@pytest.fixture
def encoded():
    rows = np.arange(6, dtype=np.float32)[:, None]
    speech = Encoded(rows, rows[:, None], np.ones(6, np.int32))
    image = Encoded(rows[:3], None, None)
    return EncodedSplit(speech, image, np.arange(6) // 2, np.arange(3))


def test_each_group_has_its_recordings_and_all_images(encoded):
    groups = split_voices(encoded, Voices([800] * 6), {"bob"})
    assert groups["heard"].recordings.tolist() == [1, 4]
    assert groups["unheard"].recordings.tolist() == [0, 2, 3, 5]
    assert groups["heard"].speech.tokens[:, 0, 0].tolist() == [1.0, 4.0]
    assert groups["heard"].speech_ids.tolist() == [0, 2]
    for group in groups.values():
        assert group.images.tolist() == [0, 1, 2]
    assert split_voices(encoded, Voices([800] * 6), {"dan"}).keys() == {"unheard"}
    assert repr(groups["heard"]) == "EncodedSplit(2 recordings, 3 images)"


def test_a_data_set_without_speakers_is_one_clear_error(encoded):
    source = Voices([800] * 6)
    check_voices(source)
    source.speakers = ("", "bob", "cy")
    for call in (lambda: check_voices(source), lambda: split_voices(encoded, source, {"bob"})):
        with pytest.raises(UserError, match="memory does not name the speaker"):
            call()
