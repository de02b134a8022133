"""Hooks of the plugin in vLLM are looked for in a module and in its source alike; versions differ as known."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.vllm_plugin.fork_server import results_of
from vllm_twotower.check_wheel import all_hooks, check
from vllm_twotower.compat import (
    CHECKED_VERSIONS,
    is_present,
    missing_hooks,
    rejection_sampler_runs_without_drafts,
    vllm_version,
    warning_text,
)
from vllm_twotower.hook_table import Hook, Kind, Need, Stage, hooks_of

HOOKS = all_hooks()
STAGES: tuple[Stage, ...] = ("routing", "model", "v1", "hybrid", "own state", "v2")
ROOT = Path(__file__).parents[2]


# A class with every kind of hook; the same text is run for `is_present` and parsed for `check`.
SOURCE = """
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
try:
    from math import gcd as imported
except ImportError:
    imported = None
if TYPE_CHECKING:
    from math import lcm as for_types_only

Special = Literal["c"]
Method = Literal["a", "b", Special]

def function(first, second, third=3): ...

@dataclass
class Owner:
    annotated: int
    method: Method | None = None

    def method_of_two(self, first, second, *rest, **named): ...

    @staticmethod
    def static(first): ...

    def demanding(self, first, second, *, third): ...

    def forwarding(self, *args, **kwargs): ...

    @property
    def computed(self): ...

    def prepare(self, other):
        if other:
            self.assigned: int = 0
            self.left, self.right = 1, self.only_read

class Heir(Owner): ...
"""

HELD = [
    (Kind.FUNCTION, "function", ("first", "second")),
    (Kind.FUNCTION, "Owner.method_of_two", ("first", "second")),
    (Kind.FUNCTION, "Owner.static", ("first",)),
    (Kind.FUNCTION, "Owner.demanding", ()),
    (Kind.FUNCTION, "Owner.forwarding", ("first", "second")),
    (Kind.FIELD, "Owner.annotated", ()),
    (Kind.FIELD, "Owner.computed", ()),
    (Kind.FIELD, "Owner.assigned", ()),
    (Kind.FIELD, "Owner.left", ()),
    (Kind.NAME, "imported", ()),
    (Kind.NAME, "function", ()),
    (Kind.CHOICE, "Owner.method", ("a", "c")),
    (Kind.KNOWN, "Owner", ("gone", "method", "annotated")),
]

# Each with the message of `check`.
LACKING = [
    (Kind.FUNCTION, "function", ("second", "first"), "takes (first, second, third)"),
    (Kind.FUNCTION, "function", ("first", "second", "third", "fourth"), "takes (first, second, third)"),
    (Kind.FUNCTION, "Owner.demanding", ("first", "second"), "takes (self, first, second, third)"),
    (Kind.FUNCTION, "Owner.gone", (), "absent"),
    (Kind.FUNCTION, "Gone.forward", (), "absent"),
    (Kind.FUNCTION, "Heir.method_of_two", ("first", "second"), "absent"),
    (Kind.FIELD, "Owner.only_read", ()),
    (Kind.NAME, "for_types_only", ()),
    (Kind.CHOICE, "Owner.method", ("a", "z"), "does not allow z"),
    (Kind.KNOWN, "Owner", ("method",), "has new fields: annotated"),
    (Kind.KNOWN, "Gone", ()),
]


@pytest.fixture
def fake_module() -> ModuleType:
    module = ModuleType("fake_module")
    exec(compile(SOURCE, "fake_module.py", "exec"), module.__dict__)
    return module


def hook_named(name: str) -> Hook:
    return next(hook for hook in HOOKS if hook.name == name)


def fake_hook(kind: Kind, name: str, parameters: tuple[str, ...]) -> Hook:
    return Hook("fake_module", name, kind, Need("the test", "routing"), parameters)


def fresh_interpreter(code: str) -> str:
    """Runs code where nothing is imported yet: vLLM changes torch and the environment of whoever imports it."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "vllm_plugin", "benchmarks"))
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize(("kind", "name", "parameters"), HELD)
def test_hook_is_found_in_the_module_and_in_its_source(
    kind: Kind, name: str, parameters: tuple[str, ...], fake_module: ModuleType
) -> None:
    hook = fake_hook(kind, name, parameters)
    finding = check(hook, ast.parse(SOURCE))
    assert is_present(hook, fake_module)
    assert finding.problem == ""
    assert finding.line is not None and name.split(".")[-1] in SOURCE.splitlines()[finding.line - 1]


@pytest.mark.parametrize("lacking", LACKING)
def test_missing_or_changed_hook_is_noticed_in_the_module_and_in_its_source(
    lacking: tuple[Kind, str, tuple[str, ...], str], fake_module: ModuleType
) -> None:
    kind, name, parameters, *problem = lacking
    hook = fake_hook(kind, name, parameters)
    assert not is_present(hook, fake_module)
    assert check(hook, ast.parse(SOURCE)).problem == (problem[0] if problem else "absent")


def test_hooks_of_a_module_that_cannot_be_imported_are_missing() -> None:
    assert not any(is_present(hook, None) for hook in HOOKS)


def test_missing_hooks_does_not_raise_where_vllm_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", fail)
    assert missing_hooks(HOOKS) == HOOKS
    assert "vLLM (unknown version)" in warning_text(missing_hooks(hooks_of("routing")))


def test_every_hook_belongs_to_one_stage_and_is_listed_once() -> None:
    assert len({(hook.module, hook.name, hook.kind) for hook in HOOKS}) == len(HOOKS)
    of_the_plugin = [hook for stage in STAGES for hook in hooks_of(stage, on_cpu=True)]
    assert {hook.need.stage for hook in set(HOOKS) - set(of_the_plugin)} == {"measuring"}
    assert not any(hook.need.required for hook in set(HOOKS) - set(of_the_plugin))


def test_a_few_more_hooks_are_touched_on_a_cpu() -> None:
    more = set(hooks_of("v1", on_cpu=True)) - set(hooks_of("v1"))
    assert more and all(hook.need.cpu_only for hook in more)


def test_importing_compat_and_check_wheel_imports_neither_vllm_nor_torch() -> None:
    said = fresh_interpreter(
        "import sys, vllm_twotower.compat, vllm_twotower.check_wheel as check_wheel; check_wheel.all_hooks(); "
        "print({'vllm', 'torch'} & set(sys.modules))"
    )
    assert said == "set()"


@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
def test_vllm_has_every_hook_and_before_0_32_all_but_those_of_runner_v2_and_of_mamba_layers_on_a_cpu() -> None:
    found, _ = results_of(f"{__name__}:write_missing_hooks", "")
    older = Version(found["version"]) < Version("0.32")
    assert {hook["stage"] for hook in found["missing"]} <= ({"v2", "hybrid"} if older else set())
    assert all(hook["cpu_only"] or hook["stage"] == "v2" for hook in found["missing"])
    assert found["rejection_sampler_runs_without_drafts"] != older


def write_missing_hooks(_: str, output: str) -> None:
    missing = [
        {"name": hook.name, "stage": hook.need.stage, "cpu_only": hook.need.cpu_only}
        for hook in missing_hooks(all_hooks())
    ]
    found = {
        "version": vllm_version(),
        "missing": missing,
        "rejection_sampler_runs_without_drafts": rejection_sampler_runs_without_drafts(),
    }
    Path(output).write_text(json.dumps(found))


def test_warning_is_one_line_with_version_hook_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9.9"))
    text = warning_text([hook_named("RejectionSampler.forward"), hook_named("SamplingParams._validate_spec_decode")])
    assert text == (
        "vLLM 9.9.9 lacks or has changed what twotower-spec builds on (RejectionSampler.forward, needed for verifying "
        "drafts; SamplingParams._validate_spec_decode, needed for requests with min_p or logit_bias), so TwoTower "
        "drafters cannot be used; versions 0.27.0 to 0.33.0 are supported."
    )


def test_warning_about_optional_hooks_says_that_drafters_work() -> None:
    assert "drafters work without that" in warning_text([hook_named("EngineArgs.add_cli_args")])


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.27.0", False),
        ("0.30.0", False),
        ("0.31.0", False),
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1.dev12+g0a1b2c3", True),
        ("1.0", True),
        ("dev", True),
    ],
)
def test_rejection_sampler_runs_without_drafts_from_0_32_on(version: str, expected: bool) -> None:
    assert rejection_sampler_runs_without_drafts(version) == expected


def test_gpu_extra_admits_the_checked_versions_and_none_older_or_newer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    allowed = next(one.specifier for one in requirements if one.name == "vllm")
    assert all(version in allowed for version in CHECKED_VERSIONS)
    assert not any(version in allowed for version in ("0.26.0", "0.34.0"))
