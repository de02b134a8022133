"""Order of measurements: systems in turn, in another order under every load and in every repeat, so that what changes
slowly on the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from twotower_bench.measurement_file import MeasurementFile
from twotower_bench.records import System
from twotower_spec.cli.interrupts import Interrupts
from twotower_spec.terminal import progress_bar

T = TypeVar("T")
# What is measured: a `Candidate`, a system, or a mode of the model alone.
Subject = TypeVar("Subject")
Place = TypeVar("Place", bound=Hashable)
Item = TypeVar("Item")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A system, and the engine that it is measured in.

    Attributes:
        system: how to speculate.
        engine: its name in the pool.
        knobs: of TwoTower, where the engine must be told how to draft; None where it was started so.
    """

    system: System
    engine: str
    knobs: Mapping[str, Any] | None = None


def engine_of(candidate: Candidate) -> str:
    """Name of the engine that candidates share where one is held at a time."""
    return candidate.engine


@dataclass(frozen=True)
class Slot(Generic[Subject, Place]):
    """A measurement to be made."""

    subject: Subject
    place: Place
    repeat: int


def key_of_slot(slot: Slot[Candidate, Place]) -> Hashable:
    """Key that a measurement of a system is found by, see `SystemsFile`."""
    return slot.subject.system.name, slot.place, slot.repeat


def in_order(
    subjects: Sequence[Subject],
    places: Sequence[Place],
    num_repeats: int,
    held: Callable[[Subject], Hashable] | None = None,
) -> list[Slot[Subject, Place]]:
    """Lists all measurements in the order in which they are made.

    Args:
        subjects: what is measured.
        places: loads or traffics, each for all subjects.
        num_repeats: passes over everything.
        held: what a subject is measured in, where one is held at a time: it then does all places of a repeat at once.
            None where all are held together.
    """
    slots = []
    for repeat in range(num_repeats):
        if held is None:
            for i, place in enumerate(places):
                slots += [Slot(one, place, repeat) for one in shuffled(subjects, repeat * len(places) + i)]
            continue
        ours = shuffled(subjects, repeat)
        for holder in dict.fromkeys(map(held, ours)):
            own = [one for one in ours if held(one) == holder]
            slots += [Slot(one, place, repeat) for place in places for one in own]
    return slots


def shuffled(sequence: Sequence[T], turn: int) -> list[T]:
    """The same in an order that the number of the turn decides.

    Not only turned round: what is measured twice to see the noise would stand side by side nearly always.
    """
    return Random(turn).sample(sequence, len(sequence))


def complete(
    file: MeasurementFile[Item],
    slots: Sequence[Slot[Subject, Place]],
    key: Callable[[Slot[Subject, Place]], Hashable],
    measure: Callable[[Sequence[Slot[Subject, Place]], Say], Generator[Item]],
) -> list[Item]:
    """Measures what a file lacks and keeps it there, with a progress bar; ends between two measurements on Ctrl-C.

    Args:
        file: open.
        slots: all, in order.
        key: by which the file finds what a slot gives.
        measure: makes the measurements of some slots, in their order, and says what it does.

    Returns:
        The measurements of all slots, and no others that the file holds.
    """
    missing = [slot for slot in slots if key(slot) not in file.found]
    if missing:
        with progress_bar() as bar, Interrupts() as interrupts:
            task = bar.add_task("loading", total=len(slots), completed=len(slots) - len(missing))
            with closing(measure(missing, lambda what: bar.update(task, description=what))) as measured:
                for item in measured:
                    file.keep(item)
                    bar.advance(task)
                    interrupts.check()
    return [file.found[key(slot)] for slot in slots]
