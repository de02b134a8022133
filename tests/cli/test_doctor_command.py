"""`twotower-spec doctor`: exit codes, the table, JSON; what each check finds is in tests/diagnosis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diagnosis.planted import with_config, with_permuted_tokens
from tests.support.command_line import Command
from twotower_spec.cli import doctor
from twotower_spec.demo.trio import trio_path
from twotower_spec.diagnosis import Case, Finding, computation, environment, examination


@pytest.fixture(autouse=True)
def _without_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(examination, "entry_points", lambda group: [])
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "no driver")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_bundled_trio_is_healthy_and_every_area_is_shown(command: Command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    areas = ("environment", "links", "files", "vocabulary", "memory", "weights", "computation", "short run")
    assert [line for line in out.splitlines() if line in areas] == list(areas)
    assert "0 warning, 0 fault, 0 skipped: nothing stands against a server" in out
    assert str(trio_path("twotower")) in out


def test_json_has_every_line_with_its_verdict_and_a_summary(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "--no-run")
    found = json.loads(out)
    assert (code, found["can_serve"]) == (0, True)
    assert found["summary"] == {"ok": len(found["findings"]) - 1, "warning": 0, "fault": 0, "skipped": 1}
    assert all(set(one) == {"area", "looked_at", "verdict", "detail", "remedy"} for one in found["findings"])
    assert found["findings"][-1]["detail"] == "left out with --no-run"


def test_experts_of_fewer_bits_are_looked_at_as_they_are_served(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "--experts-dtype", "int8")
    found = json.loads(out)
    assert code == 0 and found["summary"] == {"ok": len(found["findings"]), "warning": 0, "fault": 0, "skipped": 0}


def test_a_fault_is_exit_code_1_with_its_remedy(command: Command, tmp_path: Path) -> None:
    verifier = with_permuted_tokens(tmp_path / "permuted", "verifier")
    code, out, _ = command("doctor", "--drafter", trio_path("twotower"), "--verifier", verifier)
    assert code == 1
    assert "ids mean different tokens" in out and "remedy: give a drafter that shares the verifier's tokenizer" in out
    assert "there is a fault in vocabulary, which comes first" in out
    assert "1 fault" in out and "a server would not start" in out


def test_a_warning_leaves_the_exit_code_at_0(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    code, out, _ = command("doctor", "--no-run")
    assert code == 0 and "1 warning, 0 fault" in out


def test_without_a_verifier_the_drafter_alone_is_looked_at(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "--drafter", trio_path("twotower"))
    found = json.loads(out)
    skipped = {one["area"]: one["detail"] for one in found["findings"] if one["verdict"] == "skipped"}
    assert code == 0 and found["can_serve"] is None
    assert set(skipped) == {"files", "vocabulary", "memory", "short run"}
    assert set(skipped.values()) == {"no verifier is named"}
    assert {"weights", "computation"} <= {one["area"] for one in found["findings"] if one["verdict"] == "ok"}


def test_a_two_tower_verifier_drafts_for_itself_and_another_one_needs_a_drafter(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "--no-run", "--verifier", trio_path("twotower"))
    assert code == 0 and json.loads(out)["drafter"] == str(trio_path("twotower"))
    code, out, _ = command("doctor", "--json", "--verifier", trio_path("verifier"))
    found = json.loads(out)
    assert code == 0 and found["drafter"] is None
    assert "no drafter is named" in {one["detail"] for one in found["findings"]}


def test_a_check_that_fails_itself_is_a_finding_and_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(case: Case) -> Iterator[Finding]:
        yield Finding("computation", "before", "ok", "this much was seen")
        raise KeyError("unforeseen")

    monkeypatch.setattr(computation, "examine", failing)
    code, out, err = command("doctor", "--json")
    found = [one for one in json.loads(out)["findings"] if one["area"] == "computation"]
    assert code == 1 and "Traceback" not in out + err
    assert [one["verdict"] for one in found] == ["ok", "fault"]
    assert "KeyError: 'unforeseen'" in found[1]["detail"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-k", 3], "No such option"),
        (["--num-speculative-tokens", 0], "--num-speculative-tokens 0 is not allowed"),
        (["--max-num-seqs", 0], "--max-num-seqs 0"),
        (["--experts-dtype", "int3"], "experts_dtype 'int3' is not allowed; give one of float8_e4m3fn, int8, int4"),
        (["--memory-gib", 0], "--memory-gib 0.0"),
        (["--memory-gib", "nan"], "--memory-gib nan"),
        (["--memory-gib", "inf"], "--memory-gib inf"),
        (["--device", "cuda:7"], "cuda:7 is not there"),
        (["--denoiser-device", "tpu"], "tpu"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_code_2(options: list[Any], named: str, command: Command) -> None:
    code, out, err = command("doctor", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and named in err and err.count("\n") == 1


def test_text_of_a_checkpoint_is_shown_and_not_obeyed(command: Command, tmp_path: Path) -> None:
    drafter = with_config(tmp_path / "drafter", hybrid_override_pattern="M*E\x1b[31m")
    code, out, _ = command("doctor", "--no-run", "--drafter", drafter)
    assert code == 1 and "\x1b[31m" not in out and "x1b" in out


def test_every_verdict_has_a_style() -> None:
    assert set(doctor.STYLES) == {"ok", "warning", "fault", "skipped"}


def test_lines_that_are_short_keep_all_words_whole(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = command("doctor", "--no-run")
    words = out.split()
    assert code == 0 and {"computes;", "tokenizers", "warning,"} <= set(words)
    assert max(map(len, out.splitlines()[3:-1])) <= 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--verifier", ""], "--verifier '' names no model"),
        (["--device", "meta"], "device meta holds no numbers"),
        (["--memory-gib", "1e300"], "--memory-gib 1e+300 is not allowed"),
    ],
)
def test_what_names_nothing_is_refused(arguments: list[str], said: str, command: Command) -> None:
    code, out, err = command("doctor", "--drafter", trio_path("twotower"), *arguments)
    assert (code, out) == (2, "") and said in err


@pytest.mark.parametrize("named", [5, "Qwen3ForCausalLM", [3]])
def test_architectures_that_are_no_list_are_a_fault(named: object, command: Command, tmp_path: Path) -> None:
    verifier = with_config(tmp_path / "verifier", "verifier", architectures=named)
    for drafter in ([], ["--drafter", trio_path("twotower")]):
        code, out, _ = command("doctor", "--json", "--no-run", "--verifier", verifier, *drafter)
        faults = [one for one in json.loads(out)["findings"] if one["verdict"] == "fault"]
        assert code == 1 and any("no list of names" in one["detail"] for one in faults), faults
        assert not any("the check itself failed" in one["detail"] for one in faults)
