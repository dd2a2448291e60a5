"""Scenes of colored shapes: the description, the image and the sentence.

A scene is objects plus the relations of the first object to each other one, "a small red circle
above a large blue square", and its caption is complete. A crowded scene has four objects in two
rows and two columns, and a caption names two neighbors. Everything is a function of a NumPy
generator; only NumPy and Pillow are needed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Far apart from each other and from the gray of the background.
COLORS = {
    "red": (215, 38, 38),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 45),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# In pixels of a 64 pixel image; "" in scenes without sizes.
RADII = {"small": 7.5, "large": 11.8, "": 10.0}
SIZE_WORDS = {
    "small": ("small ", "small ", "little ", "tiny "),
    "large": ("large ", "large ", "big ", "huge "),
    "": ("",),
}

RELATION_WORDS = {
    "above": ("above",),
    "below": ("below", "under"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
}
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
# Of the subject, x right, y down.
DIRECTION = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}
PIXELS = 64
_SUPERSAMPLE = 4

Fact = tuple["SceneObject", str, "SceneObject"]  # first, "above" or "left", second


@dataclasses.dataclass(frozen=True, order=True)
class SceneObject:
    """One shape, for example small, red, circle."""

    size: str
    color: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """Two or three different objects.

    relations[k] says where objects[0] is, seen from objects[k + 1].
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[str, ...]

    def facts(self) -> frozenset[Fact]:
        """Return the relations, the same set whichever object comes first."""
        facts = []
        for relation, other in zip(self.relations, self.objects[1:], strict=True):
            if relation in ("above", "left"):
                facts.append((self.objects[0], relation, other))
            else:
                facts.append((other, OPPOSITE[relation], self.objects[0]))
        return frozenset(facts)


@dataclasses.dataclass(frozen=True)
class CrowdedScene:
    """Four different objects: upper left, upper right, lower left, lower right."""

    objects: tuple[SceneObject, SceneObject, SceneObject, SceneObject]

    def facts(self) -> frozenset[Fact]:
        """Return the relations of the four pairs of neighbors."""
        a, b, c, d = self.objects
        return frozenset({(a, "left", b), (c, "left", d), (a, "above", c), (b, "above", d)})


def draw_scene(rng: np.random.Generator, *, simple: bool = False) -> Scene:
    """Draw a random scene.

    Three times out of four it has two objects, else three: one beside and one above or below the
    first.

    Args:
      rng: random generator.
      simple: whether it has two objects without sizes.

    Returns:
      The scene.
    """
    count = 2 if simple or rng.random() < 3 / 4 else 3
    objects = _draw_objects(rng, count, ("",) if simple else ("small", "large"))
    if count == 2:
        return Scene(objects, (_pick(rng, tuple(OPPOSITE)),))
    relations = [_pick(rng, ("above", "below")), _pick(rng, ("left", "right"))]
    return Scene(objects, tuple(rng.permutation(relations).tolist()))


def draw_crowded_scene(rng: np.random.Generator) -> CrowdedScene:
    """Draw a random scene of four objects."""
    a, b, c, d = _draw_objects(rng, 4, ("small", "large"))
    return CrowdedScene((a, b, c, d))


def caption(scene: Scene | CrowdedScene, rng: np.random.Generator) -> str:
    """Describe a scene in one of several ways.

    Args:
      scene: the scene.
      rng: random generator.

    Returns:
      A sentence with every size, color, shape and relation; of a crowded scene those of one pair.
    """
    if isinstance(scene, CrowdedScene):
        first, relation, second = _pick(rng, sorted(scene.facts()))
        scene = Scene((first, second), (relation,))

    # The noun phrases come before the order is drawn; data on disk depend on this order.
    first, *others = (_noun_phrase(o, rng) for o in scene.objects)
    facts = list(zip(scene.relations, others, strict=True))
    if len(facts) == 1:
        ((relation, other),) = facts
        if rng.random() < 0.5:
            return f"{first} {_words(relation, rng)} {other}"
        return f"{other} {_words(OPPOSITE[relation], rng)} {first}"

    if rng.random() < 0.5:
        facts.reverse()
    (relation, other), (second_relation, second) = facts
    if rng.random() < 0.6:
        return (
            f"{first} {_words(relation, rng)} {other} and {_words(second_relation, rng)} {second}"
        )
    # Seen from another object: "a green cross right of a red star, which is above a big yellow
    # heart".
    inverse, second_words = _words(OPPOSITE[relation], rng), _words(second_relation, rng)
    return f"{other} {inverse} {first}, which is {second_words} {second}"


def draw_image(scene: Scene | CrowdedScene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, with jittered places, sizes, hues and rotation, on a mottled gray.

    Args:
      scene: the scene.
      rng: random generator.

    Returns:
      uint8 (64, 64, 3).
    """
    radii = [RADII[o.size] * rng.uniform(0.9, 1.1) for o in scene.objects]
    centers = _grid_layout(rng) if isinstance(scene, CrowdedScene) else _layout(scene, radii, rng)
    scale = _SUPERSAMPLE

    # Shapes are drawn at four times the size, which smooths their outlines.
    canvas = Image.fromarray(_background(rng)).resize(
        (PIXELS * scale,) * 2, Image.Resampling.BICUBIC
    )

    brush = ImageDraw.Draw(canvas)
    for item, radius, center in zip(scene.objects, radii, centers, strict=True):
        color = np.clip(np.array(COLORS[item.color]) + rng.normal(0, 9, 3), 0, 255).astype(int)
        points = (center + radius * _outline(item.shape, rng.uniform(-0.18, 0.18))) * scale
        brush.polygon([tuple(p) for p in points], fill=tuple(color.tolist()))

    # Back to the size of the image, with a little noise.
    pixels = np.asarray(canvas.resize((PIXELS, PIXELS), Image.Resampling.BOX), np.float32)
    return np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)


def _draw_objects(
    rng: np.random.Generator, count: int, sizes: tuple[str, ...]
) -> tuple[SceneObject, ...]:
    """Draw different objects."""
    objects: list[SceneObject] = []
    while len(objects) < count:
        candidate = SceneObject(_pick(rng, sizes), _pick(rng, tuple(COLORS)), _pick(rng, SHAPES))
        if candidate not in objects:
            objects.append(candidate)
    return tuple(objects)


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def _words(relation: str, rng: np.random.Generator) -> str:
    return _pick(rng, RELATION_WORDS[relation])


def _noun_phrase(item: SceneObject, rng: np.random.Generator) -> str:
    size = _pick(rng, SIZE_WORDS[item.size])
    return f"a {size}{item.color} {item.shape}"


def _layout(scene: Scene, radii: list[float], rng: np.random.Generator) -> np.ndarray:
    """Draw centers (objects, 2) in pixels.

    Related objects lie along one axis without touching, and all lie inside the image.
    """
    centers = [np.zeros(2)]
    for relation, radius in zip(scene.relations, radii[1:], strict=True):
        along = np.array(DIRECTION[relation], float)  # from the other object to the first
        distance = radii[0] + radius + rng.uniform(2, 9)
        across = along[::-1] * rng.uniform(-4, 4)
        centers.append(centers[0] - along * distance + across)

    # Move the objects as a whole to a random place inside the image.
    places = np.stack(centers)
    reach = np.array(radii)[:, None] + 1
    low, high = (places - reach).min(0), (places + reach).max(0)
    room = PIXELS - (high - low)
    if (room < 0).any():  # cannot happen with the radii above; squeezing keeps every relation
        places = places * (PIXELS / (high - low)).min()
        low, high = (places - reach).min(0), (places + reach).max(0)
        room = np.maximum(PIXELS - (high - low), 0)
    return places - low + rng.uniform(0, 1, 2) * room


def _grid_layout(rng: np.random.Generator) -> np.ndarray:
    """Draw centers (4, 2) in pixels, jittered in the quarters of the image."""
    quarters = np.array([(1, 1), (3, 1), (1, 3), (3, 3)]) * PIXELS / 4
    return quarters + rng.uniform(-2.5, 2.5, (4, 2))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Draw a dull, lightly mottled background, uint8 (16, 16, 3): no object's color."""
    tone = rng.uniform(100, 155) + rng.normal(0, 8, 3)
    return np.clip(tone + rng.normal(0, 7, (16, 16, 1)), 0, 255).astype(np.uint8)


def _outline(shape: str, angle: float) -> np.ndarray:
    """Return the closed outline of a shape in the unit circle, turned by an angle.

    Args:
      shape: one of SHAPES.
      angle: radians.

    Returns:
      (points, 2), x right and y down.
    """
    if shape == "circle":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        points = np.stack([np.cos(t), np.sin(t)], 1)
    elif shape == "square":
        points = 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif shape == "triangle":
        points = np.array([(0, -1), (1, 0.85), (-1, 0.85)], float)
    elif shape == "star":
        t = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.42, 1.1)
        points = radius[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    elif shape == "cross":
        a, b = 0.32, 1.0
        points = np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
             (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )  # fmt: skip
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([x, -y - 2], 1) / 16
    else:
        raise ValueError(f"no outline for the shape {shape!r}")

    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([(c, s), (-s, c)])
