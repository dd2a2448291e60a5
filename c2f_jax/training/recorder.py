"""What a run reports: sums and counts merged over steps, the progress line, TensorBoard, the learning curves."""

import logging
import sys
import time

import jax
from tqdm import tqdm

from c2f_jax.objectives import COLLAPSE_VALUE

log = logging.getLogger(__name__)
COLLAPSE_WIDTH = 2e-3


class Recorder:
    """Collects step metrics and writes them every logging window.

    Metrics are merged as (sum, count) over the steps of a window, never as a mean of means. ``progress`` goes into each
    checkpoint, the open window included, so that a resumed run reports what an unbroken one would have.

    Args:
      logdir: where TensorBoard events go; None on processes that do not report.
      steps: steps of the whole run.
      batch_size: global batch N.
      sim_from: step from which a SIM loss at its collapse value raises the alarm; None where SIM is not trained.
    """

    def __init__(self, logdir, *, steps, batch_size, sim_from):
        self.history = {}
        self._reports, self._steps, self._batch_size, self._sim_from = (
            logdir is not None,
            steps,
            batch_size,
            sim_from,
        )
        self._window, self._sums = [], {}
        self._waited, self._window_began, self._window_steps = 0.0, time.perf_counter(), 0
        self._alarmed, self._bar, self._writer = False, None, None
        if self._reports:
            from clu import metric_writers  # imports TensorFlow

            self._writer = metric_writers.SummaryWriter(str(logdir))

    def start(self, step):
        """Show the progress bar and start the clocks at ``step``."""
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

    def say(self, text):
        """A line on standard error that leaves the progress bar whole."""
        if self._reports:
            tqdm.write(text, file=sys.stderr)

    def add(self, metrics, waited):
        """Take one step's metrics (name -> clu Average, still on the device) and the seconds it waited for data."""
        self._window.append(metrics)
        self._waited += waited
        self._window_steps += 1
        if self._bar is not None:
            self._bar.update()

    def log(self, step):
        """Close the logging window at ``step``."""
        self._merge()
        values = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums = {}
        seconds = time.perf_counter() - self._window_began
        speed = self._window_steps * self._batch_size / seconds
        self._remember(step, {f"train/{name}": value for name, value in values.items()})
        self._write(
            step, {"train/pairs_per_second": speed, "train/data_wait": self._waited / seconds}
        )
        line = f"loss {values['loss']:.3f}  tau {values['tau']:.4f}"
        if "sim_accuracy" in values:
            line += f"  SIM accuracy {100 * values['sim_accuracy']:.1f} %"
        line += f"  data wait {100 * self._waited / seconds:.0f} %  {speed:.0f} pairs/s"
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(line)
        else:
            self.say(f"step {step}/{self._steps}  {line}")
        self._check_collapse(step, values)
        self._restart_clocks()

    def log_evaluation(self, step, data_set, result):
        """Record a retrieval result of the validation split; returns the score that chooses the best checkpoint.

        The score is the mean of the six R@K of the fine stage, of the coarse one where SIM is not trained.
        """
        values = {}
        for stage in ("coarse", "fine"):
            for short, name in (("s2i", "speech_to_image"), ("i2s", "image_to_speech")):
                for metric, value in result.get(stage, {}).get(name, {}).items():
                    if not metric.endswith("_interval"):
                        values[f"eval/{data_set}/{stage}/{short}/{metric}"] = value
        self._remember(step, values)
        score = result.get("fine", result["coarse"])["mean_recall"]
        recalls = "  ".join(
            f"{stage} {result[stage]['speech_to_image']['R@1']:.1f} / {result[stage]['image_to_speech']['R@1']:.1f}"
            for stage in ("coarse", "fine")
            if stage in result
        )
        self.say(f"step {step}  {data_set}: R@1 s2i / i2s  {recalls}  mean recall {score:.1f}")
        self._restart_clocks()
        return score

    def progress(self):
        """JSON for the checkpoint."""
        self._merge()
        return {"history": self.history, "window": self._sums}

    def restore(self, progress):
        """Go on from a checkpoint's ``progress``."""
        self.history = progress["history"]
        self._sums = {name: tuple(value) for name, value in progress["window"].items()}

    def close(self):
        """Finish the progress bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _merge(self):
        # One transfer for the window: fetching each step's metrics would make the host wait for every step.
        for metrics in jax.device_get(self._window):
            for name, average in metrics.items():
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + float(average.total), count + float(average.count))
        self._window = []

    def _remember(self, step, values):
        for name, value in values.items():
            self.history.setdefault(name, []).append([step, value])
        self._write(step, values)

    def _write(self, step, values):
        if self._writer is not None:
            self._writer.write_scalars(step, values)
            self._writer.flush()

    def _restart_clocks(self):
        self._waited, self._window_began, self._window_steps = 0.0, time.perf_counter(), 0

    def _check_collapse(self, step, values):
        if self._alarmed or self._sim_from is None or step < self._sim_from:
            return
        if abs(values.get("sim_loss", 0.0) - COLLAPSE_VALUE) < COLLAPSE_WIDTH:
            self._alarmed = True
            self.say(
                f"WARNING: at step {step} the SIM loss is {values['sim_loss']:.4f}, the value {COLLAPSE_VALUE:.4f} "
                "of a matcher that ignores its input and answers 1/3. Likely causes: learning rate too high or "
                "warm-up too short; encoders that do not tell the items apart yet (is R@1 rising?); false negatives "
                "(wrong image_id); a multimodal encoder too shallow. If it stays there, change one of these."
            )
