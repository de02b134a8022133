"""Servers whose processes are stopped and killed, and damaged drafters at start, as `benchmarks.faults` has them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.fork_server import server_and_variables
from twotower_bench.faults.servers import (
    ENGINE_CORE,
    full_disk_trial,
    killed,
    serving,
    start_trial,
    stop_trial,
)
from vllm_twotower.stats_folder import PREFIX

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]


def test_an_engine_goes_on_after_a_stop_and_leaves_nothing_when_it_is_killed() -> None:
    fork_server, variables = server_and_variables()
    with serving(fork_server, variables, drafts=True) as served:
        expected = served.ask()
        stopped = stop_trial(served, ENGINE_CORE, expected, stopped_for_s=2.0)
        assert stopped.outcome == "held", stopped
        answers, left = killed(served, ENGINE_CORE)
    assert all(isinstance(one, str) and one != "hang" for one in answers), answers
    # vLLM leaves its sockets and shared memory, whoever drafts.
    assert not {PREFIX, "the engine core", "a helper process"} & set(left), left


def test_a_disk_that_is_full_costs_a_running_server_nothing() -> None:
    fork_server, variables = server_and_variables()
    with serving(fork_server, variables, drafts=False) as plain:
        expected = plain.ask()
    found = full_disk_trial(fork_server, variables, expected)
    assert found.outcome in ("held", "n/a"), found


@pytest.mark.parametrize("damage", ["its weights cut in half", "missing"])
def test_a_server_with_a_damaged_drafter_says_so_before_it_loads_anything(damage: str) -> None:
    found = start_trial(*server_and_variables(), damage)
    assert found.outcome == "held" and found.seen.startswith("refused: "), found
