"""Self-contained HTML pages: images and recordings are inside the file."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from importlib import resources
from os import PathLike

import numpy as np

BRAND = "c2f_jax · coarse-to-fine speech-image retrieval"


@dataclass(frozen=True)
class Media:
    """One image or one recording, encoded for a browser.

    Attributes:
      data: content of the file.
      mime: its type, such as "image/png" or "audio/mpeg".
      caption: text to show with it.
      speaker: speaker of a recording.
    """

    data: bytes
    mime: str
    caption: str = ""
    speaker: str = ""


def image_media(image: np.ndarray, caption: str = "", max_side: int = 224) -> Media:
    """Encode an image as JPEG, or as PNG if it has few colors and is smaller so.

    Args:
      image: (H, W, 3) uint8.
      caption: text to show with it.
      max_side: largest side in pixels; larger images are shrunk.
    """
    from PIL import Image

    shown = Image.fromarray(np.asarray(image, np.uint8))
    shown.thumbnail((max_side, max_side))
    png, jpeg = io.BytesIO(), io.BytesIO()
    shown.save(jpeg, "JPEG", quality=90)
    # Drawings, which have few colors, are smaller as PNG; to try it takes three times as long.
    if shown.getcolors(shown.width * shown.height // 8) is not None:
        shown.save(png, "PNG")
        if len(png.getvalue()) <= len(jpeg.getvalue()):
            return Media(png.getvalue(), "image/png", caption)
    return Media(jpeg.getvalue(), "image/jpeg", caption)


def speech_media(
    waveform: np.ndarray, sample_rate: int = 16_000, caption: str = "", speaker: str = ""
) -> Media:
    """Encode a recording as MP3, which every browser plays, or as WAV if libsndfile lacks MP3.

    Args:
      waveform: (S,) in [-1, 1].
      sample_rate: samples per second.
      caption: text to show with it.
      speaker: name of the speaker.
    """
    import soundfile

    kind, mime = "WAV", "audio/wav"
    if "MP3" in soundfile.available_formats():
        kind, mime = "MP3", "audio/mpeg"
    samples = np.clip(np.asarray(waveform, np.float32), -1.0, 1.0)
    data = io.BytesIO()
    soundfile.write(data, samples, sample_rate, format=kind)
    return Media(data.getvalue(), mime, caption, speaker)


def write_page(path: str | PathLike[str], title: str, body: str) -> None:
    """Write a self-contained page in the style of the results page.

    Args:
      path: file to write, local or gs://; its folder is made.
      title: title of the page, as text.
      body: content, as HTML.
    """
    from etils import epath

    # Inlined, so that the page is one file that can be sent by mail.
    style = resources.files("c2f_jax.reports").joinpath("style.css").read_text(encoding="utf-8")
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )
    # Names of files may hold what UTF-8 cannot.
    file.write_bytes(page.encode(errors="replace"))


def data_uri(media: Media) -> str:
    """Return a URI that contains the media themselves."""
    return f"data:{escape(media.mime)};base64,{base64.b64encode(media.data).decode()}"


def section(heading: str, note: str, body: str) -> str:
    """Return a section of a page.

    Args:
      heading: text.
      note: text below the heading; may be empty.
      body: HTML.
    """
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"\n<section><h2>{escape(heading)}</h2>{note}{body}</section>"


def page_header(
    title: str,
    facts: Iterable[tuple[str, str | None]],
    tiles: Iterable[tuple[str, str, str, str]],
) -> str:
    """Return the head of a page.

    Args:
      title: text.
      facts: (name, value); left out if the value is None.
      tiles: (name, number, unit, note) of large numbers.
    """
    listed = ""
    for name, value in facts:
        if value is not None:
            listed += f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"

    shown = ""
    for name, number, unit, note in tiles:
        shown += f'<div class="tile"><span>{name}</span><b>{number}<i>{unit}</i></b>'
        shown += f"<small>{note}</small></div>"
    return (
        f'<header><p class="brand">{BRAND}</p><h1>{escape(title)}</h1>'
        f'<dl>{listed}</dl><div class="tiles">{shown}</div></header>'
    )


def sound(media: Media) -> str:
    """Return a player with caption and speaker."""
    caption = f'<p class="caption">{escape(media.caption)}</p>' if media.caption else ""
    speaker = f'<p class="speaker">{escape(media.speaker)}</p>' if media.speaker else ""
    player = f'<audio controls preload="none" src="{data_uri(media)}"></audio>'
    return f'<div class="sound">{caption}{speaker}{player}</div>'
