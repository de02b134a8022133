"""Cells of a sweep as an engine with known step times would give them: one request begins as another ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from twotower_bench.grid import system_of
from twotower_bench.records import DecodingSteps, Drafting, DraftSetting, Load, ServedRequest, ServingCell, System

PROMPT_TOKENS = 40
NONE = System("none", "no speculation")
AGAIN = System("none_again", "no speculation, again")


@dataclass(frozen=True)
class Times:
    """Seconds of an engine's step: a constant, and more for every token that is read.

    Attributes:
        step, token: of the verifier.
        prompt: for reading one more.
        extend, denoise, host: of a drafting round.
        context_token: more for every token that the context tower reads.
        denoised_request: more for every request in a denoiser pass.
    """

    step: float = 0.010
    token: float = 0.0005
    prompt: float = 0.004
    extend: float = 0.001
    denoise: float = 0.002
    host: float = 0.0005
    context_token: float = 0.0001
    denoised_request: float = 0.0002


def drafted(setting: DraftSetting) -> System:
    """TwoTower with this setting."""
    return system_of(setting, "T")


def served_cell(
    system: System = NONE,
    concurrency: int = 1,
    *,
    accepted: Sequence[Sequence[int]] = ((),),
    num_plain_tokens: int = 9,
    cut_ends: bool = False,
    speed: float = 1.0,
    repeat: int = 0,
    temperature: float = 0.0,
    times: Times | None = None,
) -> ServingCell:
    """A cell of known times.

    Args:
        system: without a setting, every step gives one token.
        concurrency: requests at once.
        accepted: drafts that each step of each request accepts, after its prompt; lengths alone for no drafting.
        num_plain_tokens: of each request without drafting.
        cut_ends: whether texts end within their last round, evenly spread, instead of with it.
        speed: that all times are divided by.
        repeat, temperature: of the cell.
        times: of the engine.
    """
    times, setting = times or Times(), system.setting
    drafts = setting.num_speculative_tokens if setting else 0
    plain = [(0,) * (num_plain_tokens - 1)] * len(accepted)
    waiting = list(enumerate(accepted if setting else plain))
    flying: dict[int, list[int]] = {}
    outputs: dict[int, list[float]] = {}
    starts: dict[int, float] = {}
    steps: dict[tuple[int, int], list[float]] = {}
    drafting_of = defaultdict[tuple[int, int], Counter[str]](Counter)
    now, rounds, context_tokens, phases = 0.0, 0, 0, {"extend": 0.0, "denoise": 0.0, "host": 0.0}
    passes = setting.steps_per_block if setting else 0
    while waiting or flying:
        new = waiting[: concurrency - len(flying)]
        waiting = waiting[len(new) :]
        decoding = len(flying)
        for place, pattern in new:
            flying[place], outputs[place], starts[place] = list(pattern), [], now
        verify = (times.step + times.token * (decoding * (1 + drafts) + len(new)) + times.prompt * len(new)) / speed
        if not new:
            steps.setdefault((decoding, 1 + drafts), []).append(verify)
        now += verify
        if setting:
            rounds += 1
            read = sum(
                flying[place][len(outputs[place]) - 1] + 1 if outputs[place] else PROMPT_TOKENS for place in flying
            )
            context_tokens += read
            denoise = passes * (times.denoise + times.denoised_request * len(flying))
            spent = (times.extend + times.context_token * read, denoise, times.host)
            for phase, seconds in zip(phases, spent, strict=True):
                phases[phase] += seconds / speed
                now += seconds / speed
                if not new:
                    drafting_of[decoding, 1 + drafts][phase] += seconds / speed
        for place in list(flying):
            outputs[place].append(now)
            if len(outputs[place]) > len(accepted[place] if setting else plain[place]):
                del flying[place]
    requests = tuple(
        _request(place, pattern, drafts, cut_ends, starts[place], outputs[place])
        for place, pattern in enumerate(accepted if setting else plain)
    )
    drafting = Drafting(rounds, context_tokens, rounds * passes, rounds * passes, phases) if setting else None
    shapes = tuple(
        DecodingSteps(*shape, tuple(seconds), dict(drafting_of[shape]), passes * len(seconds))
        for shape, seconds in sorted(steps.items())
    )
    return ServingCell(system, Load("all", concurrency, temperature), repeat, now, requests, shapes, drafting)


def repeats(cell: ServingCell, factors: Sequence[float]) -> list[ServingCell]:
    """The same cell once per factor of its duration; gaps between outputs, too."""
    return [
        replace(
            cell,
            repeat=i,
            seconds=cell.seconds * factor,
            requests=tuple(
                replace(
                    one,
                    first_token_s=one.first_token_s * factor,
                    seconds=one.seconds * factor,
                    gaps_s=tuple(gap * factor for gap in one.gaps_s),
                )
                for one in cell.requests
            ),
        )
        for i, factor in enumerate(factors)
    ]


def _request(
    place: int, accepted: Sequence[int], drafts: int, cut_end: bool, start: float, outputs: Sequence[float]
) -> ServedRequest:
    cut = 7 * place % (1 + accepted[-1]) if cut_end else 0
    num_tokens = 1 + sum(accepted) + len(accepted) - cut
    return ServedRequest(
        prompt_id=f"p{place}",
        category="maths" if place % 2 else "python",
        num_prompt_tokens=PROMPT_TOKENS,
        token_ids=tuple(range(num_tokens)),
        first_token_s=outputs[0] - start,
        seconds=outputs[-1] - start,
        gaps_s=tuple(later - earlier for earlier, later in pairwise(outputs)),
        num_draft_tokens=(drafts,) * len(accepted),
        num_accepted_tokens=tuple(accepted),
    )
