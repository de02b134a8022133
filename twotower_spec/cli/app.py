"""The command line: all commands together, and the library's errors as one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import typer

from twotower_spec.cli.demo import demo
from twotower_spec.cli.generate import generate
from twotower_spec.cli.inspect import inspect
from twotower_spec.cli.lm_eval import SETTINGS as LM_EVAL_SETTINGS
from twotower_spec.cli.lm_eval import lm_eval
from twotower_spec.cli.train import app as train
from twotower_spec.errors import TwoTowerError

# Group of entry points, each a function that becomes a command; `bench.NAME` becomes `bench NAME`.
COMMANDS_GROUP = "twotower_spec.commands"
BENCH_PREFIX = "bench."


def build_app() -> typer.Typer:
    """Builds the command line: our commands, and those of packages above this one, which may replace ours.

    Packages above are imported only when the command line runs, so that importing this one imports none of them.
    """
    app = typer.Typer(
        name="twotower-spec",
        help="Nemotron-Labs-TwoTower: generate and draft with it, look into its checkpoints, train small ones.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands: dict[str, Callable[..., Any]] = {"demo": demo, "generate": generate, "inspect": inspect}
    benchmarks: dict[str, Callable[..., Any]] = {}
    for entry in entry_points(group=COMMANDS_GROUP):
        if entry.name.startswith(BENCH_PREFIX):
            benchmarks[entry.name.removeprefix(BENCH_PREFIX)] = entry.load()
        else:
            commands[entry.name] = entry.load()
    for name, command in commands.items():
        app.command(name)(command)
    app.command("lm-eval", context_settings=LM_EVAL_SETTINGS, add_help_option=False)(lm_eval)
    app.add_typer(bench_app(benchmarks), name="bench")
    app.add_typer(train, name="train")
    return app


def bench_app(commands: Mapping[str, Callable[..., Any]]) -> typer.Typer:
    """Builds the group `bench`: measurements, all of them commands of packages above this one."""
    app = typer.Typer(help="Measure: speed, acceptance, and what they cost in quality.", no_args_is_help=True)
    for name, command in commands.items():
        app.command(name)(command)
    # Without it typer takes a single command for the app itself.
    app.callback()(lambda: None)
    return app


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 2 bad input, 130 interrupted."""
    try:
        build_app()()
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer ends so after Ctrl-C, without a message
            print(
                "interrupted; a run with --output or --json goes on where it stopped when started again",
                file=sys.stderr,
            )
        raise
