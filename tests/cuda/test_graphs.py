"""Captured passes: on emulated devices, whose graphs do again what was recorded, tokens are those of a CPU."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.cuda.paths import PROMPTS, AheadOfHost, ahead, placed
from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids
from tests.support.cuda import emulated_devices
from twotower_spec.drafting import DraftingSession, DraftPolicy, FixedPolicy, ThresholdPolicy
from twotower_spec.state.graphs import PassGraphs, padded_count, padded_counts

POLICIES = [FixedPolicy(4, 1), ThresholdPolicy(4, 3, 0.05)]
PLACES = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")]
# Few tokens a pass, so that the warm-up makes few passes.
SMALL = {"num_slots": 3, "num_tokens": 144, "token_budget": 16}


def rounds_of(session: DraftingSession) -> list[list[list[int]]]:
    """Drafts of rounds whose requests come and go."""
    rows = {"a": PROMPTS[0], "b": PROMPTS[1], "c": random_ids(19, seed=3)}
    found = []
    for names in ("a", "ab", "abc", "bc"):
        block = draft_rows(session, {name: rows[name] for name in names})
        found.append([block.row(row) for row in range(len(names))])
        rows = {name: [*row, 7, 8] for name, row in rows.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_from_graphs_are_those_of_a_cpu(policy: DraftPolicy, places: tuple[str, str]) -> None:
    expected = rounds_of(DraftingSession(placed(), policy, **SMALL))
    with emulated_devices() as usage:
        session = DraftingSession(placed(*places), policy, **SMALL)
        session.warm_up()
        usage.reset()
        assert rounds_of(session) == expected
        assert usage.kernels["graph"] >= 6  # of both towers


@pytest.mark.slow
@pytest.mark.parametrize(("num_reqs", "places"), [(1, PLACES[0]), (3, PLACES[0]), (3, PLACES[1])])
def test_drafts_ahead_of_the_host_from_graphs_are_those_of_a_cpu(num_reqs: int, places: tuple[str, str]) -> None:
    policy = FixedPolicy(8, 1, num_tokens=5)
    expected = ahead(AheadOfHost(placed(), policy, PROMPTS[:num_reqs], **SMALL))
    with emulated_devices() as usage:
        serving = AheadOfHost(placed(*places), policy, PROMPTS[:num_reqs], **SMALL)
        serving.session.warm_up()
        held = serving.session.memory()
        usage.reset()
        assert ahead(serving) == expected
        assert usage.kernels["graph"] >= 4  # passes of either tower; prompts are read as they are
        assert serving.session.memory() == held


@pytest.mark.slow
def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rounds_of(DraftingSession(placed(), POLICIES[0], **SMALL))
    with emulated_devices() as usage, caplog.at_level(logging.WARNING):
        session = DraftingSession(placed("cuda:0", "cuda:0"), POLICIES[0], **SMALL)
        begin = torch.cuda.CUDAGraph.capture_begin

        def fail(self: torch.cuda.CUDAGraph, *args: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", fail)
        session.warm_up()
        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin)
        usage.reset()
        assert rounds_of(session) == expected and not usage.kernels["graph"]
    said = [one.getMessage() for one in caplog.records]
    assert len(said) == 1 and "run without CUDA graphs" in said[0] and "out of memory" in said[0]


def test_a_graph_serves_the_next_power_of_two() -> None:
    assert [padded_count(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    assert [list(padded_counts(most)) for most in (1, 4, 8)] == [[1], [4, 2, 1], [8, 4, 2, 1]]


def test_there_are_no_graphs_on_a_cpu() -> None:
    graphs, ran = PassGraphs(torch.device("cpu")), []
    graphs.capture("pass", lambda: ran.append(1))
    assert not graphs.available and "pass" not in graphs and not ran and graphs.nbytes == 0


def test_a_captured_pass_that_reads_the_device_is_refused() -> None:
    with emulated_devices():
        graphs, x = PassGraphs(torch.device("cuda:0")), torch.zeros(2, device="cuda:0")
        graphs.capture("pass", lambda: x.tolist())
        assert not graphs.available and "pass" not in graphs
