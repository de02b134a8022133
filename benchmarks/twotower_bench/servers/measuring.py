"""Every system under every traffic, several times over, in an order in which slow changes hit all alike."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from twotower_bench.fork_server import ForkServer, running_fork_server
from twotower_bench.records import LoadPoint, System, Traffic
from twotower_bench.schedule import Candidate, Say, Slot, engine_of, in_order
from twotower_bench.servers.load_generator import LoadGenerator, Workload
from twotower_bench.servers.server import Endpoint, Server, running_servers

ServersMode = Literal["together", "in-turn"]
Slots = Sequence[Slot[Candidate, Traffic]]
# Where no closed loop is measured.
WARM_UP_CONCURRENCY = 8


@dataclass(frozen=True)
class ServePlan:
    """Plan of a measurement: servers, traffic and workload.

    Attributes:
        verifier: directory or hub id.
        arguments: of `vllm serve`, for all systems.
        systems, traffics, num_repeats: all combinations.
        mode: servers of all systems together, or one after the other, started anew for every repeat.
        workload: what is asked.
    """

    verifier: str
    arguments: tuple[str, ...]
    systems: tuple[System, ...]
    traffics: tuple[Traffic, ...]
    num_repeats: int
    mode: ServersMode
    workload: Workload

    def slots(self) -> list[Slot[Candidate, Traffic]]:
        """All measurements in their order."""
        candidates = [Candidate(system, system.name) for system in self.systems]
        in_turn = None if self.mode == "together" else engine_of
        return in_order(candidates, self.traffics, self.num_repeats, in_turn)

    def warm_up(self) -> tuple[Traffic, ...]:
        """The smallest and the largest closed loop: how many drafts pay is learnt at both."""
        sizes = [traffic.concurrency for traffic in self.traffics if traffic.concurrency] or [WARM_UP_CONCURRENCY]
        return tuple(Traffic(concurrency=size) for size in dict.fromkeys((min(sizes), max(sizes))))


def measure_servers(plan: ServePlan, slots: Slots, say: Say) -> Generator[LoadPoint]:
    """Starts servers, measures those slots of a plan that are left, in its order, and stops the servers.

    Raises:
        ChildError: a server or the load generator failed.
    """
    with running_fork_server() as forks, running_generator(plan.workload, forks) as generator:
        for part in _served_together(plan, slots):
            wanted = {slot.subject.system.name for slot in part}
            systems = [system for system in plan.systems if system.name in wanted]
            say("loading " + ", ".join(system.title for system in systems))
            with running_servers(systems, plan.verifier, plan.arguments, forks) as servers:
                for server in servers.values():
                    server.wait_until_ready()
                yield from _measure(plan, part, generator, servers, say)


def measure_endpoint(plan: ServePlan, endpoint: Endpoint, slots: Slots, say: Say) -> Generator[LoadPoint]:
    """Measures the one system of a server that others have started, else as `measure_servers`."""
    with running_generator(plan.workload) as generator:
        yield from _measure(plan, slots, generator, {plan.systems[0].name: Server(endpoint)}, say)


@contextmanager
def running_generator(workload: Workload, fork_server: ForkServer | None = None) -> Iterator[LoadGenerator]:
    """The load generator, still loading, stopped in the end."""
    with (
        TemporaryDirectory(prefix="twotower-load-") as folder,
        closing(LoadGenerator(workload, Path(folder), fork_server)) as generator,
    ):
        yield generator


def _served_together(plan: ServePlan, slots: Slots) -> list[Slots]:
    """Slots by the time for which servers run."""
    if plan.mode == "together":
        return [slots] if slots else []
    return [list(part) for _, part in groupby(slots, key=lambda slot: (slot.repeat, slot.subject.engine))]


def _measure(
    plan: ServePlan, slots: Slots, generator: LoadGenerator, servers: Mapping[str, Server], say: Say
) -> Generator[LoadPoint]:
    for name, system in {slot.subject.engine: slot.subject.system for slot in slots}.items():
        say(f"warming up {system.title}")
        for traffic in plan.warm_up():
            generator.measure(system, servers[name], traffic, repeat=0)
    for slot in slots:
        system = slot.subject.system
        say(f"{system.title}, {slot.place}")
        yield generator.measure(system, servers[system.name], slot.place, slot.repeat)
