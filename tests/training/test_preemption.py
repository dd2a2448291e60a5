"""SIGTERM before, in and after a loop that can stop."""

import gc
import os
import signal

import pytest

from c2f_jax.training.preemption import Preempted, raise_on_sigterm, stop_request


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def lost():
    """Collects garbage such that SIGTERM comes inside a callback, where exceptions are lost."""

    def collect():
        gc.callbacks.append(terminate)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(terminate)

    return collect


def test_it_raises_outside_of_the_loop_and_is_an_event_inside():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="later"), raise_on_sigterm(Preempted("later")):
        with stop_request() as asked:
            assert not asked.is_set()
            terminate()
            assert asked.is_set()
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_request() as asked:
        assert not asked.is_set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_stops_the_next_loop(lost):
    with raise_on_sigterm(Preempted("later")):
        lost()
        with stop_request() as asked:
            assert asked.is_set()
    with raise_on_sigterm(Preempted("later")), stop_request() as asked:
        assert not asked.is_set()
