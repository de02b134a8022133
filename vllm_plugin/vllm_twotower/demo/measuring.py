"""Systems in turn, several times over, and what comes of it in the middle."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower_spec.demo import demo_prompts, trio_path
from twotower_spec.evaluation.serving import System
from twotower_spec.evaluation.serving_figures import acceptance_of
from vllm_twotower.engines import Asked, EnginePool, EngineProcess, Served, ServeOrder
from vllm_twotower.systems import NGRAM, NO_SPECULATION, TRIO_ARGUMENTS, draft_model, engine_spec, two_tower

LARGEST_BATCH = 8
BATCH_SIZES = (1, LARGEST_BATCH)
Say = Callable[[str], None]


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

    def order(self, batch_size: int) -> ServeOrder:
        """All prompts of one batch size."""
        prompts = demo_prompts(self.prompts if batch_size == 1 else batch_size)
        asked = tuple(Asked(str(i), one.category, one.prompt) for i, one in enumerate(prompts))
        return ServeOrder(asked, batch_size, self.max_new_tokens)


@dataclass(frozen=True)
class DemoRow:
    """Figures of one system at one batch size.

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
    """What the demo compares, no speculation first and TwoTower last.

    Raises:
        CheckpointError: the package was installed without the trio's weights.
    """
    return (NO_SPECULATION, NGRAM, draft_model(trio_path("draft")), two_tower(trio_path("twotower")))


def demo_engines(systems: Sequence[System], sizes: Sizes, verifier: Path | None = None) -> EnginePool:
    """Engines of all systems, which do everything that will be measured once before it counts.

    Whatever is made once is made then, and the adaptive policy learns.
    """

    def warm_up(name: str, engine: EngineProcess) -> None:
        for batch_size in BATCH_SIZES:
            engine.serve(sizes.order(batch_size))

    arguments = {**TRIO_ARGUMENTS, "max_num_seqs": LARGEST_BATCH}
    path = verifier or trio_path("verifier")
    return EnginePool({system.name: engine_spec(system, path, arguments) for system in systems}, warm_up=warm_up)


def measure(
    engines: EnginePool, systems: Sequence[System], sizes: Sizes, say: Say = lambda progress: None
) -> list[DemoRow]:
    """Figures of all systems at all batch sizes; no speculation is the first of them.

    Args:
        engines: of the systems.
        systems: in the order of the table.
        sizes: how much to measure.
        say: told what is being measured.
    """
    passes: dict[tuple[int, str], list[Served]] = {(size, one.name): [] for size in BATCH_SIZES for one in systems}
    for repeat in range(sizes.repeats):
        # Another begins each time; what slows the machine for a while hits them all.
        turn = repeat % len(systems)
        for batch_size in BATCH_SIZES:
            for system in (*systems[turn:], *systems[:turn]):
                say(f"pass {repeat + 1} of {sizes.repeats}, batch {batch_size}, {system.title}")
                served = engines.use(system.name).serve(sizes.order(batch_size))
                passes[batch_size, system.name].append(served)
    first = systems[0].name
    return [_row(name, size, found, passes[size, first][0]) for (size, name), found in passes.items()]


def _row(name: str, batch_size: int, found: list[Served], expected: Served) -> DemoRow:
    acceptance = acceptance_of([request for served in found for request in served.requests])
    return DemoRow(
        system=name,
        batch_size=batch_size,
        tokens_per_s=statistics.median(sum(map(len, _texts(served))) / served.seconds for served in found),
        acceptance_length=acceptance.acceptance_length.estimate if acceptance.acceptance_length else 1.0,
        identical=all(_texts(served) == _texts(expected) for served in found),
    )


def _texts(served: Served) -> list[tuple[int, ...]]:
    return [request.token_ids for request in served.requests]
