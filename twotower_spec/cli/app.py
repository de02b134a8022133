"""Puts the commands together, and turns the library's errors into one sentence and exit code 2."""

from __future__ import annotations

import sys

import typer

from twotower_spec.cli.demo import demo
from twotower_spec.cli.generate import generate
from twotower_spec.cli.inspect import inspect
from twotower_spec.cli.train import app as train
from twotower_spec.errors import TwoTowerError

app = typer.Typer(
    name="twotower-spec",
    help="Nemotron-Labs-TwoTower: generate with it, look into its checkpoints, train small ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(generate)
app.command()(inspect)
app.add_typer(train, name="train")


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 bad input, 130 interrupted."""
    try:
        app()
    except TwoTowerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # how typer ends after Ctrl-C, without a word
            print("interrupted; a run with --output goes on where it stopped when started again", file=sys.stderr)
        raise
