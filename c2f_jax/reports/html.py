"""HTML pages that hold their own pictures and sounds."""

import base64
import dataclasses
import io
from collections.abc import Iterable
from html import escape

import numpy as np

BRAND = "c2f_jax · coarse-to-fine speech-image retrieval"


@dataclasses.dataclass(frozen=True)
class Media:
    """One picture or one recording, encoded for a browser."""

    data: bytes
    mime: str  # image/png, image/jpeg, audio/mpeg, audio/wav, ...
    caption: str = ""
    speaker: str = ""


def picture(image: np.ndarray, caption: str = "", max_side: int = 224) -> Media:
    """An (H, W, 3) uint8 image, at most max_side pixels a side, as PNG or JPEG, whichever is smaller."""
    from PIL import Image

    shown = Image.fromarray(np.asarray(image, np.uint8))
    shown.thumbnail((max_side, max_side))
    png, jpeg = io.BytesIO(), io.BytesIO()
    shown.save(png, "PNG")
    shown.save(jpeg, "JPEG", quality=90)
    mime, data = min(
        ("image/png", png.getvalue()),
        ("image/jpeg", jpeg.getvalue()),
        key=lambda kind: len(kind[1]),
    )
    return Media(data, mime, caption)


def recording(
    waveform: np.ndarray, sample_rate: int = 16_000, caption: str = "", speaker: str = ""
) -> Media:
    """A mono (S,) waveform as MP3, which every browser plays, or as WAV where libsndfile writes no MP3."""
    import soundfile

    kind, mime = (
        ("MP3", "audio/mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "audio/wav")
    )
    data = io.BytesIO()
    soundfile.write(
        data, np.clip(np.asarray(waveform, np.float32), -1.0, 1.0), sample_rate, format=kind
    )
    return Media(data.getvalue(), mime, caption, speaker)


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


def page_header(
    title: str, facts: Iterable[tuple], tiles: Iterable[tuple[str, str, str, str]]
) -> str:
    """The head of a page: facts are (name, value), left out where that is None; tiles (name, number, unit, note)."""
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts
        if value is not None
    )
    tiles = "".join(
        f'<div class="tile"><span>{name}</span><b>{number}<i>{unit}</i></b><small>{note}</small></div>'
        for name, number, unit, note in tiles
    )
    return (
        f'<header><p class="brand">{BRAND}</p><h1>{escape(title)}</h1>'
        f'<dl>{facts}</dl><div class="tiles">{tiles}</div></header>'
    )


def sound(media: Media) -> str:
    """A player with caption and speaker."""
    caption = f'<p class="caption">{escape(media.caption)}</p>' if media.caption else ""
    speaker = f'<p class="speaker">{escape(media.speaker)}</p>' if media.speaker else ""
    return f'<div class="sound">{caption}{speaker}<audio controls preload="none" src="{data_uri(media)}"></audio></div>'


def page_footer(result: dict) -> str:
    bootstrap, counts = result["bootstrap"], result["queries"]
    left_out = counts["recordings_without_image"] + counts["images_without_recording"]
    dropped = (
        f" {left_out:,} queries without a right answer in the gallery were left out."
        if left_out
        else ""
    )
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
