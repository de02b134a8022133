"""The demo in real vLLM: the bundled verifier without speculation, and with three ways to draft for it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower_bench.engines import EnginePool
from twotower_bench.engines.measuring import ServingRun
from twotower_bench.records import ALL_CATEGORIES, Load, ServingCell, System
from twotower_bench.schedule import Candidate, Say, engine_of, in_order
from twotower_bench.summary import acceptance_length
from twotower_bench.systems import NGRAM, NO_SPECULATION, TRIO_ARGUMENTS, draft_model, engine_spec, two_tower
from twotower_spec.demo import demo_prompts, trio_path
from twotower_spec.evaluation import Prompt

LARGEST_BATCH = 8
BATCH_SIZES = (1, LARGEST_BATCH)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        prompts: per category at batch 1; at batch 8 there are 8 of each.
        max_new_tokens: most new tokens per prompt.
        repeats: passes over all prompts, of which medians are taken.
    """

    prompts: int
    max_new_tokens: int
    repeats: int

    def prompts_of(self, batch_size: int) -> list[Prompt]:
        """All prompts of one batch size."""
        chosen = demo_prompts(self.prompts if batch_size == 1 else batch_size)
        return [Prompt(str(i), one.category, one.prompt, (one.prompt,)) for i, one in enumerate(chosen)]


@dataclass(frozen=True)
class DemoRow:
    """A system at one batch size, in the middle of its repeats.

    Attributes:
        system: its name.
        batch_size: prompts at once.
        tokens_per_s: median over repeats.
        acceptance_length: tokens per step of requests that had drafts, all repeats together; 1 without any.
        identical: whether every token is that of no speculation, in every repeat.
    """

    system: str
    batch_size: int
    tokens_per_s: float
    acceptance_length: float
    identical: bool


def demo_systems() -> tuple[System, ...]:
    """Systems that the demo compares, no speculation first and TwoTower last.

    Raises:
        CheckpointError: the package was installed without the trio's weights.
    """
    return (NO_SPECULATION, NGRAM, draft_model(trio_path("draft")), two_tower(trio_path("twotower")))


def demo_engines(systems: Sequence[System], verifier: Path | None = None) -> EnginePool:
    """Engines of all systems, all at once where there is no GPU that they would have to share."""
    arguments = {**TRIO_ARGUMENTS, "max_num_seqs": LARGEST_BATCH}
    path = verifier or trio_path("verifier")
    specs = {system.name: engine_spec(system, path, arguments) for system in systems}
    return EnginePool(specs, together=not torch.cuda.is_available())


def measure(
    engines: EnginePool, systems: Sequence[System], sizes: Sizes, say: Say = lambda progress: None
) -> list[DemoRow]:
    """Measures all systems, no speculation first, at all batch sizes, and says what it measures."""
    candidates = [Candidate(system, system.name) for system in systems]
    rows = []
    for batch_size in BATCH_SIZES:
        run = ServingRun(engines, sizes.prompts_of(batch_size), sizes.max_new_tokens)
        held = None if engines.together else engine_of
        slots = in_order(candidates, [Load(ALL_CATEGORIES, batch_size)], sizes.repeats, held)
        measured, cells = run.measure(slots), []
        for slot in slots:
            say(f"pass {slot.repeat + 1} of {sizes.repeats}, batch {batch_size}, {slot.subject.system.title}")
            cells.append(next(measured))
        rows += rows_of(cells, systems)
    return rows


def rows_of(cells: Sequence[ServingCell], systems: Sequence[System]) -> list[DemoRow]:
    """One row per system, of cells at one batch size."""
    by_system = [[cell for cell in cells if cell.system == system] for system in systems]
    return [_row(found, by_system[0][0]) for found in by_system]


def _row(found: Sequence[ServingCell], expected: ServingCell) -> DemoRow:
    kept = [
        accepted
        for cell in found
        for one in cell.requests
        for drafted, accepted in zip(one.num_draft_tokens, one.num_accepted_tokens, strict=True)
        if drafted
    ]
    return DemoRow(
        system=found[0].system.name,
        batch_size=found[0].load.concurrency,
        tokens_per_s=statistics.median(cell.tokens_per_s for cell in found),
        acceptance_length=acceptance_length(sum(kept), len(kept)) or 1.0,
        identical=all(cell.answers == expected.answers for cell in found),
    )
