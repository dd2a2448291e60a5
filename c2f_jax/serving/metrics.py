"""Counters in the text format of Prometheus."""

import threading
from collections import Counter
from collections.abc import Mapping


class Metrics:
    """What a server has done since it started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()

    def count_request(self, route: str, status: int) -> None:
        """Count an answered request.

        Args:
          route: template of its path, such as "/api/items/{row}/media".
          status: HTTP status of the answer.
        """
        with self._lock:
            self._requests[route, status] += 1

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds that each stage of a query took."""
        with self._lock:
            self._seconds.update(seconds)
            self._stages.update(seconds.keys())

    def text(self, queue: int, items: Mapping[str, int]) -> str:
        """Return all counters.

        Args:
          queue: queries that are waiting or running.
          items: kind -> items of its index.
        """
        with self._lock:
            lines = ["# TYPE c2f_requests_total counter"]
            for (route, status), count in sorted(self._requests.items()):
                lines.append(f'c2f_requests_total{{route="{route}",status="{status}"}} {count}')
            lines.append("# TYPE c2f_stage_seconds summary")
            for stage, count in sorted(self._stages.items()):
                label = f'{{stage="{stage}"}}'
                lines.append(f"c2f_stage_seconds_sum{label} {self._seconds[stage]:.6f}")
                lines.append(f"c2f_stage_seconds_count{label} {count}")
        lines += ["# TYPE c2f_queue gauge", f"c2f_queue {queue}", "# TYPE c2f_items gauge"]
        lines += [f'c2f_items{{kind="{kind}"}} {count}' for kind, count in sorted(items.items())]
        return "\n".join(lines) + "\n"
