"""The V1 proposer without an engine: what it counts, and when."""

from __future__ import annotations

import gc
import itertools
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.builders import random_ids, tiny_config, tiny_model
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import AdaptivePolicy, DraftingSession, FixedPolicy
from twotower_spec.errors import ArgumentError
from twotower_spec.generation import PhaseTimes
from vllm_twotower.config import FOUND, KNOBS
from vllm_twotower.metrics import PHASES

pytest.importorskip("vllm")

NUM_DRAFTS = 4


def make(monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> Any:
    """A proposer that drafts for one request, "a"."""
    from vllm_twotower.v1 import hooks
    from vllm_twotower.v1.proposer import TwoTowerProposer

    monkeypatch.setattr(hooks, "install", lambda *, is_hybrid: True)
    given = {"model": "T", "policy": "fixed", "block_size": 8, **knobs}
    proposer = TwoTowerProposer(
        SimpleNamespace(
            additional_config={KNOBS: given, FOUND: {"block_size": 8, "num_token_ids": 61}},
            speculative_config=SimpleNamespace(num_speculative_tokens=NUM_DRAFTS),
            model_config=SimpleNamespace(get_vocab_size=lambda: 61, is_hybrid=False, enforce_eager=True),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_rank=0),
            device_config=SimpleNamespace(device_type="cpu"),
        )
    )
    if proposer.knobs.policy != "off":
        proposer.session = DraftingSession(tiny_model(), FixedPolicy(8, 1, num_tokens=NUM_DRAFTS))
    request = SimpleNamespace(sampling_params=None, output_token_ids=[])
    batch = SimpleNamespace(req_ids=["a"])
    proposer.begin_step(SimpleNamespace(requests={"a": request}, input_batch=batch, max_model_len=200), None)
    return proposer


def step(proposer: Any, length: int, sampled: list[int]) -> list[int]:
    table = np.array([random_ids(200)], dtype=np.int32)
    drafts: list[list[int]] = proposer.propose([sampled], np.array([length], dtype=np.int32), table)
    return drafts[0]


def drafting_s(proposer: Any) -> float:
    return sum(proposer.stats.get("drafting_seconds", phase) for phase in PHASES)


def test_seconds_of_a_round_are_counted_in_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorders take them off the step: those of another round would make its verification look short, or long."""
    proposer = make(monkeypatch)
    for length, sampled in ((9, []), (10, [5]), (11, [5])):
        before = drafting_s(proposer)
        assert len(step(proposer, length, sampled)) == (NUM_DRAFTS if sampled else 0)
        drafted = proposer._round
        assert drafted.host_s <= drafting_s(proposer) - before


def test_seconds_that_a_device_has_not_measured_yet_are_counted_when_the_next_round_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proposer = make(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(PhaseTimes, "known", False)
        step(proposer, 9, [])
        first = proposer._round
        assert drafting_s(proposer) == 0.0
    proposer.change_policy({})  # forgets the round, not what it took
    step(proposer, 10, [5])
    extend_s = first.times.extend_s + proposer._round.times.extend_s
    assert proposer.stats.get("drafting_seconds", "extend") == pytest.approx(extend_s)


def test_a_policy_is_not_told_of_a_round_that_another_one_has_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    step(proposer, 10, [5])

    def fails() -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(proposer.session, "warm_up", fails)
    with pytest.raises(RuntimeError, match="injected"):
        proposer.change_policy({"steps_per_block": 3})
    told: list[Any] = []
    monkeypatch.setattr(proposer.session.policy, "observe", told.append)
    assert len(step(proposer, 11, [5])) == NUM_DRAFTS
    assert not told


def test_policy_off_drafts_nothing_and_another_policy_takes_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    assert step(proposer, 10, [5])
    proposer.change_policy({"policy": "off"})
    rounds = proposer.stats.get("rounds")
    assert not step(proposer, 11, [5]) and not step(proposer, 12, [5])
    assert proposer.stats.get("rounds") == rounds and proposer.stats.get("fallbacks", "policy") == 2
    proposer.change_policy({})
    assert len(step(proposer, 13, [5])) == NUM_DRAFTS


def test_a_policy_that_is_meant_again_keeps_what_it_has_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    proposer.change_policy({"policy": "adaptive", "block_size": 8, "steps_per_block": None})
    learnt = proposer.session.policy
    for changes in ({"block_size": None}, {"steps_per_block": 8}, {"dtype": "float32"}):
        proposer.change_policy({})
        proposer.change_policy({"policy": "adaptive", **changes})
        assert proposer.session.policy is learnt
    proposer.change_policy({"policy": "adaptive", "confidence_threshold": 0.5})
    assert proposer.session.policy is not learnt


def test_requests_without_drafts_are_counted_by_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    runner, proposer._runner = proposer._runner, None
    assert not step(proposer, 10, [5])
    assert proposer.stats.get("fallbacks", "no runner") == 1 and not proposer.stats.get("fallbacks", "not loaded")
    proposer._runner, proposer.session = runner, None
    assert not step(proposer, 10, [5])
    assert proposer.stats.get("fallbacks", "not loaded") == 1


def test_off_at_start_is_counted_as_the_policy_and_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch, policy="off")
    assert not step(proposer, 10, [5])
    assert proposer.stats.get("fallbacks", "policy") == 1 and not proposer.stats.get("fallbacks", "not loaded")
    proposer.change_policy({"block_size": 16})
    with pytest.raises(ArgumentError, match="policy 'fixed' needs the towers"):
        proposer.change_policy({"policy": "fixed"})


def test_a_permanently_damaged_drafter_reads_its_contexts_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    def context_tokens(model: TwoTowerModel) -> float:
        proposer = make(monkeypatch)
        proposer.session = DraftingSession(model, FixedPolicy(8, 1, num_tokens=NUM_DRAFTS))
        for length in range(50, 150):
            step(proposer, length, [5])
        return float(proposer.stats.get("context_tokens"))

    damaged = TwoTowerModel.from_config(tiny_config(), dtype="float64")
    for parameter in damaged.denoiser.parameters():
        parameter.data.fill_(math.nan)
    assert context_tokens(tiny_model()) == 149
    assert context_tokens(damaged) < 8 * 150  # rounds 0, 1, 3, 7, 15, 31 and 63; with every round it were 9950


def test_an_idle_server_holds_no_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    step(proposer, 10, [5])
    assert (proposer.stats.get("pool_used", "requests"), proposer.stats.get("pool_used", "tokens")) == (1, 10)
    proposer.begin_step(proposer._runner, SimpleNamespace(finished_req_ids={"a", "unknown"}))
    assert (proposer.stats.get("pool_used", "requests"), proposer.stats.get("pool_used", "tokens")) == (0, 0)


def test_a_request_that_cannot_be_released_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    step(proposer, 10, [5])
    monkeypatch.setattr(proposer.session.state, "release", lambda request_id: 1 / 0)
    proposer.begin_step(proposer._runner, SimpleNamespace(finished_req_ids={"a"}))


def test_nothing_is_kept_of_requests_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    proposer.session.policy = AdaptivePolicy((4, 8), may_skip=False)
    runner, numbers = proposer._runner, itertools.count()

    def objects_after(num_requests: int) -> Counter[str]:
        """Serves requests one after the other, some of them damaged; counts what exists then, by type."""
        for number in itertools.islice(numbers, num_requests):
            (old,), new = runner.input_batch.req_ids, f"request {number}"
            runner.requests[new] = runner.requests.pop(old)
            runner.input_batch.req_ids = [new]
            proposer.begin_step(runner, SimpleNamespace(finished_req_ids={old}))
            for length in (9, 10):
                step(proposer, length, [5])
                if number % 5 == 0:
                    proposer.session.state.mamba.ssm.fill_(math.nan)
        gc.collect()
        return Counter(type(one).__name__ for one in gc.get_objects())

    objects_after(1)  # counting for the first time makes a few
    before = objects_after(20)
    grown = objects_after(50) - before
    assert grown.total() < 25, grown
    assert len(proposer.session.request_ids) <= 1 and proposer.stats.get("denoiser_passes") > 50


def test_rounds_are_left_out_while_the_policy_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = make(monkeypatch)
    policy, observed = proposer.session.policy, []
    monkeypatch.setattr(policy, "plan", lambda *args, **kwargs: None)
    monkeypatch.setattr(policy, "num_rests", 3, raising=False)
    monkeypatch.setattr(policy, "observe", observed.append)
    rounds = proposer.stats.get("rounds")
    for length in range(10, 19):
        assert step(proposer, length, [5]) == []
    assert [outcome.num_rested for outcome in observed] == [3, 3]
    assert proposer.stats.get("rounds") == rounds + 9
