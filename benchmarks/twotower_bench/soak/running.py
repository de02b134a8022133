"""A soak: laps of traffic to both servers of a plan, side by side, until the time is over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from twotower_bench.fork_server import ForkServer
from twotower_bench.servers.server import VllmServer
from twotower_bench.soak.answers import Answer, ask_all, difference
from twotower_bench.soak.checks import FAULTS, Check, Findings, Side, checks_of
from twotower_bench.soak.servers import ENDS_STOCK_VLLM, Limits, SoakPlan, running_pair
from twotower_bench.soak.traffic import Request, Traffic
from twotower_bench.soak.watch import Metrics, error_lines, wait_until_idle

# Growth is measured from the first to the last, which should have one between them.
FEWEST_LAPS = 3

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Soak:
    """A soak of one plan.

    Attributes:
        plan, limits: servers.
        seconds: of traffic; the last lap is ended, and there are three at least.
        knobs: of the drafter.
        seed: of the traffic.
        further: arguments of `vllm serve` for both.
        environment: variables for both.
    """

    plan: SoakPlan
    limits: Limits
    seconds: float
    knobs: Mapping[str, Any]
    seed: int = 0
    further: Sequence[str] = ()
    environment: Mapping[str, str] | None = None

    def run(self, write: Callable[[Row], None], fork_server: ForkServer | None = None) -> list[Check]:
        """Soaks, and gives what was found.

        Args:
            write: is given a row after every kind of requests, lap and check, and one for every answer that is wrong.
            fork_server: see `VllmServer`.

        Raises:
            ChildError: a server has ended.
        """

        def write_of_plan(row: Row) -> None:
            write({"plan": self.plan.name, **row})

        with running_pair(self.plan, self.limits, self.knobs, self.further, self.environment, fork_server) as (
            drafting,
            plain,
        ):
            findings = Findings(self.knobs["verification"] == "coupled", self.knobs["policy"] in ("fixed", "threshold"))
            laps = _Laps(drafting, plain, findings, write_of_plan, ENDS_STOCK_VLLM[self.plan.runner])
            traffic, end = Traffic(self.limits, self.seed), time.monotonic() + self.seconds
            for number in count():
                if number >= FEWEST_LAPS and time.monotonic() > end:
                    break
                try:
                    laps.run(number, traffic)
                finally:
                    laps.read_logs()
            findings.counters = _counters(drafting)
        checks = checks_of(findings)
        for check in checks:
            write_of_plan({"row": "check", **asdict(check)})
        return checks


class _Laps:
    """Asks both servers the same, and keeps what they answered."""

    def __init__(
        self,
        drafting: VllmServer,
        plain: VllmServer,
        findings: Findings,
        write: Callable[[Row], None],
        ends_stock_vllm: Container[str],
    ) -> None:
        """Asks nothing yet.

        Args:
            drafting, plain: servers.
            findings: where answers are counted.
            write: see `Soak.run`.
            ends_stock_vllm: parameters that the server without speculation is not asked for.
        """
        self._servers = (drafting, plain)
        self._findings, self._write = findings, write
        self._ends_stock_vllm = ends_stock_vllm
        self._first_answers: dict[str, Answer] = {}

    def run(self, number: int, traffic: Traffic) -> None:
        """Sends every kind of requests once, and looks at both servers when they are idle again."""
        for kind, requests in traffic.lap(number):
            begun = time.monotonic()
            ours, theirs = asyncio.run(self._ask(requests))
            seconds = time.monotonic() - begun
            for server in self._servers:
                server.check()
            sides = (self._findings.drafting, self._findings.plain)
            for side, answers in zip(sides, (ours, theirs), strict=True):
                _count(side, requests, answers)
            different = self._compare(requests, ours, theirs)
            self._write(
                {
                    "row": "kind",
                    "lap": number,
                    "kind": kind,
                    "requests": len(requests),
                    "seconds": round(seconds, 2),
                    "failed": [
                        {"request": asdict(request), "drafting": asdict(one), "plain": asdict(other)}
                        for request, one, other in zip(requests, ours, theirs, strict=True)
                        if one.error or other.error
                    ],
                    "different": different,
                }
            )
        for name in ("drafting", "plain"):
            server, side = self._servers[name == "plain"], getattr(self._findings, name)
            side.points.append(wait_until_idle(server.endpoint, server.pid, side.num_requests))
            self._write({"row": "idle", "lap": number, "server": name, **asdict(side.points[-1])})

    def read_logs(self) -> None:
        """Takes error lines from the logs of both servers, and writes those that are new."""
        for name in ("drafting", "plain"):
            server, side = self._servers[name == "plain"], getattr(self._findings, name)
            lines = error_lines(server.log.read_text(errors="replace"))
            self._write({"row": "log", "server": name, "lines": lines[len(side.errors) :]})
            side.errors = lines

    async def _ask(self, requests: Sequence[Request]) -> tuple[list[Answer], list[Answer]]:
        drafting, plain = self._servers
        fewer = [request if request.is_greedy else request.without(self._ends_stock_vllm) for request in requests]
        return await asyncio.gather(ask_all(drafting.endpoint, requests), ask_all(plain.endpoint, fewer))

    def _compare(
        self, requests: Sequence[Request], ours: Sequence[Answer], theirs: Sequence[Answer]
    ) -> list[dict[str, Any]]:
        """Compares what must be the same, and gives what is not."""
        findings, found = self._findings, list[dict[str, Any]]()
        for request, answer, plain in zip(requests, ours, theirs, strict=True):
            if answer.error or plain.error:
                continue
            if request.is_greedy:
                findings.num_greedy += 1
                if differs := difference(request, answer, plain):
                    findings.greedy.append(differs)
                    found.append(differs.as_json)
            if request.has_seed and findings.is_coupled:
                # Streamed or not, in whatever lap.
                first = self._first_answers.setdefault(json.dumps(request.given, sort_keys=True), answer)
                findings.num_seeded += first is not answer
                if differs := difference(request, answer, first):
                    findings.seeded.append(differs)
                    found.append(differs.as_json)
        return found


def _count(side: Side, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    for request, answer in zip(requests, answers, strict=True):
        side.num_requests += 1
        side.num_left += answer.has_left
        side.num_answered += not (answer.has_left or answer.error)
        if answer.error:
            side.failed.append((request, answer))


def _counters(server: VllmServer) -> dict[str, float]:
    """Counters of the server that drafts that are checked."""
    metrics = Metrics(server.endpoint)
    faults = sum(metrics.total("vllm:twotower_fallbacks_total", {"reason": reason}) for reason in FAULTS)
    return {
        "preemptions": metrics.total("vllm:num_preemptions_total"),
        "hits": metrics.total("vllm:prefix_cache_hits_total"),
        "accepted": metrics.total("vllm:twotower_accepted_tokens_total"),
        "faults": faults + metrics.total("vllm:twotower_sampler_fallbacks_total"),
    }
