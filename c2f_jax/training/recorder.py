"""What a run reports: merged metrics, the progress line, TensorBoard, the learning curves."""

import logging
import sys
import time
from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
from tqdm import tqdm

from c2f_jax.errors import missing_extra
from c2f_jax.objectives import COLLAPSE_VALUE
from c2f_jax.objectives.average import Average

log = logging.getLogger(__name__)
COLLAPSE_WIDTH = 2e-3


class Recorder:
    """Collects the metrics of steps and writes them once every logging window.

    Metrics are merged as (sum, count) over the steps of a window, never as a mean of means. What
    ``progress`` returns goes into each checkpoint, the open window included, so that a resumed run
    reports what an unbroken one would have.

    Attributes:
      history: metric name, such as "train/sic_loss" or "eval/<data set>/fine/s2i/R@1" -> list of
        [step, value].
      calibrations: evaluated step, as text -> direction -> what ``Calibration.to_json`` returned.

    Args:
      logdir: where TensorBoard events go; None on processes that do not report.
      steps: steps of the whole run.
      batch_size: global batch N.
      sim_from: step from which a SIM loss at its collapse value raises the alarm; None without SIM.
    """

    def __init__(
        self,
        logdir: str | PathLike[str] | None,
        *,
        steps: int,
        batch_size: int,
        sim_from: int | None,
    ) -> None:
        self.history: dict[str, list] = {}
        self.calibrations: dict[str, dict[str, Any]] = {}
        self._reports = logdir is not None
        self._steps = steps
        self._batch_size = batch_size
        self._sim_from = sim_from

        self._window: list[dict[str, Average]] = []  # steps that are not merged yet
        self._sums: dict[str, tuple[float, float]] = {}
        self._waited = 0.0
        self._window_began = time.perf_counter()
        self._window_steps = 0

        self._alarmed = False
        self._bar: tqdm | None = None
        self._writer = None
        if logdir is not None:
            self._writer = _event_writer(logdir)

    def start(self, step: int) -> None:
        """Show the progress bar and start the clocks.

        Args:
          step: step that the run starts or resumes at.
        """
        if self._reports:
            self._bar = tqdm(
                total=self._steps,
                initial=step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )
        self._restart_clocks()

    def say(self, text: str) -> None:
        """Print a line on standard error without breaking the progress bar.

        Args:
          text: the line.
        """
        if self._reports:
            tqdm.write(text, file=sys.stderr)

    def add(self, metrics: dict[str, Average], waited: float) -> None:
        """Take the metrics of one step.

        Args:
          metrics: name -> Average, still on the device.
          waited: seconds that the step waited for data.
        """
        self._window.append(metrics)
        self._waited += waited
        self._window_steps += 1
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int) -> None:
        """Close the logging window.

        Args:
          step: its last step.
        """
        self._merge()
        values = {name: total / count for name, (total, count) in self._sums.items() if count}
        skipped, _ = self._sums.get("skipped", (0.0, 0.0))
        self._sums = {}
        seconds = time.perf_counter() - self._window_began
        speed = self._window_steps * self._batch_size / seconds
        waited = self._waited / seconds

        # Speeds are of this machine: written to TensorBoard, but no part of the learning curves.
        self._remember(step, {f"train/{name}": value for name, value in values.items()})
        self._write(step, {"train/pairs_per_second": speed, "train/data_wait": waited})

        line = f"loss {values['loss']:.3f}  tau {values['tau']:.4f}" if "loss" in values else ""
        if skipped:
            line += f"  {skipped:.0f} steps skipped: loss or gradients not finite"
        if "sim_accuracy" in values:
            line += f"  SIM accuracy {100 * values['sim_accuracy']:.1f} %"
        line += f"  data wait {100 * waited:.0f} %  {speed:.0f} pairs/s"
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(line)
        else:
            self.say(f"step {step}/{self._steps}  {line}")

        self._check_collapse(step, values)
        self._restart_clocks()

    def log_evaluation(self, step: int, data_set: str, result: Mapping[str, Any]) -> float:
        """Record a retrieval result of the validation split.

        Args:
          step: step of the parameters.
          data_set: label of the data set and split.
          result: metrics by stage, direction and name.

        Returns:
          The score that chooses the best checkpoint: the mean of the six R@K of the fine stage, or
          of the coarse one if SIM is not trained.
        """
        values = {}
        for stage in ("coarse", "fine"):
            for short, name in (("s2i", "speech_to_image"), ("i2s", "image_to_speech")):
                for metric, value in result.get(stage, {}).get(name, {}).items():
                    if not metric.endswith("_interval"):
                        values[f"eval/{data_set}/{stage}/{short}/{metric}"] = value
        self._remember(step, values)
        self.calibrations[str(step)] = result.get("calibrations", {})

        score = result.get("fine", result["coarse"])["mean_recall"]
        line = f"step {step}  {data_set}: R@1 s2i / i2s"
        for stage in ("coarse", "fine"):
            if stage in result:
                s2i = result[stage]["speech_to_image"]["R@1"]
                i2s = result[stage]["image_to_speech"]["R@1"]
                line += f"  {stage} {s2i:.1f} / {i2s:.1f}"
        self.say(f"{line}  mean recall {score:.1f}")
        self._restart_clocks()
        return score

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        self._merge()
        kept = {"history": self.history, "calibrations": self.calibrations}
        return {**kept, "window": self._sums}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Resume from a checkpoint.

        Args:
          progress: what ``progress`` returned.
        """
        self.history = progress["history"]
        self.calibrations = progress.get("calibrations", {})
        self._sums = {name: tuple(value) for name, value in progress["window"].items()}

    def close(self) -> None:
        """Finish the progress bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _merge(self) -> None:
        """Add the steps since the last call to the sums of the window."""
        # One transfer for all: fetching each step's metrics would make the host wait for each step.
        for metrics in jax.device_get(self._window):
            for name, average in metrics.items():
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + float(average.total), count + float(average.count))
        self._window = []

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        """Append values to the learning curves and to TensorBoard."""
        for name, value in values.items():
            self.history.setdefault(name, []).append([step, value])
        self._write(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values to TensorBoard alone."""
        if self._writer is not None:
            self._writer.write_scalars(step, values)
            self._writer.flush()

    def _restart_clocks(self) -> None:
        """Start a logging window."""
        self._waited = 0.0
        self._window_began = time.perf_counter()
        self._window_steps = 0

    def _check_collapse(self, step: int, values: Mapping[str, float]) -> None:
        """Warn once if the SIM loss is that of a matcher that ignores its input."""
        if self._alarmed or self._sim_from is None or step < self._sim_from:
            return
        if abs(values.get("sim_loss", 0.0) - COLLAPSE_VALUE) < COLLAPSE_WIDTH:
            self._alarmed = True
            self.say(
                f"WARNING: at step {step} the SIM loss is {values['sim_loss']:.4f}, the value "
                f"{COLLAPSE_VALUE:.4f} of a matcher that ignores its input and answers 1/3. Likely "
                "causes: learning rate too high or warm-up too short; encoders that cannot tell "
                "items apart yet (is R@1 rising?); false negatives (wrong image_id); a multimodal "
                "encoder too shallow. If it stays there, change one of these."
            )


def _event_writer(logdir: str | PathLike[str]) -> Any:
    """Return a writer of TensorBoard events, or None if TensorFlow, which it needs, is missing."""
    try:
        from clu import metric_writers
    except ModuleNotFoundError as error:
        line = missing_extra("writing no event files: TensorBoard", error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return None
    return metric_writers.SummaryWriter(str(logdir))
