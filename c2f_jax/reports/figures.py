"""Figures: learning curves, a contact sheet of spoken queries with their answers, histograms."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from c2f_jax.objectives import COLLAPSE_VALUE
from c2f_jax.reports.examples import SHOWN, Example
from c2f_jax.reports.html import Media
from c2f_jax.retrieval.calibration import Reliability
from c2f_jax.retrieval.result import ARROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | PathLike[str]
Curve = Sequence[tuple[int, float]]

INK, SOFT, GRAY, LIGHT = "#1b1f27", "#5c6675", "#9aa4b2", "#edf0f4"
COLORS = {"s2i": "#2f5bd0", "i2s": "#c2571a"}
PLAIN = ("#2f5bd0", "#c2571a", "#5b3a9e", "#0a7d3c", "#8a6d00")
HIT = "#0a7d3c"
BOLD: dict[str, Any] = {"fontweight": "bold", "color": INK}
SMALL: dict[str, Any] = {"fontsize": 9, "color": SOFT}

# Layout of the contact sheet, in inches.
MARGIN = 0.15
CAPTION = 2.7  # width of the captions
GAP = 0.35  # between the coarse and the fine images
CELL, IMAGE = 1.0, 0.92  # a place for an image, and the image in it
ROW = 1.12
HEAD, TITLE = 0.42, 0.4
PIXELS = 180  # of an image


def learning_curves_png(path: Path | None, history: Mapping[str, Curve]) -> bytes:
    """Draw panels of losses, tau, SIM accuracy and R@1.

    A panel takes the metrics whose names contain "loss", end in "tau", contain "sim" and "acc", or
    end in "R@1"; curves with "coarse" in their name are dashed. Empty panels are left out.

    Args:
      path: file to write; None for none.
      history: metric name -> [(step, value), ...].

    Returns:
      The PNG.
    """
    # Which metrics belong to which panel.
    names = {
        "loss": [name for name in history if "loss" in name],
        "tau": [name for name in history if name.endswith("tau")],
        "SIM accuracy": [name for name in history if "sim" in name and "acc" in name],
        "R@1 (%)": [name for name in history if name.endswith("R@1")],
    }
    panels = {}
    for title, group in names.items():
        if any(len(history[name]) for name in group):
            panels[title] = group

    # Two panels side by side.
    columns, rows = (2, -(-len(panels) // 2)) if len(panels) > 1 else (1, 1)
    figure = _figure(4.4 * columns, 3.1 * rows)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
    if not panels:
        figure.text(0.5, 0.5, "nothing was recorded", ha="center", va="center", color=SOFT)
    for place, (title, group) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, name in enumerate(group):
            _draw_curve(axes, name, history[name], PLAIN[number % len(PLAIN)])
        # A SIM loss that stays here comes from a matcher that ignores its input.
        if title == "loss" and any("sim" in name for name in group):
            axes.axhline(COLLAPSE_VALUE, color=GRAY, lw=1, ls=":", label="SIM collapse")
        _style_panel(axes, title)
    return _png(figure, path)


def histogram_png(
    path: Path | None, values: Mapping[str, Sequence[float]], *, label: str, bins: int = 40
) -> bytes:
    """Draw one histogram per name, one below the other on a shared axis.

    The axis ends at the 99.5th percentile of all values; larger ones are in the last bar.

    Args:
      path: file to write; None for none.
      values: name -> numbers; a name without numbers is left out.
      label: label of the axis.
      bins: number of bars.

    Returns:
      The PNG.
    """
    drawn = {name: np.asarray(numbers, float) for name, numbers in values.items() if len(numbers)}
    figure = _figure(6.4, 1.0 + 1.35 * max(len(drawn), 1))
    figure.set_layout_engine("constrained")
    # A few long recordings would leave all others in the first bars.
    end = 1.0
    if drawn:
        end = float(np.percentile(np.concatenate(list(drawn.values())), 99.5))
    edges = np.linspace(0, max(end, 1e-6), bins + 1)

    for place, (name, numbers) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(len(drawn), 1, place)
        axes.hist(np.minimum(numbers, edges[-1]), list(edges), color=PLAIN[0])
        axes.set_title(f"{name}: {len(numbers):,}", loc="left", fontsize=10, **BOLD)
        axes.tick_params(colors=SOFT, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, edges[-1])
    if drawn:
        axes.set_xlabel(label, **SMALL)
    return _png(figure, path)


def reliability_png(
    path: Path | None, reliability: Mapping[str, Mapping[str, Reliability]]
) -> bytes:
    """Draw how often pairs of a probability match, before and after calibration.

    Args:
      path: file to write; None for none.
      reliability: "s2i" and "i2s" -> "before" and "after" -> the comparison.

    Returns:
      The PNG.
    """
    figure = _figure(4.4 * max(len(reliability), 1), 3.6)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
    for place, (direction, both) in enumerate(reliability.items(), 1):
        axes = figure.add_subplot(1, len(reliability), place)
        axes.plot([0, 1], [0, 1], color=GRAY, lw=1, ls=":")
        for (name, one), color in zip(both.items(), (GRAY, COLORS[direction]), strict=True):
            label = f"{name} (error {one.error:.3f})"
            axes.plot(one.predicted, one.observed, color=color, marker="o", ms=4, label=label)
        _style_panel(axes, ARROWS[direction])
        axes.set_xlabel("probability", **SMALL)
        axes.set_ylabel("share that matches", **SMALL)
    return _png(figure, path)


def results_png(
    path: Path | None, examples: Sequence[Example], *, title: str = "", top: int = SHOWN
) -> bytes:
    """Draw a contact sheet of spoken queries: the caption, then the best images coarse and fine.

    Correct images have a frame and a check mark.

    Args:
      path: file to write; None for none.
      examples: spoken queries with images as answers.
      title: heading; may be empty.
      top: images per query and stage.

    Returns:
      The PNG.
    """
    # Where the images of each stage begin, and where the first query does.
    starts = {"coarse": CAPTION}
    if any(example.fine is not None for example in examples):
        starts["fine"] = CAPTION + top * CELL + GAP
    first_row = HEAD + (TITLE if title else 0.1)
    width = max(starts.values()) + top * CELL + MARGIN
    height = first_row + len(examples) * ROW

    figure = _figure(width, height)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    canvas.axis("off")
    if title:
        canvas.text(MARGIN, 0.3, title, fontsize=13, va="center", parse_math=False, **BOLD)

    heads = {"coarse": "coarse (SIC)", "fine": "fine (SIM)"}
    style: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold", "color": SOFT, "va": "center"}
    for stage, x in starts.items():
        canvas.text(x + 0.04, first_row - 0.17, heads[stage], **style)

    for row, example in enumerate(examples):
        y = first_row + ROW * row
        _draw_query(canvas, example, y)
        _draw_images(canvas, example.coarse[:top], example.coarse_hits[:top], starts["coarse"], y)
        if example.fine is not None and example.fine_hits is not None:
            _draw_images(canvas, example.fine[:top], example.fine_hits[:top], starts["fine"], y)
    # Drawing images has changed the limits.
    canvas.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return _png(figure, path)


def _draw_curve(axes: Axes, name: str, curve: Curve, plain: str) -> None:
    """Draw one metric; a direction has its own color, everything else ``plain``."""
    color = plain
    for direction, own in COLORS.items():
        if direction in name:
            color = own
    axes.plot(
        [step for step, _ in curve],
        [value for _, value in curve],
        lw=1.8,
        color=color,
        ls="--" if "coarse" in name else "-",
        label=name.removeprefix("train/").removeprefix("eval/").removesuffix("/R@1"),
        marker="o" if len(curve) < 12 else None,
        ms=3.5,
    )


def _style_panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, **BOLD)
    axes.set_xlabel("step", **SMALL)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9d0da")
    axes.grid(axis="y", color=LIGHT, lw=0.8)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8, handlelength=3.4)


def _draw_query(canvas: Axes, example: Example, y: float) -> None:
    """Write caption, speaker and ranks of a query."""
    caption = textwrap.shorten(example.query.caption or "spoken query", 90, placeholder=" …")
    lines = textwrap.fill(caption, 32)
    canvas.text(MARGIN, y + 0.05, lines, fontsize=9, color=INK, va="top", parse_math=False)

    # Speaker and ranks, if known.
    notes = []
    if example.query.speaker:
        notes.append(textwrap.shorten(example.query.speaker, 38, placeholder=" …"))
    ranks = [str(rank) for rank in (example.coarse_rank, example.fine_rank) if rank is not None]
    if ranks:
        notes.append("rank " + " → ".join(ranks))
    style: dict[str, Any] = {"fontsize": 8, "color": SOFT, "va": "bottom", "parse_math": False}
    canvas.text(MARGIN, y + 0.94, "\n".join(notes), **style)


def _draw_images(
    canvas: Axes, items: Sequence[Media], hits: Sequence[bool], start: float, y: float
) -> None:
    """Draw images side by side from ``start``, correct ones with a frame and a check mark."""
    from matplotlib.patches import Rectangle
    from PIL import Image

    for place, (media, hit) in enumerate(zip(items, hits, strict=True)):
        image = Image.open(io.BytesIO(media.data)).convert("RGB")
        image.thumbnail((PIXELS, PIXELS))
        width, height = (IMAGE * edge / max(image.size) for edge in image.size)
        # Centered in its cell.
        left = start + place * CELL + 0.04 + (IMAGE - width) / 2
        top = y + (IMAGE - height) / 2
        extent = (left, left + width, top + height, top)
        canvas.imshow(image, extent=extent, interpolation="lanczos")
        if hit:
            canvas.add_patch(Rectangle((left, top), width, height, fill=False, ec=HIT, lw=3))
            canvas.text(
                left + width - 0.03,
                top + 0.03,
                "✓",
                fontsize=10,
                fontweight="bold",
                color="white",
                ha="right",
                va="top",
                bbox={"boxstyle": "circle,pad=0.18", "fc": HIT, "ec": "white"},
            )


def _figure(width: float, height: float) -> Figure:
    """Make a figure with its own canvas; pyplot has global state and may look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, path: Path | None) -> bytes:
    """Return the figure as PNG, and write it to ``path`` unless that is None."""
    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor="white")
    if path is not None:
        from etils import epath

        file = epath.Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.getvalue())
    return data.getvalue()
