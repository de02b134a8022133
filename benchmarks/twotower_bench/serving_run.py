"""Cells of systems and loads, measured in turn in real engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from twotower_bench.engines import Asked, EnginePool, EngineProcess, ServeOrder
from twotower_bench.records import ALL_CATEGORIES, Load, ServingCell, System
from twotower_bench.systems import drafts
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A system, and the engine that it is measured in.

    Attributes:
        system: how to speculate.
        engine: its name in the pool.
        knobs: of TwoTower, where the engine must be told how to draft; None where it was started so.
    """

    system: System
    engine: str
    knobs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """What a cell is of."""

    candidate: Candidate
    load: Load
    repeat: int

    @property
    def key(self) -> tuple[str, Load, int]:
        """By which a cell is found again."""
        return self.candidate.system.name, self.load, self.repeat


def in_order(
    candidates: Sequence[Candidate], loads: Sequence[Load], repeats: int, together: bool = True
) -> list[Place]:
    """All cells, in an order in which what changes slowly on the machine hits all candidates alike.

    The order is another one under every load and in every repeat. Engines that are not held together do all loads of a
    repeat at once.
    """
    places = []
    for repeat in range(repeats):
        if together:
            for i, load in enumerate(loads):
                places += [Place(one, load, repeat) for one in shuffled(candidates, repeat * len(loads) + i)]
        else:
            ours = shuffled(candidates, repeat)
            engines = dict.fromkeys(one.engine for one in ours)
            own = {name: [one for one in ours if one.engine == name] for name in engines}
            places += [Place(one, load, repeat) for name in engines for load in loads for one in own[name]]
    return places


class ServingRun:
    """Measures cells with the same prompts for all."""

    def __init__(
        self,
        pool: EnginePool,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        chat: bool = False,
        num_warm_up: int | None = None,
    ) -> None:
        """Measures nothing yet.

        Args:
            pool: of all engines.
            prompts: any number.
            max_new_tokens: per prompt.
            chat: whether prompts are what a user says, and get the verifier's chat template.
            num_warm_up: rounds of as many prompts as there are requests at once, that every candidate serves before a
                load counts; None for all prompts of the load.
        """
        self.pool, self.prompts, self.max_new_tokens, self.chat = pool, prompts, max_new_tokens, chat
        self._num_warm_up = num_warm_up
        self._asked: list[Asked] | None = None
        self._drafting: dict[EngineProcess, Candidate] = {}
        self._warm: set[tuple[EngineProcess, str, Load]] = set()

    def measure(self, places: Sequence[Place]) -> Iterator[ServingCell]:
        """One cell after the other.

        Raises:
            ChildError: an engine has ended, or has not drafted though it should have.
            ArgumentError: no prompt of a load is short enough.
        """
        self.pool.load(dict.fromkeys(place.candidate.engine for place in places))
        for place in places:
            candidate, load = place.candidate, place.load
            engine = self.pool.use(candidate.engine)
            if candidate.knobs is not None and self._drafting.get(engine) != candidate:
                engine.draft_by(candidate.knobs)
                self._drafting[engine] = candidate
            order = self._order(engine, load)
            if (engine, candidate.system.name, load) not in self._warm:
                engine.serve(self._warm_up(order))
                self._warm.add((engine, candidate.system.name, load))
            served = engine.serve(order)
            if drafts(candidate.system) and not (served.drafting and served.drafting.rounds):
                raise engine.failure("has not drafted at all")
            yield ServingCell(
                candidate.system, load, place.repeat, served.seconds, served.requests, served.steps, served.drafting
            )

    def _order(self, engine: EngineProcess, load: Load) -> ServeOrder:
        chosen = [one for one in self._readable(engine) if load.category in (ALL_CATEGORIES, one.category)]
        if not chosen:
            raise ArgumentError(
                f"no prompt of {load.category} leaves room for {self.max_new_tokens} new tokens; give fewer with "
                f"--max-new-tokens, or a larger max_model_len with --engine-args"
            )
        return ServeOrder(tuple(chosen), load.concurrency, self.max_new_tokens, load.temperature)

    def _readable(self, engine: EngineProcess) -> list[Asked]:
        """Prompts as tokens, the same for all engines; without those that are too long."""
        if self._asked is None:
            texts = [one.turns[0] if self.chat else one.text for one in self.prompts]
            most = engine.wait_until_ready().max_model_len - self.max_new_tokens
            all_ids = engine.tokenize(texts, self.chat)
            self._asked = [
                Asked(prompt.prompt_id, prompt.category, token_ids)
                for prompt, token_ids in zip(self.prompts, all_ids, strict=True)
                if 0 < len(token_ids) <= most
            ]
        return self._asked

    def _warm_up(self, order: ServeOrder) -> ServeOrder:
        most = None if self._num_warm_up is None else self._num_warm_up * order.concurrency
        return ServeOrder(order.prompts[:most], order.concurrency, order.max_new_tokens, order.temperature)


def shuffled(sequence: Sequence[T], turn: int) -> list[T]:
    """The same in an order that the number of the turn decides.

    Not only turned round: what is measured twice to see the noise would stand side by side nearly always.
    """
    return Random(turn).sample(sequence, len(sequence))
