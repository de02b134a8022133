"""Every step of an engine, as its scheduler sees it: what was drafted and accepted, and how long it took."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from functools import wraps
from typing import Any

from twotower_spec.drafting.metrics import CONFIDENCE_BINS, CalibrationBin
from twotower_spec.evaluation.serving import DecodingSteps, Drafting
from vllm_twotower.metrics import FALLBACKS, PHASES, Numbers, totals


class StepRecorder:
    """Listens to the scheduler of an engine in this process.

    What vLLM publishes are sums over requests, which give neither intervals over prompts nor the acceptance of a
    position among the steps that drafted there.
    """

    def __init__(self, scheduler: Any) -> None:
        """Begins to listen.

        Args:
            scheduler: vLLM's; its `update_from_output` is wrapped.
        """
        stock = scheduler.update_from_output

        @wraps(stock)
        def update_from_output(scheduled: Any, output: Any) -> Any:
            self._record(scheduled, output)
            return stock(scheduled, output)

        scheduler.update_from_output = update_from_output
        self.begin()

    def begin(self) -> None:
        """Forgets everything."""
        self._steps_of: dict[str, list[tuple[int, int]]] = {}
        self._seconds = defaultdict[tuple[int, int], list[float]](list)
        self._drafting = defaultdict[tuple[int, int], Counter[tuple[str, str]]](Counter)
        self._before = self._begun = totals()
        self._end: float | None = None

    def steps_of(self, request_id: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Draft tokens and accepted tokens of every step of a request, its prompt's last one left out."""
        steps = self._steps_of.get(request_id, [])
        return tuple(drafted for drafted, _ in steps), tuple(accepted for _, accepted in steps)

    def decoding_steps(self) -> tuple[DecodingSteps, ...]:
        """All steps without a prompt in which requests read equally many tokens, by shape."""
        return tuple(
            DecodingSteps(*shape, tuple(seconds), *_drafted(self._drafting[shape]))
            for shape, seconds in sorted(self._seconds.items())
        )

    def drafting(self) -> Drafting | None:
        """What TwoTower counted since `begin`; None where it does not draft."""
        grown = _grown(totals(), self._begun)
        if not grown.get(("rounds", "")):
            return None
        return Drafting(
            rounds=int(grown["rounds", ""]),
            context_tokens=int(grown["context_tokens", ""]),
            denoiser_passes=int(grown["denoiser_passes", ""]),
            request_denoiser_passes=int(grown["request_denoiser_passes", ""]),
            seconds={phase: round(grown["drafting_seconds", phase], 6) for phase in PHASES},
            without_drafts={reason: int(n) for reason in FALLBACKS if (n := grown["fallbacks", reason])},
            calibration=tuple(_calibration_bin(grown, low, high) for low, high in CONFIDENCE_BINS),
        )

    def _record(self, scheduled: Any, output: Any) -> None:
        now, drafting = time.perf_counter(), totals()
        read: dict[str, int] = scheduled.num_scheduled_tokens
        drafts, invalid = scheduled.scheduled_spec_decode_tokens, scheduled.num_invalid_spec_tokens or {}
        is_decoding = all(_own_id(request_id) in self._steps_of for request_id in read)
        if self._end is not None and is_decoding and len(set(read.values())) == 1:
            shape, grown = (len(read), next(iter(read.values()))), _grown(drafting, self._before)
            drafting_s = sum(grown.get(("drafting_seconds", phase), 0.0) for phase in PHASES)
            self._seconds[shape].append(round(now - self._end - drafting_s, 6))
            self._drafting[shape].update(grown)
        for request_id, place in output.req_id_to_index.items():
            num_sampled = len(output.sampled_token_ids[place])
            steps = self._steps_of.get(_own_id(request_id))
            if steps is not None and num_sampled:
                num_drafts = len(drafts.get(request_id, ())) - invalid.get(request_id, 0)
                steps.append((num_drafts, num_sampled - 1))
            elif num_sampled:
                self._steps_of[_own_id(request_id)] = []
        self._end, self._before = now, drafting


def _own_id(request_id: str) -> str:
    """What we called a request: vLLM adds a part of its own, where its ids must not collide."""
    return request_id.partition("-")[0]


def _grown(now: Numbers, before: Numbers) -> dict[tuple[str, str], float]:
    return {place: value - before.get(place, 0.0) for place, value in now.items()}


def _drafted(grown: Numbers) -> tuple[dict[str, float], int]:
    """Seconds by phase and passes; nothing where nobody drafted."""
    if not grown:
        return {}, 0
    seconds = {phase: round(grown["drafting_seconds", phase], 6) for phase in PHASES}
    return seconds, round(grown["denoiser_passes", ""])


def _calibration_bin(grown: Numbers, low: float, high: float) -> CalibrationBin:
    label = f"{low:.1f}"
    count = int(grown["calibration_drafts", label])
    confidence, accepted = grown["calibration_confidence", label], grown["calibration_accepted", label]
    return CalibrationBin(low, high, count, confidence / max(count, 1), accepted / max(count, 1))
