"""Every step of an engine, as its scheduler sees it: what was drafted and accepted, and how long it took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower_bench.records import DecodingSteps, Drafting
from twotower_spec.drafting.metrics import CALIBRATION_BINS, CalibrationBin
from vllm_twotower.metrics import CONFIDENCES, FALLBACKS, PHASES, by_place, drafting_s, read_totals

# Requests, and tokens that each reads.
Shape = tuple[int, int]


class StepRecorder:
    """Listens to the scheduler of an engine in this process.

    What vLLM publishes are sums over requests, which give neither intervals over prompts nor the acceptance of a
    position among the steps that drafted there.
    """

    def __init__(self, scheduler: Any) -> None:
        """Begins to listen: wraps `update_from_output` of vLLM's scheduler."""
        self._scheduler, self._totals = scheduler, read_totals()
        self._begun = self._totals()
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
        self._seconds = defaultdict[Shape, list[float]](list)
        self._drafting = defaultdict[Shape, NDArray[np.float64]](lambda: np.zeros_like(self._begun))
        self._before = self._begun = self._totals()
        self._end: float | None = None

    def steps_of(self, request_id: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Draft tokens and accepted tokens of every step of a request, its prompt's last one left out."""
        steps = self._steps_of.get(request_id, [])
        return tuple(drafted for drafted, _ in steps), tuple(accepted for _, accepted in steps)

    def decoding_steps(self) -> tuple[DecodingSteps, ...]:
        """All steps without a prompt in which requests read equally many tokens, by shape."""
        found = []
        for shape, seconds in sorted(self._seconds.items()):
            grown = by_place(self._drafting[shape])
            phases = _phases(grown) if grown["rounds", ""] else {}
            found.append(DecodingSteps(*shape, tuple(seconds), phases, int(grown["denoiser_passes", ""])))
        return tuple(found)

    def drafting(self) -> Drafting | None:
        """Counts of TwoTower's drafter since `begin`; None where there is no such drafter."""
        grown = by_place(self._totals() - self._begun)
        if not any(grown.values()):
            return None
        return Drafting(
            rounds=int(grown["rounds", ""]),
            context_tokens=int(grown["context_tokens", ""]),
            denoiser_passes=int(grown["denoiser_passes", ""]),
            request_denoiser_passes=int(grown["request_denoiser_passes", ""]),
            seconds=_phases(grown),
            without_drafts={reason: int(n) for reason in FALLBACKS if (n := grown["fallbacks", reason])},
            calibration=tuple(
                _calibration_bin(grown, label, *ends) for label, ends in zip(CONFIDENCES, CALIBRATION_BINS, strict=True)
            ),
        )

    def _record(self, scheduled: Any, output: Any) -> None:
        now, totals = time.perf_counter(), self._totals()
        read: dict[str, int] = scheduled.num_scheduled_tokens
        if (
            self._end is not None
            and len(set(read.values())) == 1
            and all(_own_id(one) in self._steps_of for one in read)
        ):
            shape, grown = (len(read), next(iter(read.values()))), totals - self._before
            self._seconds[shape].append(round(now - self._end - drafting_s(grown), 6))
            self._drafting[shape] += grown
        drafts, invalid = scheduled.scheduled_spec_decode_tokens, scheduled.num_invalid_spec_tokens or {}
        for request_id, place in output.req_id_to_index.items():
            request = self._scheduler.requests.get(request_id)
            # Where vLLM schedules ahead, a request has a last step that counts for nothing.
            if request is None or request.is_finished():
                continue
            num_sampled = len(output.sampled_token_ids[place])
            steps = self._steps_of.get(_own_id(request_id))
            if steps is not None and num_sampled:
                num_drafts = len(drafts.get(request_id, ())) - invalid.get(request_id, 0)
                steps.append((num_drafts, num_sampled - 1))
            elif num_sampled:
                self._steps_of[_own_id(request_id)] = []
        self._end, self._before = now, totals


def _own_id(request_id: str) -> str:
    """Id that we gave a request: vLLM adds a part of its own where its ids must not collide."""
    return request_id.partition("-")[0]


def _phases(grown: Mapping[tuple[str, str], float]) -> dict[str, float]:
    return {phase: round(grown["drafting_seconds", phase], 6) for phase in PHASES}


def _calibration_bin(grown: Mapping[tuple[str, str], float], label: str, low: float, high: float) -> CalibrationBin:
    count = int(grown["calibration_drafts", label])
    confidence, accepted = grown["calibration_confidence", label], grown["calibration_accepted", label]
    return CalibrationBin(low, high, count, confidence / max(count, 1), accepted / max(count, 1))
