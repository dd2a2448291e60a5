"""The paper's claims as an experiment: each idea added to the one before, same budget, several seeds.

The paper starts from pretrained encoders. Here ``method.warm_up_steps`` of plain in-batch contrastive learning take
their place, once for each seed and kind of captions; every row of that seed starts from the same parameters.
"""

import json

import numpy as np
from etils import epath

from c2f_jax.config.experiment import create_experiment
from c2f_jax.config.files import save_config
from c2f_jax.errors import UserError
from c2f_jax.train import train_and_evaluate

PLAIN = {
    "method.momentum": None,
    "method.alpha": 0.0,
    "queue_size": 0,
    "token_queue_size": 0,
    "method.sim_weight": 0.0,
    "method.negatives": "global",
}
QUEUE = {k: v for k, v in PLAIN.items() if k not in ("method.momentum", "queue_size")}
SIM = {k: v for k, v in QUEUE.items() if k != "method.sim_weight"}
MINED = {"method.alpha": 0.0, "method.negatives": "queue"}
FULL = {"method.negatives": "queue"}
# Row -> what it sets on the configuration, which describes the whole method. Each adds one idea to the row above it.
ROWS = {
    "in-batch contrastive": PLAIN,
    "+ embedding queue": QUEUE,
    "+ SIM": SIM,
    "+ queue-mined negatives": MINED,
    "+ momentum distillation": FULL,
    "noisy, without distillation": MINED | {"data.shuffled_share": "noise"},
    "noisy, with distillation": FULL | {"data.shuffled_share": "noise"},
}
# Row -> the row that it is compared with, seed by seed.
COMPARED_WITH = dict(zip(list(ROWS)[1:5], list(ROWS)[:4], strict=True)) | {
    "noisy, without distillation": "+ queue-mined negatives",
    "noisy, with distillation": "noisy, without distillation",
}
METRICS = [(d, m) for d in ("speech_to_image", "image_to_speech") for m in ("R@1", "R@10")]


def ablate(config, workdir, *, seeds=3, noise=0.3, rows=None):
    """Train and evaluate every row with every seed; finished runs of the same configuration are taken as they are.

    Args:
      config: ConfigDict of the whole method with a queue and alpha > 0. ``token_queue_size`` 0 is replaced, in the rows
        with queue-mined negatives, by the embedding queue's size.
      workdir: directory for the runs, ``table.json`` and ``table.md``.
      seeds: seeds of each row, from config.seed on.
      noise: share of shuffled captions in the noisy rows.
      rows: names of ``ROWS`` to run; None for all.

    Returns:
      Two tables as Markdown, means over seeds with 95 % t intervals: every row, and its differences from the row that
      it adds an idea to.
    """
    unknown = sorted(set(rows or ()) - set(ROWS))
    if unknown:
        raise UserError(f"no row {unknown[0]!r}: the rows are {', '.join(ROWS)}")
    if config.queue_size < 1 or not config.method.alpha or config.method.momentum is None:
        raise UserError(
            "ablate varies a configuration of the whole method: it needs queue_size, method.momentum and "
            "method.alpha above 0"
        )
    if seeds < 2:
        raise UserError(f"--seeds={seeds}: an interval needs at least 2")
    for row in (
        rows or ROWS
    ):  # all before the first: a row that cannot be trained is not found hours later
        create_experiment(row_config(config, row, config.seed, noise))
    table = {}
    for seed in range(config.seed, config.seed + seeds):
        for row in rows or ROWS:
            run = _directory(workdir, row, seed)
            stored = run / "result.json"
            row_values = row_config(config, row, seed, noise)
            start = _directory(
                workdir, "noisy start" if row_values.data.shuffled_share else "start", seed
            )
            if config.method.warm_up_steps:
                row_values.init_from = str(start)
            if stored.exists():
                save_config(row_values, run)  # refuses the result of another configuration
            else:
                if config.method.warm_up_steps:
                    train_and_evaluate(start_config(config, row_values), start, test=False)
                _, _, result, _ = train_and_evaluate(row_values, run)
                stored.write_text(json.dumps(result))
            table.setdefault(row, []).append(json.loads(stored.read_text()))
            markdown = f"{format_rows(table)}\n{format_differences(table)}"
            (epath.Path(workdir) / "table.md").write_text(markdown)
    (epath.Path(workdir) / "table.json").write_text(json.dumps(summarise(table), indent=2) + "\n")
    return markdown


def row_config(config, row, seed, noise):
    """The configuration of one row and seed, after the common start."""
    changes = ROWS[row]
    config = config.copy_and_resolve_references()
    config.seed = seed
    config.steps -= config.method.warm_up_steps
    config.method.warm_up_steps = 0
    if changes.get("method.negatives") == "queue":
        config.token_queue_size = config.token_queue_size or config.queue_size
    with config.ignore_type():
        for key, value in changes.items():
            config.update_from_flattened_dict({key: noise if value == "noise" else value})
    return config


def start_config(config, row_values):
    """The configuration of the plain in-batch steps that the rows of a seed start from."""
    start = row_values.copy_and_resolve_references()
    start.init_from = config.init_from
    start.steps = config.method.warm_up_steps
    with start.ignore_type():
        start.update_from_flattened_dict(PLAIN)
    return start


def _directory(workdir, name, seed):
    return (
        epath.Path(workdir) / f"{name.replace(' ', '-').replace('+-', '').replace(',', '')}-{seed}"
    )


def summarise(table):
    """row -> stage -> direction -> metric -> [mean, half width of the 95 % t interval over seeds, values]."""
    summary = {}
    for row, results in table.items():
        summary[row] = {}
        for stage in ("coarse", "fine"):
            if all(stage in result for result in results):
                summary[row][stage] = {
                    f"{direction}/{metric}": _interval(
                        [r[stage][direction][metric] for r in results]
                    )
                    for direction, metric in METRICS
                }
    return summary


def format_rows(table):
    """Markdown: one line for each row and stage."""
    lines = [_header(), "|" + "---|" * (len(METRICS) + 2)]
    for row, stages in summarise(table).items():
        for stage, values in stages.items():
            lines.append(
                f"| {row} | {stage} | "
                + " | ".join(_cell(value) for value in values.values())
                + " |"
            )
    return "\n".join(lines) + "\n"


def format_differences(table):
    """Markdown: each row minus the one in ``COMPARED_WITH``, seed by seed, since rows of a seed start alike.

    A fine ranking is compared with the fine one of the other row, or with its coarse one where it has no other.
    """
    lines = [_header("compared with")]
    for row, other in COMPARED_WITH.items():
        pairs = list(zip(table.get(row, ()), table.get(other, ()), strict=False))
        for stage in ("coarse", "fine"):
            if pairs and all(stage in result for result, _ in pairs):
                cells = [
                    _cell(
                        _interval(
                            [a[stage][d][m] - b.get(stage, b["coarse"])[d][m] for a, b in pairs]
                        ),
                        signed=True,
                    )
                    for d, m in METRICS
                ]
                lines.append(f"| {row} | {stage} | {other} | " + " | ".join(cells) + " |")
    return "\n".join([lines[0], "|" + "---|" * (len(METRICS) + 3), *lines[1:]]) + "\n"


def _header(*columns):
    names = [f"{'s2i' if d.startswith('s') else 'i2s'} {m}" for d, m in METRICS]
    return "| | stage | " + " | ".join([*columns, *names]) + " |"


def _cell(interval, signed=False):
    mean, half, _ = interval
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


def _interval(values):
    """Mean and half width of the 95 % Student interval; None for fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return float(np.mean(values)), None, values
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half), values
