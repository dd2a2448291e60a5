"""The page of an evaluation and the page of a search."""

from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike

from c2f_jax.reports.examples import Example, PageExamples
from c2f_jax.reports.figures import reliability_png
from c2f_jax.reports.html import (
    BRAND,
    Media,
    data_uri,
    page_header,
    section,
    sound,
    write_page,
)
from c2f_jax.retrieval.recall import Metric
from c2f_jax.retrieval.reranking import SCORES
from c2f_jax.retrieval.result import DIRECTIONS, TABLE_METRICS, EvaluationResult, StageMetrics

ARROWS = {"s2i": "Speech → image", "i2s": "Image → speech"}
HEADS = {"coarse": "coarse", "fine": "fine", "difference": "fine − coarse"}


def write_results_page(
    path: str | PathLike[str],
    *,
    title: str,
    data_set: str,
    result: EvaluationResult,
    examples: PageExamples | None = None,
    curves_png: bytes | None = None,
) -> None:
    """Write the page of an evaluation.

    Args:
      path: file to write, local or gs://; its folder is made.
      title: heading of the page.
      data_set: what was evaluated, in words.
      result: its numbers.
      examples: queries to show with their answers.
      curves_png: learning curves, as PNG.
    """
    body = _header(title, data_set, result)
    stages = (
        "Coarse ranks by cosine (SIC); fine reranks the best candidates with the multimodal "
        "encoder (SIM)."
    )
    if result.baseline is not None:
        stages = "Embeddings of another model, ranked by cosine."
    note = f"{stages} 95 % intervals in small print."
    body += section("Metrics", note, _metrics(result))
    if result.bad_items:
        lines = "\n".join(result.left_out())
        note = f"{len(result.bad_items):,} files or lines of the split cannot be used."
        body += section("Left out", note, f"<pre>{escape(lines)}</pre>")
    if curves_png:
        source = data_uri(Media(curves_png, "image/png"))
        curves = f'<img class="curves" alt="learning curves" src="{source}">'
        body += section("Learning curves", "", curves)

    if result.reliability:
        source = data_uri(Media(reliability_png(None, result.reliability), "image/png"))
        body += section(
            "Probabilities",
            "Pairs of a query and one of its candidates: how many match of those that are given a "
            "probability. Before: the sigmoid of SIM's match logit. After: calibrated on the "
            "validation split. Error: expected calibration error.",
            f'<img class="curves" alt="reliability diagram" src="{source}">',
        )

    # A group without examples gets no section.
    examples = examples or PageExamples()
    groups = (
        (
            "Speech → image",
            "Queries drawn at random. Correct images have a frame and a check mark.",
            examples.speech,
            "s2i",
        ),
        (
            "Worst failures",
            "The spoken queries whose correct image ended up furthest down.",
            examples.failures,
            "s2i",
        ),
        (
            "Image → speech",
            "The query is an image, the answers are recordings.",
            examples.image,
            "i2s",
        ),
    )
    for heading, note, group, direction in groups:
        if group:
            coarse = "Coarse (SIC)" if result.baseline is None else "Cosine"
            articles = "".join(_example(example, direction, coarse) for example in group)
            body += section(heading, note, articles)
    write_page(path, title, body + _footer(result))


def write_search_page(
    path: str | PathLike[str], examples: Sequence[Example], *, direction: str, gallery: str
) -> None:
    """Write the page of a search.

    Args:
      path: file to write, local or gs://; its folder is made.
      examples: queries with their answers.
      direction: "s2i" for spoken queries, "i2s" for images.
      gallery: what was searched, in words.
    """
    title = "Search images by voice" if direction == "s2i" else "Search recordings by an image"
    body = f'<header><p class="brand">{BRAND}</p><h1>{title}</h1>'
    body += f'<p class="note">{escape(gallery)}</p></header>'
    for example in examples:
        body += _example(example, direction)
    write_page(path, title, body)


def _header(title: str, data_set: str, result: EvaluationResult) -> str:
    """Return the head of the page: what was evaluated, and the three numbers that matter most."""
    fine = result.fine is not None
    facts = [
        ("data set", data_set),
        ("step", None if result.step is None else f"{result.step:,}"),
        ("images", f"{result.queries.gallery_images:,}"),
        ("recordings", f"{result.queries.gallery_recordings:,}"),
        ("reranked", f"top {result.k} by {result.score}" if fine else "no"),
        *((f"{kind} embeddings", line) for kind, line in result.describe_baseline().items()),
    ]

    # The final numbers are large, the coarse ones beside them small.
    coarse, final = result.coarse, result.final
    numbers = (
        (f"{ARROWS['s2i']} R@1", coarse.speech_to_image["R@1"], final.speech_to_image["R@1"]),
        (f"{ARROWS['i2s']} R@1", coarse.image_to_speech["R@1"], final.image_to_speech["R@1"]),
        ("Mean of the six R@K", coarse.mean_recall, final.mean_recall),
    )
    tiles = []
    for name, before, after in numbers:
        note = f"coarse {before.value:.1f}" if fine else _heads(result)[0]
        tiles.append((name, f"{after.value:.1f}", "%", note))
    return page_header(title, facts, tiles)


def _metrics(result: EvaluationResult) -> str:
    """Return the tables of metrics."""
    tables = ""
    for direction in DIRECTIONS:
        tables += _direction_table(result, direction)
    if result.fine_scores is not None:
        tables += _score_table(result.fine_scores)
    return f'<div class="tables">{tables}</div>'


def _direction_table(result: EvaluationResult, direction: str) -> str:
    stages = result.stages()
    rows = ""
    for name, digits in TABLE_METRICS.items():
        cells = ""
        for stage, metrics in stages.items():
            metric = metrics.direction(direction)[name]
            cells += _cell(metric, name, digits, signed=stage == "difference")
        rows += _table_row(name.replace("_", " "), cells)

    # There is no time for a difference.
    times = ""
    for stage in stages:
        seconds = result.seconds.get(f"{stage}_{direction}")
        times += "<td></td>" if seconds is None else f"<td>{seconds:.1f} s</td>"
    rows += _table_row("time", times, ' class="time"')

    queries = getattr(result.queries, DIRECTIONS[direction])
    caption = f"{ARROWS[direction]} · {queries:,} queries"
    return _table(caption, _heads(result), rows)


def _heads(result: EvaluationResult) -> list[str]:
    """Return the names of the stages; a baseline has one, the ranking by cosine."""
    if result.baseline is not None:
        return ["cosine"]
    return [HEADS[stage] for stage in result.stages()]


def _score_table(fine_scores: Mapping[str, StageMetrics]) -> str:
    rows = ""
    for direction, arrow in ARROWS.items():
        cells = ""
        for score in SCORES:
            metrics = fine_scores[score].direction(direction)
            cells += f"<td>{metrics['R@1'].value:.1f}</td>"
        rows += _table_row(arrow, cells)
    return _table("R@1 by the score that reranks", SCORES, rows, ' class="wide"')


def _table(caption: str, heads: Sequence[str], rows: str, attributes: str = "") -> str:
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f"<table{attributes}><caption>{caption}</caption>"
        f"<thead><tr><td></td>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _table_row(head: str, cells: str, attributes: str = "") -> str:
    return f'<tr{attributes}><th scope="row">{head}</th>{cells}</tr>'


def _cell(metric: Metric, name: str, digits: int, signed: bool) -> str:
    """Return a metric with its interval; a difference that excludes 0 is colored."""
    number = f"{'+' if signed else ''}.{digits}f"
    # Without bootstrap samples the interval is the value itself.
    low, high = metric.interval or (metric.value, metric.value)
    style = ""
    if signed and (low > 0 or high < 0):
        # A smaller median rank is better, of all other metrics a larger value.
        better = (low > 0) != (name == "median_rank")
        style = ' class="better"' if better else ' class="worse"'

    # A real minus sign, as wide as a plus.
    text = f"{metric.value:{number}}<small>{low:{number}}\u2009…\u2009{high:{number}}</small>"
    return f"<td{style}>{text.replace('-', '−')}</td>"


def _footer(result: EvaluationResult) -> str:
    counts, bootstrap = result.queries, result.bootstrap
    left_out = counts.recordings_without_image + counts.images_without_recording
    dropped = ""
    if left_out:
        dropped = f" {left_out:,} queries without a correct answer in the gallery were left out."
    return (
        "<footer><p>R@K: percentage of queries with a correct item among the first K; image → "
        "speech counts any of the image's own recordings. Equal scores: the item that comes first "
        "in the gallery ranks first; in the fine stage, the item with the better coarse place. "
        f"Intervals: {bootstrap.resamples:,} bootstrap resamples of {bootstrap.units:,} images, "
        f"each with all its queries.{dropped}</p></footer>"
    )


def _example(example: Example, direction: str, coarse: str = "Coarse (SIC)") -> str:
    """Return an article: the query on the left, its answers on the right."""
    ranks = []
    first = coarse.partition(" (")[0].lower()
    for stage, rank in ((first, example.coarse_rank), ("fine", example.fine_rank)):
        if rank is not None:
            ranks.append(f"{stage} rank <b>{rank:,}</b>")

    if direction == "s2i":
        query = sound(example.query)
    else:
        query = f'<img class="asked" alt="query" src="{data_uri(example.query)}">'
    if ranks:
        query += f'<p class="ranks">{" → ".join(ranks)}</p>'
    if example.answer is not None:
        shown = sound(example.answer)
        if direction == "s2i":
            shown = f'<img alt="correct image" src="{data_uri(example.answer)}">'
        query += f'<div class="answer"><span>correct answer</span>{shown}</div>'

    # Both rankings side by side, to show what SIM changed.
    lists = _list(coarse, example.coarse, example.coarse_hits, direction)
    if example.fine is not None and example.fine_hits is not None:
        lists += _list("Fine (SIM)", example.fine, example.fine_hits, direction)
    return (
        f'\n<article class="{direction}"><div class="query">{query}</div>'
        f'<div class="lists">{lists}</div></article>'
    )


def _list(name: str, items: Sequence[Media], hits: Sequence[bool], direction: str) -> str:
    """Return a ranked list of answers, correct ones marked."""
    entries = ""
    for place, (media, hit) in enumerate(zip(items, hits, strict=True), 1):
        mark, frame, label = f'<span class="mark">{place}</span>', "", f"place {place}"
        if hit:
            mark, frame = '<span class="mark" title="correct">✓</span>', " class=hit"
            label += ", correct"
        body = sound(media)
        if direction == "s2i":
            alt = escape(f"{label} {media.caption}".strip())
            body = f'<img alt="{alt}" title="{alt}" src="{data_uri(media)}">'
        entries += f"<li{frame}>{mark}{body}</li>"
    body = f"<ol>{entries}</ol>" if entries else '<p class="note">nothing matches</p>'
    return f"<div><h3>{name}</h3>{body}</div>"
