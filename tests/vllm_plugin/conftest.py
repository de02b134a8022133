"""Conditions under which tests are skipped in the older vLLMs that `python -m tests.versions` runs."""

import os

import pytest

from tests.vllm_plugin.fork_server import TESTED_VERSION, results_of


@pytest.fixture(scope="session")
def missing_hooks() -> list[dict[str, str]]:
    """Hooks that the tested vLLM lacks, by `name` and `stage`; the environment's is asked by a test of its own."""
    if TESTED_VERSION not in os.environ:
        return []
    found: list[dict[str, str]] = results_of("tests.vllm_plugin.test_compat:write_missing_hooks", "")[0]["missing"]
    return found


@pytest.fixture(scope="session")
def missing_for_mamba_layers(missing_hooks: list[dict[str, str]]) -> list[str]:
    """Names of hooks without which a verifier with Mamba layers is refused on a CPU."""
    return [one["name"] for one in missing_hooks if one["stage"] == "hybrid"]


@pytest.fixture(scope="session")
def mamba_layers(missing_for_mamba_layers: list[str]) -> None:
    """Skips a test of a verifier with Mamba layers where it is refused."""
    if missing_for_mamba_layers:
        pytest.skip(f"Mamba layers on a CPU need {', '.join(missing_for_mamba_layers)}")
