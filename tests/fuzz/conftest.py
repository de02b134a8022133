"""How many cases there are: `short`, in every run of the tests, or `long` (`make fuzz`), 100,000 in all.

What the long form finds is kept beside its test, as `@example`.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, settings

# Wall-clock times say nothing on a busy machine: every case has a bound on processor time instead, see `refusal.py`.
COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("short", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("long", max_examples=10_500, **COMMON)

# What reading a few bytes of a user's may take beside what the interpreter has.
SPARE_MEMORY_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Makes a case that allocates by numbers in a file fail, instead of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
