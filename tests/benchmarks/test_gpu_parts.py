"""`benchmarks/gpu.sh` and its parts, on a CPU: what they say, what they write, and when they stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.builders import tiny_config
from tests.support.cuda import emulated_devices
from twotower_bench.gpu import goldens, sanity, serving, towers
from twotower_bench.gpu.rows import RowFile
from twotower_bench.records import System
from twotower_bench.towers import GEOMETRIES, first_layers, layers_that_fit
from twotower_spec import TwoTowerModel
from twotower_spec.evaluation import load_prompts
from twotower_spec.towers.model import towers_without_memory

ROOT = Path(__file__).parents[2]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run_script(folder: Path, *parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def some_uses(name: str) -> Mapping[str, goldens.Use]:
    """One of every kind."""
    kinds = {label.partition(", ")[2].partition(",")[0] or label: label for label in goldens.uses_of(name)}
    return {label: goldens.uses_of(name)[label] for label in kinds.values()}


@without_gpu
def test_nothing_is_run_where_there_is_no_gpu(tmp_path: Path) -> None:
    done = run_script(tmp_path, "goldens", "tune")
    assert done.returncode == 1
    assert "\nstopped: cuda:0 is not there: torch " in done.stdout and "sees 0 devices" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"sanity.jsonl", "sanity.log", "summary.txt"}
    (row,) = rows_of(tmp_path / "sanity.jsonl")
    assert row["sane"] is False and row["reason"] in done.stdout


def test_unknown_part_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    done = run_script(tmp_path, "sanity", "everything")
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("gpu.sh: everything is no part; choose among sanity, goldens, tests, towers, vllm")


@pytest.mark.slow
def test_parts_of_a_trial_share_the_time_and_have_a_file_each(tmp_path: Path) -> None:
    done = run_script(tmp_path, "goldens", "towers", DEVICE="cpu", LIMIT_S="2050")
    assert done.returncode == 0, done.stdout
    shares = [line.partition(": ")[0] for line in done.stdout.splitlines() if line.startswith("==")]
    assert shares[:3] == ["== sanity, up to 250 s", "== goldens, up to 900 s", "== towers, up to 900 s"]
    assert "A trial on the CPU: no figure says anything about a GPU." in done.stdout
    assert all(row["equal"] for row in rows_of(tmp_path / "goldens.jsonl"))
    assert [row["kind"] for row in rows_of(tmp_path / "towers.jsonl")][:3] == ["setting", "pass", "kernel"]
    assert (tmp_path / "summary.txt").read_text().count("exit code 0") == 3


def test_part_that_fails_is_told_from_the_others_which_go_on(tmp_path: Path) -> None:
    done = run_script(tmp_path, "kernels", "tables", DEVICE="cpu", ARGS="--op telepathy")
    assert done.returncode == 1
    ended = [line.partition(" after ")[0] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert ended == ["sanity: exit code 0", "kernels: exit code 2", "tables: exit code 2"]
    assert "telepathy" in (tmp_path / "kernels.log").read_text()


def test_part_that_is_killed_leaves_what_it_had_found(tmp_path: Path) -> None:
    file = tmp_path / "goldens.jsonl"
    command = [sys.executable, "-m", "twotower_bench.gpu.goldens", "cpu", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as part:
        while part.poll() is None and (not file.exists() or file.read_text().count("\n") < 3):
            time.sleep(0.05)
        part.kill()
    assert len(rows_of(file)) >= 3


def test_missing_packages_are_named() -> None:
    sanity.check_packages()
    with pytest.raises(
        sanity.NotSane, match=r"^no_such_package, nor_this cannot be imported by .*; put it on PYTHONPATH$"
    ):
        sanity.check_packages(["torch", "no_such_package", "nor_this"])


@pytest.mark.parametrize(("name", "value"), [("TRITON_INTERPRET", "1"), ("TWOTOWER_KERNELS", "torch")])
def test_variable_that_keeps_kernels_from_the_device_is_refused(name: str, value: str) -> None:
    sanity.check_variables({"TRITON_INTERPRET": "0", "TWOTOWER_KERNELS": ""})
    with pytest.raises(sanity.NotSane, match=f"^{name} is '{value}', with which our kernels do not run on the device"):
        sanity.check_variables({name: value})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=without_gpu), "cuda:64"])
def test_device_that_is_no_gpu_is_refused(device: str) -> None:
    with pytest.raises(sanity.NotSane, match=f"^(device )?{device} is n"):
        sanity.check_device(device)


def test_emulated_device_is_not_sane_and_what_is_missing_is_not_there(tmp_path: Path) -> None:
    with emulated_devices(2):
        with pytest.raises(sanity.NotSane, match=r"^cuda:2 is not there: .* sees 2 devices"):
            sanity.check_device("cuda:2")
        assert sanity.main("cuda:0", str(tmp_path / "sanity.jsonl")) == 1
    (row,) = rows_of(tmp_path / "sanity.jsonl")
    assert row["sane"] is False and row["reason"].startswith("Triton's functions are interpreted on the host")


@pytest.mark.gpu
def test_gpu_that_runs_our_kernels_is_sane() -> None:
    sanity.check_device("cuda:0")


@pytest.mark.parametrize("name", goldens.NAMES)
def test_model_on_the_same_device_gives_equal_tokens_in_every_use(name: str) -> None:
    uses = some_uses(name)
    assert len(uses) == 6  # three published modes, self-speculative, and both kinds of sessions
    outcomes = list(goldens.compared(name, goldens.load(name), goldens.load(name), uses))
    assert all(outcome.equal and outcome.num_tokens >= 14 for outcome in outcomes)


def test_damaged_model_is_different_wherever_its_damage_matters() -> None:
    damaged, uses = goldens.load("T1"), some_uses("T1")
    damaged.denoiser.head.neg_()
    outcomes = {outcome.use: outcome for outcome in goldens.compared("T1", goldens.load("T1"), damaged, uses)}
    equal = {use.partition(", ")[2].partition(",")[0] or use for use, one in outcomes.items() if one.equal}
    # Self-speculative text is the context tower's, whatever the denoiser drafts.
    assert equal == {"generate_ar", "self-speculative"}
    assert all(
        ", expected " in one.difference and "DIFFERENT: row" in str(one) for one in outcomes.values() if not one.equal
    )


@pytest.fixture
def small_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts one small checkpoint in the place of the golden ones: T1 takes minutes in the interpreter."""
    config = tiny_config(
        hybrid_override_pattern="M*E",
        mamba_num_heads=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=211,
    )
    TwoTowerModel.from_config(config, dtype="float32").save_pretrained(tmp_path / "small" / "ckpt")
    prompt = {"prompt": [5, 6, 7], "max_new_tokens": 4}
    cases = [
        {"mode": "generate_ar", **prompt},
        {"mode": "generate_mask_diffusion", "block_size": 4, "steps_per_block": 2, **prompt},
    ]
    (tmp_path / "small" / "generation.json").write_text(json.dumps(cases))
    monkeypatch.setattr(goldens, "GOLDEN", tmp_path)
    monkeypatch.setattr(goldens, "NAMES", ("small",))


def leave_out(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    uses_of = goldens.uses_of
    monkeypatch.setattr(
        goldens, "uses_of", lambda name: {label: use for label, use in uses_of(name).items() if label not in names}
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small_golden")
def test_emulated_device_gives_tokens_of_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those that take longest; tests/cuda has them in a shorter form.
    leave_out(monkeypatch, "self-speculative", "drafts ahead of the host")
    with emulated_devices() as usage:
        assert goldens.main("cuda:0", str(tmp_path / "rows.jsonl")) == 0
        assert usage.kernels.total() > 100
    assert capsys.readouterr().out.endswith("\nall equal on cuda:0\n")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert len(rows) == 3 and all(row["equal"] and row["device"] == "cuda:0" for row in rows)


@pytest.mark.usefixtures("small_golden")
def test_damage_on_an_emulated_device_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch, "self-speculative", "drafts", "drafts ahead of the host")
    load = goldens.load

    def damaged(name: str, device: str = "cpu") -> TwoTowerModel:
        model = load(name, device)
        if device != "cpu":
            model.denoiser.head.neg_()
        return model

    monkeypatch.setattr(goldens, "load", damaged)
    with emulated_devices():
        assert goldens.main("cuda:1", str(tmp_path / "rows.jsonl")) == 1
    assert capsys.readouterr().out.endswith("\n1 different\n")
    of_context, of_denoiser = rows_of(tmp_path / "rows.jsonl")
    assert of_context["equal"] and of_denoiser["difference"].startswith("row 0, position ")


def test_use_that_fails_is_different_and_others_go_on() -> None:
    reference, broken, uses = goldens.load("T1"), goldens.load("T1"), some_uses("T1")
    broken._denoiser = None
    outcomes = list(goldens.compared("T1", reference, broken, uses))
    assert len(outcomes) == len(uses)
    failed = [outcome for outcome in outcomes if not outcome.equal]
    assert len(failed) == 5 and all(outcome.difference.startswith("ArgumentError: this model") for outcome in failed)


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ([[1, 2]], [[1, 2]], ""),
        ([[1, 2], [3]], [[1, 2], [4]], "row 1, position 0: 4, expected 3"),
        ([[1, 2]], [[1]], "row 0 has 1 tokens, expected 2"),
        ([[1], [2]], [[1]], "1 rows, expected 2"),
    ],
)
def test_first_difference_is_said_in_words(expected: goldens.Tokens, found: goldens.Tokens, said: str) -> None:
    assert goldens.first_difference(expected, found) == said


def test_trial_of_the_towers_has_floor_times_and_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "towers.jsonl"
    assert towers.main("cpu", str(file), "1") == 0
    setting, *others = rows_of(file)
    assert setting["config"]["hybrid_override_pattern"] == "MEM"
    passes = [row for row in others if row["kind"] == "pass"]
    assert [(row["shape"]["kind"], row["shape"]["num_tokens"]) for row in passes] == [
        *(("step", size) for size in (16, 8, 4)),
        *(("extension", count) for count in (1, 5, 17)),
    ]
    assert all(row["floor_s"] > 0 and set(row["parts_s"]) == {"Mamba", "experts", "head, rest"} for row in passes)
    kernels = [row for row in others if row["kind"] == "kernel"]
    assert kernels and kernels[0]["seconds"] >= kernels[-1]["seconds"] and others[1] == kernels[0]
    assert "step, 1 x 16: floor " in capsys.readouterr().out


@pytest.mark.parametrize(("free", "num_layers"), [(150e9, 52), (80e9, 29), (1e9, 1)])
def test_as_many_layers_are_kept_as_fit(free: float, num_layers: int) -> None:
    config = GEOMETRIES["published"]
    assert layers_that_fit(config, torch.bfloat16, int(free)) == num_layers
    kept = towers_without_memory(first_layers(config, num_layers), torch.bfloat16)
    assert num_layers == 1 or sum(parameter.nbytes for parameter in kept.parameters()) < free


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_trio_is_compared_in_real_vllm_and_an_engine_that_fails_costs_one_row(tmp_path: Path) -> None:
    broken = System("broken", "a method that vLLM lacks", {"method": "telepathy", "num_speculative_tokens": 2})
    compared, file = [*serving.systems(), broken], tmp_path / "vllm.jsonl"
    prompts = load_prompts("trio", limit=1)
    num_wrong = serving.measure_runner(RowFile(file), "V1", compared, ["float32"], prompts, 16, on_cuda=False)
    rows = {row["system"]: row for row in rows_of(file)}
    assert list(rows) == ["none", "ngram", "draft_model", "fixed", "adaptive", "broken"] and num_wrong == 1
    assert "telepathy" in rows.pop("broken")["failure"]
    assert all(row["num_equal"] == row["num_texts"] == 1 and row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["fixed"]["num_rounds"] > 0 and rows["fixed"]["acceptance_length"] > 1
