"""Families of published networks: one file each, with its tensor names and its architecture.

To add a family, write its file and list its layouts here.
"""

from collections.abc import Collection

from c2f_jax.errors import UserError
from c2f_jax.pretrained.families import albef, blip2, clip, dinov2, siglip, wav2vec2, whisper
from c2f_jax.pretrained.tensor_names import Layout

LAYOUTS: tuple[Layout, ...] = (
    wav2vec2.HUGGING_FACE,
    wav2vec2.FAIRSEQ,
    whisper.HUGGING_FACE,
    albef.HUGGING_FACE,
    albef.PUBLISHED,
    clip.HUGGING_FACE,
    clip.OPENAI,
    siglip.HUGGING_FACE,
    dinov2.HUGGING_FACE,
    blip2.LAVIS,
    blip2.HUGGING_FACE,
)


def find_layout(names: Collection[str]) -> tuple[Layout, str]:
    """Return the layout of a file with these tensor names, and the prefix of its names.

    Raises:
      UserError: no layout fits.
    """
    for layout in LAYOUTS:
        prefix = layout.prefix(names)
        if prefix is not None:
            return layout, prefix

    known = "; ".join(f"{layout.name} ({layout.anchor})" for layout in LAYOUTS)
    shown = ", ".join(sorted(names)[:5])
    raise UserError(f"no known network: its tensors begin with {shown}. Known are: {known}")
