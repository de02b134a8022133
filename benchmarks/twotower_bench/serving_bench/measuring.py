"""Every system under every traffic, several times over, in an order in which slow changes hit all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from twotower_bench.records import LoadPoint, System, Traffic
from twotower_bench.serving_bench.load_generator import LoadGenerator, Workload
from twotower_bench.serving_bench.server import Endpoint, ForeignServer, Server, running_servers
from twotower_bench.serving_run import shuffled

ServersMode = Literal["together", "in-turn"]
Keep = Callable[[LoadPoint], None]
Say = Callable[[str], None]
# Where no closed loop is measured.
WARM_UP_CONCURRENCY = 8


@dataclass(frozen=True)
class Slot:
    """A place in the plan of a run: a point that is to be measured."""

    system: System
    traffic: Traffic
    repeat: int

    @property
    def key(self) -> tuple[str, Traffic, int]:
        """By which its point is found again."""
        return self.system.name, self.traffic, self.repeat


@dataclass(frozen=True)
class ServePlan:
    """What is measured, and how.

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

    def slots(self) -> Iterator[Slot]:
        """In the order in which they are measured; another order of systems under every load and in every repeat."""
        for repeat in range(self.num_repeats):
            if self.mode == "together":
                for i, traffic in enumerate(self.traffics):
                    turn = repeat * len(self.traffics) + i
                    yield from (Slot(system, traffic, repeat) for system in shuffled(self.systems, turn))
            else:
                ours = shuffled(self.systems, repeat)
                yield from (Slot(system, traffic, repeat) for system in ours for traffic in self.traffics)

    def warm_up(self) -> tuple[Traffic, ...]:
        """The smallest and the largest closed loop: how many drafts pay is learnt at both."""
        sizes = [traffic.concurrency for traffic in self.traffics if traffic.concurrency] or [WARM_UP_CONCURRENCY]
        return tuple(Traffic(concurrency=size) for size in dict.fromkeys((min(sizes), max(sizes))))


def measure_servers(plan: ServePlan, slots: Sequence[Slot], keep: Keep, say: Say) -> None:
    """Starts servers, measures them and stops them.

    Args:
        plan: of the whole run.
        slots: those of it that are left, in its order.
        keep: gets every point when it is done.
        say: told what is being done.

    Raises:
        ChildError: a server or the load generator failed.
    """
    with running_generator(plan.workload) as generator:
        for part in _served_together(plan, slots):
            wanted = {slot.system.name for slot in part}
            systems = [system for system in plan.systems if system.name in wanted]
            say("loading " + ", ".join(system.title for system in systems))
            with running_servers(systems, plan.verifier, plan.arguments) as servers:
                for server in servers.values():
                    server.wait_until_ready()
                _measure(plan, part, generator, servers, keep, say)


def measure_endpoint(plan: ServePlan, slots: Sequence[Slot], endpoint: Endpoint, keep: Keep, say: Say) -> None:
    """The same for the one system of a server that others have started."""
    with running_generator(plan.workload) as generator:
        _measure(plan, slots, generator, {plan.systems[0].name: ForeignServer(endpoint)}, keep, say)


@contextmanager
def running_generator(workload: Workload) -> Iterator[LoadGenerator]:
    """The load generator, still loading, stopped in the end."""
    with TemporaryDirectory(prefix="twotower-load-") as folder, closing(LoadGenerator(workload, Path(folder))) as one:
        yield one


def _served_together(plan: ServePlan, slots: Sequence[Slot]) -> list[list[Slot]]:
    """Slots by the time for which servers run."""
    if plan.mode == "together":
        return [list(slots)] if slots else []
    return [list(part) for _, part in groupby(slots, key=lambda slot: (slot.repeat, slot.system.name))]


def _measure(
    plan: ServePlan,
    slots: Sequence[Slot],
    generator: LoadGenerator,
    servers: Mapping[str, Server],
    keep: Keep,
    say: Say,
) -> None:
    for name, system in {slot.system.name: slot.system for slot in slots}.items():
        say(f"warming up {system.title}")
        for traffic in plan.warm_up():
            generator.measure(system, servers[name], traffic, repeat=0)
    for slot in slots:
        say(f"{slot.system.title}, {slot.traffic}")
        keep(generator.measure(slot.system, servers[slot.system.name], slot.traffic, slot.repeat))
