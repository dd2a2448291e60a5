"""The TFDS data set `spoken_scenes`: drawn scenes with captions spoken by espeak-ng.

It is made on the user's machine, once.
"""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from c2f_jax.data.prepared import pair_features
from c2f_jax.datasets.spoken_scenes import scenes, speech

SPLITS = ("train", "validation", "test")
Described = scenes.Scene | scenes.CrowdedScene


@dataclasses.dataclass(kw_only=True)
class SpokenScenesConfig(tfds.core.BuilderConfig):
    """What a configuration is made of.

    Attributes:
      images: split -> number of scenes.
      captions: split -> number of spoken captions of each scene.
      simple: whether scenes have two objects without sizes.
      crowded: whether scenes have four objects, of which a caption names two.
      seed: seed of all draws.
    """

    images: dict[str, int] = dataclasses.field(default_factory=dict)
    captions: dict[str, int] = dataclasses.field(default_factory=dict)
    simple: bool = False
    crowded: bool = False
    seed: int = 0


class SpokenScenes(tfds.core.GeneratorBasedBuilder):
    """Images of two or three shapes, each with captions spoken by several synthetic speakers.

    One example is a scene: its image (PNG), its name and its recordings (FLAC, caption, speaker). A
    speaker's voice variant occurs in one split only; so does a scene. The set is a function of the
    configuration alone.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        SpokenScenesConfig(
            name="default",
            description="8,000 scenes for training, 500 for validation, 500 for testing.",
            images={"train": 8000, "validation": 500, "test": 500},
            captions={"train": 2, "validation": 2, "test": 4},
        ),
        SpokenScenesConfig(
            name="simple",
            description="1,500 scenes of two objects without sizes for training, "
            "250 for validation, 500 for testing.",
            images={"train": 1500, "validation": 250, "test": 500},
            captions={"train": 4, "validation": 2, "test": 2},
            simple=True,
            seed=2,
        ),
        SpokenScenesConfig(
            name="crowded",
            description="10,000 scenes of four objects, captions of two; 250 for validation, "
            "500 for testing.",
            images={"train": 10000, "validation": 250, "test": 500},
            captions={"train": 2, "validation": 4, "test": 4},
            crowded=True,
            seed=3,
        ),
        SpokenScenesConfig(
            name="tiny",
            description="A few scenes, for trying things out.",
            images={"train": 64, "validation": 16, "test": 16},
            captions={"train": 2, "validation": 2, "test": 2},
            seed=1,
        ),
    ]

    def __init__(self, *, processes: int | None = None, **kwargs: Any) -> None:
        """Create a builder.

        Args:
          processes: processes that speak; None for one a core.
          **kwargs: arguments of TFDS's builder.
        """
        self._processes = processes
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn scenes of colored shapes with spoken captions.",
            features=pair_features(),
            # Order is generation order, so that row numbers mean something.
            disable_shuffling=True,
            # Of each split, the samples of each recording: lengths are known without reading audio.
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        # The generators of this file are bare and must stay so: named ones would draw other scenes
        # than those of the data sets on users' disks.
        rng = np.random.default_rng([config.seed, 0])
        seen: set[frozenset] = set()
        generators = {}
        for split in reversed(SPLITS):  # the small splits first: what fails, fails early
            described = distinct_scenes(config, split, rng, seen)
            generators[split] = self._generate_examples(split, described)
        return generators

    def _generate_examples(
        self, split: str, described: list[Described]
    ) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        seed = [config.seed, 1 + SPLITS.index(split)]
        count = config.captions[split]

        # All is planned before anything is spoken: speaking is what takes long.
        plans = []
        for i, scene in enumerate(described):
            plans.append(_plan(scene, np.random.default_rng([*seed, i]), split, count))
        spoken = speech.speak_all((u for plan in plans for u in plan), processes=self._processes)

        lengths = []
        for i, (scene, plan) in enumerate(zip(described, plans, strict=True)):
            recordings = []
            for utterance in plan:
                audio, samples = next(spoken)
                lengths.append(samples)
                recordings.append(
                    {"audio": audio, "caption": utterance["text"], "speaker": utterance["voice"]}
                )
            image = scenes.draw_image(scene, np.random.default_rng([*seed, i, 1]))
            example = {"image": _png(image), "image_id": f"{split}-{i:05d}"}
            yield i, example | {"recordings": recordings}
        self.info.metadata[split] = {"captions": count, "samples": lengths}


def distinct_scenes(
    config: SpokenScenesConfig, split: str, rng: np.random.Generator, seen: set[frozenset]
) -> list[Described]:
    """Draw scenes that differ from each other and from all seen ones.

    No caption of a crowded scene is true of another one of its split, except in training.

    Args:
      config: what to draw.
      split: name of the split.
      rng: random generator.
      seen: facts of the scenes of other splits; those of this one are added.

    Returns:
      The scenes.
    """
    drawn: list[Described] = []
    told: set[scenes.Fact] = set()
    while len(drawn) < config.images[split]:
        scene = _draw(config, rng)

        facts = scene.facts()
        ambiguous = config.crowded and split != "train" and facts & told
        if facts in seen or ambiguous:
            continue

        seen.add(facts)
        told |= facts
        drawn.append(scene)
    return drawn


def _draw(config: SpokenScenesConfig, rng: np.random.Generator) -> Described:
    if config.crowded:
        return scenes.draw_crowded_scene(rng)
    return scenes.draw_scene(rng, simple=config.simple)


def _plan(scene: Described, rng: np.random.Generator, split: str, count: int) -> list[dict]:
    """Decide what is said about a scene and how: `count` utterances by different speakers."""
    plan: list[dict] = []
    # One voice says one caption of a scene.
    while len(plan) < count:
        voice = speech.draw_voice(rng, split)
        if all(voice["voice"] != u["voice"] for u in plan):
            plan.append({"text": scenes.caption(scene, rng), **voice})
    return plan


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
