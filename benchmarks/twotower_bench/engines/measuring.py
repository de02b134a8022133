"""Cells of systems and loads, measured in turn in real engines."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from twotower_bench.engines.messages import Asked, ServeOrder
from twotower_bench.engines.pool import EnginePool
from twotower_bench.engines.process import EngineProcess
from twotower_bench.records import ALL_CATEGORIES, Load, ServingCell
from twotower_bench.schedule import Candidate, Say, Slot
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import Prompt


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

    def measure(
        self, slots: Sequence[Slot[Candidate, Load]], say: Say = lambda progress: None
    ) -> Generator[ServingCell]:
        """Measures one cell after the other.

        Args:
            slots: in order.
            say: told what is measured next.

        Raises:
            ChildError: an engine has ended, or has not drafted though it should have.
            ArgumentError: no prompt of a load is short enough.
        """
        self.pool.load(dict.fromkeys(slot.subject.engine for slot in slots))
        for slot in slots:
            candidate, load = slot.subject, slot.place
            say(f"{candidate.system.title}, {load}")
            engine = self.pool.use(candidate.engine)
            if candidate.knobs is not None and self._drafting.get(engine) != candidate:
                engine.draft_by(candidate.knobs)
                self._drafting[engine] = candidate
            order = self._order(engine, load)
            if (engine, candidate.system.name, load) not in self._warm:
                engine.serve(self._warm_up(order))
                self._warm.add((engine, candidate.system.name, load))
            served = engine.serve(order)
            if candidate.system.is_to_draft and not (served.drafting and served.drafting.rounds):
                raise engine.failure("has not drafted at all")
            yield ServingCell(
                candidate.system, load, slot.repeat, served.seconds, served.requests, served.steps, served.drafting
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
