"""`bench acceptance` and `bench sweep` in real vLLM, small; how they go on; and what they refuse."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.nemotron_h import save_nemotron_h
from tests.vllm_plugin.fork_server import share_forks
from twotower_bench.cli.acceptance import TABLES
from twotower_bench.measurement_file import SystemsFile
from twotower_bench.records import Load, ServingCell, read_row
from twotower_bench.serving_profile import ServingProfile
from twotower_spec.cli import main
from twotower_spec.demo import trio_path

ROOT = Path(__file__).resolve().parents[2]
LOOKUP = 'short={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 2}'
SMALL = ["--max-new-tokens", "16", "--repeat", "1"]
ACCEPTANCE = ["acceptance", "--prompts", "4", "--category", "maths", "--category", "python", *SMALL]
ACCEPTANCE += ["--rival", LOOKUP, "--only", "short,twotower"]
# The adaptive policy draws on the clock, and may find that nothing pays.
ACCEPTANCE += ["--speculative-config", '{"num_speculative_tokens": 15, "twotower": {"policy": "fixed"}}']
SWEEP = ["sweep", "--prompts", "4", *SMALL, "-S", "4", "--steps", "1,2", "--policy", "fixed,adaptive"]
SWEEP += ["--concurrency", "1,2"]

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@dataclass(frozen=True)
class Run:
    """Text that a command printed, and its file."""

    text: str
    file: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    @property
    def cells(self) -> list[ServingCell]:
        return [read_row(ServingCell, row) for row in self.rows]


def run_bench(folder: Path, *options: str) -> Run:
    """Runs the command in this process; as a process of its own it is in the test of its end."""
    file, text = folder / "cells.jsonl", StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        share_forks(patch)
        patch.setattr(sys, "argv", ["twotower-spec", "bench", *options, "--json", str(file)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, text.getvalue()
    return Run(text.getvalue(), file)


@pytest.fixture(scope="module")
def acceptance(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_bench(tmp_path_factory.mktemp("acceptance"), *ACCEPTANCE)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sweep")
    return run_bench(folder, *SWEEP, "--profile", str(folder / "profile.json"))


@needs_vllm
@pytest.mark.slow
def test_every_system_is_measured_for_every_category_and_gives_the_text_of_no_speculation(acceptance: Run) -> None:
    cells = {(cell.system.name, cell.load): cell for cell in acceptance.cells}
    names = ("none", "short", "twotower")
    loads = [Load("maths", 1), Load("python", 1)]
    assert set(cells) == {(name, load) for name in names for load in loads}
    for load in loads:
        texts = [[one.token_ids for one in cells[name, load].requests] for name in names]
        assert len(texts[0]) == 2 and all(texts[0]) and texts[1:] == texts[:1] * 2


@needs_vllm
@pytest.mark.slow
def test_tokens_are_the_first_and_those_of_every_step_and_drafts_are_accepted(acceptance: Run) -> None:
    for cell in acceptance.cells:
        for request in cell.requests:
            counted = 1 + sum(request.num_accepted_tokens) + len(request.num_accepted_tokens)
            # The last step may go beyond the end of the text.
            assert 0 <= counted - len(request.token_ids) <= (request.num_accepted_tokens or (0,))[-1]
            pairs = zip(request.num_accepted_tokens, request.num_draft_tokens, strict=True)
            assert all(accepted <= drafted for accepted, drafted in pairs)
            assert 0 < request.first_token_s < request.seconds and len(request.gaps_s) <= len(request.num_draft_tokens)
    drafted = {cell.system.name: sum(sum(r.num_accepted_tokens) for r in cell.requests) for cell in acceptance.cells}
    assert drafted["twotower"] > drafted["none"] == 0


@needs_vllm
@pytest.mark.slow
def test_the_drafter_counts_what_the_scheduler_saw(acceptance: Run) -> None:
    for cell in acceptance.cells:
        assert (cell.drafting is not None) == (cell.system.name == "twotower")
        if cell.drafting:
            seen = sum(
                min(a + 1, d)
                for r in cell.requests
                for d, a in zip(r.num_draft_tokens, r.num_accepted_tokens, strict=True)
            )
            counted = sum(one.num_drafts for one in cell.drafting.calibration)
            # A request's last round is verified, and then it is gone before the drafter is told.
            assert 0.5 * seen < counted <= seen
            assert set(cell.drafting.seconds) == {"extend", "denoise", "host"}
            assert cell.drafting.request_denoiser_passes >= cell.drafting.denoiser_passes > 0


@needs_vllm
@pytest.mark.slow
def test_rows_and_the_last_lines_say_what_was_measured_on(acceptance: Run) -> None:
    for row in acceptance.rows:
        assert row["kind"] == "serving_cell" and row["machine"]["threads"] == 1
        assert row["machine"]["torch"] and row["command"].startswith("twotower-spec bench acceptance --prompts 4")
        assert "vllm" in row["versions"] and row["versions"]["twotower-spec"]
    assert "all prompts, 1 at once" in acceptance.text and "maths, 1 at once" in acceptance.text
    assert all(f"\n{title}\n" in acceptance.text for title in TABLES)
    assert "too few repeats" in acceptance.text
    assert acceptance.text.splitlines()[-1].startswith("twotower-spec bench acceptance")


@needs_vllm
@pytest.mark.slow
def test_mtp_layers_of_the_verifier_are_a_rival(tmp_path: Path) -> None:
    verifier = save_nemotron_h(tmp_path / "verifier", vocabulary=2048, with_mtp=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trio_path("twotower") / name, verifier)
    models = ["--verifier", str(verifier), "--drafter", str(trio_path("twotower"))]
    models += ["--engine-args", '{"dtype": "float32", "enforce_eager": true, "max_model_len": 512}']
    few = ["--prompts", "2", "--category", "maths", "--rival", "mtp", "--only", "mtp,twotower"]
    cells = run_bench(tmp_path, "acceptance", *models, *SMALL, *few).cells
    texts = {cell.system.name: [one.token_ids for one in cell.requests] for cell in cells}
    assert set(texts) == {"none", "mtp", "twotower"}
    assert texts["mtp"] == texts["twotower"] == texts["none"]
    (mtp,) = (cell for cell in cells if cell.system.name == "mtp")
    assert mtp.system.speculative_config == {"method": "mtp", "num_speculative_tokens": 3}
    assert all(max(one.num_draft_tokens) == 3 for one in mtp.requests)


@needs_vllm
@pytest.mark.slow
def test_a_finished_file_is_summed_up_again_without_an_engine(
    acceptance: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = acceptance.file.read_text()
    monkeypatch.setattr("twotower_bench.engines.pool.EngineProcess", None)
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "bench", *ACCEPTANCE, "--json", str(acceptance.file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and acceptance.file.read_text() == before
    tables = capsys.readouterr().out.splitlines()
    assert tables[:5] == acceptance.text.splitlines()[:5]


@needs_vllm
@pytest.mark.slow
def test_a_file_with_the_same_name_for_another_system_is_refused(
    acceptance: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*ACCEPTANCE, "--json", str(acceptance.file), "--speculative-config", '{"num_speculative_tokens": 7}']
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "bench", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "has twotower with other settings" in capsys.readouterr().err


@needs_vllm
@pytest.mark.slow
def test_engines_end_when_the_command_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twotower_spec.cli", "bench", *ACCEPTANCE]
    # By its folder for temporary files, which its engines are started with.
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 150
        while len(processes_in(tmp_path)) < 3:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    finally:
        running.kill()
    assert not processes_in(tmp_path) and not list(tmp_path.iterdir())


def processes_in(folder: Path) -> set[int]:
    """Those whose environment names something in it."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"={folder}/".encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@needs_vllm
@pytest.mark.slow
def test_a_sweep_measures_each_setting_once_and_writes_a_profile(sweep: Run) -> None:
    names = {cell.system.name for cell in sweep.cells}
    assert names == {"none", "fixed-S4-1", "fixed-S4-2-g0.8", "adaptive-S4-1", "adaptive-S4-2-g0.8"}
    assert len(sweep.cells) == 2 * len(names) and {cell.load.concurrency for cell in sweep.cells} == {1, 2}
    texts = {tuple(request.token_ids for request in cell.requests) for cell in sweep.cells}
    assert len(texts) == 1
    profile = ServingProfile.load(sweep.file.parent / "profile.json")
    assert profile.acceptance_lengths and profile.verifier_steps
    (command,) = (line.strip() for line in sweep.text.splitlines() if line.startswith("    vllm serve"))
    assert command.endswith("--dtype float32 --enforce-eager --max-model-len 512")
    assert "LLM(model=" in sweep.text and "plan --profile" in sweep.text


@needs_vllm
@pytest.mark.slow
def test_settings_of_a_sweep_draft_as_they_say(sweep: Run) -> None:
    for cell in sweep.cells:
        setting = cell.system.setting
        if setting and cell.drafting:
            assert all(d <= 4 for request in cell.requests for d in request.num_draft_tokens)
            assert cell.drafting.denoiser_passes <= setting.steps_per_block * cell.drafting.rounds
    by_name = {cell.system.name: cell for cell in sweep.cells if cell.load.concurrency == 1}
    one, two = by_name["fixed-S4-1"].drafting, by_name["fixed-S4-2-g0.8"].drafting
    assert one and two and one.denoiser_passes < two.denoiser_passes


def file_of_cells() -> SystemsFile[ServingCell]:
    return SystemsFile(["content"], "serving_cell", ServingCell, [])


SURROUNDINGS = {"processor": "P", "gpu": None, "threads": 1, "torch": "2.13", "commit": "a"}


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        ({"commit": "b"}, True),
        ({"processor": "Q"}, False),
        ({"gpu": "G"}, False),
        ({"threads": 2}, False),
        ({"torch": "2.14"}, False),
    ],
)
def test_a_file_goes_on_on_the_same_machine_alone(
    change: dict[str, Any], goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for found in (SURROUNDINGS, {**SURROUNDINGS, **change}):
        monkeypatch.setattr("twotower_bench.measurement_file.machine_info", lambda found=found: found)
        runs.append(file_of_cells().run)
    assert (runs[0] == runs[1]) == goes_on


def test_a_file_does_not_go_on_with_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_of_cells().run
    monkeypatch.setattr("twotower_bench.measurement_file.distributions", lambda name: [SimpleNamespace(version="0.99")])
    assert file_of_cells().run != before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["acceptance", "--prompts", "0"], "--prompts 0 is not allowed; give an integer of at least 1"),
        (["acceptance", "--concurrency", "1,x"], "--concurrency '1,x' is not a list of numbers"),
        (["acceptance", "--concurrency", "0"], "--concurrency 0 is not allowed"),
        (
            ["acceptance", "--concurrency", "1,8", "--prompts", "13"],
            "--concurrency 8 needs 8 prompts of each category, python has 4; give --prompts 24 or more, or a lower",
        ),
        (["sweep", "--prompts", "4"], "--concurrency 16 needs 16 prompts at least, there are 4; give --prompts 16 or"),
        (["sweep", "--profile", "/nowhere/p.json"], "--profile /nowhere/p.json cannot be written (No such file"),
        (["acceptance", "--temperature", "3"], "--temperature 3.0 is not allowed; give 0 to 2"),
        (["acceptance", "--verifier", "V"], "--verifier came without --drafter; name both"),
        (["acceptance", "--verifier", "/nowhere", "--drafter", "T"], "--verifier /nowhere is no directory with"),
        (["acceptance", "--chat"], "--chat needs a chat template, and "),
        (["acceptance", "--rival", "{}"], "--rival '{}' has no name; give NAME=JSON"),
        (["acceptance", "--rival", "ngram={}"], "--rival ngram is taken"),
        (["acceptance", "--rival", "mtp", "--rival", "mtp"], "--rival mtp is MTP, and "),
        (["acceptance", "--rival", 'own={"method": "nemotron_h_mtp"}'], "--rival own is MTP, and "),
        (["acceptance", "--rival", "mine=[1]"], "--rival mine '[1]' is not an object"),
        (["acceptance", "--only", "eagle"], "--only eagle is not there; give some of ngram"),
        (["acceptance", "--engine-args", '{"model": "x"}'], "--engine-args cannot have model"),
        (["acceptance", "--engines", "both"], "--engines both is not there; give one of auto, together, in-turn"),
        (["acceptance", "--dataset", "nowhere"], "unknown dataset: nowhere"),
        (["sweep", "--policy", "best"], "policy 'best' is not allowed"),
        (["sweep", "--goal", "fame"], "--goal 'fame' is not there; give one of throughput, latency"),
        (["sweep", "--at-concurrency", "3"], "--at-concurrency 3 is not among --concurrency"),
        (["sweep", "-S", "0"], "block_size 0"),
    ],
)
@needs_vllm
def test_a_bad_option_is_refused_in_one_sentence_before_anything_starts(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twotower_bench.engines.pool.EngineProcess", None)
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "bench", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert said.err.startswith(f"error: {sentence}") and said.err.count("\n") == 1
