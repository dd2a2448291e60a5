"""The page of a data check: numbers, lengths, findings to see and hear, and random pairs."""

import os
from html import escape

import numpy as np

from c2f_jax.data.source import PairSource
from c2f_jax.data_check.findings import (
    ERROR,
    KINDS,
    NOTE,
    WARNING,
    Finding,
    Report,
    captions_of,
)
from c2f_jax.decoding.audio import SAMPLE_RATE, decode_audio
from c2f_jax.decoding.images import open_rgb
from c2f_jax.errors import BadFileError
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.reports.figures import histogram_png
from c2f_jax.reports.html import (
    Media,
    data_uri,
    image_media,
    page_header,
    section,
    sound,
    speech_media,
    write_page,
)

# Images and sounds are embedded in the page, so it shows only some.
SHOWN = 12  # of each kind
PAIRS = 6  # drawn at random from each split
MOST_PLAYED = 15.0  # seconds of each recording


def write_check_page(path: str | os.PathLike, report: Report) -> None:
    """Write the report as one self-contained HTML file.

    Args:
      path: path of the file, local or gs://.
      report: what the check found.
    """
    histogram = data_uri(Media(histogram_png(None, report.seconds, label="seconds"), "image/png"))
    body = _header(report)
    body += section("Splits", "Usable: recordings that can be read, with an image.", _table(report))
    body += section(
        "Lengths", "", f'<img class="curves" alt="histogram of lengths" src="{histogram}">'
    )

    for kind, count in report.counts().items():
        severity, meaning = KINDS[kind]
        shown = [finding for finding in report.findings if finding.kind == kind][:SHOWN]
        more = f" The first {SHOWN} are shown." if count > SHOWN else ""
        items = "".join(_finding(report, finding) for finding in shown)
        body += section(f"{severity.capitalize()}: {kind}, {count:,}", f"{meaning}.{more}", items)

    for split in report.sources:
        body += section(f"Pairs of {split}", "Drawn at random.", _random_pairs(report, split))
    write_page(path, f"Data check of {report.name}", body)


def _header(report: Report) -> str:
    """Write the head of the page: what was checked, and how many findings there are."""
    found = {ERROR: 0, WARNING: 0, NOTE: 0}
    for kind, count in report.counts().items():
        found[KINDS[kind][0]] += count
    images = sum(about["images"] for about in report.splits.values())
    recordings = sum(about["recordings"] for about in report.splits.values())
    return page_header(
        "Data check",
        [
            ("data set", report.name),
            ("verdict", report.verdict.capitalize()),
            ("images", f"{images:,}"),
            ("recordings", f"{recordings:,}"),
        ],
        [
            ("Errors", f"{found[ERROR]:,}", "", "cannot be used, or leak"),
            ("Warnings", f"{found[WARNING]:,}", "", "usable, worth a look"),
            ("Notes", f"{found[NOTE]:,}", "", "handled while loading"),
        ],
    )


def _table(report: Report) -> str:
    """Write the table of the splits."""
    names = ("images", "recordings", "usable", "per image", "hours", "seconds")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = ""
    for split, about in report.splits.items():
        seconds = about["seconds"]
        cells = [f"{about[key]:,}" for key in ("images", "recordings", "usable")]
        cells += [captions_of(about), f"{about['hours']:.1f}"]
        cells.append(
            f"{seconds['median']:.2f}"
            f"<small>{seconds['min']:.2f}\u2009…\u2009{seconds['max']:.2f}</small>"
        )
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{escape(split)}</th>{numbers}</tr>'
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _finding(report: Report, finding: Finding) -> str:
    """Show a finding, with the item itself if it can be read."""
    text = (
        f'<p class="caption">{escape(finding.name)}</p>'
        f'<p class="speaker">{escape(finding.detail)}</p>'
    )
    # A leak is an error, too, but its items can be shown.
    unreadable = finding.severity == ERROR and finding.kind != "split leak"
    if finding.item is None or unreadable:
        return f"\n<article>{text}</article>"

    source = report.sources[finding.split]
    what, index = finding.item
    if what == "image":
        return _article(_image(source, index), "", text)
    return _article(_image(source, source.image_index[index]), _player(source, index), text)


def _random_pairs(report: Report, split: str) -> str:
    """Show some usable pairs of a split."""
    source, left_out = report.sources[split], report.left_out[split]
    usable = [k for k in range(len(source)) if k not in left_out]
    # The same pairs each time, so that two pages can be compared.
    rng = host_rng(0, Stream.CHECKED_PAIRS)
    drawn = np.sort(rng.choice(usable, min(PAIRS, len(usable)), replace=False))
    pairs = ""
    for k in drawn.astype(int).tolist():
        pairs += _article(_image(source, source.image_index[k]), _player(source, k), "")
    return pairs


def _article(image: str, player: str, text: str) -> str:
    return f'\n<article><div class="query">{image}</div><div>{text}{player}</div></article>'


def _image(source: PairSource, row: int) -> str:
    try:
        shown = image_media(np.asarray(open_rgb(source.image(int(row)), 128)), max_side=160)
    except BadFileError:
        return '<p class="speaker">the image cannot be read</p>'
    return f'<img class="asked" alt="{escape(source.image_id(int(row)))}" src="{data_uri(shown)}">'


def _player(source: PairSource, index: int) -> str:
    item = source.recording(index)
    wave = decode_audio(item["audio"])[: round(MOST_PLAYED * SAMPLE_RATE)]
    return sound(speech_media(wave, caption=item["caption"], speaker=item["speaker"]))
