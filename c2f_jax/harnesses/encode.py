"""Encode the recordings and images that a benchmark hands over, and note what is odd about them."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from c2f_jax.decoding.image_modes import Note
from c2f_jax.errors import UserError
from c2f_jax.inference import TrainedModel
from c2f_jax.items import File, read_item
from c2f_jax.models.c2f import Encoded


def encode_files(
    model: TrainedModel, kind: str, files: Iterable[tuple[str, File]], *, tokens: bool = False
) -> tuple[Encoded, list[tuple[str, Note]]]:
    """Encode files as a run hears and sees them.

    Args:
      model: the run.
      kind: "speech" or "image".
      files: name, and path or content, of each; read as they are needed.
      tokens: whether to keep the tokens, which the fine stage needs.

    Returns:
      Encoded, one row for each file, with numpy leaves, tokens and lengths None unless asked for;
      and the name, with kind and detail, of each that was converted, cut or odd, see
      ``index.say_notes``.

    Raises:
      UserError: there is no file, or the model cannot use one. A benchmark scores every item, so
        none is left out.
    """
    notes: list[tuple[str, Note]] = []
    parts: list[Encoded] = []
    files, most = iter(files), model.experiment.eval.batch_size
    while chunk := list(itertools.islice(files, most)):
        arrays = []
        for name, file in chunk:
            item = read_item(model.experiment.data, kind, file, name, cut_silence=False)
            notes.extend((name, note) for note in (*item.converted, *item.notes))
            arrays.append(item.array)
        # After a whole batch all have its size, so that one shape is compiled.
        encoded = model.encode_items(kind, arrays, most if parts else None)
        parts.append(encoded if tokens else _without_tokens(encoded))
    if not parts:
        raise UserError(f"the benchmark has no {kind} items to encode")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), notes


def _without_tokens(encoded: Encoded) -> Encoded:
    nothing: Any = None
    return Encoded(encoded.embedding, nothing, nothing)
