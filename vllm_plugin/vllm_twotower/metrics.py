"""Numbers of the drafter, from the worker that drafts to `/metrics` and to vLLM's log.

The worker writes them into a small memory-mapped file, so that a round costs no message and nothing is lost when
traffic stops; the processes that serve `/metrics` read the files of all engines when they are asked.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from twotower_spec.drafting.metrics import CALIBRATION_BINS, bins_of
from vllm_twotower.compat import wrap_once
from vllm_twotower.stats_folder import STATS_FOLDER_VARIABLE, StatsFolder, end_with_server, inherited, stats_files

logger = logging.getLogger("vllm.twotower.metrics")

PHASES = ("extend", "denoise", "host")
FALLBACKS = (
    "prefilling",
    "no room",
    "foreign token",
    "policy",
    "limit",
    "not finite",
    "error",
    "recovering",
    "not loaded",
    "no runner",
)
RESOURCES = ("requests", "tokens")
PLANNED = "planned_draft_tokens"
# Lower bounds, as labels.
CONFIDENCES = tuple(f"{low:.1f}" for low, _ in CALIBRATION_BINS)


@dataclass(frozen=True)
class Series:
    """One number, or one per value of a label.

    Attributes:
        name: without the prefix `vllm:twotower_`.
        kind: as Prometheus has it.
        help: what it counts.
        label: name of the label, or None.
        label_values: all of them.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ("",)


SERIES = (
    Series("rounds", "counter", "Drafting rounds."),
    Series("drafts", "counter", "Drafts that were verified, one per request and round."),
    Series("draft_tokens", "counter", "Draft tokens that were verified."),
    Series("accepted_tokens", "counter", "Draft tokens that were accepted."),
    Series("denoiser_passes", "counter", "Passes of the denoiser tower."),
    Series("request_denoiser_passes", "counter", "The same, every request of a pass counted (NFE)."),
    Series("context_tokens", "counter", "Tokens that the context tower read."),
    Series("drafting_seconds", "counter", "Seconds of drafting, by phase.", "phase", PHASES),
    Series("verify_seconds", "counter", "Seconds from one drafting round to the next."),
    Series("fallbacks", "counter", "Requests that got no drafts in a round, by reason.", "reason", FALLBACKS),
    Series("sampler_fallbacks", "counter", "Steps that vLLM's own sampler took over after a fault."),
    Series("calibration_drafts", "counter", "Drafts that were decided on.", "confidence", CONFIDENCES),
    Series("calibration_confidence", "counter", "Sum of their confidences.", "confidence", CONFIDENCES),
    Series("calibration_accepted", "counter", "Those that were accepted.", "confidence", CONFIDENCES),
    Series("acceptance_length", "gauge", "Tokens per verification, of about the last hundred drafts."),
    Series(PLANNED, "gauge", "Draft tokens per request that the next steps make and verify, on model runner V2."),
    Series("pool_used", "gauge", "What is held in the state pool.", "resource", RESOURCES),
    Series("pool_size", "gauge", "What the state pool can hold.", "resource", RESOURCES),
)
_PLACES = {
    place: i for i, place in enumerate((series.name, value) for series in SERIES for value in series.label_values)
}


class DrafterStats:
    """The numbers of one drafter; written by the worker."""

    def __init__(self, path: Path | None) -> None:
        """Begins at 0; without a path that can be written no other process can read the numbers, which is logged."""
        self._values: Any = np.zeros(len(_PLACES))
        if path is not None:
            try:
                # Its last byte is written here: the one page that it is will not be asked of a full disk later.
                values = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(_PLACES),))
                self._values = values.view(np.ndarray)  # the same memory, found four times as fast
            except OSError as error:
                with suppress(OSError):
                    path.unlink()
                warn_of_no_numbers(error)

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Raises a counter."""
        self._values[_PLACES[name, label]] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """Sets a gauge."""
        self._values[_PLACES[name, label]] = value

    def add_decided(self, confidence: NDArray[np.float64], accepted: NDArray[np.bool_]) -> None:
        """Counts drafts that were decided on, by their confidence.

        Args:
            confidence: [num_drafts] of drafts up to the first that was rejected, of any number of requests.
            accepted: [num_drafts] whether each was.
        """
        bins = bins_of(confidence)
        for name, weights in (
            ("calibration_drafts", None),
            ("calibration_confidence", confidence),
            ("calibration_accepted", accepted),
        ):
            first = _PLACES[name, CONFIDENCES[0]]
            self._values[first : first + len(CONFIDENCES)] += np.bincount(bins, weights, len(CONFIDENCES))

    def get(self, name: str, label: str = "") -> float:
        """The present value."""
        return float(self._values[_PLACES[name, label]])

    def copy(self) -> DrafterStats:
        """The present values, to be compared with later ones."""
        kept = DrafterStats(None)
        kept._values[:] = self._values
        return kept


def warn_of_no_numbers(error: OSError) -> None:
    """Says in the log that `/metrics` lacks drafters, and why."""
    logger.warning(
        "TwoTower: numbers of the drafter cannot be kept in %s (%s), and /metrics lacks them; free space there, or "
        "name another folder with TMPDIR",
        tempfile.gettempdir(),
        error.strerror,
    )


class PlannedDrafts:
    """Table of draft tokens per request by batch size, as vLLM's scheduler looks it up: what the drafter plans now.

    The drafter may be in another process, from which its numbers are read.
    """

    def __init__(self, path: Path | None, most: int, table: Sequence[int] | None) -> None:
        """Looks at a drafter's numbers.

        Args:
            path: of its file, which may come later; None where it has none.
            most: drafts per request where nothing is known of it.
            table: most drafts by batch size, where the user has given it.
        """
        self._path, self._most, self._table = path, most, table
        self._values: Any = None

    def __getitem__(self, num_reqs: int) -> int:
        if self._values is None and self._path is not None:
            with suppress(OSError, ValueError):
                self._values = np.memmap(self._path, dtype=np.float64, mode="r", shape=(len(_PLACES),))
        value = self._most if self._values is None else float(self._values[_PLACES[PLANNED, ""]])
        planned = int(max(0, min(self._most, value)))  # whatever the file holds, the scheduler can use it
        return min(planned, self._most if self._table is None else self._table[num_reqs])


def publish(starts_engines: bool) -> None:
    """Lets `/metrics` of this process show drafters.

    Args:
        starts_engines: the drafters are those of engines that this process will start, for which it makes a folder;
            otherwise those of the server that has started this process, one of several that answer for it.
    """
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.multiprocess import MultiProcessCollector
    except ImportError:
        return
    if starts_engines:
        try:
            os.environ[STATS_FOLDER_VARIABLE] = str(StatsFolder().path)
        except OSError as error:  # no reason not to serve
            warn_of_no_numbers(error)
    else:
        end_with_server()
    if _Collector.instance is None:
        _Collector.instance = _Collector()
        REGISTRY.register(_Collector.instance)
        wrap_once(MultiProcessCollector, "collect", _with_drafters)
    folder = inherited()
    if folder is not None:
        _Collector.instance.folders.append(folder)


def _with_drafters(stock: Any) -> Any:
    """With several API servers `/metrics` asks registries made for it, which hold nothing but vLLM's own files."""

    @wraps(stock)
    def collect(self: Any) -> Iterator[Any]:
        yield from stock(self)
        if _Collector.instance is not None:
            yield from _Collector.instance.collect()

    return collect


def read_totals() -> Callable[[], NDArray[np.float64]]:
    """Makes a function that adds up the numbers of all drafters that this process has started, for `by_place`.

    A call of it costs microseconds: the files stay open.
    """
    files = _Collector.instance.files() if _Collector.instance else ()
    values = [np.memmap(path, dtype=np.float64, mode="r", shape=(len(_PLACES),)) for _, path in files]
    return lambda: sum(values, np.zeros(len(_PLACES)))


def by_place(values: NDArray[np.float64]) -> Mapping[tuple[str, str], float]:
    """Numbers by name and label."""
    return {place: float(values[i]) for place, i in _PLACES.items()}


def drafting_s(values: NDArray[np.float64]) -> float:
    """Seconds of all phases together."""
    first = _PLACES["drafting_seconds", PHASES[0]]
    return float(values[first : first + len(PHASES)].sum())


class _Collector:
    """Reads the files of all engines of this process when Prometheus asks."""

    instance: _Collector | None = None

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def describe(self) -> list[Any]:
        """Announces nothing to Prometheus: no number is known before an engine runs."""
        return []

    def collect(self) -> Iterator[Any]:
        """One metric family per series, with the data-parallel rank as label `engine`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engines = dict(self._engines())
        if not engines:
            return
        for series in SERIES:
            labels = ["engine", *([series.label] if series.label else [])]
            family_class = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
            family = family_class(f"vllm:twotower_{series.name}", series.help, labels=labels)
            for engine, values in engines.items():
                for value in series.label_values:
                    place = [engine, *([value] if series.label else [])]
                    family.add_metric(place, float(values[_PLACES[series.name, value]]))
            yield family

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yields data-parallel rank and file of every drafter."""
        for folder in self.folders:
            yield from stats_files(folder)

    def _engines(self) -> Iterator[tuple[str, Any]]:
        for engine, path in self.files():
            try:
                values = np.fromfile(path, dtype=np.float64)
            except OSError:  # an engine that has just ended
                continue
            if len(values) == len(_PLACES):
                yield engine, values


def log_line(now: DrafterStats, before: DrafterStats) -> str | None:
    """One line about what happened between two moments, in vLLM's manner; None if nothing did."""

    def grown(name: str, label: str = "") -> float:
        return now.get(name, label) - before.get(name, label)

    rounds, drafts = grown("rounds"), grown("drafts")
    if not rounds:
        return None
    length = 1 + grown("accepted_tokens") / drafts if drafts else 1.0
    phases = [(phase, 1e3 * grown("drafting_seconds", phase) / rounds) for phase in PHASES]
    reasons = [(reason, grown("fallbacks", reason)) for reason in FALLBACKS]
    left_out = ", ".join(f"{reason} {count:.0f}" for reason, count in reasons if count) or "none"
    return (
        f"TwoTower metrics: Mean acceptance length: {length:.2f}, "
        f"Drafts: {drafts:.0f} in {rounds:.0f} rounds, "
        f"Drafted: {grown('draft_tokens'):.0f} tokens, Accepted: {grown('accepted_tokens'):.0f} tokens, "
        f"Drafting: {sum(ms for _, ms in phases):.1f} ms/round "
        f"({', '.join(f'{phase} {ms:.1f}' for phase, ms in phases)}), "
        f"Between rounds: {1e3 * grown('verify_seconds') / rounds:.1f} ms, "
        f"Pool: {now.get('pool_used', 'requests'):.0f}/{now.get('pool_size', 'requests'):.0f} requests, "
        f"Without drafts: {left_out}"
    )
