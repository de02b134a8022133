"""The demo in real vLLM: the bundled TwoTower drafts for a larger verifier, beside its rivals, and for itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
# Its context tower has Mamba layers: every draft holds a state.
OWN_DRAFTS = 7


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
class Use:
    """A verifier, and the systems that are compared with it.

    Attributes:
        name: "verifier" where a larger model verifies, "self" where TwoTower does.
        title: what tables call it.
        verifier: directory of the model whose text is kept.
        systems: no speculation first and TwoTower last.
    """

    name: str
    title: str
    verifier: Path
    systems: tuple[System, ...]

    def engine_of(self, system: System) -> str:
        """Name of the engine of one of its systems."""
        return f"{self.name}: {system.name}"

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of all its engines, in the order of its systems."""
        return tuple(map(self.engine_of, self.systems))


@dataclass(frozen=True)
class DemoRow:
    """A system at one batch size, in the middle of its repeats.

    Attributes:
        use: name of what it is measured for.
        system: its name.
        batch_size: prompts at once.
        tokens_per_s: median over repeats.
        acceptance_length: tokens per step of requests that had drafts, all repeats together; 1 without any.
        identical: whether every token is that of no speculation, in every repeat.
    """

    use: str
    system: str
    batch_size: int
    tokens_per_s: float
    acceptance_length: float
    identical: bool


def demo_uses(verifier: Path | None = None) -> tuple[Use, Use]:
    """Both uses of TwoTower: for a larger verifier, and for itself.

    Args:
        verifier: the larger one; None for the bundled one.

    Raises:
        CheckpointError: the package was installed without the trio's weights.
    """
    model = trio_path("twotower")
    rivals = (NGRAM, draft_model(trio_path("draft")))
    larger = (NO_SPECULATION, *rivals, two_tower(model))
    own = replace(two_tower(model), speculative_config={"model": str(model), "num_speculative_tokens": OWN_DRAFTS})
    return (
        Use("verifier", "TwoTower for a larger verifier", verifier or trio_path("verifier"), larger),
        Use("self", "TwoTower for itself", model, (NO_SPECULATION, own)),
    )


def demo_engines(uses: Sequence[Use]) -> EnginePool:
    """Engines of all uses, all at once where there is no GPU that they would have to share."""
    arguments = {**TRIO_ARGUMENTS, "max_num_seqs": LARGEST_BATCH}
    specs = {use.engine_of(one): engine_spec(one, use.verifier, arguments) for use in uses for one in use.systems}
    return EnginePool(specs, together=not torch.cuda.is_available())


def measure(engines: EnginePool, use: Use, sizes: Sizes, say: Say = lambda progress: None) -> list[DemoRow]:
    """Measures the systems of one use at all batch sizes, and says what it measures."""
    candidates = [Candidate(system, use.engine_of(system)) for system in use.systems]
    rows = []
    for batch_size in BATCH_SIZES:
        run = ServingRun(engines, sizes.prompts_of(batch_size), sizes.max_new_tokens)
        held = None if engines.together else engine_of
        slots = in_order(candidates, [Load(ALL_CATEGORIES, batch_size)], sizes.repeats, held)
        measured, cells = run.measure(slots), []
        for slot in slots:
            title = slot.subject.system.title
            say(f"{use.title}: pass {slot.repeat + 1} of {sizes.repeats}, batch {batch_size}, {title}")
            cells.append(next(measured))
        rows += rows_of(cells, use)
    return rows


def rows_of(cells: Sequence[ServingCell], use: Use) -> list[DemoRow]:
    """One row per system that was measured, of cells at one batch size."""
    by_system = [[cell for cell in cells if cell.system == system] for system in use.systems]
    return [_row(use.name, found, by_system[0][0]) for found in by_system if found]


def _row(use: str, found: Sequence[ServingCell], expected: ServingCell) -> DemoRow:
    kept = [
        accepted
        for cell in found
        for one in cell.requests
        for drafted, accepted in zip(one.num_draft_tokens, one.num_accepted_tokens, strict=True)
        if drafted
    ]
    return DemoRow(
        use=use,
        system=found[0].system.name,
        batch_size=found[0].load.concurrency,
        tokens_per_s=statistics.median(cell.tokens_per_s for cell in found),
        acceptance_length=acceptance_length(sum(kept), len(kept)) or 1.0,
        identical=all(cell.answers == expected.answers for cell in found),
    )
