import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

from vllm_twotower.check_wheel import WheelError, all_hooks, check, check_wheel, download, main
from vllm_twotower.compat import (
    CHECKED_VERSIONS,
    is_present,
    missing_hooks,
    rejection_sampler_runs_without_drafts,
    warning_text,
)
from vllm_twotower.hook_table import Hook, Kind, Need, hooks_of

HOOKS = all_hooks()
ROOT = Path(__file__).parents[2]
WHEEL = "vllm-1.2.3-cp38-abi3-manylinux_2_28_x86_64.whl"

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
]

# Each with the message of `check`.
LACKING = [
    (Kind.FUNCTION, "function", ("second", "first"), "takes (first, second, third)"),
    (Kind.FUNCTION, "function", ("first", "second", "third", "fourth"), "takes (first, second, third)"),
    (Kind.FUNCTION, "Owner.demanding", ("first", "second"), "takes (self, first, second, third)"),
    (Kind.FUNCTION, "Owner.gone", (), "absent"),
    (Kind.FUNCTION, "Gone.forward", (), "absent"),
    (Kind.FIELD, "Owner.only_read", ()),
    (Kind.NAME, "for_types_only", ()),
    (Kind.CHOICE, "Owner.method", ("a", "z"), "does not allow z"),
]

# A hook, a text in the installed file of its module, and what a later version might have in its place.
CHANGES = [
    ("EngineArgs.create_speculative_config", "def create_speculative_config(", "def make_speculative_config("),
    ("EngineArgs.spec_model", "    spec_model: str", "    draft_model: str"),
    ("SpeculativeConfig.method", '    "custom_class",\n    EagleModelTypes', "    EagleModelTypes"),
    ("GPUModelRunner._sample", "spec_decode_metadata: SpecDecodeMetadata | None,\n    ) -> Sampler", ") -> Sampler"),
    ("GPUModelRunner.requests", "        self.requests: dict", "        self.states: dict"),
    ("RejectionSampler", "from vllm.v1.sample.rejection_sampler import RejectionSampler\n", ""),
    ("InputBatch.num_reqs", "def num_reqs(", "def count("),
    ("Sampler.apply_logits_processors", "predict_bonus_token: bool,\n", "predict_bonus_token: bool, step: int,\n"),
    ("SamplingMetadata.logitsprocs", "    logitsprocs: ", "    processors: "),
]


@pytest.fixture
def fake_module() -> ModuleType:
    module = ModuleType("fake_module")
    exec(compile(SOURCE, "fake_module.py", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The installed files of all modules with hooks, by path in the wheel; nothing of vLLM is imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vllm is not installed")
    folder = Path(found.submodule_search_locations[0]).parent
    paths = {hook.module.replace(".", "/") + ".py" for hook in HOOKS}
    return {path: (folder / path).read_text(encoding="utf-8") for path in paths}


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    def make(sources: dict[str, str]) -> Path:
        with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
            for path, text in sources.items():
                archive.writestr(path, text)
        return tmp_path / WHEEL

    return make


def hook_named(name: str) -> Hook:
    return next(hook for hook in HOOKS if hook.name == name)


def file_of(hook: Hook) -> str:
    return hook.module.replace(".", "/") + ".py"


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


def pip_that_says(text: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=text)

    return run


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
    of_the_plugin = hooks_of("routing") + hooks_of("v1", on_cpu=True)
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


def test_installed_vllm_has_every_hook(sources: dict[str, str]) -> None:
    said = fresh_interpreter(
        "from vllm_twotower.check_wheel import all_hooks\n"
        "from vllm_twotower.compat import missing_hooks, rejection_sampler_runs_without_drafts\n"
        "print([hook.name for hook in missing_hooks(all_hooks())], rejection_sampler_runs_without_drafts())"
    )
    assert said == "[] True"


def test_wheel_of_the_installed_sources_has_every_hook(
    sources: dict[str, str], make_wheel: Callable[[dict[str, str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make_wheel(sources))]) == 0
    assert f"All {len(HOOKS)} hooks found." in capsys.readouterr().out


@pytest.mark.parametrize(("name", "text", "replacement"), CHANGES)
def test_one_change_in_vllm_is_the_one_problem_found(
    name: str, text: str, replacement: str, sources: dict[str, str], make_wheel: Callable[[dict[str, str]], Path]
) -> None:
    hook = next(hook for hook in HOOKS if hook.name == name and text in sources[file_of(hook)])
    changed = sources[file_of(hook)].replace(text, replacement)
    findings = check_wheel(make_wheel({**sources, file_of(hook): changed}))
    assert [finding.hook for finding in findings if finding.problem] == [hook]


def test_missing_required_hook_gives_exit_code_1(
    sources: dict[str, str], make_wheel: Callable[[dict[str, str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(hook_named("create_custom_proposer"))
    assert main([str(make_wheel({path: text for path, text in sources.items() if path != file}))]) == 1
    assert f"1 of {len(HOOKS)} hooks missing or changed, 1 of them required." in capsys.readouterr().out


def test_missing_optional_hook_alone_gives_exit_code_0(
    sources: dict[str, str], make_wheel: Callable[[dict[str, str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(hook_named("SamplingParams._validate_spec_decode"))
    changed = sources[file].replace("_validate_spec_decode", "_validate_drafting")
    assert main([str(make_wheel({**sources, file: changed}))]) == 0
    said = capsys.readouterr().out
    assert "_validate_spec_decode, needed for requests with min_p or logit_bias: absent\n" in said
    assert f"1 of {len(HOOKS)} hooks missing or changed, 0 of them required." in said


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_file_that_is_no_wheel_gives_one_sentence_and_exit_code_2(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / WHEEL).write_bytes(content)
    assert main([str(tmp_path / WHEEL)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and "cannot be read as a wheel" in said.err


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==9.9.9 (from versions: 0.33.0)\n"
            "ERROR: No matching distribution found for vllm==9.9.9\n",
            "vllm 9.9.9 has no wheel for Linux x86_64 and Python 3.11 that pip finds.",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==9.9.9 (from versions: none)\n"
            "ERROR: No matching distribution found for vllm==9.9.9\n",
            "pip finds no version of vllm; check the name and whether its index can be reached.",
        ),
        ("ERROR: No space left on device\n", "pip could not download vllm 9.9.9: ERROR: No space left on device"),
        ("", "pip could not download vllm 9.9.9: no message"),
    ],
)
def test_failed_download_gives_one_sentence(
    pip_says: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", pip_that_says(pip_says))
    with pytest.raises(WheelError) as caught:
        download("vllm", "9.9.9", tmp_path)
    assert str(caught.value) == sentence


def test_warning_is_one_line_with_version_hook_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9.9"))
    text = warning_text([hook_named("RejectionSampler.forward"), hook_named("SamplingParams._validate_spec_decode")])
    assert text == (
        "vLLM 9.9.9 lacks or has changed what twotower-spec builds on (RejectionSampler.forward, needed for verifying "
        "drafts; SamplingParams._validate_spec_decode, needed for requests with min_p or logit_bias), so TwoTower "
        "drafters cannot be used; versions 0.25.1 to 0.33.0 are supported."
    )


def test_warning_about_optional_hooks_says_that_drafters_work() -> None:
    assert "drafters work without that" in warning_text([hook_named("EngineArgs.add_cli_args")])


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.25.1", False),
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
    assert not any(version in allowed for version in ("0.25.0", "0.34.0"))
