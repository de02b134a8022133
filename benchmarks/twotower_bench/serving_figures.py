"""Figures of measured cells: acceptance, speed, time by phase, and the comparison with no speculation."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from twotower_bench.records import BASELINE, BASELINE_AGAIN, Drafting, Load, ServedRequest, ServingCell, System
from twotower_bench.serving import cells_of, in_order_of_tables
from twotower_spec.drafting.metrics import CalibrationBin, DraftingMetrics
from twotower_spec.evaluation.statistics import (
    Comparison,
    Estimate,
    bootstrap_interval,
    compare_same_repeats,
    median_and_spread,
    ratio_of_same_repeats,
)


@dataclass(frozen=True)
class Acceptance:
    """What became of drafts, over requests.

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
    """Of requests, in seconds.

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
        """What one user sees; 0 where texts have one token."""
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


@dataclass(frozen=True)
class Figures:
    """A system under a load, over all repeats.

    Attributes:
        system, load: which.
        num_repeats, num_requests: what it rests on; requests of one repeat.
        tokens_per_s: of all requests together, over repeats.
        speed_up: over no speculation, the median over repeats; None where that was not measured.
        comparison: the same with its interval and the A/A noise; None with fewer than three repeats.
        num_different: prompts with another text than without speculation, in any repeat; None where texts are drawn.
        acceptance: of its drafts.
        tokens_per_nfe: tokens of steps with drafts per denoiser pass, requests counted separately; None where nothing
            was denoised or verified.
        latency: of its requests.
        round_times: None where TwoTower did not draft.
        calibration: of TwoTower's confidences.
        without_drafts: requests that got none in a round of TwoTower, by reason, over all repeats.
    """

    system: System
    load: Load
    num_repeats: int
    num_requests: int
    tokens_per_s: Estimate
    speed_up: float | None
    comparison: Comparison | None
    num_different: int | None
    acceptance: Acceptance
    tokens_per_nfe: float | None
    latency: Latency
    round_times: RoundTimes | None
    calibration: tuple[CalibrationBin, ...]
    without_drafts: Mapping[str, int]

    @property
    def verdict(self) -> str:
        """The comparison in a few words."""
        return verdict_of(self.system, self.speed_up, self.comparison)


def verdict_of(system: System, speed_up: float | None, comparison: Comparison | None) -> str:
    """A comparison with no speculation in a few words; "-" where there is none to make."""
    if comparison:
        return comparison.verdict
    return "-" if speed_up is None or system.name == BASELINE else "too few repeats"


def all_figures(cells: Sequence[ServingCell]) -> list[Figures]:
    """Of every system under every load: loads in the order in which they come first, systems in that of tables."""
    measured = {(cell.load, cell.system.name) for cell in cells}
    names = [system.name for system in in_order_of_tables(cell.system for cell in cells)]
    loads = dict.fromkeys(cell.load for cell in cells)
    return [figures(cells, name, load) for load in loads for name in names if (load, name) in measured]


def figures(cells: Sequence[ServingCell], system: str, load: Load) -> Figures:
    """Of one system under one load.

    Args:
        cells: with those of `BASELINE`, to compare with it.
        system: name of it.
        load: which; at least one cell must be of both.
    """
    own, baseline = cells_of(cells, system, load), cells_of(cells, BASELINE, load)
    requests = [request for cell in own for request in cell.requests]
    drafting = [cell.drafting for cell in own if cell.drafting]
    passes = sum(one.request_denoiser_passes for one in drafting)
    acceptance = acceptance_of(requests)
    drafted_length = acceptance.acceptance_length
    rates, plain, again = (_rates(one) for one in (own, baseline, cells_of(cells, BASELINE_AGAIN, load)))
    return Figures(
        system=own[0].system,
        load=load,
        num_repeats=len(own),
        num_requests=len(own[0].requests),
        tokens_per_s=median_and_spread([cell.tokens_per_s for cell in own]),
        speed_up=ratio_of_same_repeats(rates, plain),
        comparison=None if system == BASELINE else compare_same_repeats(plain, rates, again),
        num_different=num_different(own, baseline) if baseline and not load.temperature else None,
        acceptance=acceptance,
        tokens_per_nfe=(
            drafted_length.value * acceptance.num_drafted_steps / passes if drafted_length and passes else None
        ),
        latency=latency_of(requests),
        round_times=_round_times(own, drafting),
        calibration=merged_calibration(one.calibration for one in drafting),
        without_drafts=dict(sum((Counter(one.without_drafts) for one in drafting), Counter())),
    )


def acceptance_of(requests: Sequence[ServedRequest], *, beyond_end: bool = False) -> Acceptance:
    """Over requests, of which those with one prompt id count as one prompt; at least one.

    Args:
        requests: of one system.
        beyond_end: count what the last step accepted beyond the end of the text, too. Without it, the last step is
            counted as if no more had been drafted than the text had room for, as it is where drafters know that.
    """
    metrics = DraftingMetrics()
    tokens, steps = defaultdict[str, int](int), defaultdict[str, int](int)
    drafted_tokens, drafted_steps = defaultdict[str, int](int), defaultdict[str, int](int)
    for request in requests:
        for drafted, accepted in _steps(request, beyond_end):
            tokens[request.prompt_id] += accepted + 1
            steps[request.prompt_id] += 1
            if drafted:
                drafted_tokens[request.prompt_id] += accepted + 1
                drafted_steps[request.prompt_id] += 1
                metrics.add_round(drafted, accepted, accepted + 1, [], 0, 0)
    report = metrics.report()
    return Acceptance(
        acceptance_length=_ratio(drafted_tokens, drafted_steps) if drafted_steps else None,
        tokens_per_step=_ratio(tokens, steps) if steps else Estimate(1.0, 1.0, 1.0),
        num_steps=sum(steps.values()),
        num_drafted_steps=report.num_rounds,
        mean_draft_tokens=report.num_draft_tokens / report.num_rounds if report.num_rounds else 0.0,
        by_position=tuple(report.acceptance_by_position),
        conditional_by_position=tuple(report.conditional_acceptance_by_position),
        num_asked_by_position=tuple(report.num_asked_by_position),
        histogram=tuple(report.histogram),
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


def latency_of(requests: Sequence[ServedRequest]) -> Latency:
    """Over requests, at least one."""
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


def num_different(cells: Sequence[ServingCell], baseline: Sequence[ServingCell]) -> int:
    """Prompts whose text was not that of the baseline's first repeat, in any repeat."""
    expected = {request.prompt_id: request.token_ids for request in baseline[0].requests}
    return len(
        {
            request.prompt_id
            for cell in cells
            for request in cell.requests
            if request.token_ids != expected[request.prompt_id]
        }
    )


def merged_calibration(parts: Iterable[Sequence[CalibrationBin]]) -> tuple[CalibrationBin, ...]:
    """Bins of several runs as those of one; empty without any."""
    by_bounds = defaultdict[tuple[float, float], list[CalibrationBin]](list)
    for one in chain.from_iterable(parts):
        by_bounds[one.low, one.high].append(one)
    return tuple(_merged(low, high, bins) for (low, high), bins in sorted(by_bounds.items()))


def _merged(low: float, high: float, bins: Sequence[CalibrationBin]) -> CalibrationBin:
    count = sum(one.num_drafts for one in bins)
    confidence = sum(one.mean_confidence * one.num_drafts for one in bins)
    accepted = sum(one.acceptance_rate * one.num_drafts for one in bins)
    return CalibrationBin(low, high, count, confidence / max(count, 1), accepted / max(count, 1))


def _ratio(values: dict[str, int], denominators: dict[str, int]) -> Estimate:
    return bootstrap_interval([values[key] for key in denominators], list(denominators.values()))


def _rates(cells: Sequence[ServingCell]) -> dict[int, float]:
    """Tokens/s by repeat."""
    return {cell.repeat: cell.tokens_per_s for cell in cells}


def _steps(request: ServedRequest, beyond_end: bool) -> list[tuple[int, int]]:
    """Drafted and accepted tokens of every step."""
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
