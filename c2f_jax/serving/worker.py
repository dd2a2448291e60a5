"""One thread that runs the model, and the queue before it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from c2f_jax.serving.limits import Refusal

T = TypeVar("T")


class Worker:
    """Runs jobs one after another; refuses those that find the queue full.

    Attributes:
      size: jobs that may wait or run.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._lock = threading.Lock()
        self._jobs = 0

    @property
    def jobs(self) -> int:
        """Jobs that wait or run."""
        return self._jobs

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job and return its result.

        Raises:
          Refusal: 503, the queue is full.
        """
        with self._lock:
            if self._jobs >= self.size:
                raise Refusal(503, f"busy: {self._jobs} queries are waiting; ask again in a second")
            self._jobs += 1
        future = self._executor.submit(job)
        # Not when the caller goes away: the job then still takes the model's time.
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop what waits and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _done(self, _: Future) -> None:
        with self._lock:
            self._jobs -= 1
