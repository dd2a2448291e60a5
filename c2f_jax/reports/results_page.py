"""The page of an evaluation and the page of a search."""

from collections.abc import Sequence
from html import escape

from c2f_jax.reports.examples import Example
from c2f_jax.reports.html import (
    BRAND,
    Media,
    data_uri,
    page_footer,
    page_header,
    section,
    sound,
    write_page,
)
from c2f_jax.retrieval.evaluation import DIRECTIONS, SCORES

METRICS = (("R@1", 1), ("R@5", 1), ("R@10", 1), ("median_rank", 1), ("MRR", 3))
ARROWS = {"s2i": "Speech → image", "i2s": "Image → speech"}


def write_results_page(
    path,
    *,
    title: str,
    data_set: str,
    result: dict,
    step: int | None = None,
    speech_examples: Sequence[Example] = (),
    failures: Sequence[Example] = (),
    image_examples: Sequence[Example] = (),
    curves_png: bytes | None = None,
) -> None:
    """Writes the page of evaluate_retrieval's result to path, local or gs://; the folder is made."""
    sections = [
        _header(title, data_set, step, result),
        section(
            "Metrics",
            "Coarse ranks by cosine (SIC); fine re-ranks the best candidates with the multimodal "
            "encoder (SIM). 95 % intervals in small print.",
            _metrics(result),
        ),
    ]
    if curves_png:
        curves = f'<img class="curves" alt="learning curves" src="{data_uri(Media(curves_png, "image/png"))}">'
        sections.append(section("Learning curves", "", curves))
    for heading, note, examples, way in (
        (
            "Speech → image",
            "Queries drawn at random. Right pictures carry a frame and a check mark.",
            speech_examples,
            "s2i",
        ),
        (
            "Worst failures",
            "The spoken queries whose right picture ended furthest down.",
            failures,
            "s2i",
        ),
        (
            "Image → speech",
            "The query is a picture, the answers are recordings.",
            image_examples,
            "i2s",
        ),
    ):
        if examples:
            sections.append(
                section(heading, note, "".join(_example(example, way) for example in examples))
            )
    write_page(path, title, "".join(sections) + page_footer(result))


def write_search_page(path, examples: Sequence[Example], *, way: str, gallery: str) -> None:
    """Writes the answers of a search to path, local or gs://; way is "s2i" or "i2s", gallery says what was searched."""
    title = "Search pictures by voice" if way == "s2i" else "Search recordings by a picture"
    header = f'<header><p class="brand">{BRAND}</p><h1>{title}</h1><p class="note">{escape(gallery)}</p></header>'
    write_page(path, title, header + "".join(_example(example, way) for example in examples))


def _header(title: str, data_set: str, step: int | None, result: dict) -> str:
    counts, final = result["queries"], result.get("fine", result["coarse"])
    facts = [
        ("data set", data_set),
        ("step", f"{step:,}" if step is not None else None),
        ("pictures", f"{counts['gallery_images']:,}"),
        ("recordings", f"{counts['gallery_recordings']:,}"),
        ("re-ranked", f"top {result['k']} by {result['score']}" if "fine" in result else "no"),
    ]
    tiles = []
    for name, pick in (
        (f"{ARROWS['s2i']} R@1", lambda stage: stage["speech_to_image"]["R@1"]),
        (f"{ARROWS['i2s']} R@1", lambda stage: stage["image_to_speech"]["R@1"]),
        ("Mean of the six R@K", lambda stage: stage["mean_recall"]),
    ):
        before = f"coarse {pick(result['coarse']):.1f}" if "fine" in result else "coarse"
        tiles.append((name, f"{pick(final):.1f}", "%", before))
    return page_header(title, facts, tiles)


def _metrics(result: dict) -> str:
    stages = [("coarse", "coarse")]
    if "fine" in result:
        stages += [("fine", "fine"), ("difference", "fine − coarse")]
    heads = "".join(f'<th scope="col">{name}</th>' for _, name in stages)
    tables = ""
    for way, key in DIRECTIONS.items():
        rows = ""
        for metric, digits in METRICS:
            cells = "".join(
                _cell(result[stage][key], metric, digits, stage == "difference")
                for stage, _ in stages
            )
            rows += f'<tr><th scope="row">{metric.replace("_", " ")}</th>{cells}</tr>'
        times = "".join(
            f"<td>{result['seconds'][f'{stage}_{way}']:.1f} s</td>" for stage, _ in stages[:2]
        )
        rows += f'<tr class="time"><th scope="row">time</th>{times}{"<td></td>" * (len(stages) - 2)}</tr>'
        tables += (
            f"<table><caption>{ARROWS[way]} · {result['queries'][key]:,} queries</caption>"
            f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )
    if "fine_scores" in result:
        heads = "".join(f'<th scope="col">{name}</th>' for name in SCORES)
        rows = ""
        for way, key in DIRECTIONS.items():
            cells = "".join(
                f"<td>{result['fine_scores'][name][key]['R@1']:.1f}</td>" for name in SCORES
            )
            rows += f'<tr><th scope="row">{ARROWS[way]}</th>{cells}</tr>'
        tables += (
            f'<table class="wide"><caption>R@1 by the score that re-ranks</caption><thead><tr><td></td>{heads}'
            f"</tr></thead><tbody>{rows}</tbody></table>"
        )
    return f'<div class="tables">{tables}</div>'


def _cell(values: dict, metric: str, digits: int, signed: bool) -> str:
    sign, style = ("+" if signed else ""), ""
    low, high = values[f"{metric}_interval"]
    if signed and (low > 0 or high < 0):
        style = ' class="better"' if (low > 0) != (metric == "median_rank") else ' class="worse"'
    text = f"{values[metric]:{sign}.{digits}f}<small>{low:{sign}.{digits}f}\u2009…\u2009{high:{sign}.{digits}f}</small>"
    return f"<td{style}>{text.replace('-', '−')}</td>"


def _example(example: Example, way: str) -> str:
    query = (
        sound(example.query)
        if way == "s2i"
        else f'<img class="asked" alt="query" src="{data_uri(example.query)}">'
    )
    ranks = [
        f"{stage} rank <b>{rank:,}</b>"
        for stage, rank in (("coarse", example.coarse_rank), ("fine", example.fine_rank))
        if rank is not None
    ]
    query += f'<p class="ranks">{" → ".join(ranks)}</p>' if ranks else ""
    if example.answer is not None:
        shown = (
            f'<img alt="right picture" src="{data_uri(example.answer)}">'
            if way == "s2i"
            else sound(example.answer)
        )
        query += f'<div class="answer"><span>right answer</span>{shown}</div>'
    lists = _list("Coarse (SIC)", example.coarse, example.coarse_hits, way)
    if example.fine is not None:
        lists += _list("Fine (SIM)", example.fine, example.fine_hits, way)
    return f'\n<article class="{way}"><div class="query">{query}</div><div class="lists">{lists}</div></article>'


def _list(name: str, items: Sequence[Media], hits: Sequence[bool], way: str) -> str:
    entries = ""
    for place, (media, hit) in enumerate(zip(items, hits, strict=True), 1):
        mark = (
            '<span class="mark" title="right">✓</span>'
            if hit
            else f'<span class="mark">{place}</span>'
        )
        alt = escape(f"place {place}{', right' if hit else ''} {media.caption}".strip())
        body = (
            f'<img alt="{alt}" title="{alt}" src="{data_uri(media)}">'
            if way == "s2i"
            else sound(media)
        )
        entries += f"<li{' class=hit' if hit else ''}>{mark}{body}</li>"
    return f"<div><h3>{name}</h3><ol>{entries}</ol></div>"
