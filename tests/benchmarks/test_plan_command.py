"""`twotower-spec plan`: advice from typed numbers or a profile, and one sentence for what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.command_line import Command
from twotower_bench.serving_profile import ServingProfile

DATA = Path(__file__).parent / "data"
PROFILE, SWEEP = DATA / "trio_in_vllm.json", DATA / "trio_sweep.json"
BUDGET = (
    "plan",
    "--verifier-step-ms",
    "1:12.7,8:19.0",
    "--verify-step-ms",
    "1:15.7,8:79.0",
    "--context-pass-ms",
    "1:2.8,8:5.5",
    "--denoiser-step-ms",
    "1:4,8:9",
    "--batch-size",
    "1,8",
)
REAL_SIZE = ("plan", "--bandwidth-gb-s", 4800, "--acceptance-length", "5", "-K", 15)


def test_every_load_gets_its_advice(command: Command) -> None:
    code, out, err = command(*BUDGET, "--acceptance-length", "1:5.6+-0.3,8:4+-.3", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(a["best"]["batch_size"], a["outcome"]) for a in found["advice"]] == [
        (1, "drafting pays"),
        (8, "drafting does not pay"),
    ]
    (one, _) = found["predictions"]
    assert one["setting"]["num_speculative_tokens"] == 15
    assert one["speed_up"]["value"] == pytest.approx(5.6 * 12.7 / (15.7 + 2.8 + 4))
    assert one["acceptance_length"] == pytest.approx({"value": 5.6, "low": 5.3, "high": 5.9})


def test_single_numbers_are_about_the_one_load_and_the_most_drafts(command: Command) -> None:
    code, out, err = command(*REAL_SIZE, "--verifier-step-ms", 30, "--verify-step-ms", 30, "--json")
    assert code == 0, err
    (one,) = json.loads(out)["predictions"]
    assert one["speed_up"]["value"] == pytest.approx(3.68, abs=0.01)
    assert one["extend_ms"] == pytest.approx(3.38, abs=0.01) and one["denoise_ms"] == pytest.approx(7.33, abs=0.01)


def test_a_drafter_of_fewer_bytes_takes_less_time(command: Command) -> None:
    steps = ("--verifier-step-ms", 30, "--verify-step-ms", 30)
    smaller = ("--experts-dtype", "int8", "--experts-per-token", 2)
    (one,) = json.loads(command(*REAL_SIZE, *steps, *smaller, "--json")[1])["predictions"]
    assert one["extend_ms"] == pytest.approx(2.08, abs=0.01) and one["denoise_ms"] == pytest.approx(2.14, abs=0.02)


def test_table_says_that_it_does_not_pay_and_why(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = command(*REAL_SIZE, "--verifier-step-ms", 2, "--verify-step-ms", 2)
    assert code == 0
    assert "Drafting does not pay at batch size 1, because drafting takes 10.7 ms a round" in out
    assert "a bound that holds while they wait for memory" in out and "10 % to both sides" in out


def test_shares_by_position_serve_shorter_drafts(command: Command) -> None:
    typed = ("--verifier-step-ms", 10, "--verify-step-ms", "16", "--bandwidth-gb-s", 8000)
    code, out, err = command("plan", *typed, "-K", "1,3", "--acceptance-by-position", "0.9,0.5,0.1", "--json")
    assert code == 0, err
    found = json.loads(out)
    lengths = [p["acceptance_length"]["value"] for p in found["predictions"]]
    assert lengths == pytest.approx([1.9, 2.5])


def test_profile_is_predicted_as_measured(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    code, out, err = command("plan", "--profile", PROFILE)
    assert code == 0, err
    assert any("K 15, block of 16, 4 steps" in line and "2.38 (2.05 to 2.73)" in line for line in out.splitlines())
    assert "maths: Drafting pays at batch size 1: K 7, block of 8, 1 step, 2.98 times as fast" in out
    assert "maths and Python: No difference is to be expected at batch size 8: the best way, K 7, block of 8" in out
    code, out, _ = command("plan", "--profile", PROFILE, "--category", "maths", "-K", 7, "--json")
    found = json.loads(out)
    assert {p["setting"]["num_speculative_tokens"] for p in found["predictions"]} == {7}


def test_sweep_is_predicted_for_all_prompts_and_the_drafts_that_were_measured(command: Command) -> None:
    code, out, err = command("plan", "--profile", SWEEP, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {p["category"] for p in found["predictions"]} == {"all"}
    assert {p["setting"]["num_speculative_tokens"] for p in found["predictions"]} == {8, 16}
    assert len(found["predictions"]) == 16
    assert any("--category and -K give others" in remark for remark in found["remarks"])
    _, out, _ = command("plan", "--profile", SWEEP, "--category", "maths", "-K", "3,8", "--json")
    found = json.loads(out)
    assert {p["category"] for p in found["predictions"]} == {"maths"}
    assert {p["setting"]["num_speculative_tokens"] for p in found["predictions"]} == {3, 8}


def test_what_cannot_be_predicted_is_left_out_and_counted(command: Command, tmp_path: Path) -> None:
    profile = ServingProfile.load(SWEEP)
    small = tuple(phase for phase in profile.drafting_phases if phase.block_size == 8)
    replace(profile, drafting_phases=small).save(tmp_path / "profile.json")
    code, out, err = command("plan", "--profile", tmp_path / "profile.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {p["setting"]["block_size"] for p in found["predictions"]} == {8}
    assert any("predictions were left out, the first because" in remark for remark in found["remarks"])
    # Without any, as after a sweep of adaptive policies alone, nothing is left.
    replace(profile, drafting_phases=()).save(tmp_path / "profile.json")
    code, _, err = command("plan", "--profile", tmp_path / "profile.json")
    assert code == 2 and "the context pass for batch size 1, block size 8 is outside what was measured (nothing)" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--verifier-step-ms", 3), "--verify-step-ms, --context-pass-ms, --denoiser-step-ms missing"),
        ((*BUDGET[1:],), "--acceptance-length is missing"),
        ((*BUDGET[1:5], "--acceptance-length", 5), "--context-pass-ms, --denoiser-step-ms missing"),
        (
            (*BUDGET[1:], "--host-ms", -1, "--acceptance-length", 5),
            "drafting_phases.0.host_ms: Input should be greater",
        ),
        ((*BUDGET[1:], "--acceptance-length", "five"), "--acceptance-length 'five' is not understood"),
        ((*BUDGET[1:], "--acceptance-length", "17"), "acceptance length 17 is not possible with K 15"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--verify-step-ms", 9), "is one number for several batch sizes"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--verify-step-ms", "1:9"), "differ in batch sizes"),
        ((*BUDGET[1:], "--acceptance-length", "1:5,1:6"), "has two numbers for one batch size"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--batch-size", 9), "nothing is extrapolated"),
        ((*BUDGET[1:], "--acceptance-length", 5, "-K", "0"), "num_speculative_tokens 0"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--batch-size", "1,x"), "--batch-size '1,x' is not a list"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--bandwidth-gb-s", 10), "leave one out"),
        (("--bandwidth-gb-s", 0), "bandwidth_gb_s 0.0"),
        (("--bandwidth-gb-s", 10, "--experts-dtype", "int2"), "experts_dtype 'int2'"),
        (("--bandwidth-gb-s", 10, "--experts-per-token", 0), "experts_per_token 0"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--experts-per-token", 2), "give --bandwidth-gb-s"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--times-floor", 1.3), "give --bandwidth-gb-s"),
        ((*BUDGET[1:], "--acceptance-length", 5, "--assumed-error", 1.5), "assumed_error 1.5 is not allowed"),
        (("--profile", "/nowhere.json"), "cannot be read"),
        (("--profile", PROFILE, "--acceptance-length", 5), "is measured in --profile"),
        (("--profile", PROFILE, "--category", "poems"), "no acceptance length is known"),
        (("--profile", PROFILE, "-K", 31), "no acceptance length is known for what was asked; known are maths"),
    ],
)
def test_what_is_wrong_is_one_sentence(command: Command, arguments: tuple[object, ...], named: str) -> None:
    code, out, err = command("plan", *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert named in err
