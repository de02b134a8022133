"""Systems in turn, several times over, and what comes of it in the middle."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from twotower_spec.demo import demo_prompts
from vllm_twotower.demo.engine_process import EngineProcess
from vllm_twotower.demo.messages import Measured, MeasureOrder
from vllm_twotower.demo.systems import LARGEST_BATCH, System, engine_arguments

BATCH_SIZES = (1, LARGEST_BATCH)
Engines = Mapping[str, EngineProcess]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        prompts: per category at batch 1; at batch 8 it is one batch per category.
        max_new_tokens: most new tokens per prompt.
        repeats: passes over all prompts, of which medians are taken.
    """

    prompts: int
    max_new_tokens: int
    repeats: int

    def order(self, batch_size: int) -> MeasureOrder:
        """All batches of one size."""
        prompts = [one.prompt for one in demo_prompts(self.prompts if batch_size == 1 else batch_size)]
        batches = tuple(tuple(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size))
        return MeasureOrder(batches, self.max_new_tokens)


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


@contextmanager
def running_engines(systems: Sequence[System], verifier: Path | None = None) -> Iterator[Engines]:
    """An engine for every system, in processes of their own that are still loading."""
    with TemporaryDirectory(prefix="twotower-demo-") as folder, ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for system in systems:
            own_folder = Path(folder) / system.name
            own_folder.mkdir()
            engine = engines[system.name] = EngineProcess(system.title, engine_arguments(system, verifier), own_folder)
            stack.callback(engine.close)
        yield engines


def warm_up(engine: EngineProcess, sizes: Sizes) -> None:
    """Everything that will be measured, once: whatever is made once is made, and the adaptive policy learns."""
    for batch_size in BATCH_SIZES:
        engine.measure(sizes.order(batch_size))


def measure(engines: Engines, sizes: Sizes, say: Say = lambda progress: None) -> list[DemoRow]:
    """Figures of all systems at all batch sizes; "none" must be among them.

    Args:
        engines: by name, loaded and warm.
        sizes: how much to measure.
        say: told what is being measured.
    """
    passes: dict[tuple[str, int], list[Measured]] = {(name, size): [] for size in BATCH_SIZES for name in engines}
    names = list(engines)
    for repeat in range(sizes.repeats):
        # Another begins each time; what slows the machine for a while hits them all.
        turn = repeat % len(names)
        for batch_size in BATCH_SIZES:
            for name in names[turn:] + names[:turn]:
                say(f"pass {repeat + 1} of {sizes.repeats}, batch {batch_size}, {engines[name].title}")
                passes[name, batch_size].append(engines[name].measure(sizes.order(batch_size)))
    return [_row(name, size, found, passes["none", size][0].token_ids) for (name, size), found in passes.items()]


def _row(name: str, batch_size: int, found: list[Measured], expected: tuple[tuple[int, ...], ...]) -> DemoRow:
    drafts = sum(one.num_drafts for one in found)
    return DemoRow(
        system=name,
        batch_size=batch_size,
        tokens_per_s=statistics.median(sum(map(len, one.token_ids)) / one.seconds for one in found),
        acceptance_length=1 + sum(one.num_accepted_tokens for one in found) / drafts if drafts else 1.0,
        identical=all(one.token_ids == expected for one in found),
    )
