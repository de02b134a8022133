"""Load points that are measured, or were in a run before."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

from twotower_bench.cli.options import same_model
from twotower_bench.cli.record import Record
from twotower_bench.records import LoadPoint
from twotower_bench.serving_bench import ServePlan

KIND = "load_point"


def load_record(plan: ServePlan, server: Any) -> Record[LoadPoint]:
    """Points by system, traffic and repeat.

    Args:
        plan: more systems, loads or repeats go on with a file; another verifier or workload does not.
        server: JSON of what the user said about servers; another does not, either. Not the arguments that servers get:
            those of the trio grow with the largest load.
    """
    content = [same_model(plan.verifier), plan.mode, asdict(plan.workload), server]
    return Record(
        KIND, LoadPoint, lambda point: (point.system.name, point.traffic, point.repeat), content, plan.systems
    )


def chosen(record: Record[LoadPoint], plan: ServePlan) -> list[LoadPoint]:
    """Points of a plan, and none that the file holds beside it; systems in the order of the plan."""
    places = product(plan.traffics, plan.systems, range(plan.num_repeats))
    return [record.found[system.name, traffic, repeat] for traffic, system, repeat in places]
