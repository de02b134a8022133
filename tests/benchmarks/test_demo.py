"""The demo in real vLLM, small; what it refuses; and what it says when an engine dies."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.vllm_plugin.fork_server import share_forks
from twotower_bench.child_process import ChildError
from twotower_bench.cli.demo import print_rows, print_text, run_demo
from twotower_bench.demo import DemoRow, Sizes, demo_engines, demo_uses, rows_of
from twotower_bench.engines import Asked, Piece, ServeOrder
from twotower_bench.records import Load, ServedRequest, ServingCell, System
from twotower_spec.cli import main
from twotower_spec.demo import demo_prompts
from twotower_spec.errors import ArgumentError
from twotower_spec.files import check_writable, write_atomically

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"verifier": ["none", "ngram", "draft_model", "twotower"], "self": ["none", "twotower"]}

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@dataclass(frozen=True)
class Run:
    text: str
    record: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    file = tmp_path_factory.mktemp("demo") / "figures.json"
    options = ["--prompts", "1", "--max-new-tokens", "24", "--repeats", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "twotower_spec.cli", "demo", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return Run(done.stdout, json.loads(file.read_text()), file.parent)


def cell(
    system: System, repeat: int, *token_ids: int, seconds: float = 1.0, drafts: Any = (), accepted: Any = ()
) -> Any:
    request = ServedRequest("0", "maths", 3, token_ids, 0.1, seconds, (), drafts, accepted)
    return ServingCell(system, Load("all", 8), repeat, seconds, (request,))


def terminal() -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, width=100, highlight=False), file


@needs_vllm
@pytest.mark.slow
def test_json_file_has_machine_versions_and_a_row_per_use_system_and_batch_size(run: Run) -> None:
    assert set(run.record) == {"machine", "versions", "rows"}
    assert set(run.record["versions"]) == {"vllm", "torch", "transformers", "twotower-spec"}
    rows = run.record["rows"]
    assert [(row["use"], row["batch_size"], row["system"]) for row in rows] == [
        (use, size, name) for use, names in NAMES.items() for size in (1, 8) for name in names
    ]
    assert {frozenset(row) for row in rows} == {
        frozenset({"use", "system", "batch_size", "tokens_per_s", "acceptance_length", "identical"})
    }
    assert list(run.folder.iterdir()) == [run.folder / "figures.json"]


@needs_vllm
@pytest.mark.slow
def test_every_system_gives_the_tokens_of_no_speculation_and_drafts_are_accepted(run: Run) -> None:
    rows = run.record["rows"]
    assert all(row["identical"] is True and row["tokens_per_s"] > 0 for row in rows)
    lengths = {(row["use"], row["system"], row["batch_size"]): row["acceptance_length"] for row in rows}
    assert all(lengths[use, "none", size] == 1.0 for use in NAMES for size in (1, 8))
    assert all(lengths["verifier", name, size] > 1.0 for name in ("ngram", "draft_model") for size in (1, 8))
    # Whether drafts pay is for the clock to say; the texts that are shown are drafted for in any case.
    assert all(lengths[use, "twotower", size] >= 1.0 for use in NAMES for size in (1, 8))
    shown = [int(count) for count in re.findall(r"steps of the verifier: (\d+) accepted drafts", run.text)]
    assert len(shown) >= 2 and all(count > 0 for count in shown)


@needs_vllm
@pytest.mark.slow
def test_demo_shows_texts_of_both_uses_a_table_and_what_it_ran_on(run: Run) -> None:
    for prompt in demo_prompts(1):
        assert f"{prompt.category}, held out by {prompt.held_out}: {prompt.source}" in run.text
        assert prompt.prompt in run.text
    assert run.text.count("steps of the verifier") == 3
    assert run.text.partition("And the same model for itself")[2].count("steps of the verifier") == 1
    assert "adaptive policy learns what pays" in run.text
    expected = []
    for use in demo_uses():
        for size in (1, 8):
            expected += [f"{use.title}, batch {size}", *(system.title for system in use.systems)]
    start = run.text.index(f"\n{expected[0]}\n") + 1
    table = [re.split(" {2,}", line) for line in run.text[start:].splitlines()[: len(expected)]]
    assert [row[0] for row in table] == expected
    assert {row[4] for row in table if len(row) > 1} == {"yes"}
    assert f"vllm {run.record['versions']['vllm']}" in run.text.splitlines()[-1]
    assert "\x1b" not in run.text and "WARNING" not in run.text


@needs_vllm
@pytest.mark.slow
def test_engine_that_cannot_load_gives_one_error_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_forks(monkeypatch)
    console, _ = terminal()
    with pytest.raises(ChildError) as caught:
        run_demo(console, Sizes(1, 8, 1), verifier=tmp_path / "absent")
    first, *last = str(caught.value).splitlines()
    assert first == "the engine with TwoTower ended with exit code 1 while loading; the last it said was:"
    assert 1 <= len(last) <= 8 and str(tmp_path / "absent") in "\n".join(last)


@needs_vllm
@pytest.mark.slow
def test_engine_that_dies_at_work_gives_one_error_with_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    share_forks(monkeypatch)
    use = demo_uses()[0]
    with demo_engines([replace(use, systems=use.systems[:1])]) as engines, pytest.raises(ChildError) as caught:
        engines.use(*use.engines[:1]).serve(
            ServeOrder((Asked("0", "maths", "No token is wanted."),), 1, max_new_tokens=0)
        )
    assert "no speculation ended with exit code 1 while generating" in str(caught.value)
    assert "max_tokens must be at least 1, got 0" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompts", "0"], "--prompts 0 is not allowed; give an integer from 1 to 72"),
        (["--prompts", "73"], "--prompts 73 is not allowed; give an integer from 1 to 72"),
        (["--max-new-tokens", "385"], "--max-new-tokens 385 is not allowed; give an integer from 1 to 384"),
        (["--repeats", "-1"], "--repeats -1 is not allowed; give an integer from 1 to 1000"),
        (["--standalone", "--json", "figures.json"], "--repeats and --json are about the comparison in vLLM"),
        pytest.param(["--json", "."], "--json . is not a regular file; give another", marks=needs_vllm),
        pytest.param(
            ["--json", "absent/figures.json"],
            "--json absent/figures.json cannot be written (No such file or directory); give another",
            marks=needs_vllm,
        ),
    ],
)
def test_option_out_of_range_is_refused_in_one_sentence_before_anything_starts(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "demo", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {sentence}") and said.err.count("\n") == 1


def test_one_other_token_in_one_repeat_is_not_identical() -> None:
    use = demo_uses()[0]
    none, _, _, two_tower = use.systems
    cells = [cell(none, 0, 5, 6, 7), cell(two_tower, 0, 5, 6, 7), cell(none, 1, 5, 6, 7), cell(two_tower, 1, 5, 6, 8)]
    assert {row.system: row.identical for row in rows_of(cells, use)} == {"none": True, "twotower": False}
    assert all(row.identical for row in rows_of(cells[:3], use))


def test_figures_are_medians_over_repeats_and_tokens_per_drafted_step() -> None:
    use = demo_uses()[1]
    drafts = {"drafts": (3, 0, 2), "accepted": (2, 0, 1)}
    cells = [
        cell(use.systems[0], i, 1, 2, 3, 4, seconds=seconds, **drafts) for i, seconds in enumerate((1.0, 8.0, 2.0))
    ]
    assert rows_of(cells, use) == [DemoRow("self", "none", 8, 2.0, 2.5, True)]


def test_accepted_drafts_are_green_in_a_terminal_and_unmarked_elsewhere() -> None:
    (prompt, _) = demo_prompts(1)
    pieces = [Piece("", " The", 0, False), Piece(" answer is", " 7", 2, False), Piece(" pens", ".", 1, True)]
    console, file = terminal()
    print_text(console, prompt, pieces)
    assert prompt.prompt + " The answer is 7 pens.\n[6 tokens in 3 steps of the verifier: 3 accepted" in file.getvalue()
    coloured = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
    print_text(coloured, prompt, pieces)
    assert "\x1b[32m answer is\x1b[0m 7\x1b[32m pens\x1b[0m.\n" in coloured.file.getvalue()  # type: ignore[attr-defined]


def test_table_has_the_speed_up_over_no_speculation_of_the_same_use_and_batch_size() -> None:
    console, file = terminal()
    rows = [DemoRow("verifier", "none", 1, 100.0, 1.0, True), DemoRow("verifier", "twotower", 1, 250.0, 5.25, False)]
    print_rows(console, demo_uses(), [*rows, DemoRow("self", "none", 1, 500.0, 1.0, True)])
    assert [re.split(" {2,}", line) for line in file.getvalue().splitlines()[2:]] == [
        ["TwoTower for a larger verifier, batch 1"],
        ["no speculation", "100", "1.00", "1.00", "yes"],
        ["TwoTower", "250", "2.50", "5.25", "no"],
        ["TwoTower for itself, batch 1"],
        ["no speculation", "500", "1.00", "1.00", "yes"],
    ]


def test_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text("before")
    check_writable(file)
    assert file.read_text() == "before"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    with pytest.raises(ArgumentError, match="cannot be written"):
        check_writable(tmp_path / "absent" / "figures.json")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
