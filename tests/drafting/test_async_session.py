"""Drafting ahead of the host: drafts are those of a session that knows all tokens, and nothing is read to make them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids, tiny_model
from tests.support.host_reads import HostReads
from twotower_spec.drafting import (
    AdaptivePolicy,
    AsyncRequest,
    AsyncRound,
    AsyncSession,
    DraftingSession,
    DraftPlan,
    DraftPolicy,
    FixedPolicy,
    Round,
    ThresholdPolicy,
)
from twotower_spec.drafting.policies import FixedSteps
from twotower_spec.state.window import TokenTable

# Drafts that the target verifies, and tokens that it commits at most.
K = 5
WIDTH = K + 1
VOCAB = 61
POLICIES = [FixedPolicy(8, 1, num_tokens=K), FixedPolicy(8, 3, num_tokens=4), ThresholdPolicy(4, 4, 0.5)]


def make(policy: DraftPolicy | None = None, **options: object) -> AsyncSession:
    return AsyncSession(tiny_model(), policy or POLICIES[0], most_per_step=WIDTH, **options)  # type: ignore[arg-type]


@dataclass
class Target:
    """A target that commits random tokens, and whose results reach the host `delay` steps late."""

    session: AsyncSession
    delay: int = 1
    num_rows: int = 4
    random: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        self.table = TokenTable(
            torch.zeros(self.num_rows, 200, dtype=torch.int32), torch.zeros(self.num_rows, dtype=torch.int32)
        )
        self.rows: dict[str, int] = {}
        self.known: dict[str, list[int]] = {}
        self.sampling: set[str] = set()
        self.under_way: deque[tuple[AsyncRound, dict[str, int]]] = deque()

    def begin(self, name: str, prompt: list[int]) -> None:
        """Takes a request whose prompt is being read."""
        row = min(set(range(self.num_rows)).difference(self.rows.values()))
        self.rows[name], self.known[name] = row, list(prompt)
        self.table.token_ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.table.lengths[row] = len(prompt)

    def tokens(self, name: str) -> list[int]:
        row = self.rows[name]
        ids: list[int] = self.table.token_ids[row, : int(self.table.lengths[row])].tolist()
        return ids

    def commit(self, name: str, count: int | None = None) -> None:
        """Commits tokens, which the host does not know yet."""
        row = self.rows[name]
        self.sampling.add(name)
        length = int(self.table.lengths[row])
        for place in range(length, length + (self.random.randint(1, WIDTH) if count is None else count)):
            self.table.token_ids[row, place] = self.random.randrange(VOCAB)
            self.table.lengths[row] += 1

    def requests(self, names: str) -> list[AsyncRequest]:
        late = self.delay + 1
        return [
            AsyncRequest(
                name,
                self.rows[name],
                self.known[name],
                len(self.known[name]) + WIDTH * late * (name in self.sampling),
                read_only=name not in self.sampling,
            )
            for name in names
        ]

    def round(self, names: str) -> AsyncRound:
        """Has drafts made for the present requests."""
        done = self.session.draft_ahead(self.requests(names), self.table)
        self.under_way.append((done, {name: len(self.tokens(name)) for name in names}))
        return done

    def learn(self, delay: int | None = None) -> list[Round]:
        """Lets the host learn of all rounds but the newest."""
        settled = []
        while len(self.under_way) > (self.delay if delay is None else delay):
            done, lengths = self.under_way.popleft()
            for name, length in lengths.items():
                if name in self.rows:
                    self.known[name] = self.tokens(name)[:length]
            settled.append(self.session.settle(done, self.known))
        return settled

    def drafts(self, done: AsyncRound) -> dict[str, list[int]]:
        """Usable drafts by request."""
        if done.token_ids is None or done.usable is None:
            return {}
        usable = done.usable[:, 0].tolist()
        return {
            str(done.request_ids[row]): tokens
            for row, tokens, use in zip(done.rows, done.token_ids.tolist(), usable, strict=True)
            if use
        }


def expected(target: Target, names: str, policy: DraftPolicy) -> dict[str, list[int]]:
    session = DraftingSession(tiny_model(), policy)
    block = draft_rows(session, {name: target.tokens(name) for name in names})
    return {str(request_id): block.row(i) for i, request_id in enumerate(block.request_ids)}


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_are_those_of_a_session_that_knows_all_tokens(policy: DraftPolicy, delay: int) -> None:
    target = Target(make(policy), delay)
    for name, length in (("a", 1), ("b", 23), ("c", 4)):
        target.begin(name, random_ids(length, seed=length))
    assert target.drafts(target.round("abc")) == {}, "prompts are being read"
    for _ in range(6):
        target.learn()
        for name in "abc":
            target.commit(name)
        drafts = target.drafts(target.round("abc"))
        assert drafts == expected(target, "abc", policy)
    assert target.session.state.num_restarts == target.session.state.num_evictions == 0


def test_the_host_reads_nothing_of_a_round_in_steady_state() -> None:
    target = Target(make(FixedPolicy(8, 3, num_tokens=K)))
    for name in "abc":
        target.begin(name, random_ids(9, seed=ord(name)))
        target.commit(name, 1)
    target.round("abc")
    for _ in range(4):
        target.learn()
        for name in "abc":
            target.commit(name)
        requests = target.requests("abc")
        with HostReads(but_in={"_all_done"}) as reads:
            done = target.session.draft_ahead(requests, target.table)
        assert not reads.found and len(done.rows) == 3
        target.under_way.append((done, {name: len(target.tokens(name)) for name in "abc"}))


def test_reads_are_found() -> None:
    values = torch.arange(3)
    with HostReads() as reads:
        _ = values.tolist(), values[0].item(), values[values > 1], bool(values.any()), values.nonzero(), values.cpu()
    assert {one.split(" ", 1)[1] for one in reads.found} >= {
        "tolist",
        "item",
        "__bool__",
        "nonzero",
        "cpu",
        "index by a mask",
    }


def test_a_session_that_knows_all_tokens_reads_the_device() -> None:
    session = DraftingSession(tiny_model(), FixedPolicy(8, 2))
    with HostReads() as reads:
        draft_rows(session, {"a": random_ids(5)})
    assert any("host_loop" in one for one in reads.found)


def test_requests_may_rest_vanish_and_return() -> None:
    policy = POLICIES[0]
    target = Target(make(policy, num_slots=2), num_rows=8)
    for name in "abcd":
        target.begin(name, random_ids(6, seed=ord(name)))
        target.commit(name, 1)
    for present in ("ab", "c", "ba", "d", "dc", "a", "cb", "ab", "ab"):
        for name in present:
            target.commit(name)
        drafts = target.drafts(target.round(present))
        assert drafts == {name: row for name, row in expected(target, present, policy).items() if name in drafts}
        target.learn(0)
    assert len(drafts) == 2 and target.session.state.num_evictions > 0


def test_a_context_that_lags_behind_is_caught_up_before_it_is_drafted_for() -> None:
    policy = POLICIES[0]
    target = Target(make(policy))
    target.begin("a", random_ids(6))
    target.commit("a", 1)
    target.round("a")
    for _ in range(4):  # steps without a round
        target.commit("a", WIDTH)
    drafts = [target.drafts(target.round("a")) for _ in range(5)]
    assert drafts[:3] == [{}, {}, {}] and drafts[4] == expected(target, "a", policy)
    settled = target.learn(0)
    assert [one.without_drafts["prefilling"] for one in settled] == [0, 1, 1, 1, 0, 0]
    assert [one.num_context_tokens for one in settled] == [7, 6, 6, 6, 6, 0]


def test_what_the_host_knows_by_then_is_read_in_one_pass() -> None:
    target = Target(make())
    target.begin("a", random_ids(6))
    target.commit("a", 1)
    target.round("a")
    target.learn(0)
    target.commit("a", 4 * WIDTH)
    target.known["a"] = target.tokens("a")
    assert target.drafts(target.round("a")) == expected(target, "a", POLICIES[0])


@pytest.mark.parametrize("delay", [0, 2])
def test_nan_costs_the_drafts_of_its_request_alone(delay: int) -> None:
    target = Target(make(), delay)
    for name in "ab":
        target.begin(name, random_ids(9, seed=ord(name)))
        target.commit(name, 1)
    target.round("ab")
    target.session.state.mamba.ssm[:, target.session.state.entry("a").slot] = torch.nan
    for name in "ab":
        target.commit(name)
    damaged = target.round("ab")
    assert target.drafts(damaged) == {"b": expected(target, "b", POLICIES[0])["b"]}
    settled = target.learn(0)
    assert settled[-1].num_damaged == 1 and settled[-1].without_drafts["not finite"] == 1
    for name in "ab":
        target.commit(name)
    assert target.drafts(target.round("ab")) == expected(target, "ab", POLICIES[0])


def test_a_token_that_the_towers_do_not_have_ends_drafting_for_its_request() -> None:
    target = Target(make())
    for name in "ab":
        target.begin(name, random_ids(9, seed=ord(name)))
        target.commit(name, 1)
    target.table.token_ids[target.rows["a"], 9] = 10**6
    target.round("ab")
    target.learn(0)
    for name in "ab":
        target.commit(name)
    done = target.round("ab")
    assert target.drafts(done) == {"b": expected(target, "b", POLICIES[0])["b"]}
    assert done.without_drafts["foreign token"] == 1


def test_a_request_that_has_ended_is_settled_without_a_trace() -> None:
    target = Target(make())
    target.begin("a", random_ids(9))
    target.commit("a", 1)
    target.round("a")
    target.session.release("a")
    del target.rows["a"], target.known["a"]
    settled = target.session.settle(target.under_way.popleft()[0], {})
    assert settled.block.num_draft_tokens == [K] and not target.session.request_ids


def test_a_round_that_only_reads_tells_later_what_the_context_tower_would_have_picked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make(AdaptivePolicy((4,)))
    prompt = random_ids(6)
    text = prompt + tiny_model().generate_ar([prompt], 12, eos_token_id=None).token_ids[0]
    text[-1] = (text[-1] + 1) % (VOCAB - 1)
    table = TokenTable(torch.tensor([text], dtype=torch.int32), torch.tensor([len(text)], dtype=torch.int32))
    reads = DraftPlan(4, 0, FixedSteps(1, 0.0), frozenset({0}))
    monkeypatch.setattr(session.policy, "plan", lambda *args, **kwargs: reads)
    done = session.draft_ahead([AsyncRequest("a", 0, text, len(text))], table)
    assert done.token_ids is None and done.num_planned == 0
    settled = session.settle(done, {"a": text})
    assert settled.foreseen["a"][len(prompt) - 1 :] == [True] * 11 + [False]
    assert settled.num_context_tokens == session.state.num_computed_tokens("a") == len(text)
