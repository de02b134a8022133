"""Memory, descriptors and threads of an idle server, its metrics, and the errors in its log."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twotower_bench.servers.server import Endpoint

if TYPE_CHECKING:
    import psutil

# Of a server's processes, each started by the one before; on a GPU of its own an engine has no worker.
NAMES = ("API server", "engine", "worker")
# Drafter and blocks are told of a request's end in the steps after it; a client that left is noticed within a second.
IDLE_WITHIN_S = 60.0
LOOKS_EVERY_S = 0.25
# What is above 0 while a request holds something.
HELD = {
    "running requests": ("vllm:num_requests_running", {}),
    "waiting requests": ("vllm:num_requests_waiting", {}),
    "share of the KV cache": ("vllm:kv_cache_usage_perc", {}),
    "requests in the drafter's pool": ("vllm:twotower_pool_used", {"resource": "requests"}),
    "tokens in the drafter's pool": ("vllm:twotower_pool_used", {"resource": "tokens"}),
}
# An error, its traceback, or a warning of the drafter about one.
ERROR_LINE = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback|\bWARNING\b.*TwoTower.*\b(fail|fault|without drafts)")
PLACE_AND_TIME = re.compile(r"^\(.*? pid=\d+\) |(?<=[A-Z] )\d\d-\d\d \d\d:\d\d:\d\d ")


@dataclass(frozen=True)
class Holding:
    """Resources of a process.

    Attributes:
        memory_bytes: resident and its own: neither files nor shared memory.
        num_fds, num_threads: open descriptors, and threads.
    """

    memory_bytes: int
    num_fds: int
    num_threads: int


@dataclass(frozen=True)
class IdlePoint:
    """A server that nobody asks.

    Attributes:
        num_requests: that it has had.
        processes: by `NAMES`.
        held: what requests still hold, by `HELD`; all 0 but for what did not become so in time.
    """

    num_requests: int
    processes: Mapping[str, Holding]
    held: Mapping[str, float]


class Metrics:
    """Numbers of `/metrics`, now."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Asks for them."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(endpoint.get("/metrics"))
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, labels: Mapping[str, str] | None = None) -> float:
        """Sum over all engines, and over all labels that are not given; 0 where there is no such metric."""
        wanted = (labels or {}).items()
        return sum(one.value for one in self._samples if one.name == name and wanted <= one.labels.items())


def wait_until_idle(endpoint: Endpoint, pid: int, num_requests: int, within_s: float = IDLE_WITHIN_S) -> IdlePoint:
    """Waits until no request holds anything, and looks at the processes then.

    Args:
        endpoint: of the server.
        pid: of its first process.
        num_requests: that it has had.
        within_s: after which it looks all the same.
    """
    end = time.monotonic() + within_s
    while True:
        metrics = Metrics(endpoint)
        held = {what: metrics.total(*place) for what, place in HELD.items()}
        if not any(held.values()) or time.monotonic() > end:
            return IdlePoint(num_requests, holdings(pid), held)
        time.sleep(LOOKS_EVERY_S)


def holdings(pid: int) -> dict[str, Holding]:
    """Looks at a server's first process and those below it, by `NAMES`."""
    import psutil

    found: dict[str, Holding] = {}
    level = [psutil.Process(pid)]
    for name in NAMES:
        for i, process in enumerate(level):
            found[f"{name} {i + 1}" if i else name] = _holding(process)
        children = [child for process in level for child in process.children()]
        # Python's own process that counts semaphores.
        level = [child for child in children if not any("resource_tracker" in word for word in child.cmdline())]
    return found


def error_lines(log: str) -> list[str]:
    """Lines of a server's log that tell of an error, without process and time."""
    return [PLACE_AND_TIME.sub("", line) for line in log.splitlines() if ERROR_LINE.search(line)]


def early_and_last(points: Sequence[IdlePoint]) -> tuple[IdlePoint, IdlePoint]:
    """Points that growth is measured between; a server is warm when it has had a third of all requests."""
    return points[(len(points) - 1) // 3], points[-1]


def _holding(process: psutil.Process) -> Holding:
    memory = process.memory_info()
    return Holding(memory.rss - getattr(memory, "shared", 0), process.num_fds(), process.num_threads())
