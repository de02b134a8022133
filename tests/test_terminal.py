"""Text from outside on a terminal and in messages: shown as it is, never obeyed, never a whole file."""

import ast
import io
import pickle
from pathlib import Path

import pytest
from rich.table import Table

from twotower_spec.errors import ArgumentError, CheckpointError, TwoTowerError
from twotower_spec.printable import LONGEST_LINE, MOST_LINES, printable, shortened
from twotower_spec.terminal import LONGEST_TEXT, Terminal, styled

ROOT = Path(__file__).parents[1]
HOSTILE = "[/x] [bold]b[/bold] :smile: \x1b[31mred\x07\x9b0m\u202e\ud800"
SHOWN = r"[/x] [bold]b[/bold] :smile: \x1b[31mred\x07\x9b0m\u202e\ud800"


@pytest.fixture
def terminal() -> Terminal:
    found = Terminal(highlight=True)
    found.file = io.StringIO()
    found._width = 200
    return found


def printed(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def test_markup_and_control_characters_are_shown_wherever_text_goes(terminal: Terminal) -> None:
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    terminal.print(HOSTILE)
    terminal.print(HOSTILE, style="bold")
    terminal.print(table)
    terminal.rule(HOSTILE)
    terminal.out(HOSTILE)
    terminal.print(styled(HOSTILE, "green"))
    out = printed(terminal)
    assert out.count(SHOWN) == 9
    assert all(one.isprintable() or one == "\n" for one in out)


def test_lines_stay_lines_and_long_text_is_cut_in_its_middle(terminal: Terminal) -> None:
    terminal.print("a\nb\tc", "x" * 151_674 + "end", soft_wrap=True)
    out = printed(terminal)
    assert out.startswith("a\nb ") and out.endswith("end\n") and "the middle left out" in out
    assert len(out) < LONGEST_TEXT + 100


@pytest.mark.parametrize("kind", [TwoTowerError, ArgumentError, CheckpointError])
def test_messages_are_bounded_and_end_with_their_remedy(kind: type[TwoTowerError]) -> None:
    error = kind(f"value {'x' * 151_674} is wrong; give another")
    assert len(str(error)) < LONGEST_LINE + 1 and str(error).endswith("is wrong; give another")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind(str(error))) == str(error)


def test_messages_show_control_characters_and_line_breaks_of_values() -> None:
    assert str(ArgumentError(f"{HOSTILE}\nerror: x\r is wrong")) == SHOWN + r"\nerror: x\r is wrong"


def test_lists_in_messages_keep_their_lines_up_to_a_number() -> None:
    message = str(CheckpointError("these disagree:" + "".join(f"\n  {i}" for i in range(1000))))
    lines = message.split("\n")
    assert lines[0] == "these disagree:" and lines[1] == "  0"
    assert lines[-1] == f"  ... {1000 - MOST_LINES + 1} more" and len(lines) == 1 + MOST_LINES


def test_printable_and_short_text_is_the_same() -> None:
    text = "prompt 12 of ü 中文 is ° 😀"
    assert printable(text) == text and shortened(text) == text


@pytest.mark.parametrize("package", ["twotower_spec", "benchmarks/twotower_bench"])
def test_everything_printed_through_rich_goes_through_the_one_terminal(package: str) -> None:
    """Names of rich that take markup are imported by terminal.py alone; bars of training show names of our own."""
    found = []
    for path in (ROOT / package).rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console", "rich.text", "rich.markup"):
                found.append(f"{path}:{node.lineno}")
    assert found == []
