"""Orbax checkpoints: the latest and the best, with everything that an exact resume needs."""

import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from c2f_jax.errors import UserError


class Checkpoints:
    """Checkpoints of one run in ``<workdir>/checkpoints``; a local directory or gs://.

    A checkpoint holds ``params``, ``state`` (the rest of the C2FTrainState, so that retrieval need not read it) and
    ``progress`` (JSON: learning curves, metric sums of the open logging window). The data position is the step itself.

    Args:
      workdir: directory of the run.
      read_only: never create or delete anything.
    """

    def __init__(self, workdir, read_only=False):
        # Orbax takes no relative path; a gs:// one is absolute.
        root = (
            str(workdir) if "://" in str(workdir) else os.path.abspath(os.path.expanduser(workdir))
        )
        self.directory = epath.Path(root) / "checkpoints"
        if read_only and not self.directory.exists():
            raise UserError(f"{workdir} holds no checkpoints: give the --workdir of a training run")
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} is not a folder: remove it or give another --workdir"
            )
        self._read_only = read_only
        policies = checkpoint_managers
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(
                        [
                            policies.LatestN(1),
                            policies.BestN(
                                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                            ),
                        ]
                    ),
                    best_fn=_score,
                    create=not read_only,
                    read_only=read_only,
                    # Checkpoints written before an evaluation carry no score and must not be taken for the best.
                    keep_checkpoints_without_metrics=False,
                ),
                item_names=("params", "state", "progress"),
            )
        except ValueError as error:  # the scores of all checkpoints are read here, as JSON
            raise UserError(
                f"a score in {self.directory}, <step>/metrics/metrics, is damaged ({error}): remove that step's folder"
            ) from error

    def save(self, step, state, progress, score=None, wait=False):
        """Save in the background; ``score`` (higher is better) makes the step a candidate for the best.

        Scores must be of one kind: what is ranked by SIC alone because SIM is not trained yet has none.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                state=ocp.args.StandardSave(_named_arrays(state.replace(params={}))),
                progress=ocp.args.JsonSave(progress),
            ),
            metrics=None if score is None else {"score": float(score)},
            force=True,
        )
        if wait:
            self._manager.wait_until_finished()

    def reached_preemption(self, step):
        """Whether the platform has announced that this job will be stopped (all processes agree on the step)."""
        return self._manager.reached_preemption(step)

    @property
    def latest_step(self):
        """Step of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self):
        """Step of the best scored checkpoint; the latest where none was scored."""
        best = self._manager.best_step()
        return self.latest_step if best is None else best

    def restore(self, step, abstract_state):
        """Restore (state, progress); every array must be there in the shape and type of ``abstract_state``.

        Raises:
          UserError: nothing saved at that step, or a checkpoint of another model.
        """
        rest = abstract_state.replace(params={})
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract_state.params),
            state=ocp.args.StandardRestore(_named_arrays(rest)),
            progress=ocp.args.JsonRestore(),
        )
        named = dict(restored.state)
        rest = jax.tree_util.tree_map_with_path(
            lambda path, x: named.get(jax.tree_util.keystr(path), jnp.zeros(x.shape, x.dtype)), rest
        )
        return rest.replace(params=restored.params), restored.progress

    def restore_params(self, step, abstract_params):
        """Restore (params, progress) alone, for retrieval; raises as ``restore``."""
        restored = self._restore(
            step, params=ocp.args.StandardRestore(abstract_params), progress=ocp.args.JsonRestore()
        )
        return restored.params, restored.progress

    def _restore(self, step, **items):
        if step is None:
            raise UserError(
                f"{self.directory} holds no finished checkpoint: train that run until it has one"
            )
        if step not in self._manager.all_steps():
            raise UserError(
                f"no checkpoint of step {step} in {self.directory}: there are {self._manager.all_steps()}"
            )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # each reader of a damaged file has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason.partition(" See full TensorStore details")[0][
                :300
            ]  # an object's address, no details
            other = (
                f"remove {self.directory / str(step)} to go on from another one, if there is one"
            )
            if self._read_only:  # not this command's to remove
                other = "bring its files back, or choose another step, if there is one"
            raise UserError(
                f"checkpoint {step} in {self.directory} is damaged or does not fit this configuration "
                f"({reason}): use the configuration that it was trained with, or {other}"
            ) from error

    def close(self):
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree):
    """Shapes, types and shardings of a tree, as a restore target."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def _named_arrays(tree):
    """path -> array. Orbax refuses arrays of size zero, such as a queue of no slots: they are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.size}


def _score(metrics):
    return metrics["score"]
