"""Pictures: learning curves of a run, a contact sheet of spoken queries with what they found, histograms."""

import io
import textwrap
from collections.abc import Mapping, Sequence

from c2f_jax.reports.examples import Example

COLOURS = {"s2i": "#2f5bd0", "i2s": "#c2571a"}
PLAIN = ("#2f5bd0", "#c2571a", "#5b3a9e", "#0a7d3c", "#8a6d00")
HIT = "#0a7d3c"
SIM_COLLAPSE = 0.636514  # ln 3 - (2/3) ln 2: the matcher answers 1/3 to everything


def learning_curves_png(path, history: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """Panels of losses, tau, SIM accuracy, R@1 coarse and fine: PNG bytes, also written to path unless it is None.

    history: metric name -> [(step, value), ...]. Panels take the names that hold "loss", end in "tau", hold both "sim"
    and "acc", or end in "R@1"; a name with "coarse" is dashed. Other names and empty panels are left out.
    """
    panels = {
        "loss": [name for name in history if "loss" in name],
        "tau": [name for name in history if name.endswith("tau")],
        "SIM accuracy": [name for name in history if "sim" in name and "acc" in name],
        "R@1 (%)": [name for name in history if name.endswith("R@1")],
    }
    panels = {
        title: names for title, names in panels.items() if any(len(history[name]) for name in names)
    }
    columns, rows = (2, -(-len(panels) // 2)) if len(panels) > 1 else (1, 1)
    figure = _figure(4.4 * columns, 3.1 * rows)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
    if not panels:
        figure.text(0.5, 0.5, "nothing was recorded", ha="center", va="center", color="#5c6675")
    for place, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, name in enumerate(names):
            steps, values = zip(*history[name], strict=True) if len(history[name]) else ((), ())
            direction = next((way for way in COLOURS if way in name), None)
            axes.plot(
                steps,
                values,
                lw=1.8,
                color=COLOURS.get(direction, PLAIN[number % len(PLAIN)]),
                ls="--" if "coarse" in name else "-",
                label=name.removeprefix("train/").removeprefix("eval/").removesuffix("/R@1"),
                marker="o" if len(steps) < 12 else None,
                ms=3.5,
            )
        if title == "loss" and any("sim" in name for name in names):
            axes.axhline(SIM_COLLAPSE, color="#9aa4b2", lw=1, ls=":", label="SIM collapse")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1b1f27")
        axes.set_xlabel("step", color="#5c6675", fontsize=9)
        axes.tick_params(colors="#5c6675", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9d0da")
        axes.grid(axis="y", color="#edf0f4", lw=0.8)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8, handlelength=3.4)
    return _png(figure, path)


def histogram_png(
    path, values: Mapping[str, Sequence[float]], *, label: str, bins: int = 40
) -> bytes:
    """One histogram a name, one below the other on a shared axis: PNG bytes, also written to path unless it is None.

    The axis ends at the 99.5th percentile of all values; what lies beyond is counted in the last bar.
    """
    import numpy as np

    drawn = {name: np.asarray(numbers, float) for name, numbers in values.items() if len(numbers)}
    figure = _figure(6.4, 1.0 + 1.35 * max(len(drawn), 1))
    figure.set_layout_engine("constrained")
    end = float(np.percentile(np.concatenate(list(drawn.values())), 99.5)) if drawn else 1.0
    edges = np.linspace(0, max(end, 1e-6), bins + 1)
    for place, (name, numbers) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(len(drawn), 1, place)
        axes.hist(np.minimum(numbers, edges[-1]), edges, color=PLAIN[0])
        axes.set_title(
            f"{name}: {len(numbers):,}", loc="left", fontsize=10, fontweight="bold", color="#1b1f27"
        )
        axes.tick_params(colors="#5c6675", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, edges[-1])
    if drawn:
        axes.set_xlabel(label, color="#5c6675", fontsize=9)
    return _png(figure, path)


def results_png(path, examples: Sequence[Example], *, title: str = "", top: int = 5) -> bytes:
    """A contact sheet of spoken queries: caption, then the top pictures coarse and fine, right ones framed, ticked.

    examples: speech queries with pictures as candidates. PNG bytes, also written to path unless that is None.
    """
    from matplotlib.patches import Rectangle
    from PIL import Image

    fine = any(example.fine is not None for example in examples)
    label, gap, side = 2.7, 0.35, 1.0  # widths of caption, gap and one picture, in inches
    width = label + top * side + fine * (gap + top * side) + 0.15
    height = len(examples) * 1.12 + 0.42 + (0.4 if title else 0.1)
    figure = _figure(width, height)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    canvas.axis("off")
    if title:
        canvas.text(
            0.15,
            0.3,
            title,
            fontsize=13,
            fontweight="bold",
            color="#1b1f27",
            va="center",
            parse_math=False,
        )
    first_row = 0.42 + (0.4 if title else 0.1)
    starts = {"coarse": label, "fine": label + top * side + gap}
    for stage, name in (("coarse", "coarse (SIC)"), ("fine", "fine (SIM)"))[: 1 + fine]:
        canvas.text(
            starts[stage] + 0.04,
            first_row - 0.17,
            name,
            fontsize=10.5,
            fontweight="bold",
            color="#5c6675",
            va="center",
        )
    for row, example in enumerate(examples):
        y = first_row + 1.12 * row
        caption = textwrap.shorten(example.query.caption or "spoken query", 90, placeholder=" …")
        canvas.text(
            0.15,
            y + 0.05,
            textwrap.fill(caption, 32),
            fontsize=9,
            color="#1b1f27",
            va="top",
            parse_math=False,
        )
        ranks = [f"{rank}" for rank in (example.coarse_rank, example.fine_rank) if rank is not None]
        speaker = textwrap.shorten(example.query.speaker, 38, placeholder=" …")
        notes = "\n".join(filter(None, [speaker, "rank " + " → ".join(ranks) if ranks else ""]))
        canvas.text(
            0.15, y + 0.94, notes, fontsize=8, color="#5c6675", va="bottom", parse_math=False
        )
        for stage, items, hits in (
            ("coarse", example.coarse, example.coarse_hits),
            ("fine", example.fine or (), example.fine_hits or ()),
        ):
            for place, (media, hit) in enumerate(zip(items[:top], hits[:top], strict=True)):
                x = starts[stage] + place * side + 0.04
                image = Image.open(io.BytesIO(media.data)).convert("RGB")
                image.thumbnail((180, 180))
                wide, tall = (0.92 * edge / max(image.size) for edge in image.size)
                left, upper = x + (0.92 - wide) / 2, y + (0.92 - tall) / 2
                canvas.imshow(
                    image, extent=(left, left + wide, upper + tall, upper), interpolation="lanczos"
                )
                if hit:
                    canvas.add_patch(Rectangle((left, upper), wide, tall, fill=False, ec=HIT, lw=3))
                    canvas.text(
                        left + wide - 0.03,
                        upper + 0.03,
                        "✓",
                        fontsize=10,
                        fontweight="bold",
                        color="white",
                        ha="right",
                        va="top",
                        bbox={"boxstyle": "circle,pad=0.18", "fc": HIT, "ec": "white"},
                    )
    canvas.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return _png(figure, path)


def _figure(width: float, height: float):
    # A Figure with its own Agg canvas: pyplot would keep global state and might look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144)
    FigureCanvasAgg(figure)
    return figure


def _png(figure, path) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor="white")
    if path is not None:
        from etils import epath

        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    return data.getvalue()
