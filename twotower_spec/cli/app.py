"""The command line: all commands together, and the library's errors as one sentence and exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import typer

from twotower_spec.cli.demo import demo
from twotower_spec.cli.doctor import doctor
from twotower_spec.cli.generate import generate
from twotower_spec.cli.inspect import inspect
from twotower_spec.cli.lm_eval import SETTINGS as LM_EVAL_SETTINGS
from twotower_spec.cli.lm_eval import lm_eval
from twotower_spec.cli.streams import OutputError, open_standard_streams
from twotower_spec.cli.train import app as train
from twotower_spec.errors import TwoTowerError
from twotower_spec.printable import as_message

# Group of entry points, each a function that becomes a command; `bench.NAME` becomes `bench NAME`.
COMMANDS_GROUP = "twotower_spec.commands"
BENCH_PREFIX = "bench."
# A disk that takes no more, wherever a command writes.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What typer raises for a command line that it cannot read.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def build_app() -> typer.Typer:
    """Builds the command line: our commands, and those of packages above this one, which may replace ours.

    Packages above are imported only when the command line runs, so that importing this one imports none of them.
    """
    app = typer.Typer(
        rich_markup_mode="markdown",  # joins the lines of a paragraph
        name="twotower-spec",
        help="Nemotron-Labs-TwoTower: generate and draft with it, look into its checkpoints, train small ones.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands: dict[str, Callable[..., Any]] = {
        "demo": demo,
        "doctor": doctor,
        "generate": generate,
        "inspect": inspect,
    }
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
    """Runs the command line.

    Exit codes: 0 done, 1 standard output or the disk cannot be written, 2 bad input, 130 interrupted.
    """
    open_standard_streams()
    # Also where Python was asked for a module instead.
    code = _exit_code(lambda: build_app()(prog_name="twotower-spec", standalone_mode=False))
    sys.exit(code or _exit_code(sys.stdout.flush))


def _exit_code(action: Callable[[], int | None]) -> int:
    """Runs something; what goes wrong is one sentence on stderr."""
    try:
        code = action() or 0
    except OutputError as error:
        return _refused(str(error), code=1)
    except TwoTowerError as error:
        return _refused(str(error))
    except UsageError as error:
        return _refused_command_line(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = error.filename or "a file"
        return _refused(as_message(f"{what} cannot be written ({error.strerror}); free space and start again"), code=1)
    except typer.Abort:
        code = 130
    if code == 130:
        print("interrupted; a run with --output or --json goes on where it stopped when started again", file=sys.stderr)
    return code


def _refused_command_line(error: Any) -> int:
    """Says what typer's error says; nothing where a command without arguments has shown its help."""
    message, place = error.format_message().rstrip("."), error.ctx.command_path if error.ctx else "twotower-spec"
    return _refused(as_message(f"{message}; see {place} --help")) if message else 2


def _refused(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
