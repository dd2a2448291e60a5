"""Steps whose loss or gradients are not finite: watched while training, and explained."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from c2f_jax.models.c2f import C2FModel
from c2f_jax.models.parameters import merge_params
from c2f_jax.objectives import pmean
from c2f_jax.objectives.average import Average
from c2f_jax.objectives.collectives import AxisName
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.parallel import DataParallel
from c2f_jax.training.train_state import C2FTrainState
from c2f_jax.training.train_step import Batch, encode, loss_of_params

BEHIND = 8  # steps that the watch stays behind, so that the host does not wait for the devices
MOST_NAMED = 5
PARTS = (
    "parameter",
    "frozen parameter",
    "momentum parameter",
    "optimizer",
    "queue",
    "token queue",
    "batch",
    "encoded",
    "sic_loss",
    "sim_loss",
    "gradient",
)


class Watch:
    """Counts the steps in a row that were skipped.

    Attributes:
      rows: what ``add`` was given for each step of the current row, oldest first.

    Args:
      limit: steps in a row that are too many.
    """

    def __init__(self, limit: int) -> None:
        self.rows: list[Any] = []
        self._limit = limit
        self._waiting: collections.deque[tuple[jax.Array, Any]] = collections.deque()

    def add(self, skipped: Average, step: Any) -> None:
        """Take a step.

        Args:
          skipped: metric "skipped" of the step, still on the device.
          step: what to remember of it.
        """
        self._waiting.append((skipped.total, step))
        while len(self._waiting) > BEHIND:
            self._look()

    def settle(self) -> None:
        """Look at all steps; the host waits for the devices."""
        while self._waiting:
            self._look()

    @property
    def is_over(self) -> bool:
        """Whether as many steps in a row as the limit were skipped."""
        return len(self.rows) >= self._limit

    def _look(self) -> None:
        if self.is_over:
            self._waiting.clear()
            return
        skipped, step = self._waiting.popleft()
        if float(jax.device_get(skipped)):
            self.rows.append(step)
        else:
            self.rows = []


def find_not_finite(
    parallel: DataParallel,
    state: C2FTrainState,
    batch: Batch,
    *,
    model: C2FModel,
    method: MethodConfig,
) -> list[str]:
    """Name what is not finite in a step, causes before their effects.

    Args:
      parallel: the devices.
      state: placed state; it is used up.
      batch: placed batch.
      model: C2FModel.
      method: MethodConfig of the step.

    Returns:
      Names such as "queue['image']", "encoded['speech']", "sim_loss" and
      "gradient['image_projection']['kernel']".
    """
    step = functools.partial(_finite_parts, model=model, method=method)
    _, parts = parallel.compile_step(step)(state, batch)
    found = []
    for name, part in zip(PARTS, parallel.host_copy(parts), strict=True):
        for path, is_finite in jax.tree_util.tree_leaves_with_path(part):
            if not is_finite:
                found.append(f"{name}{jax.tree_util.keystr(path)}")
    return found


def summary(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _finite_parts(
    state: C2FTrainState,
    batch: Batch,
    *,
    model: C2FModel,
    method: MethodConfig,
    axis_name: AxisName,
) -> tuple[C2FTrainState, tuple]:
    """Tell what of ``PARTS`` is finite on all devices."""
    momentum = None
    if method.momentum is not None:
        momentum = encode(model, merge_params(state.momentum_params, state.frozen), batch)
    online = encode(model, merge_params(state.params, state.frozen), batch)
    gradient_of_loss = jax.value_and_grad(loss_of_params, has_aux=True)
    (_, (_, metrics)), gradients = gradient_of_loss(
        state.params, state, batch, momentum, model=model, method=method, axis_name=axis_name
    )
    parts = (
        state.params,
        state.frozen,
        state.momentum_params,
        state.opt_state,
        state.queue.entries,
        state.token_queue.entries,
        {name: value for name, value in batch.items() if name != "image_id"},
        {"speech": online.speech.embedding, "image": online.image.embedding},
        metrics["sic_loss"].total,
        metrics["sim_loss"].total if "sim_loss" in metrics else jnp.zeros(()),
        gradients,
    )
    return state, jax.tree.map(lambda x: _is_finite(x, axis_name), parts)


def _is_finite(x: jax.Array, axis_name: AxisName) -> jax.Array:
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    # The mean over the devices is 1 if it is finite on all of them.
    return pmean(finite.astype(jnp.float32), axis_name) == 1
