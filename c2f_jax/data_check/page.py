"""The page of a data check: numbers, lengths, findings with pictures and players, and pairs drawn at random."""

from html import escape

import numpy as np

from c2f_jax.data.audio import decode_audio
from c2f_jax.data.images import open_rgb
from c2f_jax.data.source import PairSource
from c2f_jax.data_check.findings import ERROR, KINDS, NOTE, WARNING, Report, captions_of
from c2f_jax.errors import BadFileError
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.reports.figures import histogram_png
from c2f_jax.reports.html import (
    Media,
    data_uri,
    page_header,
    image_media,
    speech_media,
    section,
    sound,
    write_page,
)

SHOWN = 12  # of each kind
PAIRS = 6  # drawn at random from each split
MOST_PLAYED = 15.0  # seconds of a recording that the page carries
VERDICTS = {ERROR: "Errors found", WARNING: "Usable, with warnings", NOTE: "Passed"}


def write_check_page(path, report: Report) -> None:
    """Writes the report as one self-contained HTML file to path, local or gs://."""
    counts = report.counts()
    found = {
        s: sum(count for kind, count in counts.items() if KINDS[kind][0] == s)
        for s in (ERROR, WARNING, NOTE)
    }
    header = page_header(
        "Data check",
        [
            ("data set", report.name),
            ("verdict", VERDICTS[report.severity]),
            ("pictures", f"{sum(about['pictures'] for about in report.splits.values()):,}"),
            ("recordings", f"{sum(about['recordings'] for about in report.splits.values()):,}"),
        ],
        [
            ("Errors", f"{found[ERROR]:,}", "", "cannot be used, or leak"),
            ("Warnings", f"{found[WARNING]:,}", "", "usable, worth a look"),
            ("Notes", f"{found[NOTE]:,}", "", "handled while loading"),
        ],
    )
    histogram = data_uri(Media(histogram_png(None, report.seconds, label="seconds"), "image/png"))
    body = header + section(
        "Splits", "Usable: recordings that can be read, with a picture.", _table(report)
    )
    body += section(
        "Lengths", "", f'<img class="curves" alt="histogram of lengths" src="{histogram}">'
    )
    for kind, count in counts.items():
        severity, meaning = KINDS[kind]
        shown = [finding for finding in report.findings if finding.kind == kind][:SHOWN]
        more = f" The first {SHOWN} are shown." if count > SHOWN else ""
        items = "".join(_finding(report, finding) for finding in shown)
        body += section(f"{severity.capitalize()}: {kind}, {count:,}", f"{meaning}.{more}", items)
    for split, source in report.sources.items():
        usable = [k for k in range(len(source)) if k not in report.left_out[split]]
        drawn = np.sort(
            host_rng(0, Stream.CHECKED_PAIRS).choice(usable, min(PAIRS, len(usable)), replace=False)
        )
        pairs = "".join(
            _article(_picture(source, source.image_index[k]), _player(source, int(k)), "")
            for k in drawn
        )
        body += section(f"Pairs of {split}", "Drawn at random.", pairs)
    write_page(path, f"Data check of {report.name}", body)


def _table(report: Report) -> str:
    names = ("pictures", "recordings", "usable", "a picture", "hours", "seconds")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = ""
    for split, about in report.splits.items():
        low, middle, high = (about["seconds"][key] for key in ("min", "median", "max"))
        cells = [f"{about[key]:,}" for key in ("pictures", "recordings", "usable")]
        cells += [captions_of(about), f"{about['hours']:.1f}"]
        cells.append(f"{middle:.2f}<small>{low:.2f}\u2009…\u2009{high:.2f}</small>")
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{escape(split)}</th>{numbers}</tr>'
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _finding(report: Report, finding) -> str:
    told = f'<p class="caption">{escape(finding.name)}</p><p class="speaker">{escape(finding.detail)}</p>'
    if finding.item is None or (KINDS[finding.kind][0] == ERROR and finding.kind != "split leak"):
        return f"\n<article>{told}</article>"
    source, (what, index) = report.sources[finding.split], finding.item
    if what == "picture":
        return _article(_picture(source, index), "", told)
    return _article(_picture(source, source.image_index[index]), _player(source, index), told)


def _article(picture: str, player: str, told: str) -> str:
    return f'\n<article><div class="query">{picture}</div><div>{told}{player}</div></article>'


def _picture(source: PairSource, row: int) -> str:
    try:
        shown = image_media(np.asarray(open_rgb(source.image(int(row)), 128)), max_side=160)
    except BadFileError:
        return '<p class="speaker">the picture cannot be read</p>'
    return f'<img class="asked" alt="{escape(source.image_id(int(row)))}" src="{data_uri(shown)}">'


def _player(source: PairSource, index: int) -> str:
    item = source.recording(index)
    wave = decode_audio(item["audio"])[: round(MOST_PLAYED * 16_000)]
    return sound(speech_media(wave, caption=item["caption"], speaker=item["speaker"]))
