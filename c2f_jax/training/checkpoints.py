"""Orbax checkpoints: the latest two and the best, with everything that an exact resume needs."""

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from c2f_jax.errors import UserError
from c2f_jax.training.distributed import in_first_process, wait_for_all
from c2f_jax.training.train_state import C2FTrainState

log = logging.getLogger(__name__)

_ITEMS = ("params", "state", "progress")
# What the user can mend, and a restart cannot. TensorStore raises the text alone.
_FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Checkpoints:
    """Checkpoints of one run in ``<workdir>/checkpoints``; a local directory or gs://.

    A checkpoint holds ``params``, ``state`` (the rest of the train state, so that retrieval need
    not read it) and ``progress`` (JSON: learning curves, metric sums of the open logging window),
    with checksums of all values, which are verified when they are restored. The position in the
    data is the step itself.

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
        if not read_only:
            for step in in_first_process(self._damaged_scores):
                self._report(
                    self._move(step), UserError(f"the score of checkpoint {step} is damaged")
                )
        self._manager = self._open_manager()

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

        Raises:
          UserError: the disk is full or may not be written to; perhaps said of the checkpoint
            before, which was still being written.
        """
        # Without metrics a step is never the best.
        metrics = None
        if score is not None:
            metrics = {"score": float(score)}
        rest = _named_arrays(state.replace(params={}))
        content = {
            "progress": progress,
            "score": score if score is None else float(score),
            "params": _checksums(state.params),
            "state": _checksums(rest),
        }
        with self._disk_errors():
            # Orbax would wait for minutes for a folder that it cannot make.
            probe = self.directory / f"writable-{jax.process_index()}"
            probe.write_bytes(b"?")
            probe.unlink()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    state=ocp.args.StandardSave(rest),
                    progress=ocp.args.JsonSave(_sealed(content)),
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
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best score; the latest if none has a score."""
        scores = {}
        for step in self.steps:
            # Orbax keeps scores too, without a checksum.
            try:
                content = _unsealed(self._restore(step, progress=ocp.args.JsonRestore()).progress)
            except UserError:
                content = None
            if content is None:
                log.warning("the score of checkpoint %d in %s is damaged", step, self.directory)
            elif content["score"] is not None:
                scores[step] = content["score"]
        return max(scores, key=lambda step: (scores[step], step)) if scores else self.latest_step

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

        content = self._verified(step, restored, "params", "state")

        # Arrays of size zero were not saved.
        named = dict(restored.state)
        rest = jax.tree_util.tree_map_with_path(
            lambda path, x: named.get(jax.tree_util.keystr(path), jnp.zeros(x.shape, x.dtype)), rest
        )
        return rest.replace(params=restored.params), content["progress"]

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
        return restored.params, self._verified(step, restored, "params")["progress"]

    def restore_latest(
        self, abstract_state: C2FTrainState
    ) -> tuple[int, C2FTrainState, dict[str, Any]] | None:
        """Restore the latest checkpoint that is whole; damaged ones after it are set aside.

        All processes must call this.

        Args:
          abstract_state: as in ``restore``.

        Returns:
          Its step, the state and the progress; None if there are no checkpoints.

        Raises:
          UserError: none of them is whole. They stay where they are.
        """
        errors: dict[int, UserError] = {}
        for step in reversed(self.steps):
            try:
                state, progress = self.restore(step, abstract_state)
            except UserError as error:
                errors[step] = error
                continue
            for damaged, reason in errors.items():
                self._report(self.set_aside(damaged), reason)
            return step, state, progress
        if errors:
            raise next(iter(errors.values()))
        return None

    def restore_best_params(self, abstract_params: Any) -> tuple[int, Any]:
        """Restore the parameters of the best checkpoint that is whole; all processes must call it.

        Args:
          abstract_params: as in ``restore_params``.

        Returns:
          Its step and the parameters.

        Raises:
          UserError: there is none.
        """
        while True:
            step = self.best_step
            try:
                params, _ = self.restore_params(step, abstract_params)
            except UserError as error:
                if step is None or len(self.steps) < 2:
                    raise
                self._report(self.set_aside(step), error)
            else:
                assert step is not None  # else there was nothing to restore
                return step, params

    def set_aside(self, step: int) -> epath.Path:
        """Move a checkpoint out of the way, to ``<workdir>/set_aside``; nothing is deleted.

        All processes must call this.

        Args:
          step: step of the checkpoint.

        Returns:
          Where it is now.
        """
        self._manager.wait_until_finished()
        self._manager.close()
        target = self._move(step)
        self._manager = self._open_manager()
        return target

    def close(self) -> None:
        """Wait for saves under way.

        Raises:
          UserError: as ``save``.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()
        self._manager.close()

    def _open_manager(self) -> ocp.CheckpointManager:
        # Orbax reads the scores of all checkpoints here, as JSON.
        try:
            with _absl_errors_only():
                return ocp.CheckpointManager(
                    self.directory, options=_options(self._read_only), item_names=_ITEMS
                )
        except ValueError as error:
            raise UserError(
                f"a score in {self.directory}, <step>/metrics/metrics, is damaged ({error}): "
                "bring the file back, or move that step's folder away"
            ) from error

    def _damaged_scores(self) -> list[int]:
        """Return the steps whose score Orbax could not read."""
        found = []
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            step = path.parent.parent.name
            try:
                json.loads(path.read_text())
            except (OSError, ValueError):
                if step.isdigit():  # else it was never finished
                    found.append(int(step))
        return found

    def _move(self, step: int) -> epath.Path:
        folder = self.directory.parent / "set_aside"
        target = folder / str(step)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}_")
            _move_folder(self.directory / str(step), target)
        wait_for_all()
        return target

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Make UserError of what the user can mend."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            number = getattr(error, "errno", None)
            reasons = [os.strerror(code) for code in _FULL_OR_CLOSED]
            if number not in _FULL_OR_CLOSED and not any(reason in text for reason in reasons):
                raise
            reason = next((reason for reason in reasons if reason in text), text[:200])
            raise UserError(
                f"a checkpoint could not be written to {self.directory} ({reason}): mend that and "
                f"repeat the command; {self._last_saved()}"
            ) from error

    def _last_saved(self) -> str:
        with contextlib.suppress(OSError):
            steps = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]
            if steps:
                return f"it resumes from step {max(steps)}"
        return "no checkpoint was saved before"

    def _report(self, moved: epath.Path, error: Exception) -> None:
        if jax.process_index() == 0:
            log.warning("%s\nIt is now in %s, and the one before it is used", error, moved)

    def _verified(
        self, step: int | None, restored: ocp.args.Composite, *names: str
    ) -> dict[str, Any]:
        """Return what was sealed in a checkpoint, if the named items are what was saved.

        Raises:
          UserError: they are not.
        """
        content = _unsealed(restored.progress)
        if content is None:
            raise self._damaged(step, "its progress is not what was saved")
        for name in names:
            found = _checksums(getattr(restored, name))
            for path, checksum in content[name].items():
                if found.get(path) != checksum:
                    raise self._damaged(step, f"{name}{path} is not what was saved")
        return content

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
            raise self._damaged(step, reason) from error

    def _damaged(self, step: int | None, reason: str) -> UserError:
        other = f"remove {self.directory / str(step)} to resume from another one, if any"
        if self._read_only:  # not this command's to remove
            other = "bring its files back, or choose another step, if there is one"
        return UserError(
            f"checkpoint {step} in {self.directory} is damaged or does not fit this configuration "
            f"({reason}): use the configuration that it was trained with, or {other}"
        )


def abstract(tree: Any) -> Any:
    """Return the shapes, types and shardings of a tree, as a restore target."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def _options(read_only: bool) -> ocp.CheckpointManagerOptions:
    """Return Orbax's options: keep the latest two checkpoints and the one with the best score.

    The one before the latest is there for the day when the latest is damaged.
    """
    best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
        best_fn=_score,
        create=not read_only,
        read_only=read_only,
        # A checkpoint written before an evaluation has no score and must not count as the best.
        keep_checkpoints_without_metrics=False,
    )


def _move_folder(source: epath.Path, target: epath.Path) -> None:
    """Move a folder; in a bucket, which has no folders, object by object."""
    if "://" not in str(source):
        source.rename(target)
        return
    for path in source.iterdir():
        if path.is_dir():
            _move_folder(path, target / path.name)
        else:
            path.copy(target / path.name)
    source.rmtree()


def _named_arrays(tree: Any) -> dict[str, Any]:
    """Return path -> array without arrays of size zero, which Orbax refuses."""
    named = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if x.size:
            named[jax.tree_util.keystr(path)] = x
    return named


def _checksums(tree: Any) -> dict[str, int]:
    """Return path -> CRC-32 of the bytes of each array."""
    named = _named_arrays(tree)

    def of_array(x: Any) -> int:
        local = x.addressable_data(0) if isinstance(x, jax.Array) else x
        return zlib.crc32(np.ascontiguousarray(local).reshape(-1).view(np.uint8).data)

    with ThreadPoolExecutor() as pool:
        return dict(zip(named, pool.map(of_array, named.values()), strict=True))


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with their checksum."""
    text = json.dumps(content)
    return {"content": text, "crc32": zlib.crc32(text.encode())}


def _unsealed(sealed: Any) -> dict[str, Any] | None:
    """Return the values, or None if they are not what was sealed."""
    text = sealed.get("content") if isinstance(sealed, dict) else None
    if not isinstance(text, str) or zlib.crc32(text.encode()) != sealed.get("crc32"):
        return None
    return json.loads(text)


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
