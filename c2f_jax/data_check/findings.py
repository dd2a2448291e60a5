"""What a data check finds, and the report of it."""

import collections
import dataclasses
from typing import Any

import numpy as np

from c2f_jax.data.files import printable
from c2f_jax.data.source import MIN_SAMPLES, PairSource

ERROR, WARNING, NOTE = "error", "warning", "note"
VERY_SHORT = 0.25  # seconds
# By severity, the worst first. Status 2 means a wrong command line.
EXIT_CODES = {ERROR: 3, WARNING: 1, NOTE: 0}
VERDICTS = {ERROR: "errors found", WARNING: "usable, with warnings", NOTE: "passed"}
# Kind of finding -> (severity, what it means for training and evaluation).
KINDS = {
    "missing file": (ERROR, "the pair is left out"),
    "unreadable": (ERROR, "the pair is left out"),
    "truncated": (ERROR, "the pair is left out"),
    "zero length": (ERROR, "the pair is left out"),
    "header too short": (ERROR, "more follows than the header says: the pair is left out"),
    "too short": (ERROR, f"under {MIN_SAMPLES} samples, one frame: the pair is left out"),
    "not numbers": (ERROR, "the pair is left out"),
    "wrong rate": (ERROR, "no sample rate of speech: the pair is left out"),
    "too long": (ERROR, "treated as a decompression bomb: the pair is left out"),
    "too large": (ERROR, "treated as a decompression bomb: the pair is left out"),
    "needs an extra": (ERROR, "what reads it is not installed: the pair is left out"),
    "unreadable line": (ERROR, "the line is left out"),
    "two image ids": (ERROR, "one image has one image_id: the pair is left out"),
    "no features": (ERROR, "the cache lacks its tokens or has those of another file: left out"),
    "too many left out": (ERROR, "more than max_bad_share of a split: training stops"),
    "too few recordings": (ERROR, "less than a batch: training does not start"),
    "split leak": (ERROR, "the same image or recording in two splits: scores are too high"),
    "silence": (WARNING, "nothing louder than -60 dB: there is no speech to learn from"),
    "silent start": (
        WARNING,
        "evaluation and search hear nothing else, training at times: cut the silence off",
    ),
    "over-long": (WARNING, "cropped in training, cut in evaluation"),
    "duplicate image": (WARNING, "each counts as wrong for the other: ties and false negatives"),
    "count differs": (WARNING, "scores cannot be compared with published ones"),
    "caption without image": (WARNING, "nothing to pair it with"),
    "missing split": (WARNING, "this split cannot be loaded"),
    "left out": (WARNING, "cannot be read; it was left out when the set was prepared"),
    "shared image_id": (WARNING, "each counts as correct for the others: recall means little"),
    "missing value": (WARNING, "a word for nothing; the item has its default"),
    "misspelled column": (WARNING, "the column is not read"),
    "splits alike": (WARNING, "names that differ in case or spaces are different splits"),
    "other length": (WARNING, "not as listed: the recording may be padded or cropped too much"),
    "zeros at the end": (WARNING, "perhaps an interrupted download: a part may look wrong"),
    "more promised": (
        WARNING,
        "fewer whole frames than the header says: split, or cut between two",
    ),
    "sound left out": (WARNING, "a part of the file that players do not play"),
    "several tracks": (WARNING, "of a file with several recordings, the one that players play"),
    "one color": (WARNING, "an image in which nothing can be seen"),
    "damaged pixels": (WARNING, "a part of the image may look wrong"),
    "duplicate recording": (NOTE, "the same sound twice in a split"),
    "repeated image": (
        NOTE,
        "the same image twice under one image_id: each is correct for the other",
    ),
    "very short": (NOTE, f"under {VERY_SHORT} s: hardly a word"),
    "number of captions": (NOTE, "not that of most images"),
    "other sample rate": (NOTE, "converted to 16 kHz while loading"),
    "stereo": (NOTE, "channels are averaged while loading, unless it is said otherwise"),
    "out of phase": (NOTE, "the mean would lose a part of the sound: the loudest one is used"),
    "silent channel": (NOTE, "left out of the mean of the channels"),
    "scaled": (NOTE, "samples far above full scale: all are divided by one number"),
    "silence cut": (NOTE, "but for a tenth of a second"),
    "clipped": (NOTE, "samples at full scale or above: what was louder is lost"),
    "incomplete": (NOTE, "what is missing cannot be heard: the rest is used"),
    "wrong length": (NOTE, "the header gives fewer samples than follow: all are used"),
    "several streams": (NOTE, "recordings joined in one file: they are used as one"),
    "no end mark": (NOTE, "an Ogg stream that was not closed: perhaps it is cut off"),
    "bytes left out": (NOTE, "bytes that are no sound, after it or before it"),
    "tiny image": (NOTE, "under 16 pixels a side"),
    "several images": (NOTE, "an animation, pages or a burst: one is used"),
    "deep image": (NOTE, "values of an unusual range are scaled to 8 bits; its white is a guess"),
    "transparency": (NOTE, "shown on white"),
    "print colors": (NOTE, "CMYK is converted to RGB"),
    "color profile": (NOTE, "colors are converted to sRGB"),
    "odd metadata": (NOTE, "ignored; the image may be turned or have other colors"),
    "last bytes missing": (NOTE, "at most a hundredth of the pixels is gray"),
    "wrong suffix": (NOTE, "the content decides, not the name"),
    "image without caption": (NOTE, "not used"),
    "in no split": (NOTE, "not used"),
    "stray file": (NOTE, "not used"),
    "ignored column": (NOTE, "the column is not read"),
    "unused split": (NOTE, "the run reads other splits"),
    "other spelling": (NOTE, "one file under several names is one item"),
    "enlarged image": (NOTE, "smaller than the images of the model"),
    "image_id in two splits": (NOTE, "fine if ids name classes rather than images"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
      kind: a key of KINDS.
      name: the item; its path if it is a file.
      detail: what is wrong with it.
      split: name of its split; "" if it belongs to none.
      item: "image" or "recording", and its number in the split; None if it is neither.
      like: split and name of the first item that it is like, for duplicates and leaks.
    """

    kind: str
    name: str
    detail: str
    split: str = ""
    item: tuple[str, int] | None = None
    like: tuple[str, str] | None = None

    @property
    def severity(self) -> str:
        """Error, warning or note."""
        return KINDS[self.kind][0]


@dataclasses.dataclass
class Report:
    """What the check found.

    Attributes:
      name: name of the data set.
      splits: split -> images, recordings, usable, hours, seconds, captions_per_image.
      seconds: split -> (usable,) lengths, for the histogram.
      findings: all findings, errors first.
      sources: split -> pairs, to show examples from.
      left_out: split -> the recordings that cannot be used.
      not_listed: name -> reason of what the listing, or the preparation of the set, left out.
    """

    name: str
    splits: dict[str, dict[str, Any]]
    seconds: dict[str, np.ndarray]
    findings: list[Finding]
    sources: dict[str, PairSource]
    left_out: dict[str, set[int]]
    not_listed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def severity(self) -> str:
        """The worst severity found; "note" if nothing was found."""
        return min((f.severity for f in self.findings), key=list(EXIT_CODES).index, default=NOTE)

    @property
    def verdict(self) -> str:
        """The verdict in words, with what is left out, which a set that passes may have, too."""
        recordings = sum(len(rows) for rows in self.left_out.values())
        parts = [VERDICTS[self.severity]]
        if recordings:
            total = sum(about["recordings"] for about in self.splits.values())
            parts.append(f"{recordings:,} of {total:,} recordings are left out")
        if self.not_listed:
            parts.append(f"{len(self.not_listed):,} lines or items were left out before")
        return "; ".join(parts)

    def counts(self) -> dict[str, int]:
        """Count the findings of each kind, in the order of KINDS."""
        found = collections.Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def json(self) -> dict[str, Any]:
        """Return the report as plain values, for check.json."""
        return {
            "data_set": self.name,
            "severity": self.severity,
            "verdict": self.verdict,
            "counts": self.counts(),
            "splits": self.splits,
            "findings": [dataclasses.asdict(f) | {"severity": f.severity} for f in self.findings],
        }

    def text(self, most: int = 5) -> str:
        """Format a table of the splits, then each kind of finding with its first items.

        Args:
          most: how many items of a kind are listed.

        Returns:
          Lines of text.
        """
        lines = [printable(self.name), *self._table()]
        for kind, count in self.counts().items():
            severity, meaning = KINDS[kind]
            lines.append(f"{severity}: {kind}, {count:,} ({meaning})")
            found = [finding for finding in self.findings if finding.kind == kind]
            for finding in found[:most]:
                lines.append(f"  {printable(finding.name)}: {printable(finding.detail)}")
            if count > most:
                lines.append(f"  and {count - most:,} more")
        lines.append(self.verdict)
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """Format one line for each split, under a heading."""
        lines = [
            f"  {'split':14}{'images':>10}{'recordings':>12}{'usable':>9}"
            f"{'per image':>10}{'hours':>8}  seconds"
        ]
        for split, about in self.splits.items():
            seconds = about["seconds"]
            lines.append(
                f"  {printable(split):14}{about['images']:>10,}{about['recordings']:>12,}"
                f"{about['usable']:>9,}{captions_of(about):>10}{about['hours']:>8.1f}  "
                f"{seconds['min']:.2f} to {seconds['max']:.2f}, median {seconds['median']:.2f}"
            )
        return lines


def captions_of(about: dict[str, Any]) -> str:
    """Say how many recordings the images of a split have.

    >>> captions_of({"captions_per_image": {"5": 1000}})
    '5'
    >>> captions_of({"captions_per_image": {"5": 969, "6": 31}})
    '5 to 6'

    Args:
      about: entry of a split in `Report.splits`.

    Returns:
      A number or a range.
    """
    numbers = list(about["captions_per_image"])
    return " to ".join(dict.fromkeys([numbers[0], numbers[-1]]))
