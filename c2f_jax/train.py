"""The training loop: batches in, steps, logs, evaluations and checkpoints out."""

import contextlib
import dataclasses
import functools
import signal
import threading
import time

import jax
import numpy as np

from c2f_jax.config.caches import prepare_features
from c2f_jax.config.experiment import create_experiment, example_batch
from c2f_jax.config.files import load_saved_config, save_config
from c2f_jax.data import batch_plan, loader
from c2f_jax.datasets.registry import make_data_set
from c2f_jax.evaluate import data_set_label, evaluate_source, retrieve
from c2f_jax.inference import encode_split
from c2f_jax.models.parameters import merge_params, momentum_subset
from c2f_jax.objectives.keys import Stream, host_rng
from c2f_jax.pretrained.weights import check_weights, load_published
from c2f_jax.training.checkpoints import Checkpoints, abstract
from c2f_jax.training.distributed import first_process_first, wait_for_all
from c2f_jax.training.optimizer import create_optimizer
from c2f_jax.training.parallel import DataParallel
from c2f_jax.training.recorder import Recorder
from c2f_jax.training.train_state import create_train_state
from c2f_jax.training.train_step import train_step

PREEMPTED_EXIT_CODE = 42


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop and has saved a checkpoint to go on from."""


def train_and_evaluate(config, workdir, *, devices=None, test=True):
    """Train, resuming from the latest checkpoint in ``workdir``, then evaluate the best one on the test split.

    Args:
      config: ConfigDict; see ``configs/spoken_scenes.py``.
      workdir: local directory or gs://; gets config.json, checkpoints, TensorBoard events, eval results.
      devices: devices to use; None for all of all processes.
      test: whether to evaluate the test split at the end.

    Returns:
      The final train state, the learning curves, and the test result with the path of its page (None without ``test``
      and on processes other than the first).

    Raises:
      UserError: for anything wrong with the configuration, the data or the workdir, before the first step where it can
        be known.
      Preempted: SIGTERM or the platform's notice; a checkpoint was saved.
    """
    experiment = create_experiment(config)
    data = experiment.data
    parallel = DataParallel(experiment.parallel, devices)
    parallel.check_batch_size(experiment.batch_size)
    if experiment.init_from:
        load_saved_config(
            experiment.init_from
        )  # that there is a run, before data are made and read
    first_process_first(lambda: make_data_set(data.name, data.data_dir))
    prepare_features(
        experiment, (data.train_split, data.validation_split, *((data.test_split,) if test else ()))
    )
    source = data.load(data.train_split, copies=True)
    validation = data.load(data.validation_split)
    batch_plan.check_plan(
        len(source),
        batch_size=experiment.batch_size,
        bucket_seconds=data.bucket_seconds,
        process_count=jax.process_count(),
    )
    # The test split is opened before the training, so that a misspelt one is not found hours later.
    test_source = data.load(data.test_split) if test else None
    is_main = jax.process_index() == 0
    if is_main:
        save_config(config, workdir)
        check_weights(workdir, experiment.weights, write=True)
    recorder = Recorder(
        workdir if is_main else None,
        steps=experiment.steps,
        batch_size=experiment.batch_size,
        sim_from=_alarm_from(experiment),
    )
    experiment = fit_to_data(experiment, source, recorder.say)
    source.image_index = shuffled_images(source.image_index, data.shuffled_share, experiment.seed)

    optimizer = create_optimizer(experiment.optimizer, experiment.steps)
    state = create_train_state(
        experiment.model,
        optimizer,
        example_batch(data),
        seed=experiment.seed,
        queue_size=experiment.queue_size,
        token_queue_size=experiment.token_queue_size,
        momentum_model=experiment.method.momentum is not None,
        weights=load_published(experiment.model, experiment.weights, example_batch(data)),
    )
    state = parallel.place_state(state)
    frozen = state.frozen
    checkpoints = Checkpoints(workdir)
    start = checkpoints.latest_step or 0
    if experiment.init_from and not start:
        other = Checkpoints(experiment.init_from, read_only=True)
        params, _ = other.restore_params(
            other.best_step, abstract(parallel.global_state(state.params))
        )
        other.close()
        params = parallel.host_copy(params)
        copy = jax.tree.map(np.copy, momentum_subset(params)) if state.momentum_params else {}
        state = parallel.place_state(
            parallel.host_copy(state).replace(params=params, momentum_params=copy)
        )
        recorder.say(f"starting from the parameters of {experiment.init_from}")
    if start:
        state, progress = checkpoints.restore(
            start, abstract(parallel.global_state(state.replace(frozen={})))
        )
        state = parallel.place_state(parallel.host_copy(state)).replace(frozen=frozen)
        recorder.restore(progress)
        recorder.say(f"resuming at step {start} of {experiment.steps}")
    if start < experiment.steps:
        state = _train(
            experiment, state, start, optimizer, source, validation, parallel, checkpoints, recorder
        )

    result = page = None
    if test:
        # All processes restore, since Orbax waits for all of them; one evaluates and the others wait for it.
        best = checkpoints.best_step
        params, _ = checkpoints.restore_params(best, abstract(parallel.global_state(state.params)))
        if is_main:
            result, page = evaluate_source(
                experiment,
                parallel.local_copy(merge_params(params, state.frozen)),
                test_source,
                workdir,
                step=best,
                history=recorder.history,
            )
    checkpoints.close()
    wait_for_all()
    recorder.close()
    return state, recorder.history, result, page


def _train(
    experiment, state, start, optimizer, source, validation, parallel, checkpoints, recorder
):
    """Steps ``start`` + 1 to the last; returns the final state."""
    data = experiment.data
    method = experiment.method
    warm_up_step, full_step = (
        parallel.compile_step(
            functools.partial(train_step, model=experiment.model, optimizer=optimizer, method=m)
        )
        for m in (method.warm_up(), method)
    )
    options = data.batch_options(
        source,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = loader.train_batches(source, options, start_step=start)
    recorder.start(start)
    with _stop_request() as stop_requested:
        for step in range(start + 1, experiment.steps + 1):
            began = time.perf_counter()
            _, batch = next(batches)
            waited = time.perf_counter() - began
            step_fn = full_step if step > method.warm_up_steps else warm_up_step
            state, metrics = step_fn(state, parallel.place_batch(batch))
            recorder.add(metrics, waited)

            last = step == experiment.steps
            if last or step % experiment.log_every == 0:
                recorder.log(step)
            score = None
            if last or _due(step, experiment.eval_every):
                params = parallel.local_copy(merge_params(state.params, state.frozen))
                result, _ = retrieve(
                    experiment, params, encode_split(experiment, params, validation), step=step
                )
                score = recorder.log_evaluation(step, data_set_label(validation), result)
                if method.sim_weight and not method.has_sim(step):
                    recorder.say(
                        f"step {step} lies in the warm-up: ranked by SIC alone, no candidate for the best"
                    )
                    score = None
            stopping = not last and (
                stop_requested.is_set() or checkpoints.reached_preemption(step)
            )
            if last or stopping or score is not None or _due(step, experiment.checkpoint_every):
                checkpoints.save(
                    step,
                    parallel.global_state(state.replace(frozen={})),
                    recorder.progress(),
                    score,
                    wait=stopping,
                )
            if stopping:
                recorder.close()
                raise Preempted(f"stopped at step {step}; the same command goes on from there")
    for bad in (source.bad_items, validation.bad_items):
        if len(bad):
            names = "\n".join(f"  {name}: {reason}" for name, reason in bad.reasons.items())
            recorder.say(f"left out of {bad.where}: {len(bad)} of {bad.total} items\n{names}")
    return state


def fit_to_data(experiment, source, say):
    """Values that depend on the size of the training split: the ramp of alpha, and a bound on the queues.

    A queue longer than the data set would hold stale copies of every recording beside the fresh ones.
    """
    method, epoch = experiment.method, loader.steps_per_epoch(source, experiment.batch_size)
    if method.alpha_ramp_steps is None:
        experiment = dataclasses.replace(
            experiment, method=dataclasses.replace(method, alpha_ramp_steps=epoch)
        )
    for name in ("queue_size", "token_queue_size"):
        size = getattr(experiment, name)
        if size > len(source):
            say(
                f"{name} {size} is cut to the {len(source)} recordings of {source.name}, split {source.split}"
            )
            experiment = dataclasses.replace(experiment, **{name: len(source)})
    return experiment


def shuffled_images(image_index, share, seed):
    """Noisy supervision: a share of the recordings exchange their images among themselves.

    Args:
      image_index: (M,) int32 image of each recording.
      share: in [0, 1].
      seed: int.
    """
    if not share:
        return image_index
    rng = host_rng(seed, Stream.WRONG_CAPTIONS)
    chosen = rng.permutation(len(image_index))[: round(share * len(image_index))]
    shuffled = image_index.copy()
    shuffled[chosen] = image_index[np.roll(chosen, 1)]
    return shuffled


def _alarm_from(experiment):
    """Step from which a SIM loss at its collapse value is worth a warning; None without SIM."""
    if not experiment.method.sim_weight:
        return None
    return (
        max(experiment.method.warm_up_steps, experiment.optimizer.warmup_steps)
        + experiment.steps // 4
    )


def _due(step, every):
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _stop_request():
    """An event that SIGTERM sets, so that the loop ends at the end of a step with a checkpoint."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
