"""Command lines that nobody meant, of every command, up to where models would be loaded or anything started."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.inputs import HOSTILE_NUMBERS, HOSTILE_TEXT
from tests.fuzz.refusal import LONGEST_S, check_message, fuzzed
from twotower_spec.cli import app as command_line
from twotower_spec.demo import trio_path
from twotower_spec.training.pipeline import STAGES

GROUPS = ("bench", "train")


class TakenError(Exception):
    """A command line was taken: models would be loaded now."""


def taken(*arguments: Any, **named: Any) -> None:
    raise TakenError


# What loads models, starts processes or connects to somewhere.
WORK = (
    "twotower_spec.model.TwoTowerModel.from_pretrained",
    "twotower_spec.training.pipeline.sharing_cores",
    "twotower_spec.cli.doctor.examine",
    "twotower_spec.cli.train.evaluate_side_by_side",
    "twotower_bench.cli.demo.run_demo",
    "twotower_bench.cli.demo.standalone_demo",
    "twotower_bench.cli.acceptance.complete",
    "twotower_bench.cli.serve.complete",
    "twotower_bench.cli.serve.Endpoint.of_running_server",
    "twotower_bench.cli.standalone.complete",
    "twotower_bench.cli.sweep.complete",
    "twotower_bench.cli.towers.measure_all",
)


@functools.cache
def options_of() -> dict[tuple[str, ...], list[str]]:
    """Options of every command but lm-eval, which reads its own."""
    root: Any = typer.main.get_command(command_line.build_app())
    found: dict[tuple[str, ...], list[str]] = {}
    for name, command in root.commands.items():
        inner = command.commands if name in GROUPS else {"": command}
        for last, one in inner.items():
            path = (name, last) if last else (name,)
            found[path] = [option for param in one.params for option in param.opts if option.startswith("-")]
    del found["lm-eval",]
    return found


@pytest.fixture(scope="module", autouse=True)
def _lm_eval() -> None:
    """Imports lm-eval and lists its thousands of tasks: 9 s and 1.4 GiB that no command line answers for."""
    from lm_eval.tasks import TaskManager

    TaskManager()


PLAIN = (
    "1",
    "7",
    "1,2",
    "0.5",
    "fixed",
    "throughput",
    "cpu",
    "cuda:9",
    "meta",
    "float32",
    "ar",
    "{}",
    '{"num_speculative_tokens": 0}',
    '{"twotower": 7}',
    "ttft:1",
    "trio",
    "ngram",
    "a={}",
    "model",
    "rows.jsonl",
    "new.jsonl",
    "-",
    "--",
    "--help",
    "hub/none",
)
# Never an absolute path or one that leads up: commands write where they are told to.
words = st.sampled_from(PLAIN) | st.sampled_from([text for text in HOSTILE_TEXT if "\0" not in text])
words |= st.sampled_from([str(number) for number in HOSTILE_NUMBERS[:-4]]) | st.sampled_from(["[" * 3000, "9" * 5000])


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    path = draw(st.sampled_from(sorted(options_of())))
    line = list(path)
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.integers(0, 3)):
            line.append(draw(st.sampled_from(options_of()[path])))
        if draw(st.integers(0, 3)):
            line.append(draw(words))
    return line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model that has no weights; commands are made once, and none begins to work."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trio_path("twotower") / name, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One and two"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    app = command_line.build_app()
    monkeypatch.setattr(command_line, "build_app", lambda: app)
    for place in WORK:
        monkeypatch.setattr(place, taken)
    monkeypatch.setattr("twotower_spec.training.pipeline.STAGES", dict.fromkeys(STAGES, taken))
    return tmp_path


@fuzzed(share=1 / 2)
@given(command_lines())
@example(["bench", "acceptance", "--verifier", "[" * 3000, "--drafter", "model"])
@example(["train", "all", "--output", "[" * 3000])
@example(["train", "all", "--output", "rows.jsonl"])
@example(["train", "all", "-", "--output", "rows.jsonl"])
@example(["train", "evaluate", "--output", "[" * 3000])
@example(["train", "evaluate", "--json", "[" * 3000 + "/new.json"])
@example(["bench", "standalone", "--task", "gsm8k", "--include-path", "[" * 3000])
@example(["bench", "standalone", "--repeat", "2147483648"])
@example(["bench", "acceptance", "--verifier", "model", "--drafter", "model", "--repeat", "9223372036854775808"])
def test_command_line(folder: Path, line: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    code: Any = "taken"
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.suppress(TakenError),
    ):
        patched.setattr(sys, "argv", ["twotower-spec", *line])
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One and two\n")))
        try:
            command_line.main()
        except SystemExit as end:
            code = end.code or 0
    assert time.process_time() - began < LONGEST_S
    assert code in ("taken", 0, 2), code
    if code == 2 and err.getvalue():
        assert err.getvalue().startswith("error: ") and err.getvalue().endswith("\n")
        check_message(err.getvalue()[:-1].removeprefix("error: "))
