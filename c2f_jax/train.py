"""Train a model: batches in; steps, logs, evaluations and checkpoints out."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from c2f_jax.config.caches import prepare_features
from c2f_jax.config.experiment import Experiment, create_experiment, example_batch
from c2f_jax.config.files import load_saved_config, save_config
from c2f_jax.data import batch_plan, loader
from c2f_jax.data.files import check_writable
from c2f_jax.data.source import PairSource
from c2f_jax.datasets.registry import make_data_set
from c2f_jax.errors import UserError
from c2f_jax.evaluate import data_set_label, evaluate_encoded, evaluate_source
from c2f_jax.inference import TrainedModel
from c2f_jax.models.parameters import merge_params, momentum_subset
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.pretrained.weights import check_weights, load_published
from c2f_jax.retrieval.calibration import read_calibrations
from c2f_jax.retrieval.result import EvaluationResult
from c2f_jax.training.checkpoints import Checkpoints, abstract
from c2f_jax.training.distributed import (
    first_process_first,
    in_first_process,
    share_work,
    wait_for_all,
)
from c2f_jax.training.health import Watch, find_not_finite, summary
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.optimizer import create_optimizer
from c2f_jax.training.parallel import DataParallel
from c2f_jax.training.preemption import Preempted, stop_request
from c2f_jax.training.recorder import Recorder
from c2f_jax.training.train_state import C2FTrainState, create_train_state
from c2f_jax.training.train_step import train_step
from c2f_jax.training.workdir import Claim


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The outcome of a training run.

    Attributes:
      state: the final train state.
      history: learning curves, metric name -> [[step, value], ...].
      evaluation: the best checkpoint on the test split; None if it was not evaluated.
      page: path of the page of that evaluation; None like it.
    """

    state: C2FTrainState
    history: Mapping[str, Sequence]
    evaluation: EvaluationResult | None = None
    page: epath.Path | None = None

    def table(self) -> str:
        """Return the console table of the evaluation; empty without one."""
        return "" if self.evaluation is None else self.evaluation.table()

    def __repr__(self) -> str:
        return f"TrainResult(evaluation={self.evaluation!r}, page={str(self.page)!r})"


@dataclass(frozen=True)
class _Run:
    """Everything that the training loop needs besides the state."""

    experiment: Experiment
    workdir: str | PathLike[str]
    parallel: DataParallel
    optimizer: optax.GradientTransformation
    source: PairSource  # the training split
    identity: Mapping[str, int | str]  # of the training split
    validation: PairSource
    checkpoints: Checkpoints
    recorder: Recorder
    claims: Sequence[Claim]  # to the workdir: one, in the first process

    def check_claim(self) -> None:
        """Check that the workdir is there and this run's; all processes must call this."""
        in_first_process(lambda: self.claims[0].check())


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
    test: bool = True,
) -> TrainResult:
    """Train, or resume from the latest checkpoint; then evaluate the best on the test split.

    Args:
      config: configuration; see ``load_config``.
      workdir: local directory or gs://; gets config.json, checkpoints, TensorBoard events and the
        results of the evaluation.
      devices: devices to use; None for all devices of all processes.
      test: whether to evaluate the test split at the end.

    Returns:
      The final state, the learning curves, the evaluation and its page.

    Raises:
      UserError: the configuration, the data or the workdir is wrong; found before the first step
        wherever possible.
      Preempted: the run was stopped by SIGTERM or by the platform, and has saved a checkpoint.
    """
    # Mistakes are found here, before anything is written.
    experiment = create_experiment(config)
    parallel = DataParallel(experiment.parallel, devices)
    parallel.check_batch_size(experiment.batch_size)
    if experiment.init_from:
        load_saved_config(experiment.init_from)  # fails early if there is no such run
    in_first_process(lambda: check_writable(workdir, "--workdir", folder=True))
    source, validation, test_source = _open_splits(experiment, test)

    # From here on, files are written. The first process answers for the workdir.
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []
        in_first_process(lambda: claims.append(stack.enter_context(Claim(workdir))))
        recorder = _open_workdir(config, experiment, workdir)
        recorder.say(
            f"training on {source.origin}, split {source.split}: {len(source):,} recordings"
        )
        experiment = fit_to_data(experiment, source, recorder.say)
        identity = source.identity()
        source.image_index = shuffled_images(
            source.image_index, experiment.data.shuffled_share, experiment.seed
        )

        # The state to start from: new, restored, or another run's parameters.
        optimizer = create_optimizer(experiment.optimizer, experiment.steps)
        state = parallel.place_state(_new_state(experiment, optimizer))
        run = _Run(
            experiment,
            workdir,
            parallel,
            optimizer,
            source,
            identity,
            validation,
            Checkpoints(workdir),
            recorder,
            claims,
        )
        state, start = _resume_or_start(run, state)
        if start < experiment.steps:
            state = _train(run, state, start)
        _report_bad_items(run)  # the result of the test split names its own

        # All processes restore the best checkpoint and evaluate it together.
        evaluation = page = None
        if test_source is not None:
            evaluation, page = evaluate_source(_best_model(run, state), test_source)
        run.checkpoints.close()
        wait_for_all()
        recorder.close()
    return TrainResult(state, recorder.history, evaluation, page)


def fit_to_data(
    experiment: Experiment, source: PairSource, say: Callable[[str], None]
) -> Experiment:
    """Set what depends on the size of the training split: the ramp of alpha and the queue sizes.

    A queue longer than the data set would keep a stale copy of each recording beside the fresh one.

    Args:
      experiment: the experiment.
      source: the training split.
      say: prints a line.

    Returns:
      The experiment, with ``alpha_ramp_steps`` set and the queues at most as long as the split.
    """
    method = experiment.method
    if method.alpha_ramp_steps is None:
        epoch = loader.steps_per_epoch(source, experiment.batch_size)
        method = dataclasses.replace(method, alpha_ramp_steps=epoch)
        experiment = dataclasses.replace(experiment, method=method)

    # A short data set fills a long queue several times over.
    for name in ("queue_size", "token_queue_size"):
        size = getattr(experiment, name)
        if size > len(source):
            say(
                f"{name} {size} is reduced to the {len(source)} recordings of {source.name}, split "
                f"{source.split}"
            )
            shorter: dict[str, Any] = {name: len(source)}
            experiment = dataclasses.replace(experiment, **shorter)
    return experiment


def shuffled_images(image_index: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Make supervision noisy: a share of the recordings swap their images among themselves.

    Args:
      image_index: (M,) int32, image of each recording.
      share: share of the recordings, in [0, 1].
      seed: seed of the run.

    Returns:
      (M,) int32.
    """
    if not share:
        return image_index
    # A cycle through the chosen recordings: each gets the image of another.
    rng = host_rng(seed, Stream.WRONG_CAPTIONS)
    chosen = rng.permutation(len(image_index))[: round(share * len(image_index))]
    shuffled = image_index.copy()
    shuffled[chosen] = image_index[np.roll(chosen, 1)]
    return shuffled


def _open_splits(
    experiment: Experiment, test: bool
) -> tuple[PairSource, PairSource, PairSource | None]:
    """Prepare the data set and its feature caches; open the training, validation and test split.

    The test split is opened before training, so that a typo does not surface hours later.
    """
    data = experiment.data
    first_process_first(lambda: make_data_set(data.name, data.data_dir))
    splits = [data.train_split, data.validation_split]
    if test:
        splits.append(data.test_split)
    prepare_features(experiment, tuple(splits))

    # Only training reads the varied copies of the recordings.
    source = data.load(data.train_split, copies=True)
    validation = data.load(data.validation_split)
    batch_plan.check_plan(
        len(source),
        batch_size=experiment.batch_size,
        bucket_seconds=data.bucket_seconds,
        process_count=jax.process_count(),
    )
    return source, validation, data.load(data.test_split) if test else None


def _open_workdir(
    config: ConfigDict, experiment: Experiment, workdir: str | PathLike[str]
) -> Recorder:
    """Save the configuration, or compare it with the saved one, and open the logs."""

    def write() -> None:
        save_config(config, workdir)
        check_weights(workdir, experiment.weights, write=True)

    in_first_process(write)
    is_main = jax.process_index() == 0
    return Recorder(
        workdir if is_main else None,
        steps=experiment.steps,
        batch_size=experiment.batch_size,
        sim_from=_alarm_from(experiment),
    )


def _new_state(experiment: Experiment, optimizer: optax.GradientTransformation) -> C2FTrainState:
    """Initialize the parameters, published ones excepted, and the queues."""
    batch = example_batch(experiment.data)
    return create_train_state(
        experiment.model,
        optimizer,
        batch,
        seed=experiment.seed,
        queue_size=experiment.queue_size,
        token_queue_size=experiment.token_queue_size,
        momentum_model=experiment.method.momentum is not None,
        weights=load_published(experiment.model, experiment.weights, batch),
    )


def _resume_or_start(run: _Run, state: C2FTrainState) -> tuple[C2FTrainState, int]:
    """Return the state to start from and its step: of the latest checkpoint, if there is one.

    Without a checkpoint the run starts from ``state``, or from the parameters of ``init_from``.
    """
    parallel, frozen = run.parallel, state.frozen
    # Frozen parameters are not in checkpoints.
    target = abstract(parallel.global_state(state.replace(frozen={})))
    found = run.checkpoints.restore_latest(target)
    if found is None:
        if run.experiment.init_from:
            state = _start_from_run(run, state, run.experiment.init_from)
        return state, 0

    step, restored, progress = found
    _check_identity(run, progress["data"])
    run.recorder.restore(progress)
    run.recorder.say(f"resuming at step {step} of {run.experiment.steps}")
    return parallel.place_state(parallel.host_copy(restored)).replace(frozen=frozen), step


def _check_identity(run: _Run, saved: Mapping[str, int | str]) -> None:
    """Raise UserError if a run goes on with other data than it began with."""
    if saved == run.identity:
        return
    then, now = (
        f"{data['recordings']} recordings of {data['images']} images"
        for data in (saved, run.identity)
    )
    how = ""
    if then == now:
        how = ", in another order, with other image ids or lengths"
        if saved["crc32"] == run.identity["crc32"]:
            how = ", but their files hold something else or are in another order"
    raise UserError(
        f"{run.source.name}, split {run.source.split}, is not what {run.workdir} was trained on: "
        f"{then} then, {now} now{how}. Bring the data back, or start another run from this one: "
        f"--config.init_from={run.workdir} with another --workdir"
    )


def _start_from_run(run: _Run, state: C2FTrainState, workdir: str) -> C2FTrainState:
    """Take the parameters of another run's best checkpoint, and a momentum copy of them."""
    parallel = run.parallel
    other = Checkpoints(workdir, read_only=True)
    target = abstract(parallel.global_state(state.params))
    params, _ = other.restore_params(other.best_step, target)
    other.close()

    params, momentum_params = parallel.host_copy(params), {}
    if state.momentum_params:
        # A copy: the state is donated, and no buffer may be donated twice.
        momentum_params = jax.tree.map(np.copy, momentum_subset(params))
    run.recorder.say(f"starting from the parameters of {workdir}")
    started = parallel.host_copy(state).replace(params=params, momentum_params=momentum_params)
    return parallel.place_state(started)


def _train(run: _Run, state: C2FTrainState, start: int) -> C2FTrainState:
    """Run steps ``start`` + 1 to the last; return the final state."""
    experiment, parallel, recorder = run.experiment, run.parallel, run.recorder
    method = experiment.method
    warm_up_step, full_step = _compile_step(run, method.warm_up()), _compile_step(run, method)
    batches = _training_batches(run, start)
    watch = Watch(experiment.max_skipped_steps)

    recorder.start(start)
    with stop_request() as stop_requested:
        for step in range(start + 1, experiment.steps + 1):
            # Waiting for data is timed separately, to show whether decoding limits the speed.
            began = time.perf_counter()
            _, batch = next(batches)
            waited = time.perf_counter() - began

            # One step on all devices; the host does not wait for it.
            full = step > method.warm_up_steps
            step_fn = full_step if full else warm_up_step
            state, metrics = step_fn(state, parallel.place_batch(batch))
            recorder.add(metrics, waited)
            watch.add(metrics["skipped"], (step, batch))

            # What is due after this step: a line of the log, an evaluation, a checkpoint.
            last = step == experiment.steps
            evaluates = last or _due(step, experiment.eval_every)
            stopping = not last and (
                stop_requested.is_set() or run.checkpoints.reached_preemption(step)
            )
            saves = last or stopping or _due(step, experiment.checkpoint_every)
            if saves or evaluates:
                watch.settle()
            if watch.is_over or (last and watch.rows):
                raise _not_finite(run, state, watch, method if full else method.warm_up())
            if last or _due(step, experiment.log_every):
                recorder.log(step)

            # A state that gives NaN is neither scored nor saved: the run may have to go back.
            if not watch.rows:
                score = _evaluate_validation(run, state, step) if evaluates else None
                # A step that was scored is saved, since it may be the best.
                if saves or score is not None:
                    _save(run, state, step, score, wait=stopping)
            if stopping:
                recorder.close()
                raise Preempted(f"stopped at step {step}; repeat the command to resume from there")
    return state


def _save(run: _Run, state: C2FTrainState, step: int, score: float | None, wait: bool) -> None:
    run.check_claim()
    saved = run.parallel.global_state(state.replace(frozen={}))
    progress = run.recorder.progress() | {"data": run.identity}
    run.checkpoints.save(step, saved, progress, score, wait=wait)


def _not_finite(run: _Run, state: C2FTrainState, watch: Watch, method: MethodConfig) -> UserError:
    """Explain a row of skipped steps, write their ids, and set aside the state that gave them."""
    experiment, parallel = run.experiment, run.parallel
    first, batch = watch.rows[0]
    names = find_not_finite(
        parallel, state, parallel.place_batch(batch), model=experiment.model, method=method
    )
    shares = share_work(lambda *_: [batch["image_id"].tolist() for _, batch in watch.rows])
    steps = [
        {"step": step, "image_ids": sum(ids, [])}
        for (step, _), *ids in zip(watch.rows, *shares, strict=True)
    ]
    path = epath.Path(run.workdir) / "not_finite.json"
    report = json.dumps({"not_finite": names, "steps": steps}, indent=2) + "\n"
    run.check_claim()
    in_first_process(lambda: path.write_text(report))

    # The checkpoint of the step before holds this very state.
    moved = ""
    if first - 1 in run.checkpoints.steps:
        aside = run.checkpoints.set_aside(first - 1)
        moved = f" Checkpoint {first - 1} gives that; it is now {aside}."
    latest = run.checkpoints.latest_step
    again = f"train again: no other checkpoint is left in {run.workdir}"
    if latest is not None:
        again = (
            f"begin another run from checkpoint {latest}, the last one before: "
            f"--config.init_from={run.workdir} with another --workdir"
        )
    run.checkpoints.close()
    run.recorder.close()
    return UserError(
        f"the loss or a gradient is not finite in steps {first} to {watch.rows[-1][0]}. Not finite "
        f"at step {first}: {summary(names) or 'nothing, when computed again'}. The image ids of "
        f"these steps are in {path}.{moved} Lower optimizer.learning_rate or mend the data, and "
        f"{again}"
    )


def _compile_step(run: _Run, method: MethodConfig) -> Callable:
    step = functools.partial(
        train_step, model=run.experiment.model, optimizer=run.optimizer, method=method
    )
    return run.parallel.compile_step(step)


def _training_batches(run: _Run, start: int) -> Iterator[tuple[int, dict]]:
    """Return this process's share of the batches after step ``start``."""
    options = run.experiment.data.batch_options(
        run.source,
        batch_size=run.experiment.batch_size,
        seed=run.experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return loader.train_batches(run.source, options, start_step=start)


def _evaluate_validation(run: _Run, state: C2FTrainState, step: int) -> float | None:
    """Evaluate the validation split; return the score that chooses the best checkpoint.

    The score is None during the warm-up: rankings by SIC alone do not compare with those by SIM.
    """
    # Each process evaluates its share on its own devices, by its own copy of the parameters.
    method, recorder = run.experiment.method, run.recorder
    params = run.parallel.local_copy(merge_params(state.params, state.frozen))
    model = TrainedModel(run.experiment, params, step, run.workdir, recorder.history)
    result = evaluate_encoded(model, model.encode_split(run.validation), calibrate=True)
    score = recorder.log_evaluation(step, data_set_label(run.validation), result.to_json())
    if method.sim_weight and not method.has_sim(step):
        recorder.say(
            f"step {step} is in the warm-up: ranked by SIC alone, not a candidate for the best"
        )
        return None
    return score


def _best_model(run: _Run, state: C2FTrainState) -> TrainedModel:
    """Restore the best checkpoint; all processes must call this, since Orbax waits for all."""
    target = abstract(run.parallel.global_state(state.params))
    step, params = run.checkpoints.restore_best_params(target)
    params = run.parallel.local_copy(merge_params(params, state.frozen))
    recorder = run.recorder
    calibrations = read_calibrations(recorder.calibrations, step)
    return TrainedModel(run.experiment, params, step, run.workdir, recorder.history, calibrations)


def _report_bad_items(run: _Run) -> None:
    for bad in (run.source.bad_items, run.validation.bad_items):
        if len(bad):
            run.recorder.say(bad.text())


def _alarm_from(experiment: Experiment) -> int | None:
    """Return the step from which a SIM loss at its collapse value is alarming; None without SIM."""
    if not experiment.method.sim_weight:
        return None
    # A quarter of the run, once both warm-ups are over.
    warm_up = max(experiment.method.warm_up_steps, experiment.optimizer.warmup_steps)
    return warm_up + experiment.steps // 4


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
