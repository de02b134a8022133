"""The adaptive policy on simulated servers: never much slower than no drafts, near the best fixed choice, and quiet."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from tests.drafting.served_texts import ServerCosts, SimulatedServer, rate, serve
from twotower_spec.drafting import AdaptivePolicy, RoundOutcome

BAD, GOOD = 0.2, 0.9


# What a policy does hangs on what the first texts happen to show it: bounds are of the mean of several runs.
SEEDS = 3


def started(
    costs: ServerCosts | None = None, whole_batch: bool = False, seed: int = 0
) -> tuple[AdaptivePolicy, SimulatedServer]:
    policy, server = AdaptivePolicy(), SimulatedServer(costs, seed, whole_batch)
    server.warm_up(policy)
    return policy, server


def shares_of_the_best(kinds: list[float], num_rounds: int, whole_batch: bool = False) -> list[float]:
    """Rates after 200 rounds, in those of the best fixed choice."""
    shares = []
    for seed in range(SEEDS):
        policy, server = started(whole_batch=whole_batch, seed=seed)
        serve(policy, server, kinds, 200)
        shares.append(
            rate(serve(policy, server, kinds, num_rounds)) / server.best_fixed_rate(kinds, policy.block_sizes)
        )
    return shares


@pytest.mark.parametrize(
    "kinds",
    [[GOOD], [BAD], [GOOD] * 4, [0.3] * 4, [0.5] * 8, [BAD] * 8, [0.95, 0.95, *[0.1] * 6], [0.8] * 16],
    ids=lambda kinds: f"{kinds[0]}x{len(kinds)}",
)
def test_after_200_rounds_of_one_kind_the_regret_is_small(kinds: list[float]) -> None:
    # Simulated texts are random: the mean of 600 rounds is known to about a hundredth where drafts are long.
    noise = 0.01 if max(kinds) >= GOOD else 0.0
    assert mean(shares_of_the_best(kinds, 600)) > 0.98 - noise


@pytest.mark.parametrize("kinds", [[BAD], [BAD] * 8, [0.8] * 16], ids=lambda kinds: f"{kinds[0]}x{len(kinds)}")
def test_where_no_drafts_are_best_looks_take_a_hundredth_of_the_time_one_request_at_a_time(kinds: list[float]) -> None:
    policy, server = started()
    serve(policy, server, kinds, 100)
    rounds = serve(policy, server, kinds, 1000)
    looked_s = sum(one.seconds - one.plain_s for one in rounds)
    assert 0 < looked_s < 0.012 * sum(one.seconds for one in rounds)  # with the verification of what was drafted
    assert max(len(one.drafted) for one in rounds) == 1
    assert max(one.seconds / one.plain_s for one in rounds) < 2.5


def test_no_hundred_rounds_have_more_looks_than_a_hundredth_of_their_time() -> None:
    quick = ServerCosts(extend_s=0.0005, extend_token_s=0.00005, denoise_s=0.03)
    policy, server = started(quick)
    serve(policy, server, [BAD] * 8, 200)
    rounds = serve(policy, server, [BAD] * 8, 1000)
    looked_s = [one.seconds - one.plain_s for one in rounds]
    assert sum(second > 0 for second in looked_s) > 10
    for first in range(len(rounds) - 99):
        hundred = slice(first, first + 100)
        # What a pass takes is read off a line between two that were measured.
        assert sum(looked_s[hundred]) < 0.0105 * sum(one.seconds for one in rounds[hundred])


def test_a_whole_batch_is_drafted_for_alike_as_far_as_that_pays() -> None:
    policy, server = started(whole_batch=True)
    serve(policy, server, [GOOD] * 4, 800)
    rounds = serve(policy, server, [GOOD] * 4, 100)
    assert mean(len(one.drafted) for one in rounds if one.block_size) > 3.5  # some may be read yet
    assert mean(shares_of_the_best([GOOD] * 4, 600, whole_batch=True)) > 0.95
    for kinds in ([BAD] * 8, [0.8] * 16):
        serve(policy, server, kinds, 300)
        # A beginning by mistake costs more than where requests join one by one.
        assert rate(serve(policy, server, kinds, 600)) > 0.96 * len(kinds) / server.costs.verify(len(kinds))


def test_a_request_that_drafts_badly_is_not_drafted_for_while_its_neighbour_is() -> None:
    kinds, drafted, num_rounds = [GOOD, GOOD, GOOD, 0.05], [], 400
    for seed in range(SEEDS):
        policy, server = started(seed=seed)
        serve(policy, server, kinds, 500)
        rounds = serve(policy, server, kinds, num_rounds)
        drafted += [one.chances[row] for one in rounds for row in one.drafted]
    num_rounds *= SEEDS
    assert drafted.count(GOOD) > 0.9 * 3 * num_rounds and drafted.count(0.05) < 0.35 * num_rounds


@pytest.mark.parametrize("kind", [GOOD, BAD])
def test_load_that_comes_and_goes_costs_nothing_that_lasts(kind: float) -> None:
    loads, gains = (1, 8, 16, 1, 16, 1), []
    for seed in range(SEEDS):
        policy, server = started(seed=seed)
        gains.append([])
        for num_reqs in loads:
            serve(policy, server, [kind] * num_reqs, 200)
            plain = num_reqs / server.costs.verify(num_reqs)
            gains[-1].append(rate(serve(policy, server, [kind] * num_reqs, 600)) / plain)
    means = [mean(one) for one in zip(*gains, strict=True)]
    assert min(means) > 0.98
    assert means[-1] > (2.2 if kind == GOOD else 0.98)


@pytest.mark.parametrize("num_reqs", [1, 4])
def test_prompts_of_another_kind_are_noticed_both_ways(num_reqs: int) -> None:
    kinds, rates = (GOOD, BAD, GOOD, BAD), []
    for seed in range(SEEDS):
        policy, server = started(seed=seed)
        rates.append([])
        for kind in kinds:
            server.fill([])
            # A look, as many tokens as the text has, takes 1 % of two hundred rounds and more; the second one tells.
            serve(policy, server, [kind] * num_reqs, 500)
            rates[-1].append(rate(serve(policy, server, [kind] * num_reqs, 600)))
    plain = num_reqs / server.costs.verify(num_reqs)
    _, bad, good, bad_again = (mean(turn) for turn in zip(*rates, strict=True))
    assert min(bad, bad_again) > 0.98 * plain
    assert good > 0.96 * server.best_fixed_rate([GOOD] * num_reqs, policy.block_sizes)


def test_bursts_are_no_slower_than_without_drafts() -> None:
    policy, server = started()
    serve(policy, server, [BAD] * 16, 200)
    rounds = []
    for _ in range(20):
        rounds += serve(policy, server, [BAD] * 16, 10) + serve(policy, server, [BAD], 30)
    assert sum(one.seconds for one in rounds) < 1.02 * sum(one.plain_s for one in rounds)


@pytest.mark.parametrize(("phase", "stalled"), [("extend_s", 5), ("denoise_s", 5), ("verify_s", 4), ("verify_s", 8)])
def test_a_machine_that_stood_still_for_five_seconds_costs_nothing_that_lasts(
    phase: str, stalled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, server = started()
    undisturbed, other = started()
    observe = policy.observe

    def observe_stalled(outcome: RoundOutcome) -> None:
        observe(replace(outcome, **{phase: getattr(outcome, phase) + 5.0}))

    serve(policy, server, [GOOD], stalled - 1)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "observe", observe_stalled)
        serve(policy, server, [GOOD], 1)
    serve(policy, server, [GOOD], 200)
    serve(undisturbed, other, [GOOD], stalled + 200)
    assert rate(serve(policy, server, [GOOD], 300)) > 0.95 * rate(serve(undisturbed, other, [GOOD], 300))


@pytest.mark.parametrize("phase", ["extend_s", "verify_s"])
def test_a_look_in_which_a_machine_stood_still_does_not_end_all_looks(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, server = started()
    serve(policy, server, [BAD], 300)  # nothing is drafted any more, and rounds with drafts are looks
    observe, stalled = policy.observe, list[bool]()

    def observe_stalled(outcome: RoundOutcome) -> None:
        if outcome.num_context_tokens > 1 and not stalled:
            outcome = replace(outcome, **{phase: getattr(outcome, phase) + 5.0})
            stalled.append(True)
        observe(outcome)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "observe", observe_stalled)
        serve(policy, server, [BAD], 500)
    assert stalled
    server.fill([])
    serve(policy, server, [GOOD], 800)
    assert rate(serve(policy, server, [GOOD], 300)) > 0.95 * server.best_fixed_rate([GOOD], policy.block_sizes)
