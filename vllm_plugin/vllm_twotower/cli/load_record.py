"""Load points that are measured, or were in a run before."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

from twotower_spec.evaluation.load_points import LoadPoint
from vllm_twotower.cli.record import Record
from vllm_twotower.serving_bench import ServePlan

KIND = "load_point"
# What may change in `vllm serve`'s arguments while points still stand in one file: more requests at once.
NOT_COMPARED = "--max-num-seqs"


def load_record(plan: ServePlan, base_url: str | None) -> Record[LoadPoint]:
    """Points by system, traffic and repeat.

    Args:
        plan: more systems, loads or repeats go on with a file; another verifier, workload or server does not.
        base_url: of a server that others have started.
    """
    arguments = list(plan.arguments)
    if NOT_COMPARED in arguments:
        del arguments[arguments.index(NOT_COMPARED) + 1]
    content = [plan.verifier, arguments, plan.mode, asdict(plan.workload), base_url]
    return Record(
        KIND, LoadPoint.from_json, lambda point: (point.system.name, point.traffic, point.repeat), content, plan.systems
    )


def chosen(record: Record[LoadPoint], plan: ServePlan) -> list[LoadPoint]:
    """Points of a plan, and none that the file holds beside it; systems in the order of the plan."""
    places = product(plan.traffics, plan.systems, range(plan.num_repeats))
    return [record.found[system.name, traffic, repeat] for traffic, system, repeat in places]
