"""Stages of a round of drafting in a vLLM engine, and how each of them can fail.

A kind of fault that a stage cannot have says why.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch

from twotower_bench.faults.cells import KINDS
from twotower_bench.faults.injection import (
    Effect,
    Injection,
    after,
    failing,
    gives,
    hangs,
    raises,
    runs_out_of_memory,
    takes,
    within,
)

# Of no vocabulary.
NO_TOKEN = 10**6
Fault = Callable[["DraftingEngine", Injection], AbstractContextManager[None]]
Place = Callable[["DraftingEngine"], tuple[Any, str]]
NAN = float("nan")

NO_NUMBERS = "no floating-point number passes here"
NO_RESULT = "it gives nothing back"
NO_POOL = "it does not ask the pool for room"
NO_STATE = "it keeps no state"
VERIFIERS = "the logits are the verifier's: vLLM without a drafter would sample from them too"


class DraftingEngine(Protocol):
    """An engine of vLLM in this process that drafts."""

    @property
    def drafter(self) -> Any:
        """Ours, of either model runner."""

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""


@dataclass(frozen=True)
class Stage:
    """A place in a round that can fail.

    Attributes:
        what: it does, in a few words.
        faults: how it fails, by kind; a text where it cannot, which says why.
    """

    what: str
    faults: Mapping[str, Fault | str]


def stage(
    what: str,
    place: Place,
    *,
    nan: Callable[[DraftingEngine], Effect] | str = NO_NUMBERS,
    shape: Callable[[DraftingEngine], Effect] | str = NO_RESULT,
    damage: Callable[[DraftingEngine], Effect] | str = NO_STATE,
    full: Callable[[DraftingEngine], Effect] | str = NO_POOL,
    around: Callable[[DraftingEngine, Injection], AbstractContextManager[Any]] | None = None,
) -> Stage:
    """Makes a stage whose function is at one place.

    Args:
        what: see `Stage`.
        place: of the function, its owner and its name.
        nan, shape, damage, full: effects of the kinds that are this stage's own, or why it cannot have them.
        around: what has the engine come by here.
    """
    own = {"NaN": nan, "wrong shape": shape, "damaged state": damage, "full pool": full}
    everywhere = {"exception": raises, "out of memory": runs_out_of_memory, "hang": hangs}

    def at(effect_of: Callable[[DraftingEngine], Effect]) -> Fault:
        @contextmanager
        def fault(engine: DraftingEngine, injection: Injection) -> Iterator[None]:
            with ExitStack() as stack:
                if around is not None:
                    stack.enter_context(around(engine, injection))
                stack.enter_context(failing(*place(engine), effect_of(engine), injection))
                yield

        return fault

    def same(effect: Effect) -> Callable[[DraftingEngine], Effect]:
        return lambda engine: effect

    found: dict[str, Fault | str] = {kind: at(same(effect)) for kind, effect in everywhere.items()}
    for kind, effect_of in own.items():
        found[kind] = effect_of if isinstance(effect_of, str) else at(effect_of)
    return Stage(what, {kind: found[kind] for kind in KINDS})


def _always(effect: Effect) -> Callable[[DraftingEngine], Effect]:
    return lambda engine: effect


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, NAN)


def _damages_states(engine: DraftingEngine) -> Effect:
    """Sets the Mamba states of all requests to NaN."""
    return after(lambda: engine.drafter.session.state.mamba.ssm.fill_(NAN))


def _has_another_history(engine: DraftingEngine) -> Effect:
    """Reads other tokens into the contexts of requests, so that their histories differ from vLLM's."""

    def damage() -> None:
        session = engine.drafter.session
        for request_id in session.request_ids:
            session.release(request_id)
            session.state.extend(session.towers.context, {request_id: [7, 8, 9, 10]})

    return after(damage)


def _fills_pool(engine: DraftingEngine) -> Effect:
    """Leaves room for one request in the pool."""
    return within(lambda: patch.object(engine.drafter.session.state, "num_slots", 1))


def _asks_for_first_tokens(engine: DraftingEngine, injection: Injection) -> AbstractContextManager[Any]:
    """Has a steady policy asked which requests are worth denoising for, as an adaptive one is."""
    return patch.object(engine.drafter.session.policy, "selects_drafts", True)


@contextmanager
def _failing_denoiser(engine: DraftingEngine, injection: Injection) -> Iterator[None]:
    """Has every other pass of the denoiser raise while there is a fault, so that there is something to recover from."""
    denoiser, calls = engine.drafter.session.towers.denoiser, itertools.count()
    real = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if injection.is_active and next(calls) % 2 == 0:
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    with patch.object(denoiser, "forward", forward):
        yield


def _module(of: Callable[[DraftingEngine], Any]) -> Callable[[DraftingEngine], Any]:
    return lambda engine: sys.modules[type(of(engine)).__module__]


_sampler_module = _module(lambda engine: engine.runner.rejection_sampler)


def _drafts(name: str, value: Any) -> Effect:
    """Changes what a step of denoising has committed."""
    return gives(lambda done: replace(done, **{name: torch.full_like(getattr(done, name), value)}))


def _read_back(first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor]) -> Effect:
    """Changes confidences and token ids, in either order, where they are read back from the device."""

    def change(copies: list[torch.Tensor]) -> list[torch.Tensor]:
        return [first(x) if x.is_floating_point() else second(x) if x.ndim == 2 else x for x in copies]

    return gives(change)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _one_column_less(x: torch.Tensor) -> torch.Tensor:
    return x[:, :-1]


def _foreign_rows(
    sampled: list[list[int]], lengths: Any, token_ids: Any
) -> tuple[list[list[int]], Any, np.ndarray[Any, Any]]:
    return sampled, lengths, np.full_like(token_ids, NO_TOKEN)


SESSION: Mapping[str, Stage] = {
    "release": stage(
        "requests that have ended are forgotten",
        lambda engine: (engine.drafter.session, "release"),
        damage=_damages_states,
    ),
    "policy plan": stage(
        "the policy decides what is drafted",
        lambda engine: (engine.drafter.session.policy, "plan"),
        shape=_always(gives(lambda plan: replace(plan, num_tokens=plan.block_size + 5))),
        damage=_always(gives(lambda plan: replace(plan, rows=frozenset({-1, 99})))),
    ),
    "policy observe": stage(
        "the policy learns what became of drafts",
        lambda engine: (engine.drafter.session.policy, "observe"),
        nan=_always(takes(lambda outcome: (replace(outcome, verify_s=NAN, extend_s=NAN, denoise_s=NAN),))),
        shape=_always(takes(lambda outcome: (replace(outcome, num_accepted=[]),))),
    ),
    "context pass": stage(
        "the context tower reads new tokens",
        lambda engine: (engine.drafter.session.towers.context, "forward"),
        nan=_always(gives(_with_nan)),
        shape=_always(gives(lambda logits: logits[:-1])),
        damage=_damages_states,
        full="room was claimed before it",
    ),
    "denoiser pass": stage(
        "the denoiser tower fills blocks",
        lambda engine: (engine.drafter.session.towers.denoiser, "forward"),
        nan=_always(gives(_with_nan)),
        shape=_always(gives(lambda logits: logits[:-1])),
        damage=_damages_states,
        full="room was claimed before it",
    ),
    "commit": stage(
        "tokens are picked from the denoiser's logits and committed",
        lambda engine: (sys.modules["twotower_spec.generation.denoising.commit_rules"], "unmask"),
        nan=_always(_drafts("confidence", NAN)),
        shape=_always(gives(lambda done: replace(done, token_ids=done.token_ids[:-1]))),
        damage=_always(_drafts("token_ids", NO_TOKEN)),
    ),
    "read-back": stage(
        "drafts come from the device to the host",
        lambda engine: (sys.modules["twotower_spec.state.transfer"].HostCopy, "read"),
        nan=_always(_read_back(_with_nan, _same)),
        shape=_always(_read_back(_same, _one_column_less)),
        damage=_always(_read_back(_same, lambda ids: torch.full_like(ids, NO_TOKEN))),
    ),
    "metrics": stage(
        "what happened is counted",
        lambda engine: (engine.drafter.stats, "add"),
        nan=_always(takes(lambda name, amount, *label: (name, NAN, *label))),
        shape=_always(takes(lambda name, amount, *label: (name, amount, "no such label"))),
        damage=lambda engine: after(lambda: engine.drafter.stats._values.fill(NAN)),
    ),
    "verification": stage(
        "the verifier's logits accept or reject drafts",
        lambda engine: (_sampler_module(engine), "accept"),
        nan=VERIFIERS,
        shape=_always(takes(lambda logits, drafts, cu, *rest: (logits, drafts, cu[:-1], *rest))),
    ),
    "reset": stage(
        "all contexts are forgotten after a fault, here of the denoiser",
        lambda engine: (engine.drafter.session, "reset"),
        damage=_damages_states,
        around=_failing_denoiser,
    ),
}

ON_V1: Mapping[str, Stage] = {
    "begin of a step": stage(
        "vLLM announces a step and the requests that have ended",
        lambda engine: (engine.drafter, "begin_step"),
        shape=_always(takes(lambda runner, step: (runner, None))),
    ),
    "requests of a step": stage(
        "vLLM hands over rows of token ids and their lengths",
        lambda engine: (engine.drafter, "_rows"),
        shape=_always(takes(lambda sampled, lengths, token_ids: (sampled, lengths[:1], token_ids))),
        damage=_always(takes(_foreign_rows)),
    ),
    "admission": stage(
        "requests are compared with what was read of them, and admitted",
        lambda engine: (engine.drafter.session._admission, "admit"),
        shape=_always(gives(lambda admitted: replace(admitted, completed=[*admitted.completed, "nobody"]))),
        damage=_has_another_history,
        full=_fills_pool,
    ),
    "pool claim": stage(
        "slots and pages of the pool are claimed",
        lambda engine: (engine.drafter.session.state, "claim"),
        damage=_damages_states,
        full="admission has seen to it that there is room",
    ),
    "first tokens": stage(
        "the context tower's own next tokens are weighed",
        lambda engine: (engine.drafter.session.drafter, "first_confidence"),
        nan=_always(gives(_with_nan)),
        shape=_always(gives(lambda confidence: confidence[:-1])),
        damage=_damages_states,
        around=_asks_for_first_tokens,
    ),
    "worth denoising": stage(
        "the policy leaves out requests whose first token is unlikely",
        lambda engine: (engine.drafter.session.policy, "worth_denoising"),
        nan=_always(takes(lambda plan, request_ids, confidence: (plan, request_ids, _with_nan(confidence)))),
        shape=_always(gives(lambda worth: worth[:-1])),
        around=_asks_for_first_tokens,
    ),
    **SESSION,
}

ON_V2: Mapping[str, Stage] = {
    "begin of a step": ON_V1["begin of a step"],
    "history": stage(
        "vLLM's rows on the device begin to be copied",
        lambda engine: (engine.drafter._history, "follow"),
        shape=_always(takes(lambda input_batch, num_sampled: (input_batch, num_sampled[:-1]))),
        damage=_has_another_history,
    ),
    "late history": stage(
        "what a step has brought is learnt, a step late",
        lambda engine: (engine.drafter._history, "next_landed"),
        damage=_has_another_history,
    ),
    "speculator": stage(
        "the round is asked for, and made ahead of the host",
        lambda engine: (engine.drafter.session, "draft_ahead"),
        shape=_always(gives(lambda done: replace(done, token_ids=done.token_ids[:, :-3]))),
        damage=_damages_states,
        full=_fills_pool,
    ),
    "admission": stage(
        "room in the pool is claimed",
        lambda engine: (engine.drafter.session, "_fitting"),
        shape=_always(gives(lambda fitting: fitting[:-1])),
        damage=_has_another_history,
        full=_fills_pool,
    ),
    **SESSION,
}


STAGES: Mapping[str, Mapping[str, Stage]] = {"V1": ON_V1, "V2": ON_V2}
