"""Cells of the matrix in one real engine of vLLM, one after the other, in a process of their own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from twotower_bench.faults.cells import KINDS, WHENS, Cell, Seen
from twotower_bench.faults.injection import Injection
from twotower_bench.faults.stages import STAGES, Fault
from twotower_spec.demo.trio import held_out_prompts
from vllm_twotower.faults import FaultHandler
from vllm_twotower.runner import drafter_of

LOGGER = "vllm.twotower"
COUNTED = ("error", "recovering", "not finite", "no room", "foreign token", "no runner", "not loaded")
# Of a load "during" which the fault comes and goes: steps between which it is there, and one of so many calls fails.
FIRST_STEP, LAST_STEP, EVERY = 4, 14, 2
# Of a load "after" another one: steps after which the fault, which came while the engine was idle, is gone.
STEPS_OF_THE_NEXT = 3
# A pause after faults takes so many loads at most.
MOST_LOADS = 6
HANGS_ONCE, ANY_NUMBER = 1, 1 << 30


@dataclass(frozen=True)
class CellsOrder:
    """Order of an engine and its cells.

    Attributes:
        arguments: of `LLM()`.
        cells: are run in this order.
        expected: token ids of the load's requests without drafts; empty for an engine that is to find them out.
        num_requests, num_tokens: of a load.
        hang_s: seconds of a call that hangs.
    """

    arguments: dict[str, Any]
    cells: tuple[Cell, ...] = ()
    expected: tuple[tuple[int, ...], ...] = ()
    num_requests: int = 6
    num_tokens: int = 20
    hang_s: float = 5.0


class EngineUnderFault:
    """A real engine that serves loads of greedy requests, step by step.

    Attributes:
        num_accepted: drafts that were accepted so far, by the tokens that came: the drafter's own count may be damaged.
    """

    def __init__(self, order: CellsOrder) -> None:
        """Loads the models."""
        from vllm import LLM

        self._order = order
        self._llm = LLM(**order.arguments)
        self._numbers = count()
        self.num_accepted = 0

    @cached_property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def drafter(self) -> Any:
        """Ours, of either model runner; None without speculation."""
        return drafter_of(self.runner)

    def load(self, on_step: Callable[[int], None] = lambda step: None) -> list[tuple[int, ...]]:
        """Token ids of all requests, of which every third comes a few steps later; () for one that was lost.

        Args:
            on_step: is told before every step which it is.
        """
        from vllm import SamplingParams

        core, step = self._llm.llm_engine, 0
        prompts = [one.prompt for kind in ("maths", "python") for one in held_out_prompts(kind)[:10]]
        waiting = {next(self._numbers): place for place in range(self._order.num_requests)}
        places = dict(waiting)
        texts: list[tuple[int, ...]] = [()] * len(waiting)
        lengths = dict.fromkeys(waiting, 0)
        params = SamplingParams(temperature=0.0, max_tokens=self._order.num_tokens, ignore_eos=True)
        while waiting or core.has_unfinished_requests():
            for number, place in list(waiting.items()):
                if step >= 6 * (place % 3 == 2):
                    core.add_request(str(number), prompts[place * 3], params)
                    del waiting[number]
            on_step(step)
            for row in core.step():
                number, token_ids = int(row.request_id), tuple(row.outputs[0].token_ids)
                self.num_accepted += max(0, len(token_ids) - lengths[number] - 1)
                lengths[number] = len(token_ids)
                if row.finished and len(token_ids) == self._order.num_tokens:
                    texts[places[number]] = token_ids
            step += 1
        return texts

    def run(self, cell: Cell) -> Seen:
        """Puts one fault into the engine, and takes it away again."""
        stage = STAGES[cell.runner][cell.stage]
        fault = stage.faults[cell.kind]
        if isinstance(fault, str):
            return Seen(cell, reason=fault)
        self._begin_anew()
        with _sentences() as sentences:
            return self._under(cell, fault, sentences)

    def _under(self, cell: Cell, fault: Fault, sentences: list[str]) -> Seen:
        injection = Injection(self._order.hang_s)
        most = HANGS_ONCE if cell.kind == "hang" else ANY_NUMBER
        before = self._counted()
        with fault(self, injection):
            texts = self._faulty_loads(cell.when, injection, most)
        accepted, num_without = self.num_accepted, 0

        def watch(step: int) -> None:
            nonlocal num_without
            num_without += self.num_accepted == accepted

        for _ in range(MOST_LOADS):
            texts += self.load(watch)
            if self.num_accepted > accepted:
                break
        expected = self._order.expected * (len(texts) // self._order.num_requests)
        return Seen(
            cell,
            num_fired=injection.num_fired,
            num_requests=len(texts),
            num_answered=sum(map(bool, texts)),
            num_equal=sum(bool(text) and text == one for text, one in zip(texts, expected, strict=True)),
            num_accepted_after=self.num_accepted - accepted,
            num_steps_back=num_without,
            counted={name: int(one) for name, one in (self._counted() - before).items() if one == one},
            sentences=tuple(sentences),
        )

    def _faulty_loads(self, when: str, injection: Injection, most: int) -> list[tuple[int, ...]]:
        """Serves while the fault is there."""
        if when == "before":
            injection.begin(every=1, most=most)
            texts = self.load()
            injection.end()
            return texts
        if when == "during":

            def come_and_go(step: int) -> None:
                if step == FIRST_STEP:
                    injection.begin(EVERY, most)
                elif step == LAST_STEP:
                    injection.end()

            return self.load(come_and_go)
        texts = self.load()
        injection.begin(every=1, most=most)

        def go(step: int) -> None:
            if step == STEPS_OF_THE_NEXT:
                injection.end()

        return texts + self.load(go)

    def _begin_anew(self) -> None:
        """Has the drafter know nothing of the cells before: no contexts, no faults, no pauses, no counts."""
        drafter = self.drafter
        drafter.session.reset()
        drafter._faults = FaultHandler()
        drafter.stats._values.fill(0.0)
        self.runner.rejection_sampler.num_failures = drafter._sampler_failures = 0

    def _counted(self) -> Counter[str]:
        stats = self.drafter.stats
        counted = {reason: stats.get("fallbacks", reason) for reason in COUNTED}
        return Counter({**counted, "sampler": stats.get("sampler_fallbacks")})


class _Listener(logging.Handler):
    """Keeps what is worse than information."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a sentence."""
        self.sentences.append(record.getMessage())


@contextmanager
def _sentences() -> Iterator[list[str]]:
    """Errors and warnings that the plugin logs meanwhile."""
    listener, logger = _Listener(), logging.getLogger(LOGGER)
    logger.addHandler(listener)
    try:
        yield listener.sentences
    finally:
        logger.removeHandler(listener)


def serve_cells(connection: Connection, order: CellsOrder) -> None:
    """Loads an engine, and sends the texts of a load, then what is seen in every cell, as soon as it is known."""
    engine = EngineUnderFault(order)
    connection.send(tuple(engine.load()))
    for cell in order.cells:
        connection.send(engine.run(cell))


def cells_of(
    runner: str, stages: Sequence[str] | None = None, kinds: Sequence[str] | None = None, whens: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """Cells of those stages, kinds and times; None for all stages or kinds, which are in the order of a round."""
    return tuple(
        Cell(runner, stage, kind, when)
        for stage in STAGES[runner]
        if stages is None or stage in stages
        for kind in kinds or KINDS
        for when in whens or WHENS
    )
