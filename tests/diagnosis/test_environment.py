"""Traps in the environment: versions, builds, threads, and kernels that are switched off."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.diagnosis.planted import findings, the, verdicts
from tests.support.cuda import emulated_devices
from twotower_kernels import backend
from twotower_spec.diagnosis import environment

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="the emulated device needs a compiler"
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_what_the_tests_run_in_is_healthy() -> None:
    found = findings(environment.examine, verifier_device="cpu")
    assert verdicts(found) == {"ok"}
    assert "torch " in the(found, "versions", "ok").detail


def test_threads_that_nobody_chose_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    one = the(findings(environment.examine, verifier_device="cpu"), "threads", "warning")
    assert "OMP_NUM_THREADS=1" in one.remedy


@pytest.mark.parametrize(
    ("package", "installed", "remedy"),
    [
        ("transformers", "4.57.1", "pip install 'transformers>=5.0'"),
        ("torch", "2.8.0", "pip install 'torch>=2.9'"),
        ("numpy", "1.24.4", "pip install 'numpy>=1.26'"),
        ("triton", "3.3.1", "pip install 'triton>=3.4'"),
    ],
)
def test_a_version_that_is_too_old_is_found(
    package: str, installed: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = environment.version
    monkeypatch.setattr(environment, "version", lambda name: installed if name == package else stock(name))
    one = the(findings(environment.examine, verifier_device="cpu"), package, "fault")
    assert installed in one.detail and one.remedy == remedy


def test_libraries_for_two_versions_of_cuda_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", None)
    monkeypatch.setattr(environment, "distributions", lambda: [SimpleNamespace(name=name) for name in names])
    one = the(findings(environment.examine, verifier_device="cpu"), "CUDA libraries", "warning")
    assert "nvidia-nccl-cu{12,13}" in one.detail and "cudnn" not in one.detail


def test_a_torch_that_cannot_use_the_driver_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "version")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cannot use it" in the(findings(environment.examine, verifier_device="cpu"), "CUDA", "warning").detail


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Findings with the models on an emulated GPU, and a value of the switch."""

    def call(switch: str | None) -> Any:
        if switch is not None:
            monkeypatch.setenv(backend.SWITCH, switch)
        backend._triton_wanted.cache_clear()
        with emulated_devices(1):
            return findings(environment.examine, verifier_device="cuda:0")

    yield call
    backend._triton_wanted.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("switch", "verdict", "named"),
    [(None, "ok", "Triton kernels on"), ("torch", "warning", "switches kernels off"), ("fast", "fault", "not allowed")],
)
def test_kernels_that_run_are_named(on_cuda: Any, switch: str | None, verdict: Any, named: str) -> None:
    found = on_cuda(switch)
    assert named in the(found, "kernels on cuda:0", verdict).detail
    assert "threads" not in {one.looked_at for one in found}
