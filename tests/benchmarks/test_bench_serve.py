"""`twotower-spec bench serve`: real servers under vLLM's load generator, and what is refused before they start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.vllm_plugin.fork_server import run_forked, share_forks
from tests.vllm_plugin.server import serving
from twotower_bench.child_process import ChildError, ChildProcess
from twotower_bench.cli.measured_systems import systems_of
from twotower_bench.cli.options import Models
from twotower_bench.cli.serve import points_file, serve
from twotower_bench.cli.serve_options import most_at_once, serve_arguments, traffics_of
from twotower_bench.cli.tables import print_section
from twotower_bench.engine_flags import engine_flags
from twotower_bench.records import LatencyBound, LoadPoint, System, Traffic, read_row
from twotower_bench.report.reading import Measurements
from twotower_bench.report.serve import serve_section
from twotower_bench.servers import ServePlan, Workload
from twotower_bench.servers.load_generator import as_point
from twotower_bench.summary import summarise_points
from twotower_spec.cli.app import bench_app
from twotower_spec.errors import ArgumentError

pytestmark = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")

NONE, TWO_TOWER = System("none", "no speculation"), System("twotower", "TwoTower", {"model": "T"})
WORKLOAD = Workload(("one", "two", "three"), False, 16, 0.0, LatencyBound(ttft=500))
SMALL = ["--concurrency", "2", "--request-rate", "8", "--prompts", "4", "--max-new-tokens", "24", "--repeat", "1"]
# The adaptive policy draws on the clock, and may find that nothing pays.
FIXED = ["--speculative-config", '{"num_speculative_tokens": 7, "twotower": {"policy": "fixed"}}']
# Nobody listens there.
CLOSED_PROXY = "http://127.0.0.1:9"
Capture = pytest.CaptureFixture[str]


def bench(*arguments: object) -> None:
    app = bench_app({"serve": serve})
    app(["serve", *map(str, arguments)], standalone_mode=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(ChildProcess, "__init__", refuse)


@dataclass(frozen=True)
class Run:
    """A finished run on the trio."""

    file: Path
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    file = tmp_path_factory.mktemp("serve") / "points.jsonl"
    code = "from tests.benchmarks.test_bench_serve import bench; import sys; bench(*sys.argv[1:])"
    arguments = ["--only", "twotower", *SMALL, *FIXED, "--json", str(file)]
    # A proxy that would answer nothing is not asked.
    environment = {**os.environ, "http_proxy": CLOSED_PROXY, "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(file, done.stdout)


@pytest.mark.slow
def test_every_point_is_a_line_that_says_where_it_was_measured(run: Run) -> None:
    rows = rows_of(run.file)
    points = [read_row(LoadPoint, row) for row in rows]
    assert {(one.system.name, str(one.traffic)) for one in points} == {
        (name, load) for name in ("none", "twotower") for load in ("concurrency 2", "8 requests/s")
    }
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert all(row["kind"] == "load_point" and row["machine"]["processor"] and row["versions"] for row in rows)


@pytest.mark.slow
def test_texts_are_those_of_no_speculation_in_fewer_steps(run: Run) -> None:
    figures = summarise_points([read_row(LoadPoint, row) for row in rows_of(run.file)])
    ours = [one for one in figures if one.system.name == "twotower"]
    assert len(ours) == 2
    for one in ours:
        assert one.num_different == one.num_failed == 0
        assert one.acceptance_length is not None and one.acceptance_length > 1.5
        assert one.tokens_per_s.value > 0 and 0 < one.ttft.median < one.e2el.median


@pytest.mark.slow
def test_table_names_every_system_and_the_highest_loads(run: Run) -> None:
    assert run.output.count("no speculation") >= 4 and run.output.count("TwoTower") >= 4
    assert "Good requests: within TTFT 500 ms, TPOT 50 ms." in run.output
    (highest,) = [part for part in run.output.split("\n\n") if part.startswith("System") and "Closed loop" in part]
    assert [line.split("  ")[0] for line in highest.splitlines()[:3]] == ["System", "no speculation", "TwoTower"]


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_starts")
def test_finished_run_starts_nothing_when_it_is_given_again(run: Run, capsys: Capture) -> None:
    before = run.file.read_bytes()
    bench("--only", "twotower", *SMALL, *FIXED, "--json", run.file)
    assert run.file.read_bytes() == before
    assert "no speculation" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_starts")
def test_file_of_other_prompts_or_another_config_is_refused(run: Run) -> None:
    with pytest.raises(ArgumentError, match="other prompts or settings"):
        bench(*SMALL, "--prompts", 5, "--json", run.file)
    with pytest.raises(ArgumentError, match="twotower with other settings"):
        bench(*SMALL, "--speculative-config", '{"num_speculative_tokens": 3}', "--json", run.file)


@pytest.mark.slow
def test_server_that_fails_is_one_sentence_with_its_last_lines_and_keeps_what_was_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_forks(monkeypatch)
    file = Path(shutil.copy(run.file, tmp_path))
    systems = ["--only", "twotower,broken", "--rival", 'broken={"method": "no_such_method"}']
    with pytest.raises(ChildError, match=r"(?s)^the server with broken ended with exit code .* while loading.*no_such"):
        bench(*systems, *SMALL, *FIXED, "--json", file)
    assert rows_of(file) == rows_of(run.file)


@pytest.mark.slow
def test_server_that_runs_already_is_measured_alone(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "points.jsonl"
    with serving() as server:
        loads = ["--concurrency", "", "--request-rate", "8", "--prompts", "4", "--max-new-tokens", "8", "--repeat", "1"]
        bench("--base-url", server.endpoint.url, *loads, "--json", file)
    (point,) = (read_row(LoadPoint, row) for row in rows_of(file))
    assert (point.num_completed, point.num_output_tokens) == (4, 32)
    assert "the server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "", "--request-rate", ""], "both empty"),
        (["--concurrency", "1,many"], "--concurrency '1,many' is not a list of numbers"),
        (["--concurrency", "0"], "concurrency 0 is not allowed"),
        (
            ["--concurrency", "1,8", "--prompts", "4"],
            "8 needs 8 prompts at least, there are 4; give --prompts 8 or more",
        ),
        (["--request-rate", "-1"], "request rate -1.0 is not above 0"),
        (["--goodput", "itl:5"], "goodput bound"),
        (["--temperature", "-1"], "--temperature"),
        (["--repeat", "0"], "--repeat"),
        (["--prompts", "0"], "--prompts"),
        (["--max-new-tokens", "600"], "do not fit the bundled"),
        (["--servers", "apart"], "give one of auto, together, in-turn"),
        (["--only", "twotower,medusa"], "--only medusa is not there; give some of ngram"),
        (["--rival", "medusa"], "has no name"),
        (["--rival", "medusa={"], "is not JSON"),
        (["--rival", "ngram={}"], "--rival ngram is taken"),
        (["--speculative-config", "[1]"], "is not an object"),
        (["--serve-args", "--port=8000"], "--serve-args has --port=8000"),
        (["--serve-args", "--dtype 'half"], "cannot be split"),
        (["--verifier", "owner/model"], "came without --drafter"),
        (["--verifier", "./nowhere", "--drafter", "owner/model"], "no directory with a config.json"),
        (["--base-url", "http://127.0.0.1:9", "--drafter", "owner/model"], "--base-url measures a server that runs"),
        (["--base-url", "http://127.0.0.1:9"], "does not answer as vLLM does"),
        (["--dataset", "nothing"], "unknown dataset"),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_option_that_cannot_be_is_refused_before_anything_starts(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bench(*arguments)


def plan(mode: Any, num_repeats: int = 2) -> ServePlan:
    traffics = traffics_of("1,4,2", "3")
    return ServePlan("V", (), (NONE, TWO_TOWER), traffics, num_repeats, mode, WORKLOAD)


MODELS = Models("V", "T", "D", {})


def test_no_speculation_is_measured_again_where_there_are_repeats_for_a_verdict() -> None:
    rival = ['mine={"method": "suffix"}']
    names = [one.name for one in systems_of(MODELS, None, rival, None, num_repeats=3)]
    assert [name for name in names if name != "suffix"] == [
        *("none", "none_again", "ngram", "draft_model", "mine", "twotower"),
    ]
    assert [one.name for one in systems_of(MODELS, None, rival, "twotower", num_repeats=2)] == ["none", "twotower"]


def test_speculative_config_changes_what_it_names_and_leaves_the_rest() -> None:
    _, ours = systems_of(MODELS, '{"twotower": {"steps_per_block": 2}}', None, "twotower", num_repeats=1)
    assert ours.speculative_config == {
        "model": "T",
        "num_speculative_tokens": 15,
        "twotower": {"steps_per_block": 2},
    }


def test_arguments_of_the_user_come_after_ours() -> None:
    ours = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16}
    arguments = serve_arguments("--max-num-seqs 64", ours)
    assert " ".join(arguments) == "--dtype float32 --enforce-eager --max-num-seqs 16 --max-num-seqs 64"


def run_of(plan: ServePlan, server: object = "") -> str:
    return points_file(plan, server).run


def test_file_is_gone_on_with_for_more_loads_but_not_with_other_arguments_prompts_or_verifier() -> None:
    begun = run_of(plan("together"))
    assert run_of(replace(plan("together", 5), traffics=traffics_of("64", ""), arguments=("--max-num-seqs",))) == begun
    edited = replace(WORKLOAD, prompts=("one", "two", "three, edited"))
    others = [replace(plan("together"), workload=edited), replace(plan("together"), verifier="W"), plan("in-turn")]
    assert begun not in [run_of(plan("together"), "--seed 1"), *map(run_of, others)]


def test_verifier_in_a_directory_is_the_same_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "V").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_of(plan("together")) == run_of(replace(plan("together"), verifier=str(tmp_path / "V")))


def test_servers_of_the_trio_hold_all_requests_of_the_largest_load() -> None:
    assert most_at_once(traffics_of("1,32", "2")) == 32


def write_parsed(names: str, output: str, *flags: str) -> None:
    """Finds what vLLM makes of flags, for arguments of these names."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    found = {name: getattr(parsed, name) for name in json.loads(names)}
    Path(output).write_text(json.dumps(found, default=repr))


@pytest.mark.slow
def test_flags_are_what_vllm_makes_of_them(tmp_path: Path) -> None:
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 512,
        "compilation_config": {"cudagraph_mode": "NONE"},
        "ignore_patterns": ["*.bin", "*.pt"],
        "quantization": None,
    }
    order = (json.dumps(list(arguments)), str(tmp_path / "parsed.json"), *engine_flags(arguments))
    code = run_forked("tests.benchmarks.test_bench_serve:write_parsed", *order, folder=tmp_path)
    assert code == 0, (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "parsed.json").read_text())
    assert "NONE" in str(found.pop("compilation_config"))
    assert found == {name: value for name, value in arguments.items() if name != "compilation_config"}


def result(**given: Any) -> dict[str, Any]:
    times = {f"{which}_{name}_ms": 50.0 for which in ("median", "p99") for name in ("ttft", "tpot", "itl", "e2el")}
    return {
        **times,
        "duration": 2.0,
        "request_goodput": 0.5,
        "total_output_tokens": 30,
        "generated_texts": ["a", "", "c"],
        "errors": ["", "Internal Server Error", ""],
        **given,
    }


def printed(points: list[LoadPoint]) -> str:
    console = Console(width=80, file=StringIO(), record=True)
    print_section(console, serve_section(Measurements("", load_points=points)))
    return console.export_text()


def test_failed_request_is_counted_in_the_tables() -> None:
    point = as_point(result(), WORKLOAD, NONE, Traffic(concurrency=4), repeat=0)
    assert point.texts == ("a", None, "c") and point.num_good == 1
    (table,) = [part for part in printed([point]).split("\n\n") if "Failed" in part.partition("\n")[0]]
    assert "concurrency 4; 3 prompts\n" in table and re.search(r"no speculation .* 1\n", table)


def test_tables_fit_80_columns_and_say_all_of_every_cell() -> None:
    points = [
        as_point(
            result(median_e2el_ms=54321.0, p99_e2el_ms=54321.0, median_ttft_ms=54321.0, p99_ttft_ms=54321.0),
            WORKLOAD,
            system,
            Traffic(concurrency=128),
            repeat,
        )
        for repeat in range(3)
        for system in (NONE, System("draft_model", "AR draft model"), System("none_again", "none again (A/A)"))
    ]
    text, section = printed(points), serve_section(Measurements("", load_points=points))
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("System")]
    sentences = {section.finding, *section.notes, *(table.note for table in section.tables)}
    assert max(len(line) for lines in tables for line in lines if line not in sentences) <= 80
    cells = [cell for table in section.tables for row in table.rows for cell in (*table.columns, *row.values())]
    assert all(cell in text for cell in cells)
