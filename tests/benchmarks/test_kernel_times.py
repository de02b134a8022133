import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from benchmarks.harness import OURS, benchmark_modules
from benchmarks.isolation import CallFailed, Isolated
from benchmarks.kernel_times import Outcome, as_json, console_table, main, measure_all, readme_row, readme_section
from benchmarks.readme import write_section
from tests.benchmarks.toy import COMPOSITION, FakeClock

MACHINE: dict[str, str | int | None] = {
    "gpu": "NVIDIA Toy",
    "driver": "1.2",
    "torch": "2",
    "triton": "3",
    "commit": "c",
}


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as process:
        yield process


@pytest.fixture(scope="module")
def outcomes(isolated: Isolated) -> dict[str, Outcome]:
    """Outcomes of the toy and of a real op, by shape."""
    modules = {"toy": "tests.benchmarks.toy", "noise": benchmark_modules()["noise"]}
    found = list(measure_all(modules, "cpu", FakeClock(), isolated, 300))
    assert len(found) >= 7
    return {outcome.shape: outcome for outcome in found}


def test_ours_is_compared_with_its_rivals_and_with_the_copy(outcomes: dict[str, Outcome]) -> None:
    # 3 MB in 0.25 ms are 12 GB/s, of 48.
    row = readme_row(outcomes["good"], 48.0)
    assert row == ["toy", "good", "3", "500.0", "250.0", "12", "25%", f"{COMPOSITION}: 3.00 (3.00)", "1 / 1"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("systems disagree", "failed: AssertionError: Tensor-likes are not close!"),
        ("ends its process", "failed: its process ended with exit code 3"),
    ],
)
def test_failed_case_stands_in_the_table(outcomes: dict[str, Outcome], shape: str, reason: str) -> None:
    assert reason in readme_row(outcomes[shape], 48.0)


def test_call_that_cannot_be_captured_is_measured_without_graph(outcomes: dict[str, Outcome]) -> None:
    assert readme_row(outcomes["no graph"], 48.0)[3:5] == ["2000.0", "no"]
    assert outcomes["no graph"].ours.failure.startswith("no graph: RuntimeError: operation not permitted")


def test_failing_rival_leaves_our_figures(outcomes: dict[str, Outcome]) -> None:
    row = readme_row(outcomes["rival fails"], 48.0)
    assert row[3] == "1000.0" and "ZeroDivisionError" in row[7]


def test_cases_of_a_real_op_run(outcomes: dict[str, Outcome]) -> None:
    real = [outcome for outcome in outcomes.values() if outcome.op == "noise"]
    assert real and all(outcome.ours.call and not outcome.failure for outcome in real)


def test_json_has_every_figure_and_failure(outcomes: dict[str, Outcome]) -> None:
    figures = json.loads(json.dumps(as_json(list(outcomes.values()), MACHINE, 48.0, "a command")))
    good, disagree = figures["cases"][:2]
    assert good["systems"][OURS]["graph"] == {"median_ms": 0.25, "low_ms": 0.225, "high_ms": 0.275}
    assert good["systems"][OURS]["of_copy"] == 0.25
    assert good["speed_up_over"][COMPOSITION] == {"call": 3.0, "graph": 3.0}
    assert disagree["systems"] == {} and "not close" in disagree["failure"]


def test_readme_section_names_hardware_and_command(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    write_section("measured", readme_section(list(outcomes.values()), MACHINE, 48.0, "a command"), readme)
    text = readme.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "NVIDIA Toy, driver 1.2; torch 2, triton 3; commit c; `a command`; a copy" in text
    assert text.count("\n| toy |") == 6
    lines = sum(max(1, len(outcome.systems)) for outcome in outcomes.values())
    assert console_table(list(outcomes.values()), 48.0).row_count == lines


def test_section_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no section measured; put the lines"):
        write_section("measured", "text", tmp_path / "README.md")


def test_cases_after_the_time_are_named_as_not_run(isolated: Isolated) -> None:
    late = list(measure_all({"toy": "tests.benchmarks.toy"}, "cpu", FakeClock(), isolated, 0))
    assert {outcome.failure for outcome in late} == {"not run, the time was up"}


def test_benchmark_that_cannot_be_imported_is_one_failed_line(isolated: Isolated) -> None:
    (outcome,) = measure_all({"gone": "tests.benchmarks.gone"}, "cpu", FakeClock(), isolated, 300)
    assert outcome.failure == "ModuleNotFoundError: No module named 'tests.benchmarks.gone'"


def test_call_that_hangs_is_given_up(isolated: Isolated) -> None:
    isolated.call(abs, -1, seconds=120)  # starts the process
    with pytest.raises(CallFailed, match="took more than 0 s"):
        isolated.call(time.sleep, 60, seconds=0.1)
    assert isolated.call(abs, -1, seconds=120) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left:
        main()
    assert left.value.exit_code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("No CUDA device is here") and err.count("\n") == 1
