"""SIGTERM, by which a platform says that it takes the machine."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

EXIT_CODE = 42  # of a run that was stopped and can be resumed

# A signal is a matter of the whole process.
_asked = threading.Event()


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was stopped from outside, and can be resumed."""


@contextlib.contextmanager
def raise_on_sigterm(event: Preempted) -> Iterator[None]:
    """Raise an exception at SIGTERM, except where `stop_request` answers it.

    Args:
      event: the exception. Inside a callback of a library it would be lost; then the next
        `stop_request` is set from the beginning.
    """

    def stop() -> None:
        _asked.set()
        raise event

    with _at_sigterm(stop):
        try:
            yield
        finally:
            _asked.clear()


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, so that a loop can save a checkpoint and stop."""
    with _at_sigterm(_asked.set):
        try:
            yield _asked
        finally:
            _asked.clear()


@contextlib.contextmanager
def _at_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Answer SIGTERM, if this is the only process.

    Several must agree on the step to stop at: there jax's own handler tells Orbax.
    """
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if not alone:
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
