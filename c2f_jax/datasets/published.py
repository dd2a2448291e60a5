"""The published data sets by name."""

from c2f_jax.datasets.flickr8k_audio import FLICKR8K_AUDIO, Flickr8kAudio
from c2f_jax.datasets.layout import Layout
from c2f_jax.datasets.places_audio import PLACES_AUDIO, PlacesAudio
from c2f_jax.datasets.spoken_coco import SPOKEN_COCO, SpokenCoco
from c2f_jax.errors import UserError

LAYOUTS = {layout.name: layout for layout in (FLICKR8K_AUDIO, SPOKEN_COCO, PLACES_AUDIO)}


def layout_of(spec: str) -> Layout:
    """The layout that a folder of downloaded parts goes with; `UserError` for what is no published data set."""
    if spec not in LAYOUTS:
        raise UserError(
            f"{spec} is no published data set: --manual-dir goes with one of {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[spec]


BUILDERS = {builder.name: builder for builder in (Flickr8kAudio, SpokenCoco, PlacesAudio)}
