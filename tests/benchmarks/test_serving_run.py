"""The order of cells, and what engines are asked for, without engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import pytest

from twotower_bench.child_process import ChildError
from twotower_bench.engines import EnginePool, EngineSpec, Ready, Served, ServeOrder
from twotower_bench.engines.measuring import ServingRun
from twotower_bench.records import Load, System
from twotower_bench.schedule import Candidate, engine_of, in_order, key_of_slot, shuffled
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation import Prompt

PROMPTS = [Prompt(f"p{i}", "maths" if i % 2 else "python", "x" * (i + 1), ("say " + "x" * i,)) for i in range(6)]
ONE, FOUR = Load("all", 1), Load("all", 4)


def candidate(name: str, engine: str | None = None, knobs: Mapping[str, Any] | None = None) -> Candidate:
    return Candidate(System(name, name), engine or name, knobs)


class StandIn:
    """Reads a character as a token, and keeps what it is asked for."""

    def __init__(self, title: str, *others: object) -> None:
        self.title, self.asked, self.is_closed = title, list[Any](), False
        ALL.append(self)

    def wait_until_ready(self) -> Ready:
        return Ready("0", 20)

    def tokenize(self, texts: Sequence[str], chat: bool) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(len(text))) for text in texts)

    def draft_by(self, knobs: Mapping[str, Any]) -> None:
        self.asked.append(knobs)

    def serve(self, order: ServeOrder) -> Served:
        self.asked.append(order)
        return Served(1.0, ())

    def failure(self, what: str) -> ChildError:
        return ChildError(f"TwoTower {what}")

    def close(self) -> None:
        self.is_closed = True


ALL: list[StandIn] = []


@pytest.fixture(autouse=True)
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    ALL.clear()
    monkeypatch.setattr("twotower_bench.engines.pool.EngineProcess", StandIn)
    monkeypatch.setattr("twotower_bench.engines.pool.running_fork_server", nullcontext)


def pool_of(*names: str, together: bool = True) -> EnginePool:
    return EnginePool({name: EngineSpec(name, {}) for name in names}, together)


def test_the_order_is_another_one_under_every_load_and_in_every_repeat() -> None:
    slots = in_order([candidate(name) for name in "abcd"], [ONE, FOUR], 4)
    orders = ["".join(slot.subject.system.name for slot in slots[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in orders) and len(set(orders)) > 4
    assert [slot.place for slot in slots] == ([ONE] * 4 + [FOUR] * 4) * 4
    assert len({key_of_slot(slot) for slot in slots}) == 32


def test_two_of_a_kind_are_not_always_side_by_side() -> None:
    orders = [shuffled("abcdef", turn) for turn in range(200)]
    neighbours = sum(abs(order.index("a") - order.index("b")) == 1 for order in orders)
    assert 0.2 < neighbours / len(orders) < 0.5


def test_engines_that_are_held_one_at_a_time_do_all_loads_of_a_repeat_at_once() -> None:
    candidates = [candidate("a"), candidate("b", "shared"), candidate("c", "shared")]
    slots = in_order(candidates, [ONE, FOUR], 3, held=engine_of)
    engines = [slot.subject.engine for slot in slots]
    assert [engines[i : i + 6].count("shared") for i in (0, 6, 12)] == [4, 4, 4]
    started = [name for name, _ in groupby(engines)]
    with pool_of("a", "shared", together=False) as pool:
        list(ServingRun(pool, PROMPTS, 4).measure(slots))
        # A repeat that begins with the engine that the one before ended with goes on with it.
        assert [engine.title for engine in ALL] == started and 3 < len(started) <= 6
        assert [engine.is_closed for engine in ALL] == [True] * (len(started) - 1) + [False]
    assert ALL[-1].is_closed


def test_an_engine_drafts_by_the_knobs_of_the_candidate_and_is_warm_before_it_counts() -> None:
    candidates = [candidate("a", "shared", {"policy": "fixed"}), candidate("b", "shared", {"policy": "adaptive"})]
    with pool_of("shared") as pool:
        cells = list(ServingRun(pool, PROMPTS, 4, num_warm_up=1).measure(in_order(candidates, [FOUR], 2)))
    (engine,) = ALL
    policies = {"a": "fixed", "b": "adaptive"}
    knobs = [one["policy"] for one in engine.asked if not isinstance(one, ServeOrder)]
    # Nothing is said to an engine that drafts so already.
    assert knobs == [policies[name] for name, _ in groupby(cell.system.name for cell in cells)]
    orders = [one for one in engine.asked if isinstance(one, ServeOrder)]
    assert [len(order.prompts) for order in orders] == [4, 6, 4, 6, 6, 6]
    assert [cell.repeat for cell in cells] == [0, 0, 1, 1]


def test_all_engines_that_are_needed_are_loaded_before_the_first_is_measured() -> None:
    with pool_of("a", "b", "not needed") as pool:
        next(ServingRun(pool, PROMPTS, 4).measure(in_order([candidate("a"), candidate("b")], [ONE], 1)))
        assert sorted(engine.title for engine in ALL) == ["a", "b"]


def test_a_load_gets_the_prompts_of_its_category_as_tokens_and_those_that_are_too_long_are_left_out() -> None:
    with pool_of("a") as pool:
        run = ServingRun(pool, PROMPTS, 16)
        list(run.measure(in_order([candidate("a")], [Load("maths", 2, 0.5), ONE], 1)))
    maths, _, everything, _ = ALL[0].asked
    assert [one.prompt_id for one in maths.prompts] == ["p1", "p3"] and maths.prompts[0].prompt == (0, 1)
    assert (maths.concurrency, maths.max_new_tokens, maths.temperature) == (2, 16, 0.5)
    assert [one.prompt_id for one in everything.prompts] == ["p0", "p1", "p2", "p3"]


def test_chat_prompts_are_what_the_user_says_first() -> None:
    with pool_of("a") as pool:
        list(ServingRun(pool, PROMPTS, 4, chat=True).measure(in_order([candidate("a")], [ONE], 1)))
    assert [len(one.prompt) for one in ALL[0].asked[0].prompts] == [4, 5, 6, 7, 8, 9]


def test_a_load_without_a_prompt_that_is_short_enough_is_refused_with_the_remedy() -> None:
    with pool_of("a") as pool, pytest.raises(ArgumentError, match="no prompt of all leaves room for 20 new tokens"):
        list(ServingRun(pool, PROMPTS, 20).measure(in_order([candidate("a")], [ONE], 1)))


def test_a_drafter_that_never_drafted_is_an_error_and_not_a_slow_one() -> None:
    system = System("twotower", "TwoTower", {"model": "T", "num_speculative_tokens": 7})
    with pool_of("a") as pool, pytest.raises(ChildError, match="TwoTower has not drafted at all"):
        list(ServingRun(pool, PROMPTS, 4).measure(in_order([Candidate(system, "a")], [ONE], 1)))
    off = System("twotower", "TwoTower", {"model": "T", "twotower": {"policy": "off"}})
    with pool_of("a") as pool:
        assert len(list(ServingRun(pool, PROMPTS, 4).measure(in_order([Candidate(off, "a")], [ONE], 1)))) == 1
