"""Summaries of measurements over their repeats: made once, shown in terminals, in JSON and in the report.

pandas groups and scipy makes intervals (extra `bench`); both are imported where they are needed.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from twotower_bench.records import (
    ALL_CATEGORIES,
    BASELINE,
    BASELINE_AGAIN,
    Drafting,
    LatencyBound,
    Load,
    LoadPoint,
    Quantiles,
    ServedRequest,
    ServingCell,
    System,
    Traffic,
)
from twotower_spec.drafting.metrics import CalibrationBin, DraftingMetrics
from twotower_spec.evaluation.statistics import (
    Comparison,
    Estimate,
    bootstrap_interval,
    compare_same_repeats,
    median_and_spread,
    ratio_of_same_repeats,
)

Measured = TypeVar("Measured", ServingCell, LoadPoint)

# Of the requests of every repeat that must be within the bound for a load to count as kept.
GOOD_ENOUGH = 0.9
# Of the drafts in a bin of calibration; 0 without any.
MEANS = ("mean_confidence", "acceptance_rate")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A system in one place, over all repeats, beside no speculation there.

    Attributes:
        system: what was measured.
        num_repeats: passes that it rests on.
        num_requests: in one repeat.
        tokens_per_s: of all requests together, over repeats.
        speed_up: over no speculation, the median over repeats; None where that was not measured.
        comparison: the same with its interval and the A/A noise; None with fewer than three repeats.
        num_different: prompts with another text than no speculation in its first repeat, in any repeat; None where
            texts are drawn or there is nothing to compare with.
    """

    system: System
    num_repeats: int
    num_requests: int
    tokens_per_s: Estimate
    speed_up: float | None
    comparison: Comparison | None
    num_different: int | None

    @property
    def verdict(self) -> str:
        """The comparison in a few words; "-" where there is none to make."""
        if self.comparison:
            return self.comparison.verdict
        return "-" if self.speed_up is None or self.system.name == BASELINE else "too few repeats"


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of drafts, over requests.

    Attributes:
        acceptance_length: accepted + 1 per step that verified drafts, intervals over prompts; None without drafts.
        tokens_per_step: per step, with those that had no drafts.
        num_steps, num_drafted_steps: of requests, counted separately.
        mean_draft_tokens: verified per step that had any.
        by_position: share of the steps with drafts that accepted the draft at each position.
        conditional_by_position: the same among the steps that drafted there and accepted all drafts before.
        num_asked_by_position: how many steps these were.
        histogram: steps with drafts by number of accepted ones.
    """

    acceptance_length: Estimate | None
    tokens_per_step: Estimate
    num_steps: int
    num_drafted_steps: int
    mean_draft_tokens: float
    by_position: tuple[float, ...]
    conditional_by_position: tuple[float, ...]
    num_asked_by_position: tuple[int, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Latency:
    """Times of requests, in seconds.

    Attributes:
        first_token, first_token_p99: TTFT.
        gap, gap_p99: between outputs (ITL); 0 where texts have one token.
        token: per output token after the first (TPOT), the median over requests; 0 likewise.
    """

    first_token: float
    first_token_p99: float
    gap: float
    gap_p99: float
    token: float

    @property
    def user_tokens_per_s(self) -> float:
        """Tokens/s that one user sees after the first token; 0 where texts have one token."""
        return 1 / self.token if self.token else 0.0


@dataclass(frozen=True)
class RoundTimes:
    """Where the time of a round goes: means in seconds per round of the whole batch, which add up to its wall time.

    Attributes:
        extend, denoise, host: of the drafter.
        verify: the verifier and all the rest of vLLM, prompts included.
    """

    extend: float
    denoise: float
    host: float
    verify: float


@dataclass(frozen=True, kw_only=True)
class CellSummary(Summary):
    """A system in an engine under a load.

    Attributes:
        load: what it was asked.
        rates, user_rates: tokens/s of all requests together, and of one from its first token on, by repeat.
        user_tokens_per_s: of one request, over repeats.
        acceptance: of its drafts.
        tokens_per_nfe: tokens of steps with drafts per denoiser pass, requests counted separately; None where nothing
            was denoised or verified.
        latency: of its requests.
        round_times: None where TwoTower did not draft.
        calibration: of TwoTower's confidences.
        without_drafts: requests that got none in a round of TwoTower, by reason, over all repeats.
    """

    load: Load
    rates: Mapping[int, float]
    user_rates: Mapping[int, float]
    user_tokens_per_s: Estimate
    acceptance: Acceptance
    tokens_per_nfe: float | None
    latency: Latency
    round_times: RoundTimes | None
    calibration: tuple[CalibrationBin, ...]
    without_drafts: Mapping[str, int]

    @property
    def place(self) -> Load:
        """Where systems are compared."""
        return self.load


@dataclass(frozen=True, kw_only=True)
class ServerSummary(Summary):
    """A system behind a server under a traffic; nothing is compared where a request failed, which leaves less to do.

    Attributes:
        traffic: how requests came.
        bound: which requests are good.
        num_failed: requests in all repeats.
        requests_per_s, goodput: over repeats.
        good_share: goodput over requests per second, those that failed included: medians of the repeats.
        lowest_good_share: of the repeat with the smallest share of requests within the bound.
        ttft, tpot, itl, e2el: medians over repeats.
        acceptance_length: accepted + 1 per draft, of all repeats together; None without drafts.
    """

    traffic: Traffic
    bound: LatencyBound
    num_failed: int
    requests_per_s: Estimate
    goodput: Estimate
    good_share: float
    lowest_good_share: float
    ttft: Quantiles
    tpot: Quantiles
    itl: Quantiles
    e2el: Quantiles
    acceptance_length: float | None

    @property
    def place(self) -> Traffic:
        """Where systems are compared."""
        return self.traffic

    @property
    def keeps_bound(self) -> bool:
        """Whether enough of its requests are within the bound, in every repeat."""
        return self.lowest_good_share >= GOOD_ENOUGH


def summarise_cells(cells: Sequence[ServingCell]) -> list[CellSummary]:
    """Summarises every system under every load: loads as they come first, systems in the order of tables."""
    return [_summary_of_cells(cells, own) for own in _in_places(cells)]


def summarise_points(points: Sequence[LoadPoint]) -> list[ServerSummary]:
    """Summarises every system under every traffic: traffics as they come first, systems in the order of tables."""
    return [_summary_of_points(points, own) for own in _in_places(points)]


def _summary_of_cells(cells: Sequence[ServingCell], own: Sequence[ServingCell]) -> CellSummary:
    requests = [request for cell in own for request in cell.requests]
    drafting = [cell.drafting for cell in own if cell.drafting]
    passes = sum(one.request_denoiser_passes for one in drafting)
    acceptance = acceptance_of(requests)
    length = acceptance.acceptance_length
    user_rates = {cell.repeat: latency_of(cell.requests).user_tokens_per_s for cell in own}
    return CellSummary(
        **_beside_baseline(cells, own),
        num_requests=len(own[0].requests),
        load=own[0].load,
        rates={cell.repeat: cell.tokens_per_s for cell in own},
        user_rates=user_rates,
        user_tokens_per_s=median_and_spread([*user_rates.values()]),
        acceptance=acceptance,
        tokens_per_nfe=length.value * acceptance.num_drafted_steps / passes if length and passes else None,
        latency=latency_of(requests),
        round_times=_round_times(own, drafting),
        calibration=merged_calibration(one.calibration for one in drafting),
        without_drafts=dict(sum((Counter(one.without_drafts) for one in drafting), Counter())),
    )


def _summary_of_points(points: Sequence[LoadPoint], own: Sequence[LoadPoint]) -> ServerSummary:
    goodput = median_and_spread([point.goodput for point in own])

    def middle(name: str) -> Quantiles:
        found = [getattr(point, name) for point in own]
        return Quantiles(*(statistics.median(getattr(one, which) for one in found) for which in ("median", "p99")))

    return ServerSummary(
        **_beside_baseline(points, own),
        ttft=middle("ttft"),
        tpot=middle("tpot"),
        itl=middle("itl"),
        e2el=middle("e2el"),
        num_requests=len(own[0].texts),
        traffic=own[0].traffic,
        bound=own[0].bound,
        num_failed=sum(point.num_failed for point in own),
        requests_per_s=median_and_spread([point.requests_per_s for point in own]),
        goodput=goodput,
        good_share=goodput.value / statistics.median(len(point.texts) / point.seconds for point in own),
        lowest_good_share=min(point.good_share for point in own),
        acceptance_length=acceptance_length(
            sum(point.num_accepted_tokens for point in own), sum(point.num_drafts for point in own)
        ),
    )


def acceptance_length(num_accepted_tokens: int, num_drafted_steps: int) -> float | None:
    """Tokens gained by a step that verifies drafts: those accepted, and one of the verifier; None without a step."""
    return 1 + num_accepted_tokens / num_drafted_steps if num_drafted_steps else None


def acceptance_of(requests: Sequence[ServedRequest], *, beyond_end: bool = False) -> Acceptance:
    """Counts over requests, of which those with one prompt id count as one prompt; at least one.

    Args:
        requests: of one system.
        beyond_end: count what the last step accepted beyond the end of the text, too. Without it, the last step is
            counted as if no more had been drafted than the text had room for, as it is where drafters know that.
    """
    import pandas as pd

    rows = [(one.prompt_id, *step) for one in requests for step in _steps(one, beyond_end)]
    steps = pd.DataFrame(rows, columns=["prompt", "drafted", "accepted"])
    drafted = steps[steps["drafted"] > 0]
    metrics = DraftingMetrics()
    for num_drafts, num_accepted in zip(drafted["drafted"].tolist(), drafted["accepted"].tolist(), strict=True):
        metrics.add_round(num_drafts, num_accepted, num_accepted + 1, [], 0, 0)
    report = metrics.summary()
    return Acceptance(
        acceptance_length=_gain_per_step(drafted) if len(drafted) else None,
        tokens_per_step=_gain_per_step(steps) if len(steps) else Estimate(1.0, 1.0, 1.0),
        num_steps=len(steps),
        num_drafted_steps=report.num_rounds,
        mean_draft_tokens=report.num_draft_tokens / report.num_rounds if report.num_rounds else 0.0,
        by_position=tuple(report.acceptance_by_position),
        conditional_by_position=tuple(report.conditional_acceptance_by_position),
        num_asked_by_position=tuple(report.num_asked_by_position),
        histogram=tuple(report.histogram),
    )


def latency_of(requests: Sequence[ServedRequest]) -> Latency:
    """Summarises the times of requests, at least one."""
    first = [request.first_token_s for request in requests]
    gaps = list(chain.from_iterable(request.gaps_s for request in requests)) or [0.0]
    tokens = [one.token_s for one in requests if one.token_s is not None] or [0.0]
    return Latency(
        first_token=float(np.median(first)),
        first_token_p99=float(np.quantile(first, 0.99)),
        gap=float(np.median(gaps)),
        gap_p99=float(np.quantile(gaps, 0.99)),
        token=float(np.median(tokens)),
    )


def plain_step_s(cells: Sequence[ServingCell]) -> float:
    """Mean wall time of a step, prompts and all of the engine included: a step of no speculation beside `RoundTimes`.

    Args:
        cells: whose requests followed each other, of any system; at least one.
    """
    return sum(cell.seconds for cell in cells) / sum(map(num_steps, cells))


def num_steps(cell: ServingCell) -> int:
    """Steps of the engine: those of each request, which began in the order of submission as others ended."""
    free = [0] * cell.load.concurrency
    for request in cell.requests:
        heapq.heapreplace(free, free[0] + 1 + len(request.num_accepted_tokens))
    return max(free)


def merged_calibration(parts: Iterable[Sequence[CalibrationBin]]) -> tuple[CalibrationBin, ...]:
    """Joins the bins of several runs; empty without any."""
    by_bounds: dict[tuple[float, float], list[CalibrationBin]] = {}
    for one in chain.from_iterable(parts):
        by_bounds.setdefault((one.low, one.high), []).append(one)
    merged = []
    for bounds, bins in sorted(by_bounds.items()):
        counts = [one.num_drafts for one in bins]
        weights = counts if any(counts) else None
        means = (np.average([getattr(one, name) for one in bins], weights=weights) for name in MEANS)
        merged.append(CalibrationBin(*bounds, sum(counts), *map(float, means)))
    return tuple(merged)


def over_categories(cells: Sequence[ServingCell]) -> list[ServingCell]:
    """Joins categories that were measured one after the other to one cell, for every system, concurrency and repeat.

    Empty where there is one category alone, or loads hold all prompts as it is. A run that was stopped has places where
    some categories are missing: these are left out, since they would be compared with other prompts.
    """
    categories = {cell.load.category for cell in cells}
    if len(categories) < 2 or ALL_CATEGORIES in categories:
        return []
    groups: dict[tuple[str, Load, int], list[ServingCell]] = {}
    for cell in cells:
        together = replace(cell.load, category=ALL_CATEGORIES)
        groups.setdefault((cell.system.name, together, cell.repeat), []).append(cell)
    return [
        ServingCell(
            system=group[0].system,
            load=load,
            repeat=repeat,
            seconds=sum(cell.seconds for cell in group),
            requests=tuple(request for cell in group for request in cell.requests),
            steps=tuple(steps for cell in group for steps in cell.steps),
            drafting=_added_up([cell.drafting for cell in group if cell.drafting]),
        )
        for (_, load, repeat), group in groups.items()
        if {cell.load.category for cell in group} == categories
    ]


def repeats_of(measured: Sequence[Measured], system: str, place: Load | Traffic) -> list[Measured]:
    """Finds the repeats of one system in one place, in order."""
    found = (one for one in measured if one.system.name == system and one.place == place)
    return sorted(found, key=lambda one: one.repeat)


def highest_within_bound(summaries: Sequence[ServerSummary], system: str, *, is_closed: bool) -> Traffic | None:
    """Finds the highest closed or open loop that a system keeps the bound under; None if it does under none."""
    kept = [
        one.traffic
        for one in summaries
        if one.system.name == system and one.traffic.is_closed == is_closed and one.keeps_bound
    ]
    return max(kept, key=lambda traffic: traffic.amount, default=None)


def _in_places(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Repeats of every system in every place: places as they come first, systems in the order of tables.

    That is no speculation, the same again, rivals, TwoTower; they were measured in an order that was drawn.
    """

    def rank(system: System) -> tuple[bool, bool, bool]:
        return system.name != BASELINE, system.name != BASELINE_AGAIN, system.is_two_tower

    systems = sorted({one.system.name: one.system for one in measured}.values(), key=rank)
    places = dict.fromkeys(one.place for one in measured)
    groups = [repeats_of(measured, system.name, place) for place in places for system in systems]
    return [group for group in groups if group]


def _beside_baseline(measured: Sequence[Measured], own: Sequence[Measured]) -> dict[str, Any]:
    """Fills in what all summaries have but the number of requests."""
    system, place = own[0].system, own[0].place
    plain: Sequence[Measured] = repeats_of(measured, BASELINE, place)
    again: Sequence[Measured] = repeats_of(measured, BASELINE_AGAIN, place)
    speeds, plain_speeds, again_speeds = ({one.repeat: one.speed for one in group} for group in (own, plain, again))
    # A server with fewer requests to answer has less to do.
    if any(None in one.answers.values() for one in (*own, *plain, *again)):
        speeds = {}
    expected = plain[0].answers if plain else {}
    answers = [(prompt, text, expected.get(prompt)) for one in own for prompt, text in one.answers.items()]
    different = {prompt for prompt, text, other in answers if None not in (text, other) and text != other}
    return {
        "system": system,
        "num_repeats": len(own),
        "tokens_per_s": median_and_spread([one.tokens_per_s for one in own]),
        "speed_up": ratio_of_same_repeats(speeds, plain_speeds),
        "comparison": None if system.name == BASELINE else compare_same_repeats(plain_speeds, speeds, again_speeds),
        "num_different": len(different) if plain and not own[0].temperature else None,
    }


def _gain_per_step(steps: Any) -> Estimate:
    """Estimates accepted + 1 per step from a data frame of steps, with its interval over prompts."""
    by_prompt = steps.groupby("prompt", sort=False)["accepted"].agg(["sum", "size"])
    return bootstrap_interval((by_prompt["sum"] + by_prompt["size"]).tolist(), by_prompt["size"].tolist())


def _steps(request: ServedRequest, beyond_end: bool) -> list[tuple[int, int]]:
    """Lists drafted and accepted tokens of every step."""
    steps = list(zip(request.num_draft_tokens, request.num_accepted_tokens, strict=True))
    unused = request.num_unused_tokens
    if steps and unused > 0 and not beyond_end:
        drafted, accepted = steps[-1]
        # With the token of the verifier that follows them they are all that there was room for.
        kept = max(accepted - unused, 0)
        steps[-1] = (min(drafted, kept), kept)
    return steps


def _round_times(cells: Sequence[ServingCell], drafting: Sequence[Drafting]) -> RoundTimes | None:
    rounds = sum(one.rounds for one in drafting)
    if not rounds:
        return None
    extend, denoise, host = (
        sum(one.seconds[phase] for one in drafting) / rounds for phase in ("extend", "denoise", "host")
    )
    wall = sum(cell.seconds for cell in cells if cell.drafting) / rounds
    return RoundTimes(extend, denoise, host, wall - extend - denoise - host)


def _added_up(parts: Sequence[Drafting]) -> Drafting | None:
    if not parts:
        return None
    seconds, without_drafts = Counter[str](), Counter[str]()
    for part in parts:
        seconds.update(part.seconds)
        without_drafts.update(part.without_drafts)
    return Drafting(
        rounds=sum(part.rounds for part in parts),
        context_tokens=sum(part.context_tokens for part in parts),
        denoiser_passes=sum(part.denoiser_passes for part in parts),
        request_denoiser_passes=sum(part.request_denoiser_passes for part in parts),
        seconds=seconds,
        without_drafts=without_drafts,
        # Bins of the same bounds are merged where they are looked at.
        calibration=tuple(one for part in parts for one in part.calibration),
    )
