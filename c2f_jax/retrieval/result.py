"""The result of an evaluation: typed numbers, their JSON, and a table for the console."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2f_jax.data.files import printable
from c2f_jax.retrieval.calibration import Calibration, Reliability
from c2f_jax.retrieval.recall import RECALL_AT, Metric
from c2f_jax.retrieval.reranking import SCORES

DIRECTIONS = {"s2i": "speech_to_image", "i2s": "image_to_speech"}
ARROWS = {"s2i": "speech -> image", "i2s": "image -> speech"}
STAGES = ("coarse", "fine", "difference")
# Metrics of a table and their decimals.
TABLE_METRICS = {"R@1": 1, "R@5": 1, "R@10": 1, "median_rank": 1, "MRR": 3}
# What a stored result has only if it is known.
OPTIONAL = ("data_set", "split", "trained_on", "step", "model", "data", "bad_items", "baseline")
COLUMN = 27  # characters
HASH_SHOWN = 8  # characters of a file's hash
MOST_NAMED = 20  # items that could not be used


@dataclass(frozen=True)
class RankedLists:
    """The rankings of one direction, for pages and analysis.

    q queries, those with a correct item; L = min(max(k, 10), gallery size) items of each.

    Attributes:
      queries: (q,) row of each query among all recordings or images.
      coarse: (q, L) gallery rows, best first.
      coarse_hits: (q, L) bool, which of them are correct.
      coarse_rank: (q,) rank of the first correct item in the whole gallery, from 1.
      fine: the same after reranking by the chosen score; None without a matcher.
      fine_hits: see coarse_hits.
      fine_rank: see coarse_rank.
    """

    queries: np.ndarray
    coarse: np.ndarray
    coarse_hits: np.ndarray
    coarse_rank: np.ndarray
    fine: np.ndarray | None = None
    fine_hits: np.ndarray | None = None
    fine_rank: np.ndarray | None = None


@dataclass(frozen=True)
class StageMetrics:
    """The metrics of one stage, or the differences between two stages.

    Attributes:
      speech_to_image: "R@1", "R@5", "R@10", "median_rank", "MRR", "nDCG@10", "fraction_recall@1",
        ... of spoken queries; the last four are not in differences.
      image_to_speech: the same for image queries.
      mean_recall: mean of the six R@K.
    """

    speech_to_image: Mapping[str, Metric]
    image_to_speech: Mapping[str, Metric]
    mean_recall: Metric

    def direction(self, direction: str) -> Mapping[str, Metric]:
        """Return the metrics of "s2i" or "i2s"."""
        return getattr(self, DIRECTIONS[direction])

    def to_json(self) -> dict[str, Any]:
        """Return {"speech_to_image": {"R@1": x, "R@1_interval": [low, high], ...}, ...}."""
        return {
            "speech_to_image": _metrics_to_json(self.speech_to_image),
            "image_to_speech": _metrics_to_json(self.image_to_speech),
            **_metrics_to_json({"mean_recall": self.mean_recall}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StageMetrics:
        """Read what ``to_json`` returned."""
        return cls(
            _metrics_from_json(values["speech_to_image"]),
            _metrics_from_json(values["image_to_speech"]),
            Metric(values["mean_recall"], _interval(values["mean_recall_interval"])),
        )


@dataclass(frozen=True)
class QueryCounts:
    """How many queries and gallery items an evaluation had.

    Attributes:
      speech_to_image: spoken queries with a correct image.
      image_to_speech: image queries with a correct recording.
      gallery_images: images that spoken queries are ranked against.
      gallery_recordings: recordings that image queries are ranked against.
      recordings_without_image: recordings that were left out as queries.
      images_without_recording: images that were left out as queries.
    """

    speech_to_image: int
    image_to_speech: int
    gallery_images: int
    gallery_recordings: int
    recordings_without_image: int
    images_without_recording: int


@dataclass(frozen=True)
class Bootstrap:
    """How the confidence intervals were made.

    Attributes:
      resamples: number of resamples.
      seed: seed of the draws.
      percentiles: the bounds of an interval, as percentiles of the samples.
      unit: what is drawn.
      units: number of these units.
    """

    resamples: int
    seed: int
    percentiles: tuple[float, float]
    unit: str
    units: int


@dataclass(frozen=True)
class ProtocolReport:
    """Which part of a split a protocol used.

    Attributes:
      name: name of the protocol.
      about: description of it.
      folds: parts of the gallery, whose results are averaged.
      images: images used.
      recordings: recordings used.
      of_images: images of the split.
      of_recordings: recordings of the split.
      as_published: whether the numbers used are the published ones, so that results compare.
    """

    name: str
    about: str
    folds: int
    images: int
    recordings: int
    of_images: int
    of_recordings: int
    as_published: bool

    def to_json(self) -> dict[str, Any]:
        """Return the report as it is stored."""
        return {
            "name": self.name,
            "about": self.about,
            "folds": self.folds,
            "pictures": self.images,
            "recordings": self.recordings,
            "of": {"pictures": self.of_images, "recordings": self.of_recordings},
            "as_published": self.as_published,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ProtocolReport:
        """Read what ``to_json`` returned."""
        return cls(
            name=values["name"],
            about=values["about"],
            folds=values["folds"],
            images=values["pictures"],
            recordings=values["recordings"],
            of_images=values["of"]["pictures"],
            of_recordings=values["of"]["recordings"],
            as_published=values["as_published"],
        )


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """All numbers of one evaluation; ``table()`` shows them, ``to_json()`` stores them.

    Attributes:
      coarse: metrics of the ranking by SIC.
      k: candidates that SIM reranked.
      score: score that ordered them.
      tau: temperature of the model.
      seconds: wall time of "coarse_s2i", "fine_s2i", "coarse_i2s", "fine_i2s", with compilation.
      queries: counts of queries and gallery items.
      bootstrap: how the intervals were made.
      fine: metrics after reranking by ``score``; None without a matcher, like the next two.
      fine_scores: metrics after reranking by each of the five scores.
      difference: fine - coarse, with paired intervals.
      protocol: what a protocol used; None without a protocol.
      data_set: evaluated data set; None if unknown, like the rest.
      split: evaluated split.
      trained_on: data set of the run.
      step: step of the parameters.
      model: fingerprint of the model, see ``TrainedModel``.
      data: what the split is known by, see ``PairSource.identity``.
      bad_items: name of each unreadable item of the split -> why.
      calibrations: "s2i" and "i2s" -> what turns scores into probabilities.
      reliability: "s2i" and "i2s" -> "before" and "after" calibration, probabilities beside what
        came true; None where they were fitted.
      baseline: "speech", "image" -> the embeddings that were evaluated, see ``Embeddings``; None
        for a run. Of a baseline k, score and tau mean nothing.
      lists: ranked lists of "s2i" and "i2s"; not stored.
    """

    coarse: StageMetrics
    k: int
    score: str
    tau: float
    seconds: Mapping[str, float]
    queries: QueryCounts
    bootstrap: Bootstrap
    fine: StageMetrics | None = None
    fine_scores: Mapping[str, StageMetrics] | None = None
    difference: StageMetrics | None = None
    protocol: ProtocolReport | None = None
    data_set: str | None = None
    split: str | None = None
    trained_on: str | None = None
    step: int | None = None
    model: str | None = None
    data: Mapping[str, int | str] | None = None
    bad_items: Mapping[str, str] | None = None
    calibrations: Mapping[str, Calibration] | None = None
    reliability: Mapping[str, Mapping[str, Reliability]] | None = None
    baseline: Mapping[str, Mapping[str, Any]] | None = None
    lists: Mapping[str, RankedLists] | None = dataclasses.field(default=None, compare=False)

    @property
    def final(self) -> StageMetrics:
        """The fine stage, or the coarse one if SIM was not used."""
        return self.coarse if self.fine is None else self.fine

    def describe_baseline(self) -> dict[str, str]:
        """Return "speech", "image" -> file, size, and first part of the hash; {} for a run."""
        lines = {}
        for kind, about in (self.baseline or {}).items():
            lines[kind] = (
                f"{about['file']}, {about['rows']:,} rows of {about['width']:,} numbers, "
                f"{about['content'][:HASH_SHOWN]}"
            )
            if not about["was_normalized"]:
                lines[kind] += ", normalized here"
        return lines

    def stages(self) -> dict[str, StageMetrics]:
        """Return the stages there are, of "coarse", "fine" and "difference"."""
        stages = {"coarse": self.coarse}
        if self.fine is not None and self.difference is not None:
            stages |= {"fine": self.fine, "difference": self.difference}
        return stages

    def to_json(self) -> dict[str, Any]:
        """Return the result as it is stored in eval/*.json; ``from_json`` reads it back."""
        # The order of the keys is that of the files.
        result: dict[str, Any] = {"coarse": self.coarse.to_json()}
        if self.fine is not None and self.difference is not None:
            scores = (self.fine_scores or {}).items()
            result["fine"] = self.fine.to_json()
            result["fine_scores"] = {name: stage.to_json() for name, stage in scores}
            result["difference"] = self.difference.to_json()

        result["k"] = self.k
        result["score"] = self.score
        result["tau"] = self.tau
        result["seconds"] = dict(self.seconds)
        result["queries"] = dataclasses.asdict(self.queries)
        result["bootstrap"] = dataclasses.asdict(self.bootstrap)
        result["bootstrap"]["percentiles"] = list(self.bootstrap.percentiles)

        # What is unknown is left out.
        if self.calibrations:
            result["calibrations"] = {n: one.to_json() for n, one in self.calibrations.items()}
        if self.reliability is not None:
            result["reliability"] = {
                direction: {name: one.to_json() for name, one in both.items()}
                for direction, both in self.reliability.items()
            }
        if self.protocol is not None:
            result["protocol"] = self.protocol.to_json()
        for name in OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                result[name] = value
        return result

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvaluationResult:
        """Read what ``to_json`` returned."""
        stages = {}
        for name in STAGES:
            if name in values:
                stages[name] = StageMetrics.from_json(values[name])

        fine_scores = None
        if "fine_scores" in values:
            scores = values["fine_scores"].items()
            fine_scores = {name: StageMetrics.from_json(stage) for name, stage in scores}

        protocol = None
        if "protocol" in values:
            protocol = ProtocolReport.from_json(values["protocol"])

        calibrations, reliability = values.get("calibrations"), values.get("reliability")
        if calibrations is not None:
            calibrations = {name: Calibration(**one) for name, one in calibrations.items()}
        if reliability is not None:
            reliability = {
                direction: {name: Reliability.from_json(one) for name, one in both.items()}
                for direction, both in reliability.items()
            }

        # JSON has lists where the result has tuples.
        bootstrap = dict(values["bootstrap"])
        bootstrap["percentiles"] = tuple(bootstrap["percentiles"])
        return cls(
            coarse=stages["coarse"],
            k=values["k"],
            score=values["score"],
            tau=values["tau"],
            seconds=values["seconds"],
            queries=QueryCounts(**values["queries"]),
            bootstrap=Bootstrap(**bootstrap),
            fine=stages.get("fine"),
            fine_scores=fine_scores,
            difference=stages.get("difference"),
            protocol=protocol,
            data_set=values.get("data_set"),
            split=values.get("split"),
            trained_on=values.get("trained_on"),
            step=values.get("step"),
            model=values.get("model"),
            data=values.get("data"),
            bad_items=values.get("bad_items"),
            calibrations=calibrations,
            reliability=reliability,
            baseline=values.get("baseline"),
        )

    def table(self) -> str:
        """Return the console table: stages side by side with 95 % intervals, both directions."""
        lines = list(_baseline_lines(self))
        lines += _protocol_lines(self)
        for direction in DIRECTIONS:
            lines += _direction_lines(self, direction)
        lines.append(_row("mean R@K", 14, _mean_cells(self)))
        lines += _score_lines(self)
        for direction, both in (self.reliability or {}).items():
            lines.append(
                f"probabilities, {ARROWS[direction]}: expected calibration error "
                f"{both['after'].error:.3f}, before calibration {both['before'].error:.3f}"
            )

        paired = ", fine - coarse paired." if self.fine is not None else "."
        lines.append(
            f"\nR@K in %. [95 % intervals]: {self.bootstrap.resamples} bootstrap resamples of "
            f"{self.bootstrap.units} image ids, all queries of an image together{paired}"
        )
        if self.bad_items:
            lines.append(f"\nleft out, since they cannot be used: {len(self.bad_items):,}")
            lines += self.left_out()
        return "\n".join(lines)

    def left_out(self) -> list[str]:
        """Return a line for each of the first items that could not be used, and count the rest."""
        bad = list((self.bad_items or {}).items())
        lines = [f"  {printable(name)}: {printable(reason)}" for name, reason in bad[:MOST_NAMED]]
        more = len(bad) - MOST_NAMED
        return [*lines, f"  and {more:,} more, named in the .json"] if more > 0 else lines

    def __repr__(self) -> str:
        # The data set, if it is known, and the numbers of the last stage.
        parts = [part for part in (self.data_set, self.split) if part]
        last = "coarse" if self.fine is None else "fine"
        parts.append(last if self.baseline is None else "baseline")
        for direction, arrow in ARROWS.items():
            parts.append(f"{arrow} R@1 {self.final.direction(direction)['R@1'].value:.1f} %")
        parts.append(f"mean recall {self.final.mean_recall.value:.1f} %")
        return f"EvaluationResult({', '.join(parts)})"


def _metrics_to_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return each value, followed by its interval if it has one."""
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        values[name] = metric.value
        if metric.interval is not None:
            values[f"{name}_interval"] = list(metric.interval)
    return values


def _metrics_from_json(values: Mapping[str, Any]) -> dict[str, Metric]:
    """Read what ``_metrics_to_json`` returned."""
    metrics = {}
    for name, value in values.items():
        if not name.endswith("_interval"):
            metrics[name] = Metric(value, _interval(values.get(f"{name}_interval")))
    return metrics


def _interval(bounds: list[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])


def _row(name: str, width: int, cells: list[str]) -> str:
    return f"{name:{width}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def _cell(metric: Metric, digits: int, signed: bool) -> str:
    """Return "47.1 [45.0, 49.2]", with signs for a difference."""
    style = f"{'+' if signed else ''}.{digits}f"
    text = f"{metric.value:{style}}"
    if metric.interval is not None:
        low, high = metric.interval
        text += f" [{low:{style}}, {high:{style}}]"
    return text


def _mean_cells(result: EvaluationResult) -> list[str]:
    cells = []
    for name, stage in result.stages().items():
        cells.append(_cell(stage.mean_recall, 1, signed=name == "difference"))
    return cells


def _direction_lines(result: EvaluationResult, direction: str) -> list[str]:
    """Return the part of the table on one direction."""
    counts = dataclasses.asdict(result.queries)
    gallery = counts["gallery_images" if direction == "s2i" else "gallery_recordings"]
    queries = counts[DIRECTIONS[direction]]

    # Heads of the columns.
    stages = result.stages()
    heads = {
        "coarse": "coarse (SIC)" if result.baseline is None else "cosine",
        "fine": f"fine (k={result.k}, {result.score})",
        "difference": "fine - coarse",
    }
    left_out = counts[
        "recordings_without_image" if direction == "s2i" else "images_without_recording"
    ]
    dropped = f"; {left_out} queries have no correct item there" if left_out else ""
    lines = [f"{ARROWS[direction]}: {queries} queries, gallery of {gallery}{dropped}"]
    lines.append(_row("", 14, [heads[name] for name in stages]))

    # One line per metric, and the time each stage took.
    for metric, digits in TABLE_METRICS.items():
        cells = []
        for name, stage in stages.items():
            cells.append(_cell(stage.direction(direction)[metric], digits, name == "difference"))
        lines.append(_row(f"  {metric.replace('_', ' ')}", 14, cells))

    times = []
    for name in stages:
        if name != "difference":
            times.append(f"{result.seconds[f'{name}_{direction}']:.1f} s")
    lines.append(_row("  time", 14, times) + "\n")
    return lines


def _score_lines(result: EvaluationResult) -> Iterator[str]:
    """Yield R@1 by the score that reranks."""
    if result.fine_scores is None:
        return
    yield "\nR@1 by score " + "".join(f"{name:>8}" for name in SCORES)
    for direction, arrow in ARROWS.items():
        line = f"{arrow:13}"
        for name in SCORES:
            line += f"{result.fine_scores[name].direction(direction)['R@1'].value:8.1f}"
        yield line


def _baseline_lines(result: EvaluationResult) -> Iterator[str]:
    """Yield which embeddings were measured."""
    if result.baseline is None:
        return
    yield "baseline: embeddings of another model"
    for kind, line in result.describe_baseline().items():
        yield f"  {kind}: {line}"


def _protocol_lines(result: EvaluationResult) -> Iterator[str]:
    """Yield what a protocol measured, and whether the numbers can be compared."""
    report = result.protocol
    if report is None:
        return
    verdict = "as published" if report.as_published else "NOT the published number: not comparable"
    where = f"{result.data_set}, {result.split} split" if result.data_set else "ids from files"
    if result.baseline is None:
        where += f", trained on {result.trained_on}"
    yield f"protocol {report.name} ({report.about})"
    yield f"  {report.images:,} images, {report.recordings:,} recordings, {verdict}; {where}"

    # MTEB reports metrics that the table does not have.
    if report.name == "mteb":
        for direction, arrow in ARROWS.items():
            metrics = result.final.direction(direction)
            fractions = ""
            for cut in RECALL_AT:
                fractions += f"  @{cut} {metrics[f'fraction_recall@{cut}'].value:.1f}"
            ndcg = metrics["nDCG@10"].value
            yield f"  {arrow}: nDCG@10 {ndcg:.3f}, fraction recall{fractions}"
