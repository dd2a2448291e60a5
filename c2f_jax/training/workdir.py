"""One run at a time in a workdir: a lock on this machine, and a mark that all machines see."""

import contextlib
import json
import os
import platform
import time
import uuid
from types import TracebackType

from etils import epath
from filelock import FileLock, Timeout

from c2f_jax.errors import UserError

LOCK = "run.lock"
OWNER = "run.json"


class Claim:
    """The right to write to a workdir, held by process 0 of a run until it ends or dies.

    A lock refuses a second run on machines that share the workdir's file system and its locks.
    Elsewhere, as on gs://, the run that came last keeps the workdir: the one before finds another
    mark there, and stops before it writes.

    Args:
      workdir: directory of the run.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self._folder = epath.Path(workdir)
        self._mark = {
            "host": platform.node(),
            "process": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "id": uuid.uuid4().hex,
        }
        self._lock = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if "://" not in str(workdir):
                self._lock = self._acquire(FileLock(self._folder / LOCK))
            (self._folder / OWNER).write_text(json.dumps(self._mark) + "\n")
        except OSError as error:
            self.close()
            raise UserError(
                f"--workdir={workdir} cannot be written ({error}): give another directory"
            ) from error

    def check(self) -> None:
        """Check that the workdir is still there and this run's; call it before writing.

        Raises:
          UserError: it is not.
        """
        try:
            mark = json.loads((self._folder / OWNER).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder} is no longer there, or cannot be read ({error}): bring it back "
                "and repeat the command, which resumes from the last checkpoint in it"
            ) from error
        if mark.get("id") != self._mark["id"]:
            raise UserError(
                f"{self._folder}: {self._owner()} has started here, and this run leaves the "
                "workdir to it: give each run its own --workdir"
            )

    def close(self) -> None:
        """Let other runs have the workdir."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _acquire(self, lock: FileLock) -> FileLock | None:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self._folder}: {self._owner()} is training here: wait for its end, stop it, or "
                "give another --workdir"
            ) from error
        except NotImplementedError:  # a file system without locks
            return None
        return lock

    def _owner(self) -> str:
        """Return who the mark says is at work."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            mark = json.loads((self._folder / OWNER).read_text())
            return f"process {mark['process']} on {mark['host']}, started {mark['started']},"
        return "another run"
