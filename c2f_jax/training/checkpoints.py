"""Orbax checkpoints: the latest and the best, with everything that an exact resume needs."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from c2f_jax.errors import UserError
from c2f_jax.training.train_state import C2FTrainState

_ITEMS = ("params", "state", "progress")


class Checkpoints:
    """Checkpoints of one run in ``<workdir>/checkpoints``; a local directory or gs://.

    A checkpoint holds ``params``, ``state`` (the rest of the train state, so that retrieval need
    not read it) and ``progress`` (JSON: learning curves, metric sums of the open logging window).
    The position in the data is the step itself.

    Attributes:
      directory: where the checkpoints are.

    Args:
      workdir: directory of the run.
      read_only: never create or delete anything.

    Raises:
      UserError: there are no checkpoints to read, the directory is a file, or a score is damaged.
    """

    def __init__(self, workdir: str | os.PathLike, read_only: bool = False) -> None:
        # Orbax takes no relative path; a gs:// one is absolute.
        root = str(workdir)
        if "://" not in root:
            root = os.path.abspath(os.path.expanduser(workdir))
        self.directory = epath.Path(root) / "checkpoints"
        if read_only and not self.directory.exists():
            raise UserError(f"{workdir} holds no checkpoints: give the --workdir of a training run")
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} is not a folder: remove it or give another --workdir"
            )
        self._read_only = read_only

        # Orbax reads the scores of all checkpoints here, as JSON.
        try:
            with _absl_errors_only():
                self._manager = ocp.CheckpointManager(
                    self.directory, options=_options(read_only), item_names=_ITEMS
                )
        except ValueError as error:
            raise UserError(
                f"a score in {self.directory}, <step>/metrics/metrics, is damaged ({error}): "
                "remove that step's folder"
            ) from error

    def save(
        self,
        step: int,
        state: C2FTrainState,
        progress: Mapping[str, Any],
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Save in the background.

        Args:
          step: optimizer steps taken.
          state: C2FTrainState of global arrays.
          progress: JSON values; see ``Recorder.progress``.
          score: the higher, the better; makes the step a candidate for the best. All scores must be
            of one kind: a step ranked by SIC alone, because SIM is not trained yet, has none.
          wait: block until the checkpoint is on disk.
        """
        # Without metrics a step is never the best.
        metrics = None
        if score is not None:
            metrics = {"score": float(score)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                state=ocp.args.StandardSave(_named_arrays(state.replace(params={}))),
                progress=ocp.args.JsonSave(progress),
            ),
            metrics=metrics,
            force=True,
        )
        if wait:
            self._manager.wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        """Return whether the platform will stop this job; all processes agree on the step."""
        return self._manager.reached_preemption(step)

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best score; the latest if none has a score."""
        best = self._manager.best_step()
        return self.latest_step if best is None else best

    def restore(
        self, step: int | None, abstract_state: C2FTrainState
    ) -> tuple[C2FTrainState, dict[str, Any]]:
        """Restore everything; each array must have the shape and type that it has in the target.

        Args:
          step: step of a checkpoint.
          abstract_state: C2FTrainState of ShapeDtypeStruct; see ``abstract``.

        Returns:
          The state and the progress.

        Raises:
          UserError: no checkpoint of that step, or it is damaged or of another model.
        """
        # Parameters are a separate item, as saved.
        rest = abstract_state.replace(params={})
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract_state.params),
            state=ocp.args.StandardRestore(_named_arrays(rest)),
            progress=ocp.args.JsonRestore(),
        )

        # Arrays of size zero were not saved.
        named = dict(restored.state)
        rest = jax.tree_util.tree_map_with_path(
            lambda path, x: named.get(jax.tree_util.keystr(path), jnp.zeros(x.shape, x.dtype)), rest
        )
        return rest.replace(params=restored.params), restored.progress

    def restore_params(self, step: int | None, abstract_params: Any) -> tuple[Any, dict[str, Any]]:
        """Restore parameters and progress alone, for retrieval.

        Args:
          step: step of a checkpoint.
          abstract_params: pytree of ShapeDtypeStruct.

        Returns:
          The parameters and the progress.

        Raises:
          UserError: as ``restore``.
        """
        restored = self._restore(
            step, params=ocp.args.StandardRestore(abstract_params), progress=ocp.args.JsonRestore()
        )
        return restored.params, restored.progress

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, step: int | None, **items: Any) -> ocp.args.Composite:
        """Restore the items of a checkpoint, or raise UserError."""
        if step is None:
            raise UserError(
                f"{self.directory} holds no finished checkpoint: train that run until it has one"
            )
        if step not in self._manager.all_steps():
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}: give one of "
                f"{', '.join(map(str, self._manager.all_steps()))}"
            )

        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # each file format raises its own errors
            reason = " ".join(str(error).split()) or type(error).__name__
            # What follows is the address of an object, not a detail.
            reason = reason.partition(" See full TensorStore details")[0][:300]
            other = f"remove {self.directory / str(step)} to resume from another one, if any"
            if self._read_only:  # not this command's to remove
                other = "bring its files back, or choose another step, if there is one"
            raise UserError(
                f"checkpoint {step} in {self.directory} is damaged or does not fit this "
                f"configuration ({reason}): use the configuration that it was trained with, or "
                f"{other}"
            ) from error


def abstract(tree: Any) -> Any:
    """Return the shapes, types and shardings of a tree, as a restore target."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def _options(read_only: bool) -> ocp.CheckpointManagerOptions:
    """Return Orbax's options: keep the latest checkpoint and the one with the best score."""
    best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
        best_fn=_score,
        create=not read_only,
        read_only=read_only,
        # A checkpoint written before an evaluation has no score and must not count as the best.
        keep_checkpoints_without_metrics=False,
    )


def _named_arrays(tree: Any) -> dict[str, Any]:
    """Return path -> array without arrays of size zero, which Orbax refuses."""
    named = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if x.size:
            named[jax.tree_util.keystr(path)] = x
    return named


def _score(metrics: Mapping[str, float]) -> float:
    """Return the score in the metrics of a checkpoint."""
    return metrics["score"]


@contextlib.contextmanager
def _absl_errors_only() -> Iterator[None]:
    """Silence Orbax's warnings, which repeat the options that it was given."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
