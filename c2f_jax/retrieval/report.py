"""The results page: one self-contained HTML file with metrics, playable examples, failures. No network, no script."""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np

from c2f_jax.retrieval.evaluation import DIRECTIONS, SCORES, RankedLists

METRICS = (("R@1", 1), ("R@5", 1), ("R@10", 1), ("median_rank", 1), ("MRR", 3))
BRAND = "c2f_jax · coarse-to-fine speech-image retrieval"
ARROWS = {"s2i": "Speech → image", "i2s": "Image → speech"}


@dataclasses.dataclass(frozen=True)
class Media:
    """One picture or one recording, encoded for a browser."""

    data: bytes
    mime: str  # image/png, image/jpeg, audio/mpeg, audio/wav, ...
    caption: str = ""
    speaker: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One query with its best gallery items before and after re-ranking; hits mark the right ones.

    fine is None when there was no fine stage; ranks are None for a query whose right answer nobody knows.
    """

    query: Media
    coarse: Sequence[Media]
    coarse_hits: Sequence[bool]
    coarse_rank: int | None = None
    fine: Sequence[Media] | None = None
    fine_hits: Sequence[bool] | None = None
    fine_rank: int | None = None
    answer: Media | None = None  # a right item, shown beside the query


def picture(image: np.ndarray, caption: str = "", max_side: int = 224) -> Media:
    """An (H, W, 3) uint8 image, at most max_side pixels a side, as PNG or JPEG, whichever is smaller."""
    from PIL import Image

    shown = Image.fromarray(np.asarray(image, np.uint8))
    shown.thumbnail((max_side, max_side))
    png, jpeg = io.BytesIO(), io.BytesIO()
    shown.save(png, "PNG")
    shown.save(jpeg, "JPEG", quality=90)
    mime, data = min(("image/png", png.getvalue()), ("image/jpeg", jpeg.getvalue()), key=lambda kind: len(kind[1]))
    return Media(data, mime, caption)


def recording(waveform: np.ndarray, sample_rate: int = 16_000, caption: str = "", speaker: str = "") -> Media:
    """A mono (S,) waveform as MP3, which every browser plays, or as WAV where libsndfile writes no MP3."""
    import soundfile

    kind, mime = ("MP3", "audio/mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "audio/wav")
    data = io.BytesIO()
    soundfile.write(data, np.clip(np.asarray(waveform, np.float32), -1.0, 1.0), sample_rate, format=kind)
    return Media(data.getvalue(), mime, caption, speaker)


def random_queries(ranked: RankedLists, count: int, seed: int = 0) -> np.ndarray:
    """Places in `ranked` of queries drawn at random, without a look at how they did."""
    total = len(ranked.queries)
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


def worst_queries(ranked: RankedLists, count: int) -> np.ndarray:
    """Places in `ranked` of the queries whose right item ends furthest down, the worst first, none that ends first."""
    final = ranked.coarse_rank if ranked.fine_rank is None else ranked.fine_rank
    worst = np.argsort(-final, kind="stable")[:count]
    return worst[final[worst] > 1]


def make_examples(
    ranked: RankedLists,
    places: Iterable[int],
    query_media: Callable[[int], Media],
    gallery_media: Callable[[int], Media],
    answer: Callable[[int], Media] | None = None,
    top: int = 5,
) -> list[Example]:
    """Examples for the page. query_media and gallery_media turn a row of their table into Media; answer a query row."""
    examples = []
    for place in places:
        query = int(ranked.queries[place])
        fine = (
            {}
            if ranked.fine is None
            else {
                "fine": [gallery_media(int(row)) for row in ranked.fine[place, :top]],
                "fine_hits": ranked.fine_hits[place, :top].tolist(),
                "fine_rank": int(ranked.fine_rank[place]),
            }
        )
        examples.append(
            Example(
                query_media(query),
                [gallery_media(int(row)) for row in ranked.coarse[place, :top]],
                ranked.coarse_hits[place, :top].tolist(),
                int(ranked.coarse_rank[place]),
                **fine,
                answer=answer(query) if answer else None,
            )
        )
    return examples


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
        ("Worst failures", "The spoken queries whose right picture ended furthest down.", failures, "s2i"),
        ("Image → speech", "The query is a picture, the answers are recordings.", image_examples, "i2s"),
    ):
        if examples:
            sections.append(section(heading, note, "".join(_example(example, way) for example in examples)))
    write_page(path, title, "".join(sections) + _footer(result))


def write_search_page(path, examples: Sequence[Example], *, way: str, gallery: str) -> None:
    """Writes the answers of a search to path, local or gs://; way is "s2i" or "i2s", gallery says what was searched."""
    title = "Search pictures by voice" if way == "s2i" else "Search recordings by a picture"
    header = f'<header><p class="brand">{BRAND}</p><h1>{title}</h1><p class="note">{escape(gallery)}</p></header>'
    write_page(path, title, header + "".join(_example(example, way) for example in examples))


def write_page(path, title: str, body: str) -> None:
    """Writes a self-contained page in the style of the results page to path, local or gs://; the folder is made."""
    from etils import epath

    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def data_uri(media: Media) -> str:
    """The address under which a page finds what it carries itself."""
    return f"data:{escape(media.mime)};base64,{base64.b64encode(media.data).decode()}"


def section(heading: str, note: str, body: str) -> str:
    """A section of a page; heading and note are text, body is HTML."""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"\n<section><h2>{escape(heading)}</h2>{note}{body}</section>"


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


def page_header(title: str, facts: Iterable[tuple], tiles: Iterable[tuple[str, str, str, str]]) -> str:
    """The head of a page: facts are (name, value), left out where that is None; tiles (name, number, unit, note)."""
    facts = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value is not None)
    tiles = "".join(
        f'<div class="tile"><span>{name}</span><b>{number}<i>{unit}</i></b><small>{note}</small></div>'
        for name, number, unit, note in tiles
    )
    return (
        f'<header><p class="brand">{BRAND}</p><h1>{escape(title)}</h1>'
        f'<dl>{facts}</dl><div class="tiles">{tiles}</div></header>'
    )


def _metrics(result: dict) -> str:
    stages = [("coarse", "coarse")]
    if "fine" in result:
        stages += [("fine", "fine"), ("difference", "fine − coarse")]
    heads = "".join(f'<th scope="col">{name}</th>' for _, name in stages)
    tables = ""
    for way, key in DIRECTIONS.items():
        rows = ""
        for metric, digits in METRICS:
            cells = "".join(_cell(result[stage][key], metric, digits, stage == "difference") for stage, _ in stages)
            rows += f'<tr><th scope="row">{metric.replace("_", " ")}</th>{cells}</tr>'
        times = "".join(f"<td>{result['seconds'][f'{stage}_{way}']:.1f} s</td>" for stage, _ in stages[:2])
        rows += f'<tr class="time"><th scope="row">time</th>{times}{"<td></td>" * (len(stages) - 2)}</tr>'
        tables += (
            f"<table><caption>{ARROWS[way]} · {result['queries'][key]:,} queries</caption>"
            f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )
    if "fine_scores" in result:
        heads = "".join(f'<th scope="col">{name}</th>' for name in SCORES)
        rows = ""
        for way, key in DIRECTIONS.items():
            cells = "".join(f"<td>{result['fine_scores'][name][key]['R@1']:.1f}</td>" for name in SCORES)
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
    query = sound(example.query) if way == "s2i" else f'<img class="asked" alt="query" src="{data_uri(example.query)}">'
    ranks = [
        f"{stage} rank <b>{rank:,}</b>"
        for stage, rank in (("coarse", example.coarse_rank), ("fine", example.fine_rank))
        if rank is not None
    ]
    query += f'<p class="ranks">{" → ".join(ranks)}</p>' if ranks else ""
    if example.answer is not None:
        shown = f'<img alt="right picture" src="{data_uri(example.answer)}">' if way == "s2i" else sound(example.answer)
        query += f'<div class="answer"><span>right answer</span>{shown}</div>'
    lists = _list("Coarse (SIC)", example.coarse, example.coarse_hits, way)
    if example.fine is not None:
        lists += _list("Fine (SIM)", example.fine, example.fine_hits, way)
    return f'\n<article class="{way}"><div class="query">{query}</div><div class="lists">{lists}</div></article>'


def _list(name: str, items: Sequence[Media], hits: Sequence[bool], way: str) -> str:
    entries = ""
    for place, (media, hit) in enumerate(zip(items, hits, strict=True), 1):
        mark = '<span class="mark" title="right">✓</span>' if hit else f'<span class="mark">{place}</span>'
        alt = escape(f"place {place}{', right' if hit else ''} {media.caption}".strip())
        body = f'<img alt="{alt}" title="{alt}" src="{data_uri(media)}">' if way == "s2i" else sound(media)
        entries += f"<li{' class=hit' if hit else ''}>{mark}{body}</li>"
    return f"<div><h3>{name}</h3><ol>{entries}</ol></div>"


def sound(media: Media) -> str:
    """A player with caption and speaker."""
    caption = f'<p class="caption">{escape(media.caption)}</p>' if media.caption else ""
    speaker = f'<p class="speaker">{escape(media.speaker)}</p>' if media.speaker else ""
    return f'<div class="sound">{caption}{speaker}<audio controls preload="none" src="{data_uri(media)}"></audio></div>'


def _footer(result: dict) -> str:
    bootstrap, counts = result["bootstrap"], result["queries"]
    left_out = counts["recordings_without_image"] + counts["images_without_recording"]
    dropped = f" {left_out:,} queries without a right answer in the gallery were left out." if left_out else ""
    return (
        f"<footer><p>R@K: share of queries with a right item among the first K, in per cent; image → speech counts "
        f"any of the image's own recordings. Equal scores: the item that stands first in the gallery ranks first, "
        f"in the fine stage the earlier coarse place. Intervals: {bootstrap['resamples']:,} bootstrap resamples of "
        f"{bootstrap['units']:,} images, each with all its queries.{dropped}</p></footer>"
    )


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#5c6675;--line:#e1e5eb;
--hit:#0a7d3c;--miss:#b3352a;--accent:#2f5bd0}
@media (prefers-color-scheme:dark){:root{--page:#111418;--card:#1a1f26;--ink:#e9edf2;--soft:#98a3b3;--line:#2c343f;
--hit:#4ecb83;--miss:#f08a7d;--accent:#8fb0ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 56px}
p,h1,h2,h3,dl,dd,ol{margin:0;padding:0}
.brand{color:var(--accent);font-size:14px;font-weight:600}
h1{font-size:clamp(26px,4vw,38px);line-height:1.15;letter-spacing:-.02em;overflow-wrap:anywhere;margin:4px 0 14px}
h2{font-size:22px;letter-spacing:-.01em;margin-bottom:8px}
h3{font-size:13px;font-weight:600;color:var(--soft);margin-bottom:8px}
section{margin-top:44px}
.note{color:var(--soft);max-width:70ch;margin-bottom:14px}
dl{display:flex;flex-wrap:wrap;gap:6px 28px}
dt{font-size:13px;color:var(--soft)}dd{font-weight:600;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin-top:22px}
.tile,table,article{background:var(--card);border:1px solid var(--line);border-radius:14px}
.tile{padding:14px 18px;display:flex;flex-direction:column}
.tile span,.tile small{color:var(--soft);font-size:14px}
.tile b{font-size:36px;line-height:1.2;letter-spacing:-.02em}
.tile i{font-size:.5em;font-style:normal;color:var(--soft);margin-left:2px}
.tables{display:grid;grid-template-columns:1fr 1fr;gap:20px 16px}.wide{grid-column:1/-1}
.tables>*{min-width:0}
table{border-collapse:separate;border-spacing:0;width:100%;padding:14px 16px 8px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:0 2px 8px}
td,th{padding:7px 4px;text-align:right;font-weight:500}th[scope=row]{text-align:left;font-weight:600}
thead th{color:var(--soft);font-size:13px}tbody td,tbody th{border-top:1px solid var(--line)}
td small{display:block;color:var(--soft);font-size:12px;line-height:1.2;white-space:nowrap}
.time td,.time th{color:var(--soft);font-size:14px;font-weight:500}
.better{color:var(--hit);font-weight:650}.worse{color:var(--miss);font-weight:650}
.curves{width:100%;display:block;border-radius:14px;background:#fff;border:1px solid var(--line)}
article{display:grid;grid-template-columns:270px 1fr;gap:22px;padding:18px;margin-top:14px}
.query{min-width:0;display:flex;flex-direction:column;gap:10px}
.caption{font-weight:600;line-height:1.35;overflow-wrap:anywhere}.speaker{color:var(--soft);font-size:14px}
audio{width:100%;height:38px;display:block;margin-top:6px}
.ranks{font-size:14px;color:var(--soft)}.ranks b{color:var(--ink)}
.answer{display:flex;align-items:center;gap:10px;color:var(--soft);font-size:13px}
.answer img{width:62px;height:62px;object-fit:contain;border-radius:8px;background:var(--page)}
.i2s .answer{display:block}.answer .caption{font-weight:500;color:var(--ink)}
.asked{width:100%;max-height:270px;object-fit:contain;border-radius:10px;background:var(--page)}
.lists{min-width:0;display:grid;gap:16px}.i2s .lists{grid-template-columns:1fr 1fr}
ol{list-style:none}.s2i ol{display:grid;grid-template-columns:repeat(5,1fr);gap:8px}.i2s ol{display:grid;gap:8px}
li{position:relative;min-width:0;border:3px solid transparent;border-radius:11px}
.s2i li img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:8px;background:var(--page)}
.mark{position:absolute;top:4px;left:4px;min-width:22px;padding:0 5px;border-radius:11px;background:#fffd;color:#333;
font-size:12px;font-weight:600;line-height:22px;text-align:center}
.hit{border-color:var(--hit)}.hit .mark{background:#0a7d3c;color:#fff;font-size:14px}
.i2s li{border-color:var(--line);border-width:1px;padding:8px 10px 8px 40px}.i2s li .mark{top:9px;left:9px}
.i2s li.hit{border:3px solid var(--hit);padding:6px 8px 6px 38px}.i2s li .caption{font-weight:500;font-size:14px}
.i2s li .mark{background:var(--page);color:var(--soft)}.i2s li.hit .mark{background:#0a7d3c;color:#fff}
footer{margin-top:40px;padding-top:16px;border-top:1px solid var(--line);color:var(--soft);font-size:14px}
@media (max-width:860px){article{grid-template-columns:1fr;gap:16px}.tables{grid-template-columns:1fr}}
@media (max-width:560px){main{padding:22px 12px 40px}.tiles{grid-template-columns:1fr}.tile{padding:10px 14px}
.tile b{font-size:28px}.i2s .lists{grid-template-columns:1fr}article{padding:12px}.s2i ol{gap:4px}
table{padding:8px 8px 6px;font-size:15px}td,th{padding:7px 3px}td small{font-size:10.5px;letter-spacing:-.03em}
.asked{max-height:220px}.s2i li{display:flex;flex-direction:column-reverse}
.s2i .mark{position:static;border-radius:0 0 7px 7px;line-height:20px;background:none;color:var(--soft)}
.s2i .hit .mark{background:#0a7d3c;color:#fff}}
"""
