"""The paper's claims as an experiment: its ideas added one by one, with several seeds.

The paper starts from pretrained encoders. Here ``method.warm_up_steps`` of plain in-batch
contrastive learning take their place, once for each seed and kind of captions; all rows of that
seed start from the same parameters.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import save_config
from c2f_jax.errors import UserError
from c2f_jax.retrieval.result import DIRECTIONS, EvaluationResult, StageMetrics
from c2f_jax.train import train_and_evaluate

# What each row changes in the configuration of the whole method.
FULL: dict[str, Any] = {"method.negatives": "queue"}
MINED = FULL | {"method.alpha": 0.0}
SIM: dict[str, Any] = {"method.alpha": 0.0, "token_queue_size": 0, "method.negatives": "global"}
QUEUE = SIM | {"method.sim_weight": 0.0}
PLAIN = QUEUE | {"method.momentum": None, "queue_size": 0}
NOISE = "data.shuffled_share"

# Each row adds one idea to the row above; the last two repeat two rows with wrong captions.
ROWS = {
    "in-batch contrastive": PLAIN,
    "+ embedding queue": QUEUE,
    "+ SIM": SIM,
    "+ queue-mined negatives": MINED,
    "+ momentum distillation": FULL,
    "noisy, without distillation": MINED | {NOISE: "noise"},
    "noisy, with distillation": FULL | {NOISE: "noise"},
}
# Row -> the row that it is compared with, seed by seed.
COMPARED_WITH = {
    "+ embedding queue": "in-batch contrastive",
    "+ SIM": "+ embedding queue",
    "+ queue-mined negatives": "+ SIM",
    "+ momentum distillation": "+ queue-mined negatives",
    "noisy, without distillation": "+ queue-mined negatives",
    "noisy, with distillation": "noisy, without distillation",
}
# (direction, metric) of each column.
METRICS = (("s2i", "R@1"), ("s2i", "R@10"), ("i2s", "R@1"), ("i2s", "R@10"))
STAGES = ("coarse", "fine")

Results = Mapping[str, Sequence[EvaluationResult]]


@dataclass(frozen=True)
class SeedMean:
    """The mean of a number over seeds.

    Attributes:
      mean: the mean.
      half_width: half the width of the 95 % Student interval; None with fewer than two seeds.
      values: the number of each seed.
    """

    mean: float
    half_width: float | None
    values: Sequence[float]

    def to_json(self) -> list[Any]:
        """Return [mean, half width, values]."""
        return [self.mean, self.half_width, list(self.values)]


def ablate(
    config: ConfigDict,
    workdir: str | PathLike[str],
    *,
    seeds: int = 3,
    noise: float = 0.3,
    rows: Sequence[str] | None = None,
) -> str:
    """Train and evaluate each row with each seed; finished runs are reused.

    Args:
      config: configuration of the whole method, with a queue and alpha above 0. If
        ``token_queue_size`` is 0, rows with queue-mined negatives use the embedding queue's size.
      workdir: directory for the runs, ``table.json`` and ``table.md``.
      seeds: seeds per row, from config.seed on.
      noise: share of shuffled captions in the noisy rows.
      rows: names of ``ROWS`` to run; None for all.

    Returns:
      Two tables as Markdown, means over seeds with 95 % intervals: each row, and the difference
      between each row and the one it adds an idea to.

    Raises:
      UserError: a row is unknown or cannot be trained, or a finished run has another configuration.
    """
    rows = rows or tuple(ROWS)
    _check(config, seeds, rows)

    # Check all rows first: a mistake in the last one must not surface hours later.
    for row in rows:
        create_experiment(row_config(config, row, config.seed, noise))

    results: dict[str, list[EvaluationResult]] = {}
    markdown = ""
    for seed in range(config.seed, config.seed + seeds):
        for row in rows:
            result = _run_row(config, row_config(config, row, seed, noise), row, workdir)
            results.setdefault(row, []).append(result)
            first = results[rows[0]][0]
            if result.data != first.data:
                raise UserError(
                    f"{_directory(workdir, row, seed)} was evaluated on other data than "
                    f"{_directory(workdir, rows[0], config.seed)}: their numbers do not compare; "
                    "bring the data back or remove the older run"
                )
            markdown = f"{format_rows(results)}\n{format_differences(results)}"
            (epath.Path(workdir) / "table.md").write_text(markdown)

    summary = json.dumps(summarize(results), indent=2, default=SeedMean.to_json)
    (epath.Path(workdir) / "table.json").write_text(summary + "\n")
    return markdown


def row_config(config: ConfigDict, row: str, seed: int, noise: float) -> ConfigDict:
    """Return the configuration of one row and seed, after the common start."""
    changes = ROWS[row]
    config = config.copy_and_resolve_references()
    config.seed = seed
    # The warm-up is the common start.
    config.steps -= config.method.warm_up_steps
    config.method.warm_up_steps = 0

    # Mined negatives come from the token queue, by default as long as the embedding queue.
    if changes.get("method.negatives") == "queue":
        config.token_queue_size = config.token_queue_size or config.queue_size

    # A value may become None, and None a value.
    changes = dict(changes)
    if NOISE in changes:
        changes[NOISE] = noise
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def start_config(config: ConfigDict, row_values: ConfigDict) -> ConfigDict:
    """Return the configuration of the plain steps that the rows of a seed start from."""
    start = row_values.copy_and_resolve_references()
    start.init_from = config.init_from
    start.steps = config.method.warm_up_steps
    with start.ignore_type():
        start.update_from_flattened_dict(PLAIN)
    return start


def summarize(results: Results) -> dict[str, dict[str, dict[str, SeedMean]]]:
    """Average the results of each row over its seeds.

    Args:
      results: row -> one result per seed.

    Returns:
      row -> stage -> "speech_to_image/R@1" and so on -> mean. A stage that a row lacks is left out.
    """
    summary: dict[str, dict[str, dict[str, SeedMean]]] = {}
    for row, evaluations in results.items():
        summary[row] = {}
        for stage in STAGES:
            stages = [getattr(evaluation, stage) for evaluation in evaluations]
            if None not in stages:
                summary[row][stage] = _column_means([_columns(metrics) for metrics in stages])
    return summary


def format_rows(results: Results) -> str:
    """Format the means: a Markdown table with one line per row and stage."""
    lines = [_header(), "|" + "---|" * (len(METRICS) + 2)]
    for row, stages in summarize(results).items():
        for stage, means in stages.items():
            cells = " | ".join(_cell(mean) for mean in means.values())
            lines.append(f"| {row} | {stage} | {cells} |")
    return "\n".join(lines) + "\n"


def format_differences(results: Results) -> str:
    """Format each row minus the one in ``COMPARED_WITH``, seed by seed, as a Markdown table.

    Rows of a seed start from the same parameters, so differences vary less than rows. A fine
    ranking is compared with the fine one of the other row, or with its coarse one if that is all.
    """
    lines = [_header("compared with"), "|" + "---|" * (len(METRICS) + 3)]
    for row, other in COMPARED_WITH.items():
        pairs = list(zip(results.get(row, ()), results.get(other, ()), strict=False))
        for stage in STAGES:
            if pairs and all(getattr(result, stage) is not None for result, _ in pairs):
                # Differences first, then their mean: this is what pairs the seeds.
                means = _column_means(list(_differences(pairs, stage)))
                cells = " | ".join(_cell(mean, signed=True) for mean in means.values())
                lines.append(f"| {row} | {stage} | {other} | {cells} |")
    return "\n".join(lines) + "\n"


def _check(config: ConfigDict, seeds: int, rows: Sequence[str]) -> None:
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise UserError(f"no row {unknown[0]!r}: the rows are {', '.join(ROWS)}")
    if config.queue_size < 1 or not config.method.alpha or config.method.momentum is None:
        raise UserError(
            "ablate varies a configuration of the whole method: it needs queue_size, "
            "method.momentum and method.alpha above 0"
        )
    if seeds < 2:
        raise UserError(f"--seeds={seeds}: must be at least 2, for an interval")


def _run_row(
    config: ConfigDict, row_values: ConfigDict, row: str, workdir: str | PathLike[str]
) -> EvaluationResult:
    """Train and evaluate one row with one seed, or read its stored result."""
    seed = row_values.seed
    run = _directory(workdir, row, seed)
    start_name = "noisy start" if row_values.data.shuffled_share else "start"
    start = _directory(workdir, start_name, seed)
    if config.method.warm_up_steps:
        row_values.init_from = str(start)

    stored = run / "result.json"
    if stored.exists():
        # Refuses the result of another configuration.
        save_config(row_values, run)
    else:
        # The start is trained by the first row that needs it; the others find it finished.
        if config.method.warm_up_steps:
            train_and_evaluate(start_config(config, row_values), start, test=False)
        evaluation = train_and_evaluate(row_values, run).evaluation
        if evaluation is None:
            raise UserError("ablate evaluates each run: start it as a single process")
        stored.write_text(json.dumps(evaluation.to_json()))
    return EvaluationResult.from_json(json.loads(stored.read_text()))


def _directory(workdir: str | PathLike[str], name: str, seed: int) -> epath.Path:
    """Return the directory of a row and seed, such as "embedding-queue-0"."""
    short = name.replace(" ", "-").replace("+-", "").replace(",", "")
    return epath.Path(workdir) / f"{short}-{seed}"


def _columns(metrics: StageMetrics) -> dict[str, float]:
    """Return the value of each column, named like "speech_to_image/R@1"."""
    columns = {}
    for direction, metric in METRICS:
        name = f"{DIRECTIONS[direction]}/{metric}"
        columns[name] = metrics.direction(direction)[metric].value
    return columns


def _differences(
    pairs: Sequence[tuple[EvaluationResult, EvaluationResult]], stage: str
) -> Iterator[dict[str, float]]:
    """Yield the difference of each pair of results, column by column."""
    for result, other in pairs:
        columns = _columns(getattr(result, stage))
        other_columns = _columns(getattr(other, stage) or other.coarse)
        yield {name: value - other_columns[name] for name, value in columns.items()}


def _column_means(seeds: Sequence[Mapping[str, float]]) -> dict[str, SeedMean]:
    """Average columns over seeds."""
    return {name: _seed_mean([columns[name] for columns in seeds]) for name in seeds[0]}


def _seed_mean(values: Sequence[float]) -> SeedMean:
    """Average over seeds: half width = t(0.975, n - 1) s / sqrt(n)."""
    from scipy import stats

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return SeedMean(mean, None, values)
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return SeedMean(mean, float(half), values)


def _header(*columns: str) -> str:
    names = [f"{direction} {metric}" for direction, metric in METRICS]
    return "| | stage | " + " | ".join([*columns, *names]) + " |"


def _cell(mean: SeedMean, signed: bool = False) -> str:
    text = f"{mean.mean:+.1f}" if signed else f"{mean.mean:.1f}"
    return text if mean.half_width is None else f"{text} ± {mean.half_width:.1f}"
