"""Runs of the tests on several vLLMs: what pytest wrote is counted, and texts are compared over all of them."""

from pathlib import Path

import pytest

from tests.versions import runs
from tests.versions.runs import Outcome, outcome_of, run_tests, texts_that_differ

WRITTEN = """<testsuites><testsuite time="12.5">
<testcase name="a"><properties><property name="greedy" value="0a"/></properties></testcase>
<testcase name="b"><properties><property name="greedy" value="{second}"/></properties></testcase>
<testcase name="c"><skipped message="Mamba layers on a CPU need register_kernels"/></testcase>
<testcase name="d"><{last}/></testcase>
</testsuite></testsuites>"""


def written(folder: Path, second: str = "0a", last: str = "system-out") -> Path:
    path = folder / "results.xml"
    path.write_text(WRITTEN.format(second=second, last=last))
    return path


def test_tests_are_counted_with_the_reasons_of_those_that_were_skipped(tmp_path: Path) -> None:
    found = outcome_of(written(tmp_path), "0.27.0", "V1", 0)
    assert found.counts == {"passed": 3, "skipped": 1} and found.seconds == 12.5 and found.is_good
    assert found.skipped == {"Mamba layers on a CPU need register_kernels": 1}
    assert outcome_of(written(tmp_path, last="error"), "0.27.0", "V1", 1).counts["failed"] == 1


def test_a_run_is_good_only_where_something_passed_and_nothing_failed(tmp_path: Path) -> None:
    assert not outcome_of(written(tmp_path), "0.27.0", "V1", 1).is_good
    assert not outcome_of(tmp_path / "absent.xml", "0.27.0", "V1", 0).is_good
    assert not Outcome("0.27.0", "V1", exit_code=0, counts={"skipped": 4}).is_good


def test_texts_have_to_be_the_same_within_a_version_and_over_versions(tmp_path: Path) -> None:
    one = outcome_of(written(tmp_path), "0.27.0", "V1", 0)
    other = outcome_of(written(tmp_path, second="ff"), "0.28.0", "V1", 0)
    assert texts_that_differ([one, one]) == []
    assert texts_that_differ([other]) == texts_that_differ([one, other]) == ["greedy"]


def test_a_version_for_another_torch_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "unpacked", lambda version: tmp_path)
    monkeypatch.setattr(runs, "unmet_requirements", lambda folder: ["torch==2.11.0+cpu (2.13.0+cpu is here)"])
    found = run_tests("0.26.0", "V1")
    assert not found.is_good and found.unmet and not found.counts
