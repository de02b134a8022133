"""Standard streams that are full, closed or gone: one sentence, the right exit code, no traceback."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command
from tests.support.golden_files import checkpoint
from twotower_spec.demo import trio_path

PLAN = ["plan", "--verifier-step-ms", 12, "--verify-step-ms", 14, "--context-pass-ms", 2, "--denoiser-step-ms", 2]
COMMANDS: dict[str, list[Any]] = {
    "generate": ["generate", "--model", checkpoint("T1"), "--mode", "ar", "--max-new-tokens", 2, "--token-ids", "6,9"],
    "inspect": ["inspect", checkpoint("T1")],
    "inspect --json": ["inspect", checkpoint("T1"), "--json"],
    "inspect --verifier": ["inspect", trio_path("twotower"), "--verifier", trio_path("verifier")],
    "plan": [*PLAN, "--acceptance-length", 5],
    "plan --json": [*PLAN, "--acceptance-length", 5, "--json"],
    "demo": ["demo", "--standalone", "--prompts", 1, "--max-new-tokens", 1],
    **{
        f"{name} --help": [*name.split(), "--help"]
        for name in ("bench acceptance", "bench report", "bench serve", "bench standalone", "bench sweep", "train all")
    },
}


SAID = {"full": "No space left on device", "closed": "Bad file descriptor", "gone": "Broken pipe"}


@contextmanager
def output_that_is(state: str) -> Iterator[None]:
    """Standard output as the interpreter makes it of a full disk, nothing, or a pipe that nobody reads."""
    reader, number = os.pipe()
    os.close(reader)
    if state == "full":
        os.close(number)
        number = os.open("/dev/full", os.O_WRONLY)
    stream = None if state == "closed" else io.TextIOWrapper(io.FileIO(number, "wb"), write_through=True)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("stdout", "__stdout__"):
            patched.setattr(sys, name, stream)
        yield
    os.close(number) if stream is None else stream.close()


@pytest.mark.parametrize("state", SAID)
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_written_is_one_sentence(name: str, state: str, command: Command) -> None:
    with output_that_is(state):
        code, _, err = command(*COMMANDS[name])
    assert code == 1
    assert err == f"error: standard output cannot be written ({SAID[state]}); give it to what takes all of it\n"


def test_rows_that_go_to_a_file_need_no_standard_output(command: Command, tmp_path: Path) -> None:
    with output_that_is("closed"):
        code, _, err = command(*COMMANDS["generate"], "--output", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("state", SAID)
def test_bad_input_stays_bad_input_where_output_is_broken(state: str, command: Command) -> None:
    with output_that_is(state):
        code, _, err = command("generate", "--token-ids", "x")
    assert code == 2 and err.startswith("error: --token-ids 'x' is not a list of ids")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("> /dev/full", 1, "(No space left on device)"),
        (">&-", 1, "(Bad file descriptor)"),
        ("| head -0", 1, "(Broken pipe)"),
        ("2> /dev/full > /dev/null", 0, ""),
        ("2>&- > /dev/null", 0, ""),
    ],
)
def test_shell_sees_the_exit_code_and_nothing_of_the_interpreter(redirection: str, code: int, message: str) -> None:
    installed = Path(sys.executable).with_name("twotower-spec")
    words = " ".join(map(str, [installed, *COMMANDS["inspect"]]))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {redirection}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert message in done.stderr and done.stderr.count("\n") == (1 if message else 0)
