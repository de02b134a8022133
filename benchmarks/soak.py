"""`vllm serve` under mixed traffic for half an hour, drafts and no drafts side by side: python -m benchmarks.soak

The bundled models, a verifier with attention alone, one with Mamba layers, and T that drafts for itself, on both model
runners of vLLM. Prints what must hold and whether it does; the exit code is 1 where something does not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer

from twotower_bench.child_process import ChildError, ended_by_signals
from twotower_bench.cli.serve_options import serve_arguments
from twotower_bench.soak import PLANS, Check, Limits, Soak, SoakPlan, plans_of
from twotower_spec.errors import ArgumentError, TwoTowerError
from twotower_spec.extras import require_extra
from twotower_spec.machine import describe_machine
from twotower_spec.terminal import Terminal
from vllm_twotower.config import DrafterKnobs

ROOT = Path(__file__).parents[1]
# vLLM runs model runner V2 where Triton has a backend; this one interprets kernels, at about 0.1 s a step.
TRITON_ON_CPU = ROOT / "tests" / "support" / "v2_on_cpu"
SHOWN_PER_PLAN = 10

app = typer.Typer(rich_markup_mode="markdown", add_completion=False, pretty_exceptions_enable=False)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="Traffic of all plans together; each has three laps at least.")] = 30,
    plan: Annotated[str, typer.Option(help="Servers, with commas.")] = ",".join(PLANS),
    policy: Annotated[str, typer.Option(help="How is drafted: fixed, threshold, adaptive.")] = "fixed",
    verification: Annotated[str, typer.Option(help="coupled; or one-hot, whose seeds are not compared.")] = "coupled",
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    serve_args: Annotated[str, typer.Option(help="Further arguments of `vllm serve`, for all servers.")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON lines, written as things are found.")] = None,
) -> None:
    """Soaks the plans one after the other."""
    console = Terminal()
    try:
        # Everything that can be refused is checked before anything starts.
        if not 0 <= minutes < float("inf"):
            raise ArgumentError(f"--minutes {minutes:g} is no length of time; give 0 or more")
        plans, knobs = plans_of(plan), {"policy": policy, "verification": verification}
        DrafterKnobs.parse({"model": "T", **knobs})
        further = serve_arguments(serve_args, {})
        require_extra("bench", "psutil", "openai")
        with ended_by_signals(), opened(output) as file:
            recorder, everything = Recorder(console, file), list[Check]()
            for one in plans:
                recorder.begin(one)
                limits, environment = conditions(one)
                seconds = 60 * minutes / len(plans)
                found = Soak(one, limits, seconds, knobs, seed, further, environment).run(recorder.write)
                recorder.show(one, found)
                everything += found
    except ChildError as error:
        sys.exit(str(error))
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    console.print(describe_machine())
    sys.exit(not all(check.holds for check in everything))


@contextmanager
def opened(path: Path | None) -> Iterator[TextIO | None]:
    """A file to write to, begun anew."""
    try:
        file = path.open("w", encoding="utf-8") if path else None
    except OSError as error:
        raise ArgumentError(f"--output {path} cannot be written ({error.strerror}); give another file") from error
    with file or nullcontext():
        yield file


def conditions(plan: SoakPlan) -> tuple[Limits, dict[str, str]]:
    """Limits and variables of a plan's servers on this machine."""
    if plan.runner == "V1" or torch.cuda.is_available():
        return plan.limits(), {}
    path = os.pathsep.join(filter(None, [str(TRITON_ON_CPU), os.environ.get("PYTHONPATH")]))
    return plan.limits(is_interpreted=True), {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}


class Recorder:
    """Writes rows, and shows what is going on."""

    def __init__(self, console: Terminal, file: TextIO | None) -> None:
        self._console, self._file = console, file
        self._begun = time.monotonic()
        self._wrong: list[dict[str, Any]] = []

    def begin(self, plan: SoakPlan) -> None:
        """Begins with a plan."""
        self._wrong = []
        self._console.print(f"{plan.name}: starting its servers")

    def write(self, row: Any) -> None:
        """Writes a row at once."""
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if row["row"] == "idle" and row["server"] == "drafting":
            minutes = (time.monotonic() - self._begun) / 60
            self._console.print(f"{minutes:.1f} min: {row['plan']}, {row['num_requests']} requests")
        for what in ("failed", "different"):
            self._wrong += [{"kind": row["kind"], **one} for one in row.get(what, ())]

    def show(self, plan: SoakPlan, checks: list[Check]) -> None:
        """Shows the checks of a plan, and the first of the requests that went wrong."""
        self._console.print(plan.name, style="bold")
        for check in checks:
            text = f"{'holds' if check.holds else 'FAILS'}  {check.what}: {check.found}; allowed: {check.allowed}"
            self._console.print(text, style="" if check.holds else "red", soft_wrap=True)
        for wrong in self._wrong[:SHOWN_PER_PLAN]:
            self._console.print(json.dumps(wrong), soft_wrap=True)


if __name__ == "__main__":
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed; a soak needs it")
    app()
